package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

const (
	// compactAbove is the size from which a mostly empty log file is rewritten
	// at start.
	compactAbove = 32 << 20
	// deleteChunk is how many entries one transaction removes when the log is
	// shortened from its start, so that appends get their turn in between.
	deleteChunk = 512
)

// openLog opens the log file, which must exist when started is true, checks
// that all of it can be read, and compacts it when mostly empty.
func openLog(path string, started bool, log *slog.Logger) (*raftboltdb.BoltStore, error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && fi.Size() == 0:
		if started {
			return nil, errors.New("the file is missing or empty")
		}
	case err != nil:
		return nil, err
	default:
		if err := checkBoltFile(path, fi.Size()); err != nil {
			return nil, err
		}
		if err := guard(func() error { return compactLog(path, fi.Size(), log) }); err != nil {
			return nil, err
		}
	}
	var store *raftboltdb.BoltStore
	err = guard(func() (err error) {
		store, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: boltOptions()})
		return err
	})
	return store, err
}

func boltOptions() *bbolt.Options {
	return &bbolt.Options{
		Timeout: time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
		InitialMmapSize: 64 << 20, // growing the map waits for readers
	}
}

// guard turns what reading a damaged file may do (panics of bbolt, faults of
// its memory map) into an error.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the file is damaged: %v", p)
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

// compactLog reads all of the log and rewrites the file when less than a
// quarter of it is in use.
func compactLog(path string, size int64, log *slog.Logger) error {
	src, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer src.Close()
	var used, last uint64
	err = src.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				used += uint64(len(k) + len(v))
				if string(name) != "logs" || len(k) != 8 {
					return nil
				}
				index := binary.BigEndian.Uint64(k)
				if last != 0 && index != last+1 {
					return fmt.Errorf("entries %d to %d are missing", last+1, index-1)
				}
				last = index
				return nil
			})
		})
	})
	if err != nil || size < compactAbove || used > uint64(size)/4 {
		return err
	}
	start := time.Now()
	tmp := path + ".compact"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	dst, err := bbolt.Open(tmp, 0o600, &bbolt.Options{Timeout: time.Second, NoFreelistSync: true, NoSync: true})
	if err != nil {
		return err
	}
	err = bbolt.Compact(dst, src, 4<<20)
	err = errors.Join(err, dst.Sync(), dst.Close())
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
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	log.Info("compacted the log", "file", path, "before", size, "after", fi.Size(), "took", time.Since(start))
	return nil
}

// checkLog reads every entry and verifies the checksum of ours. It returns the
// indexes of the first and the last, 0 if there is none.
func checkLog(store *raftboltdb.BoltStore) (first, last uint64, err error) {
	err = guard(func() error {
		if first, err = store.FirstIndex(); err != nil {
			return err
		}
		if last, err = store.LastIndex(); err != nil {
			return err
		}
		for i := first; i <= last && i > 0; i++ {
			var l raft.Log
			if err := store.GetLog(i, &l); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
			if l.Index != i {
				return fmt.Errorf("entry %d claims to be entry %d", i, l.Index)
			}
			if l.Type != raft.LogCommand {
				continue
			}
			if _, err := decodeEntry(l.Data); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
		}
		return nil
	})
	return first, last, err
}
