package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"timonel/internal/durable"
)

const (
	// compactAbove is the size from which a mostly empty log file is rewritten
	// at start.
	compactAbove = 32 << 20
	// deleteChunk is how many entries one transaction removes when the log is
	// shortened from its start, so that other writes get their turn in between.
	deleteChunk = 4096
	// compactSuffix is what ends the name of the file that is to take the log file's place.
	compactSuffix = ".compact"
)

// logExtent is what a log file holds.
type logExtent struct {
	first, last uint64 // indexes of the entries, 0 if there are none
	used, size  int64  // bytes of entries, and of the file
	weights     weights
}

// inspectLog reads all of the log file, which must exist when started is true,
// without changing it, and verifies what can be verified.
func inspectLog(path string, started bool) (x logExtent, err error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && fi.Size() == 0:
		if started {
			return x, errors.New("the file is missing or empty")
		}
		return x, nil
	case err != nil:
		return x, err
	}
	x.size = fi.Size()
	if err := checkBoltFile(path, x.size); err != nil {
		return x, err
	}
	err = guard(func() error {
		store, err := raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{ReadOnly: true, Timeout: time.Second}})
		if err != nil {
			return err
		}
		defer store.Close()
		if err := x.read(store); err != nil {
			return err
		}
		waiting, err := inspectJournal(path, store)
		if err != nil {
			return err
		}
		return x.add(waiting)
	})
	return x, err
}

// read reads every entry and verifies the checksum of ours.
func (x *logExtent) read(store raft.LogStore) (err error) {
	if x.first, err = store.FirstIndex(); err != nil {
		return err
	}
	if x.last, err = store.LastIndex(); err != nil {
		return err
	}
	for i := x.first; i <= x.last && i > 0; i++ {
		var l raft.Log
		if err := store.GetLog(i, &l); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if err := verify(i, &l); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		x.used += int64(len(l.Data)) + 64
		x.weights.add(&l)
	}
	return nil
}

// add adds entries that follow.
func (x *logExtent) add(logs []*raft.Log) error {
	for _, l := range logs {
		if err := verify(l.Index, l); err != nil {
			return fmt.Errorf("entry %d: %w", l.Index, err)
		}
		if x.first == 0 {
			x.first = l.Index
		}
		x.last = l.Index
		x.weights.add(l)
	}
	return nil
}

// verify checks that an entry is the one asked for, and the checksum of one of ours.
func verify(index uint64, l *raft.Log) error {
	switch {
	case l.Index != index:
		return fmt.Errorf("it claims to be entry %d", l.Index)
	case l.Type == raft.LogCommand:
		_, err := decodeEntry(l.Data)
		return err
	}
	return nil
}

// openLog opens the log file for writing, after inspectLog, and compacts it
// when less than a quarter of it is in use.
func openLog(path string, x logExtent, log *slog.Logger) (*boltLog, error) {
	if err := os.RemoveAll(path + compactSuffix); err != nil { // of one that was killed
		return nil, err
	}
	var store *raftboltdb.BoltStore
	err := guard(func() (err error) {
		if x.size >= compactAbove && x.used < x.size/4 {
			if err := compactLog(path, x.size, log); err != nil {
				return err
			}
		}
		store, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: boltOptions()})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &boltLog{BoltStore: store, settle: func() error { return rewriteMeta(path) }, writing: newGate()}, nil
}

// boltLog is raft-boltdb that goes on after a commit that failed.
//
// A commit of bbolt writes pages that nothing refers to yet, syncs them, writes a meta
// page that refers to them, and syncs that. When the last sync fails, bbolt reports an
// error and goes on from the new meta page all the same, which it sees in memory: with
// its next commit it overwrites pages that only the meta page before refers to. But the
// disk may still have that one, for as long as nobody writes the new one again (a sync
// that failed is not made good by one that succeeds): after a power cut in between, the
// file is damaged, with all that was acknowledged. So before the next commit the meta
// pages are written once more as they are in memory, and synced.
//
// The commit that failed has then taken place, as far as the store is concerned; Raft is
// told that it did not: see disk.dropUnsure, disk.truncate and journaled.forget.
type boltLog struct {
	*raftboltdb.BoltStore
	// settle makes the meta pages on disk those in memory.
	settle func() error
	// stall, if not nil, comes before each commit, in a simulation.
	stall func()

	writing   gate
	unsettled bool // the last commit failed; writing guards it
}

