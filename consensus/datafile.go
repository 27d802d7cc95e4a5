package consensus

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dataFile writes past the page cache where the file system lets it, which takes a
// quarter less time. One goroutine at a time writes.
type dataFile struct {
	journalFile
	direct directFile // nil: it does not let us
	buf    []byte     // aligned: what was last written with direct
	start  int64      // where
}

// directFile writes past the page cache. It may refuse with EINVAL, now or at any time,
// to write what is not aligned as the device wants it.
type directFile interface {
	io.WriterAt
	io.Closer
}

// sector is what direct writes are aligned to. A device may want more, and refuse.
const sector = 512

func newDataFile(f *os.File) *dataFile {
	d := &dataFile{journalFile: dataSynced{f}}
	if direct, err := os.OpenFile(f.Name(), os.O_WRONLY|unix.O_DIRECT, 0); err == nil {
		d.direct = direct
	}
	return d
}

// WriteAt implements io.WriterAt. It may overwrite what is left of the last sector
// with zeros.
func (f *dataFile) WriteAt(b []byte, off int64) (int, error) {
	if f.direct == nil {
		return f.journalFile.WriteAt(b, off)
	}
	var before [sector]byte // in the first sector
	start := off / sector * sector
	if had := start - f.start; had >= 0 && had+sector <= int64(len(f.buf)) {
		copy(before[:], f.buf[had:])
	} else if off > start {
		if _, err := f.ReadAt(before[:off-start], start); err != nil {
			return 0, err
		}
	}
	size := (int(off-start) + len(b) + sector - 1) / sector * sector
	if cap(f.buf) < size {
		f.buf = alignedBuffer(max(size, 64<<10))
	}
	f.buf, f.start = f.buf[:size], start
	n := copy(f.buf, before[:off-start])
	n += copy(f.buf[n:], b)
	clear(f.buf[n:])
	if _, err := f.direct.WriteAt(f.buf, start); errors.Is(err, unix.EINVAL) {
		f.direct.Close()
		f.direct = nil
		return f.journalFile.WriteAt(b, off)
	} else if err != nil {
		f.buf = f.buf[:0]
		return 0, err
	}
	return len(b), nil
}

// alignedBuffer returns bytes that direct writes can take.
func alignedBuffer(size int) []byte {
	const page = 4096
	b := make([]byte, size+page)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) % page)
	return b[skip : skip+size : skip+size]
}

// Close implements io.Closer.
func (f *dataFile) Close() error {
	err := f.journalFile.Close()
	if f.direct != nil {
		err = errors.Join(err, f.direct.Close())
	}
	return err
}

// dataSynced is a file of which a sync is one of what was written, not of the times in
// the inode.
type dataSynced struct{ *os.File }

// Sync makes what was written last.
func (f dataSynced) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			if err != nil {
				return &fs.PathError{Op: "sync", Path: f.Name(), Err: err}
			}
			return nil
		}
	}
}
