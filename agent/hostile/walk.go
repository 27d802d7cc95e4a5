package hostile

import (
	"context"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

const (
	// walkOuter and walkInner are how many folders stay open at once while a tree is
	// walked, the outermost ones and the innermost ones. Those between them are opened
	// again on the way up, by "..", and only if they are still the same.
	walkOuter, walkInner = 32, 32
	// walkBatch is how many names are visited between two calls of pause.
	walkBatch = 1024
	// walkBuffer is how many bytes of names are read at once.
	walkBuffer = 8 << 10
)

// walk visits all that is below a folder, in time proportional to what there is and
// with some 70 descriptors and a MiB at most, whatever the depth and the width. Links
// are not followed, mounts are not entered. What comes and goes meanwhile is visited
// or not. It works with bare descriptors: the names of a tree that is very deep are
// too long to be kept.
type walk struct {
	// visit is called with each name and the folder that it is in, and says whether to
	// enter it. Its error ends the walk.
	visit func(dir int, name string) (enter bool, err error)
	// pause is called now and then; nil: it is not. Its error ends the walk.
	pause func() error

	// partial says that some of it could not be read, or was moved away; failed is why
	// of the former.
	partial bool
	failed  error
	names   int // so far
	reads   int // of names, from the kernel
	levels  []walkLevel
	spare   [][]byte // buffers that no level has
}

// walkLevel is a folder that is being read.
type walkLevel struct {
	fd       int // -1: closed for now
	dev, ino uint64
	next     int64  // where reading goes on
	buf      []byte // nil: there is none
	rest     []byte // of buf, what was read and is not visited
}

// run visits all below top, which stays the caller's to close. It ends with ctx.
func (w *walk) run(ctx context.Context, top *Root) error {
	var st unix.Stat_t
	if err := unix.Fstat(top.fd(), &st); err != nil {
		return err
	}
	own, err := openFolder(top.fd(), ".") // a place of its own to read from
	if err != nil {
		return err
	}
	defer func() {
		for i := range w.levels {
			w.shut(&w.levels[i])
		}
	}()
	w.levels = append(w.levels, walkLevel{fd: own, dev: st.Dev, ino: st.Ino})
	for len(w.levels) > 0 {
		more, err := w.read(ctx)
		if err != nil {
			return err
		}
		if !more {
			w.up()
		}
	}
	return nil
}

// miss notes that something could not be read.
func (w *walk) miss(err error) {
	w.partial = true
	if w.failed == nil {
		w.failed = err
	}
}

// shut closes a folder for now.
func (w *walk) shut(l *walkLevel) {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
	if l.buf != nil {
		w.spare = append(w.spare, l.buf)
	}
	l.fd, l.buf, l.rest = -1, nil, nil
}

// read visits what was read of the innermost folder, up to a folder in it, which
// becomes the innermost then. It says whether there is more.
func (w *walk) read(ctx context.Context) (more bool, err error) {
	l := &w.levels[len(w.levels)-1]
	if len(l.rest) == 0 {
		if l.buf == nil {
			if n := len(w.spare); n > 0 {
				l.buf, w.spare = w.spare[n-1], w.spare[:n-1]
			} else {
				l.buf = make([]byte, walkBuffer)
			}
		}
		w.reads++
		n, err := unix.Getdents(l.fd, l.buf)
		if err != nil || n <= 0 {
			if err != nil && !errors.Is(err, unix.ENOENT) { // removed meanwhile
				w.miss(err)
			}
			return false, nil
		}
		l.rest = l.buf[:n]
	}
	// struct linux_dirent64: inode, where the next one is, length, kind, name.
	const header = 19
	for len(l.rest) >= header {
		length := int(binary.NativeEndian.Uint16(l.rest[16:]))
		if length < header || length > len(l.rest) {
			return false, errors.New("the kernel's list of names cannot be read")
		}
		name := unix.ByteSliceToString(l.rest[header:length])
		l.next = int64(binary.NativeEndian.Uint64(l.rest[8:]))
		l.rest = l.rest[length:]
		if name == "." || name == ".." {
			continue
		}
		if w.names++; w.names%walkBatch == 0 {
			if err := ctx.Err(); err != nil {
				return false, err
			}
			if w.pause != nil {
				if err := w.pause(); err != nil {
					return false, err
				}
			}
		}
		enter, err := w.visit(l.fd, name)
		if err != nil {
			return false, err
		}
		if enter && w.down(l.fd, name) {
			return true, nil
		}
	}
	l.rest = nil
	return true, nil
}

// down makes a folder the innermost one.
func (w *walk) down(dir int, name string) bool {
	fd, err := openFolder(dir, name)
	if err != nil {
		// It was removed, replaced or mounted over meanwhile, or cannot be read.
		gone := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV)
		if !gone {
			w.miss(err)
		}
		return false
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		w.miss(err)
		return false
	}
	w.levels = append(w.levels, walkLevel{fd: fd, dev: st.Dev, ino: st.Ino})
	if at := len(w.levels) - 1 - walkInner; at >= walkOuter {
		w.shut(&w.levels[at])
	}
	return true
}

// up goes on in the folder above the innermost one, after what was visited there.
func (w *walk) up() {
	at := len(w.levels) - 1
	from := &w.levels[at]
	if at > 0 && w.levels[at-1].fd < 0 {
		w.reopen(from.fd, &w.levels[at-1])
	}
	w.shut(from)
	w.levels = w.levels[:at]
	for at = len(w.levels) - 1; at >= 0 && w.levels[at].fd < 0; at-- {
		// It was moved away. What is not visited yet of it, and of those above it
		// that were closed, is not found again.
		w.partial = true
		w.levels = w.levels[:at]
	}
}

// reopen opens the folder above one if it is the one that was there before.
func (w *walk) reopen(fd int, was *walkLevel) {
	// Not beneath: what ".." leads to is compared instead.
	up, err := unix.Openat2(fd, "..", &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return
	}
	var st unix.Stat_t
	if unix.Fstat(up, &st) != nil || st.Dev != was.dev || st.Ino != was.ino {
		unix.Close(up)
		return
	}
	if _, err := unix.Seek(up, was.next, unix.SEEK_SET); err != nil {
		w.miss(err)
	}
	was.fd = up
}

// openFolder opens a folder that is directly in another.
func openFolder(dir int, name string) (int, error) {
	return openBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
}

// openBeneath opens what is directly in a folder.
func openBeneath(dir int, name string, flags uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: beneath}
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(dir, name, &how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) && tries < 100 {
			continue
		}
		return fd, err
	}
}