// commit does one commit, after what is left of one that failed.
func (b *boltLog) commit(do func() error) error {
	b.writing.Lock()
	defer b.writing.Unlock()
	if b.stall != nil {
		b.stall()
	}
	if b.unsettled {
		if err := b.settle(); err != nil {
			return fmt.Errorf("write the log file's first pages again: %w", err)
		}
	}
	b.unsettled = true // also after a panic
	err := do()
	b.unsettled = err != nil
	return err
}

// StoreLog implements raft.LogStore.
func (b *boltLog) StoreLog(l *raft.Log) error { return b.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (b *boltLog) StoreLogs(logs []*raft.Log) error {
	return b.commit(func() error { return b.BoltStore.StoreLogs(logs) })
}

// DeleteRange implements raft.LogStore.
func (b *boltLog) DeleteRange(first, last uint64) error {
	return b.commit(func() error { return b.BoltStore.DeleteRange(first, last) })
}

// Set implements raft.StableStore.
func (b *boltLog) Set(key, value []byte) error {
	return b.commit(func() error { return b.BoltStore.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (b *boltLog) SetUint64(key []byte, value uint64) error {
	return b.commit(func() error { return b.BoltStore.SetUint64(key, value) })
}

// metaArea is the start of a bbolt file, with both its meta pages, of the page size of
// whatever machine made it.
const metaArea = 2 * 64 << 10

// rewriteMeta writes the meta pages of a bbolt file as they are in memory, and what is
// beside them as it is, and syncs them. Nobody else may write the file meanwhile.
func rewriteMeta(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, metaArea)
	n, err := f.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err == nil {
		_, err = f.WriteAt(b[:n], 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func boltOptions() *bbolt.Options {
	return &bbolt.Options{
		Timeout: time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
		InitialMmapSize: 64 << 20, // growing the map waits for readers
	}
}

var errDamaged = errors.New("the file is damaged")

// guard turns what reading a damaged file may do (panics of bbolt, faults of
// its memory map) into an error.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return f()
}

// checkBoltFile compares the size of a bbolt file with what its newer valid
// meta page says: bbolt would fault on what is missing.
func checkBoltFile(path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// A meta page: 16 bytes of page header; magic, version, page size, flags (32
	// bit each); root bucket (16 bytes); freelist, high water mark, transaction,
	// checksum (64 bit each). The second one is a page further.
	const metaSize = 64
	var pages, pageSize, newest uint64
	for _, ps := range []int64{0, 4096, 8192, 16384, 65536} {
		var b [16 + metaSize]byte
		if _, err := f.ReadAt(b[:], ps); err != nil {
			continue
		}
		m := b[16:]
		h := fnv.New64a()
		h.Write(m[:56])
		if binary.NativeEndian.Uint32(m) != 0xED0CDAED || binary.NativeEndian.Uint64(m[56:]) != h.Sum64() {
			continue
		}
		if txid := binary.NativeEndian.Uint64(m[48:]); txid >= newest {
			newest, pageSize, pages = txid, uint64(binary.NativeEndian.Uint32(m[8:])), binary.NativeEndian.Uint64(m[40:])
		}
	}
	switch {
	case pageSize == 0:
		return fmt.Errorf("not a log, or its first pages are damaged (%d bytes)", size)
	case uint64(size) < pages*pageSize:
		return fmt.Errorf("the file is truncated: %d bytes of at least %d", size, pages*pageSize)
	}
	return nil
}

// compactLog rewrites the file without what is unused.
func compactLog(path string, size int64, log *slog.Logger) error {
	src, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer src.Close()
	start := time.Now()
	tmp := path + compactSuffix
	dst, err := bbolt.Open(tmp, 0o600, &bbolt.Options{Timeout: time.Second, NoFreelistSync: true, NoSync: true})
	if err == nil {
		err = bbolt.Compact(dst, src, 4<<20)
		err = errors.Join(err, dst.Sync(), dst.Close())
	}
	if err != nil {
		// No room, say: the file as it is serves as well.
		os.Remove(tmp)
		log.Warn("cannot compact the log", "file", path, "error", err)
		return nil
	}
	fi, err := os.Stat(tmp)
	if err != nil {
		return err
	}
	// The file before it must not come back: it has an older term and vote.
	if err := durable.Rename(tmp, path); err != nil {
		return err
	}
	log.Info("compacted the log", "file", path, "before", size, "after", fi.Size(), "took", time.Since(start))
	return nil
}
