package hostile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxDepth is how many folders are open at once while a tree is removed. What
// lies deeper is first moved up: a container can make a tree as deep as it
// likes, in which each level would cost a descriptor.
const maxDepth = 64

// Remove removes one name: a file of any kind, a link, an empty folder. What is
// not there is no error.
func (r *Root) Remove(name string) error {
	dir, base, err := r.parent("remove", name)
	if err == nil {
		defer dir.Close()
		err = dir.remove(base)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// remove unlinks what is directly in the folder.
func (r *Root) remove(base string) error {
	err := unix.Unlinkat(r.fd(), base, 0)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) {
		if dirErr := unix.Unlinkat(r.fd(), base, unix.AT_REMOVEDIR); !errors.Is(dirErr, unix.ENOTDIR) {
			err = dirErr
		}
	}
	if err != nil {
		return r.fail("remove", base, err)
	}
	return nil
}

// RemoveAll removes name with all that is in it. No link is followed, and what
// is mounted on or below it is an error, not removed. What cannot be removed keeps
// nothing else: the first error is returned at the end. A tree of any depth and width
// takes some 130 descriptors at most. It ends with ctx.
func (r *Root) RemoveAll(ctx context.Context, name string) error {
	dir, base, err := r.parent("remove", name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	defer dir.Close()
	return (&remover{ctx: ctx}).removeAll(dir, base, 0)
}

// RemoveAllIn removes everything in the folder that skip does not name.
func (r *Root) RemoveAllIn(ctx context.Context, skip func(name string) bool) error {
	for {
		var names []string
		if err := r.Names(func(n string) bool {
			if skip == nil || !skip(n) {
				names = append(names, n)
			}
			return len(names) < 4096
		}); err != nil {
			return err
		}
		if len(names) == 0 {
			return nil
		}
		for _, n := range names {
			if err := r.RemoveAll(ctx, n); err != nil {
				return err
			}
		}
	}
}

// RemoveAll removes a folder by a path as for [OpenRoot]; what is not there is
// no error.
func RemoveAll(ctx context.Context, path string) error {
	r, err := OpenRoot(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer r.Close()
	return r.RemoveAll(ctx, filepath.Base(path))
}

// remover is one removal.
type remover struct {
	ctx   context.Context
	top   *Root // the folder that is removed; what lies too deep is moved here
	count int
}

func (rm *remover) removeAll(dir *Root, base string, depth int) error {
	if err := rm.ctx.Err(); err != nil {
		return dir.fail("remove", base, err)
	}
	err := dir.remove(base)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, unix.EPERM) { // chattr +i or +a, by a container that may
		if dir.clearFlags(base) == nil && dir.clearFlags(".") == nil {
			err = dir.remove(base)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
		}
	}
	if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if depth >= maxDepth {
		return rm.hoist(dir, base)
	}
	sub, err := dir.OpenRoot(base)
	if err != nil {
		return err
	}
	defer sub.Close()
	if depth == 0 {
		rm.top = sub
	}
	var failed error
	for {
		found, gone := 0, 0
		if err := sub.Names(func(n string) bool {
			found++
			err := rm.removeAll(sub, n, depth+1)
			if err == nil {
				gone++
			} else if failed == nil {
				failed = err
			}
			return rm.ctx.Err() == nil
		}); err != nil {
			return err
		}
		if err := rm.ctx.Err(); err != nil {
			return dir.fail("remove", base, err)
		}
		// Reading while removing may miss some, and others were moved here:
		// look until nothing is found, or nothing can be removed of it.
		if found == 0 {
			break
		}
		if gone == 0 {
			return failed
		}
	}
	if err := dir.remove(base); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// hoist moves a folder up into the one that is removed.
func (rm *remover) hoist(dir *Root, base string) error {
	for {
		rm.count++
		err := unix.Renameat2(dir.fd(), base, rm.top.fd(), "removing-"+strconv.Itoa(rm.count), unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return dir.fail("remove", base, fmt.Errorf("the tree is deeper than %d folders and cannot be moved up: %w", maxDepth, err))
		}
		return nil
	}
}

// clearFlags takes the immutable and append-only flags from a file or folder.
func (r *Root) clearFlags(name string) error {
	const immutable, appendOnly = 0x10, 0x20
	fd, err := r.openat2("open", name, unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return r.fail("stat", name, err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return nil // has no such flags
	}
	again, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return r.fail("open", name, err)
	}
	defer unix.Close(again)
	flags, err := unix.IoctlGetUint32(again, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return r.fail("read the flags of", name, err)
	}
	if flags&(immutable|appendOnly) == 0 {
		return nil
	}
	if err := unix.IoctlSetPointerInt(again, unix.FS_IOC_SETFLAGS, int(flags&^(immutable|appendOnly))); err != nil {
		return r.fail("clear the flags of", name, err)
	}
	return nil
}
