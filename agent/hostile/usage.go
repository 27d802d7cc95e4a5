package hostile

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

const (
	// usageOpen is how many folders stay open at once while a tree is measured.
	// Those deeper are opened again on the way up, by "..", and only if they are
	// still the same.
	usageOpen = 64
	// usageLinks bounds the files of several names that are remembered so as to be
	// counted once. Of those beyond it each name counts its part.
	usageLinks = 1 << 16
	// usageNames bounds one measuring: who makes names faster than they are
	// counted does not keep it going for ever.
	usageNames = 64 << 20
	// usageBatch is how many names are looked at between two calls of Pause.
	usageBatch = 1024
)

// Size is how much of a file system something takes.
type Size struct {
	Bytes, Inodes int64
	// Whole says that all was counted; else it is at least this much.
	Whole bool
}

// Measure says how a tree is measured.
type Measure struct {
	// Stop ends it as soon as there are more bytes; 0: only at the end.
	Stop int64
	// Pause is called now and then, so that the caller can keep the work from
	// taking the machine. Its error ends the measuring.
	Pause func() error
	// links is usageLinks but in tests.
	links int
}

// Usage measures what name and all below it take: blocks, not lengths, so a
// sparse file counts for what it has; a file of several names once. Links are
// not followed, mounts are left out, folders count too. A tree of any depth and
// width takes some 70 descriptors and a few MiB at most. What comes and goes
// meanwhile is counted or not. What is not there takes nothing.
func (r *Root) Usage(ctx context.Context, name string, m Measure) (Size, error) {
	m.links = cmp.Or(m.links, usageLinks)
	w := &usageWalk{ctx: ctx, measure: m, links: map[uint64]struct{}{}}
	st, err := r.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Size{Whole: true}, nil
	}
	if err != nil {
		return Size{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return Size{Bytes: st.Blocks * 512, Inodes: 1, Whole: true}, nil
	}
	dir, err := r.OpenRoot(name)
	if err != nil {
		return Size{}, err
	}
	defer dir.Close()
	err = w.walk(dir)
	return w.size(), err
}

// UsageIn is Usage in a folder, which is the agent's own or the runtime's and may not be
// there.
func UsageIn(ctx context.Context, dir, name string, m Measure) (Size, error) {
	root, err := OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return Size{Whole: true}, nil
	}
	if err != nil {
		return Size{}, err
	}
	defer root.Close()
	return root.Usage(ctx, name, m)
}

// usageWalk is one measuring. It works with bare descriptors: the names of a tree
// that is very deep are too long to be kept.
type usageWalk struct {
	ctx     context.Context
	measure Measure
	links   map[uint64]struct{} // inodes of files of several names
	bytes   float64
	inodes  float64
	names   int
	partial bool
	levels  []usageLevel
}

// usageLevel is a folder that is being read.
type usageLevel struct {
	fd       int // -1: closed for now
	dev, ino uint64
	next     int64 // where reading goes on
}

func (w *usageWalk) size() Size {
	return Size{Bytes: int64(w.bytes + 0.5), Inodes: int64(w.inodes + 0.5), Whole: !w.partial}
}

// over says whether it is more than anybody wants to know.
func (w *usageWalk) over() bool { return w.measure.Stop > 0 && w.bytes > float64(w.measure.Stop) }

// walk counts top and all below it. The folder stays the caller's to close.
func (w *usageWalk) walk(top *Root) error {
	var st unix.Stat_t
	if err := unix.Fstat(top.fd(), &st); err != nil {
		return top.fail("stat", ".", err)
	}
	w.bytes, w.inodes = float64(st.Blocks*512), 1
	own, err := openFolder(top.fd(), ".") // a place of its own to read from
	if err != nil {
		return top.fail("open folder", ".", err)
	}
	defer func() {
		for _, l := range w.levels {
			if l.fd >= 0 {
				unix.Close(l.fd)
			}
		}
	}()
	w.levels = append(w.levels, usageLevel{fd: own, dev: st.Dev, ino: st.Ino})
	buf := make([]byte, 8<<10)
	for len(w.levels) > 0 {
		more, err := w.read(buf)
		if err != nil {
			return top.fail("measure", ".", err)
		}
		if w.over() || w.names > usageNames {
			w.partial = true
			return nil
		}
		if !more {
			w.up()
		}
	}
	return nil
}

