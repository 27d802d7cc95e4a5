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

	"github.com/hashicorp/raft"
)

// snapshotStore is Raft's file snapshot store without the snapshots that
// turned out damaged at start.
type snapshotStore struct {
	raft.SnapshotStore
	damaged map[string]error // by snapshot id; not changed after start
	// taken, if not nil, is told of each snapshot that is on disk.
	taken func(index, term uint64) error
}

// Create implements raft.SnapshotStore.
func (s *snapshotStore) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, at uint64, t raft.Transport) (raft.SnapshotSink, error) {
	inner, err := s.SnapshotStore.Create(version, index, term, c, at, t)
	if err != nil || s.taken == nil {
		return inner, err
	}
	return &snapshotSink{SnapshotSink: inner, taken: func() error { return s.taken(index, term) }}, nil
}

// snapshotSink tells when the snapshot is on disk.
type snapshotSink struct {
	raft.SnapshotSink
	taken    func() error
	canceled bool
}

// Cancel implements raft.SnapshotSink.
func (s *snapshotSink) Cancel() error {
	s.canceled = true
	return s.SnapshotSink.Cancel()
}

// Close implements raft.SnapshotSink.
func (s *snapshotSink) Close() error {
	if err := s.SnapshotSink.Close(); err != nil || s.canceled {
		return err
	}
	s.canceled = true // once
	return s.taken()
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
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := os.RemoveAll(path); err != nil {
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
	file = filepath.Join(path, "state.bin")
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
