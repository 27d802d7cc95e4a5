package hostile

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// SetGroup gives name and all below it to a group, which may then read it, and
// write it unless readOnly; what is made in its folders later is the group's, too.
// Name itself is the last: one that [Root.HasGroup] is given whole. What is the
// group's already is left alone, so that one that was not finished goes on sooner.
// Links are given away themselves and lead nowhere, mounts are left out. What comes
// or goes meanwhile is changed or not. Depth and width cost neither memory nor
// descriptors. It ends with ctx.
func (r *Root) SetGroup(ctx context.Context, name string, gid int, readOnly bool) error {
	if !filepath.IsLocal(name) {
		return r.fail("change the group of", name, errors.New("the name leaves its folder"))
	}
	give := func(dir int, name string) (isDir bool, err error) {
		isDir, err = setGroup(dir, name, gid, readOnly)
		// Gone, or replaced meanwhile.
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV) {
			return false, nil
		}
		if err != nil {
			err = fmt.Errorf("%s, in the folder: %w", begin(name), err)
		}
		return isDir, err
	}
	top, err := r.OpenRoot(name)
	if err == nil {
		defer top.Close()
		tree := walk{visit: give}
		err = tree.run(ctx, top)
		if err == nil && tree.failed != nil {
			err = fmt.Errorf("some of its folders cannot be read: %w", tree.failed)
		}
		if err == nil {
			_, err = setGroup(top.fd(), ".", gid, readOnly)
		}
	} else if errors.Is(err, unix.ENOTDIR) {
		dir, base, parentErr := r.parent("change the group of", name)
		if parentErr != nil {
			return parentErr
		}
		defer dir.Close()
		_, err = setGroup(dir.fd(), base, gid, readOnly)
	}
	if err != nil {
		return r.fail("change the group of", name, err)
	}
	return nil
}

// setGroup changes one file, folder or link in a folder.
func setGroup(dir int, name string, gid int, readOnly bool) (isDir bool, err error) {
	fd, err := openBeneath(dir, name, unix.O_PATH|unix.O_NOFOLLOW)
	if errors.Is(err, unix.ELOOP) { // a link, which kernels differ about
		return false, unix.Fchownat(dir, name, -1, gid, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	if int(st.Gid) != gid {
		if err := unix.Fchownat(fd, "", -1, gid, unix.AT_EMPTY_PATH); err != nil {
			return false, err
		}
		// It may have taken setuid and setgid away.
		if err := unix.Fstat(fd, &st); err != nil {
			return false, err
		}
	}
	mode := groupMode(st.Mode, readOnly)
	if st.Mode&unix.S_IFMT == unix.S_IFLNK || mode == st.Mode&0o7777 {
		return isDir, nil
	}
	return isDir, unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode)
}

// begin is enough of a name to find it by.
func begin(name string) string { return strconv.QuoteToASCII(name[:min(len(name), 64)]) }

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
