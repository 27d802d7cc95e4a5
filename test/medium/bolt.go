package medium

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"unsafe"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

// BoltFile is a file of bbolt as one process sees it. Since bbolt maps it into memory,
// it is a real one; what of it a power cut leaves is simulated.
type BoltFile struct {
	// Path is where to open it. Its folder goes with Attach, so that a process that is
	// killed leaves nothing behind; or with Remove.
	Path string

	d    *Disk
	c    *content
	life int
	file *os.File
	was  []byte // what it had when it was opened
	size int64  // of both its meta pages
}

// OpenBolt opens a file of bbolt, which is empty if there is none.
func (d *Disk) OpenBolt(name string) (*BoltFile, error) {
	parent := "/dev/shm"
	if info, err := os.Stat(parent); err != nil || !info.IsDir() {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "timonel-medium-")
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	f := &BoltFile{Path: filepath.Join(dir, name), d: d, c: d.file(name), life: d.life}
	f.was = f.c.seen()
	if err := os.WriteFile(f.Path, f.was, 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if f.file, err = os.OpenFile(f.Path, os.O_RDWR, 0); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return f, nil
}

// Attach takes over the writes of a store that was opened on Path; what it has written
// so far is on the disk. What is returned writes the meta pages again.
//
// bbolt writes through a variable of its own, and syncs before and after it writes a
// meta page: there the syncs are simulated, and the real ones left out.
func (f *BoltFile) Attach(store *raftboltdb.BoltStore) (settle func() error) {
	db := (*bbolt.DB)(reflect.ValueOf(store).Elem().FieldByName("conn").UnsafePointer())
	writeAt := (*func([]byte, int64) (int, error))(unsafe.Pointer(reflect.ValueOf(db).Elem().FieldByName("ops").FieldByName("writeAt").UnsafeAddr()))
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.trim(db)
	if f.life == f.d.life {
		f.take()
	}
	_ = os.RemoveAll(filepath.Dir(f.Path)) // Remove tries again, and says why it cannot
	f.size = 2 * int64(db.Info().PageSize)
	db.NoSync = true
	*writeAt = f.write
	return f.settle
}

// take puts what was written before Attach on the disk, with what an earlier process has
// left unsynced; what a sync has lost before, it does not make good.
func (f *BoltFile) take() {
	b, err := f.read()
	if err != nil {
		return
	}
	f.c.sync()
	f.c.certain = f.c.certain[:min(len(f.c.certain), len(b))]
	f.c.grow(int64(len(b)))
	for at := 0; at < len(b); at += sector {
		end := min(at+sector, len(b))
		if end > len(f.was) || !bytes.Equal(b[at:end], f.was[at:end]) {
			copy(f.c.certain[at:], b[at:end])
		}
	}
	f.was, f.c.room = nil, int64(len(b))
	f.c.latest = func() []byte {
		b, _ := f.read()
		return b
	}
}

// read reads all of it.
func (f *BoltFile) read() ([]byte, error) {
	info, err := f.file.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, info.Size())
	_, err = f.file.ReadAt(b, 0)
	return b, err
}

// growth is in what steps the file grows, instead of 16 MiB: it is copied at each start.
const growth = 64 << 10

// trim cuts off what bbolt has made the file larger by and not used yet.
func (f *BoltFile) trim(db *bbolt.DB) {
	db.AllocSize = growth
	_ = db.View(func(tx *bbolt.Tx) error { return f.file.Truncate(tx.Size()) })
}

func (f *BoltFile) write(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	meta := off < f.size
	if meta {
		if err := f.d.sync(f.life, f.c); err != nil {
			return 0, err
		}
	}
	n, err := f.put(b, off)
	if err == nil && meta {
		err = f.d.sync(f.life, f.c)
	}
	return n, err
}

func (f *BoltFile) put(b []byte, off int64) (int, error) {
	if info, err := f.file.Stat(); err == nil && f.life == f.d.life {
		f.c.grow(info.Size()) // which bbolt syncs at once
	}
	return f.d.write(f.life, f.c, b, off, func(b []byte) error {
		_, err := f.file.WriteAt(b, off)
		return err
	}, f.file.ReadAt)
}

// settle is consensus.rewriteMeta on this disk.
func (f *BoltFile) settle() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	b := make([]byte, f.size)
	if _, err := f.file.ReadAt(b, 0); err != nil {
		return err
	}
	if _, err := f.put(b, 0); err != nil {
		return err
	}
	return f.d.sync(f.life, f.c)
}

// Remove removes the real file.
func (f *BoltFile) Remove() error {
	return errors.Join(f.file.Close(), os.RemoveAll(filepath.Dir(f.Path)))
}
