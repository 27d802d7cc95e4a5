package hostile

import (
	"cmp"
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

const (
	// usageLinks bounds the files of several names that are remembered so as to be
	// counted once. Of those beyond it each name counts its part.
	usageLinks = 1 << 16
	// usageNames bounds one measuring: who makes names faster than they are
	// counted does not keep it going for ever.
	usageNames = 64 << 20
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
	w := &usageWalk{measure: m, links: map[uint64]struct{}{}}
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
	err = w.walk(ctx, dir)
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

// usageWalk is one measuring.
type usageWalk struct {
	tree    walk
	measure Measure
	links   map[uint64]struct{} // inodes of files of several names
	bytes   float64
	inodes  float64
}

func (w *usageWalk) size() Size {
	return Size{Bytes: int64(w.bytes + 0.5), Inodes: int64(w.inodes + 0.5), Whole: !w.tree.partial}
}

// over says whether it is more than anybody wants to know.
func (w *usageWalk) over() bool { return w.measure.Stop > 0 && w.bytes > float64(w.measure.Stop) }

// walk counts top and all below it. The folder stays the caller's to close.
func (w *usageWalk) walk(ctx context.Context, top *Root) error {
	var st unix.Stat_t
	if err := unix.Fstat(top.fd(), &st); err != nil {
		return top.fail("stat", ".", err)
	}
	w.bytes, w.inodes = float64(st.Blocks*512), 1
	w.tree = walk{visit: w.count, pause: w.measure.Pause}
	err := w.tree.run(ctx, top)
	if errors.Is(err, errEnough) {
		w.tree.partial, err = true, nil
	}
	if err != nil {
		return top.fail("measure", ".", err)
	}
	return nil
}

var errEnough = errors.New("enough is known")

// count adds one name. It says whether it is a folder to be counted, too.
func (w *usageWalk) count(dir int, name string) (enter bool, err error) {
	var st unix.Statx_t
	const want = unix.STATX_TYPE | unix.STATX_NLINK | unix.STATX_INO | unix.STATX_BLOCKS
	if err := unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, want, &st); err != nil {
		w.tree.partial = w.tree.partial || !errors.Is(err, unix.ENOENT)
		return false, nil
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return false, nil // another file system's
	}
	folder := uint32(st.Mode)&unix.S_IFMT == unix.S_IFDIR
	part := 1.0
	if !folder && st.Nlink > 1 {
		if _, seen := w.links[st.Ino]; seen {
			return false, nil
		}
		if len(w.links) < w.measure.links {
			w.links[st.Ino] = struct{}{}
		} else {
			part = 1 / float64(st.Nlink)
		}
	}
	w.bytes += part * 512 * float64(st.Blocks)
	w.inodes += part
	if w.over() || w.tree.names > usageNames {
		return false, errEnough
	}
	return folder, nil
}
