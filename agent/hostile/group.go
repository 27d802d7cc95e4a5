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

// maxPending bounds the names of folders that wait while a tree is walked.
const maxPending = 64 << 20

// SetGroup gives name and all below it to a group, which may then read it, and
// write it unless readOnly; what is made in its folders later is the group's, too.
// Links are given away themselves and lead nowhere, mounts are left out. What comes
// or goes meanwhile is changed or not. It ends with ctx.
func (r *Root) SetGroup(ctx context.Context, name string, gid int, readOnly bool) error {
	pending, size := []string{name}, len(name)
	for len(pending) > 0 {
		at := pending[len(pending)-1]
		pending, size = pending[:len(pending)-1], size-len(at)
		if err := ctx.Err(); err != nil {
			return r.fail("change the group of", at, err)
		}
		isDir, err := r.setGroup(at, gid, readOnly)
		if err == nil && isDir {
			var dir *Root
			if dir, err = r.OpenRoot(at); err == nil {
				err = dir.Names(func(n string) bool {
					n = filepath.Join(at, n)
					pending, size = append(pending, n), size+len(n)
					return size < maxPending
				})
				dir.Close()
			}
		}
		if size >= maxPending {
			return r.fail("change the group of", name, fmt.Errorf("%w: the names of its folders and files take more than %d bytes", ErrTooLarge, maxPending))
		}
		// Gone, replaced by a link, or something is mounted there.
		if err != nil && (at == name || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrKind) && !errors.Is(err, unix.ENOTDIR)) {
			return err
		}
	}
	return nil
}

// setGroup changes one file, folder or link.
func (r *Root) setGroup(name string, gid int, readOnly bool) (isDir bool, err error) {
	fd, err := r.openat2("change the group of", name, unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath})
	if errors.Is(err, ErrKind) {
		return false, r.linkGroup(name, gid)
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, r.fail("stat", name, err)
	}
	if err := unix.Fchownat(fd, "", -1, gid, unix.AT_EMPTY_PATH); err != nil {
		return false, r.fail("change the group of", name, err)
	}
	isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	mode := groupMode(st.Mode, readOnly)
	if st.Mode&unix.S_IFMT == unix.S_IFLNK || mode == st.Mode&0o7777 {
		return isDir, nil
	}
	if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode); err != nil {
		return false, r.fail("change the mode of", name, err)
	}
	return isDir, nil
}

// linkGroup is for what openat2 refuses to open beneath a folder although it is
// only named: a link, of which kernels differ.
func (r *Root) linkGroup(name string, gid int) error {
	dir, base, err := r.parent("change the group of", name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Fchownat(dir.fd(), base, -1, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return r.fail("change the group of", name, err)
	}
	return nil
}

// groupMode is a mode in which the group may do what the file is for.
func groupMode(mode uint32, readOnly bool) uint32 {
	add := uint32(0o660)
	if readOnly {
		add = 0o440
	}
	if mode&unix.S_IFMT == unix.S_IFDIR {
		add |= unix.S_ISGID | 0o110
	}
	return mode&0o7777 | add
}

// HasGroup says whether name is a group's already, as [Root.SetGroup] makes it.
func (r *Root) HasGroup(name string, gid int, readOnly bool) (bool, error) {
	st, err := r.Lstat(name)
	return err == nil && int(st.Gid) == gid && groupMode(st.Mode, readOnly) == st.Mode&0o7777, err
}
