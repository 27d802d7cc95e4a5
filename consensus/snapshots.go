package consensus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hashicorp/raft"

	"timonel/internal/durable"
)

// stateFile is a snapshot's state, in its folder.
const stateFile = "state.bin"

// snapshotStore is Raft's file snapshot store without the snapshots that turned out
// damaged at start, and that leaves nothing of those that come to nothing. (Raft's keeps
// what was written of one when the disk is full: each try would take the room of the log.)
type snapshotStore struct {
	raft.SnapshotStore
	dir     string           // where they are; empty in a simulation
	damaged map[string]error // by snapshot id; not changed after start
	// taken, if not nil, is told of each snapshot that is on disk.
	taken func(index, term uint64) error

	mu     sync.Mutex
	making map[string]bool // ids of those that are being written
}

// Create implements raft.SnapshotStore.
func (s *snapshotStore) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, at uint64, t raft.Transport) (raft.SnapshotSink, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	inner, err := s.SnapshotStore.Create(version, index, term, c, at, t)
	if err != nil {
		return nil, errors.Join(err, s.sweep())
	}
	if s.making == nil {
		s.making = map[string]bool{}
	}
	s.making[inner.ID()] = true
	return &snapshotSink{SnapshotSink: inner, store: s, index: index, term: term}, nil
}

// made is told that a snapshot was written, or will not be.
func (s *snapshotStore) made(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.making, id)
	return s.sweep()
}

// sweep removes what is left of snapshots that nobody writes. s.mu is held.
func (s *snapshotStore) sweep() error {
	if s.dir == "" {
		return nil
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), partial); ok && e.IsDir() && !s.making[id] {
			err = errors.Join(err, removePartial(filepath.Join(s.dir, e.Name())))
		}
	}
	return err
}

// partial is what ends the name of a snapshot's folder while it is written.
const partial = ".tmp"

// removePartial removes the folder of a snapshot, and frees its room at once: Raft's store
// may have left its file open.
func removePartial(path string) error {
	if err := os.Truncate(filepath.Join(path, stateFile), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(path)
}

// snapshotSink tells when the snapshot is on disk.
type snapshotSink struct {
	raft.SnapshotSink
	store       *snapshotStore
	index, term uint64
	over        bool
}

// Cancel implements raft.SnapshotSink.
func (s *snapshotSink) Cancel() error {
	s.over = true
	return errors.Join(s.SnapshotSink.Cancel(), s.store.made(s.ID()))
}

// Close implements raft.SnapshotSink.
func (s *snapshotSink) Close() error {
	if s.over {
		return s.SnapshotSink.Close()
	}
	s.over = true
	if err := s.finish(); err != nil {
		return errors.Join(err, s.store.made(s.ID()))
	}
	if err := s.store.made(s.ID()); err != nil || s.store.taken == nil {
		return err
	}
	return s.store.taken(s.index, s.term)
}

// finish gives the snapshot its name, after the names of the files in it are on the disk.
func (s *snapshotSink) finish() error {
	if s.store.dir == "" {
		return s.SnapshotSink.Close()
	}
	path := filepath.Join(s.store.dir, s.ID())
	state, err := os.OpenFile(filepath.Join(path+partial, stateFile), os.O_WRONLY, 0)
	if err != nil {
		return errors.Join(err, s.SnapshotSink.Cancel())
	}
	defer state.Close()
	if err := durable.SyncDir(path + partial); err != nil {
		return errors.Join(err, s.SnapshotSink.Cancel())
	}
	err = s.SnapshotSink.Close()
	if err == nil {
		return nil
	}
	// Raft's store has removed the file then, and left it open, unless it has its last name.
	if _, there := os.Stat(path); errors.Is(there, fs.ErrNotExist) {
		err = errors.Join(err, state.Truncate(0))
	}
	return err
}

// List implements raft.SnapshotStore.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	all, err := s.SnapshotStore.List()
	if err != nil {
		return nil, err
	}
	var good []*raft.SnapshotMeta
	for _, m := range all {
		if s.damaged[m.ID] == nil {
			good = append(good, m)
		}
	}
	return good, nil
}

// checkSnapshots verifies every snapshot in the folder. It returns the index of
// the newest good one (0: none) and what is wrong with the others, by id.
// Leftovers of snapshots that were never finished are removed.
func checkSnapshots(dir string) (newest uint64, damaged map[string]error, err error) {
	damaged = map[string]error{}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, damaged, nil
	}
	if err != nil {
		return 0, nil, err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), partial) {
			if err := removePartial(path); err != nil {
				return 0, nil, err
			}
			continue
		}
		index, err := checkSnapshot(path)
		if err != nil {
			damaged[e.Name()] = err
			continue
		}
		newest = max(newest, index)
	}
	return newest, damaged, nil
}

// checkSnapshot verifies one snapshot's size and checksum and returns its index.
func checkSnapshot(path string) (index uint64, err error) {
	file := filepath.Join(path, "meta.json")
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	var meta struct {
		raft.SnapshotMeta
		CRC []byte
	}
	if err := json.Unmarshal(b, &meta); err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	file = filepath.Join(path, stateFile)
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sum := crc64.New(crc64.MakeTable(crc64.ECMA))
	n, err := io.Copy(sum, f)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%s: %w", file, err)
	case n != meta.Size:
		return 0, fmt.Errorf("%s: %d bytes of %d", file, n, meta.Size)
	case !bytes.Equal(sum.Sum(nil), meta.CRC):
		return 0, fmt.Errorf("%s: checksum does not match", file)
	}
	return meta.Index, nil
}