// read takes one piece of the innermost folder, up to a folder in it, which
// becomes the innermost then. It says whether there is more to read.
func (w *usageWalk) read(buf []byte) (more bool, err error) {
	l := &w.levels[len(w.levels)-1]
	n, err := unix.Getdents(l.fd, buf)
	if err != nil || n <= 0 {
		w.partial = w.partial || err != nil
		return false, nil
	}
	// struct linux_dirent64: inode, where the next one is, length, kind, name.
	const header = 19
	for rest := buf[:n]; len(rest) >= header; {
		length := int(binary.NativeEndian.Uint16(rest[16:]))
		if length < header || length > len(rest) {
			return false, errors.New("the kernel's list of names cannot be read")
		}
		name := unix.ByteSliceToString(rest[header:length])
		l.next = int64(binary.NativeEndian.Uint64(rest[8:]))
		rest = rest[length:]
		if name == "." || name == ".." {
			continue
		}
		if w.names++; w.names%usageBatch == 0 {
			if err := w.ctx.Err(); err != nil {
				return false, err
			}
			if w.measure.Pause != nil {
				if err := w.measure.Pause(); err != nil {
					return false, err
				}
			}
		}
		if w.count(l.fd, name) || w.over() {
			return true, nil
		}
	}
	return true, nil
}

// count adds one name. A folder becomes the innermost one, and it says so.
func (w *usageWalk) count(dir int, name string) (entered bool) {
	var st unix.Statx_t
	const want = unix.STATX_TYPE | unix.STATX_NLINK | unix.STATX_INO | unix.STATX_BLOCKS
	if err := unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, want, &st); err != nil {
		w.partial = w.partial || !errors.Is(err, unix.ENOENT)
		return false
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return false // another file system's
	}
	folder := uint32(st.Mode)&unix.S_IFMT == unix.S_IFDIR
	part := 1.0
	if !folder && st.Nlink > 1 {
		if _, seen := w.links[st.Ino]; seen {
			return false
		}
		if len(w.links) < w.measure.links {
			w.links[st.Ino] = struct{}{}
		} else {
			part = 1 / float64(st.Nlink)
		}
	}
	w.bytes += part * 512 * float64(st.Blocks)
	w.inodes += part
	return folder && w.down(dir, name)
}

// down makes a folder the innermost one.
func (w *usageWalk) down(dir int, name string) bool {
	fd, err := openFolder(dir, name)
	if err != nil {
		// It was removed, replaced or mounted over meanwhile, or cannot be read.
		gone := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV)
		w.partial = w.partial || !gone
		return false
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		w.partial = true
		return false
	}
	if at := len(w.levels) - 1; at >= usageOpen {
		unix.Close(w.levels[at].fd)
		w.levels[at].fd = -1
	}
	w.levels = append(w.levels, usageLevel{fd: fd, dev: st.Dev, ino: st.Ino})
	return true
}

// up goes on in the folder above the innermost one, after what was read there.
func (w *usageWalk) up() {
	at := len(w.levels) - 1
	from := w.levels[at].fd
	w.levels = w.levels[:at]
	defer unix.Close(from)
	if at == 0 {
		return
	}
	if above := &w.levels[at-1]; above.fd < 0 {
		above.fd = parentOf(from, above)
	}
	for w.levels[len(w.levels)-1].fd < 0 {
		// It was moved away. What is not counted yet of it, and of those above it
		// that were closed, is not found again.
		w.partial = true
		w.levels = w.levels[:len(w.levels)-1]
	}
	above := w.levels[len(w.levels)-1]
	if _, err := unix.Seek(above.fd, above.next, unix.SEEK_SET); err != nil {
		w.partial = true
	}
}

// parentOf opens the folder above one if it is the one that was there before,
// and returns -1 otherwise.
func parentOf(fd int, was *usageLevel) int {
	// Not beneath: what ".." leads to is compared instead.
	up, err := unix.Openat2(fd, "..", &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return -1
	}
	var st unix.Stat_t
	if unix.Fstat(up, &st) != nil || st.Dev != was.dev || st.Ino != was.ino {
		unix.Close(up)
		return -1
	}
	return up
}

// openFolder opens a folder that is directly in another.
func openFolder(dir int, name string) (int, error) {
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath}
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(dir, name, &how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) && tries < 100 {
			continue
		}
		return fd, err
	}
}
