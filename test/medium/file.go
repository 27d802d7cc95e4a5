package medium

import (
	"errors"
	"slices"
	"syscall"
	"unsafe"
)

// File is a file of a fixed size as one process sees it.
type File struct {
	d    *Disk
	c    *content
	life int
	now  []byte
}

// Open opens a file, and makes it of zeros if there is none.
func (d *Disk) Open(name string, size int64) *File {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.file(name)
	c.grow(size)
	c.room = size
	f := &File{d: d, c: c, life: d.life, now: c.seen()}
	c.latest = func() []byte { return slices.Clone(f.now) }
	return f
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.read(b, off)
}

func (f *File) read(b []byte, off int64) (int, error) {
	if off >= int64(len(f.now)) {
		return 0, errors.New("behind the end of the file")
	}
	return copy(b, f.now[off:]), nil
}

// WriteAt implements io.WriterAt.
func (f *File) WriteAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if off+int64(len(b)) > int64(len(f.now)) {
		return 0, ErrNoSpace
	}
	return f.d.write(f.life, f.c, b, off, func(b []byte) error { copy(f.now[off:], b); return nil }, f.read)
}

// Sync makes what was written last.
func (f *File) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.d.sync(f.life, f.c)
}

// Close implements io.Closer.
func (f *File) Close() error { return nil }

// Direct writes to the file past the page cache. A sync is needed all the same, since the
// device has a cache of its own.
type Direct struct {
	f     *File
	align int64
}

// Direct returns what writes to the file past the page cache, to a device that takes only
// what is aligned to so many bytes: in the file, in its length and in memory.
func (f *File) Direct(align int64) *Direct { return &Direct{f, align} }

// WriteAt implements io.WriterAt.
func (w *Direct) WriteAt(b []byte, off int64) (int, error) {
	if in := int64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))); off%w.align != 0 || int64(len(b))%w.align != 0 || in%w.align != 0 {
		return 0, syscall.EINVAL
	}
	return w.f.WriteAt(b, off)
}

// Close implements io.Closer.
func (w *Direct) Close() error { return nil }
