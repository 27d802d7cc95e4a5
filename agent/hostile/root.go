package hostile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Root is an opened folder. It stays the same folder whatever happens to its
// name. Names are relative and local ([filepath.IsLocal]); "." is the folder
// itself. Its methods may be called from several goroutines.
type Root struct {
	f    *os.File
	path string // for errors
}

// beneath is how everything below a Root is looked up.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// OpenRoot opens a folder by a path that nobody but the agent and the machine's
// administrator can change.
func OpenRoot(path string) (*Root, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open folder", Path: path, Err: err}
	}
	return &Root{f: os.NewFile(uintptr(fd), path), path: path}, nil
}

// MakeRoot is OpenRoot of a folder that is made, with those above it, when it
// is missing.
func MakeRoot(path string, mode fs.FileMode) (*Root, error) {
	if err := os.MkdirAll(path, mode); err != nil {
		return nil, err
	}
	return OpenRoot(path)
}

// Close frees the folder's descriptor.
func (r *Root) Close() error { return r.f.Close() }

// Path is what the folder was opened by, for messages.
func (r *Root) Path() string { return r.path }

func (r *Root) fd() int { return int(r.f.Fd()) }

func (r *Root) fail(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: filepath.Join(r.path, name), Err: err}
}

// openat2 opens name as how says, or as the flags do beneath this folder.
func (r *Root) openat2(op, name string, how unix.OpenHow) (int, error) {
	if !filepath.IsLocal(name) {
		return -1, r.fail(op, name, errors.New("the name leaves its folder"))
	}
	how.Flags |= unix.O_CLOEXEC
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(r.fd(), name, &how)
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN) && tries < 100:
			// Something was renamed during the look-up.
		case errors.Is(err, unix.ENOSYS):
			return -1, r.fail(op, name, errors.New("the kernel has no openat2: Linux 5.8 or newer is needed"))
		case errors.Is(err, unix.ELOOP):
			return -1, r.fail(op, name, fmt.Errorf("%w: a symbolic link is in the way", ErrKind))
		case errors.Is(err, unix.EXDEV):
			return -1, r.fail(op, name, fmt.Errorf("%w: a mount is in the way, or the name leaves its folder", ErrKind))
		default:
			return -1, r.fail(op, name, err)
		}
	}
}

// OpenRoot opens a folder beneath this one.
func (r *Root) OpenRoot(name string) (*Root, error) {
	fd, err := r.openat2("open folder", name, unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW, Resolve: beneath})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(r.path, name)
	return &Root{f: os.NewFile(uintptr(fd), path), path: path}, nil
}

// OpenMount opens a folder beneath this one on which the agent mounted
// something, or may have.
func (r *Root) OpenMount(name string) (*Root, error) {
	fd, err := r.openat2("open folder", name, unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW, Resolve: beneath &^ unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(r.path, name)
	return &Root{f: os.NewFile(uintptr(fd), path), path: path}, nil
}

// OpenMountOrMake is OpenMount of a folder that is made, as by Mkdir, when it
// is missing.
func (r *Root) OpenMountOrMake(name string, mode uint32, uid, gid int) (*Root, error) {
	made, err := r.OpenMount(name)
	if errors.Is(err, fs.ErrNotExist) {
		return r.Mkdir(name, mode, uid, gid)
	}
	return made, err
}

// parent opens the folder that name is in, for the calls that take one name.
func (r *Root) parent(op, name string) (dir *Root, base string, err error) {
	if !filepath.IsLocal(name) || filepath.Clean(name) == "." {
		return nil, "", r.fail(op, name, errors.New("the name leaves its folder"))
	}
	name = filepath.Clean(name)
	dir, err = r.OpenRoot(filepath.Dir(name))
	return dir, filepath.Base(name), err
}

// Lstat describes what name is, a link as itself.
func (r *Root) Lstat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := r.openat2("stat", name, unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath &^ unix.RESOLVE_NO_XDEV})
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &st); err != nil {
		return st, r.fail("stat", name, err)
	}
	return st, nil
}

// Exists says whether there is anything of that name.
func (r *Root) Exists(name string) (bool, error) {
	switch _, err := r.Lstat(name); {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	default:
		return false, err
	}
}

// Readlink returns what a link says. It is followed by nobody here.
func (r *Root) Readlink(name string) (string, error) {
	dir, base, err := r.parent("read link", name)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir.fd(), base, buf)
	if err != nil {
		return "", r.fail("read link", name, err)
	}
	return string(buf[:n]), nil
}

// Symlink makes a link, which must not be there yet.
func (r *Root) Symlink(target, name string) error {
	dir, base, err := r.parent("make link", name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Symlinkat(target, dir.fd(), base); err != nil {
		return r.fail("make link", name, err)
	}
	return nil
}

// Split cuts a path that this agent once gave to CRI into a folder of the agent's own
// and the last n names, which are looked up beneath it.
func Split(path string, n int) (root, rel string) {
	root = path
	for range n {
		rel = filepath.Join(filepath.Base(root), rel)
		root = filepath.Dir(root)
	}
	return root, rel
}

// Rename gives from the name to, which is replaced.
func (r *Root) Rename(from, to string) error { return r.rename(from, to, 0) }

// RenameNew gives from the name to, which nothing may have yet.
func (r *Root) RenameNew(from, to string) error { return r.rename(from, to, unix.RENAME_NOREPLACE) }

func (r *Root) rename(from, to string, flags uint) error {
	a, fromBase, err := r.parent("rename", from)
	if err != nil {
		return err
	}
	defer a.Close()
	b, toBase, err := r.parent("rename", to)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := unix.Renameat2(a.fd(), fromBase, b.fd(), toBase, flags); err != nil {
		return r.fail("rename", from, err)
	}
	return nil
}

// Mkdir makes one folder, which must not be there yet, and returns it opened.
// mode is the whole of it (setgid included), the umask does not count; owner
// and group -1 mean root's.
func (r *Root) Mkdir(name string, mode uint32, uid, gid int) (*Root, error) {
	dir, base, err := r.parent("make folder", name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := unix.Mkdirat(dir.fd(), base, 0o700); err != nil {
		return nil, r.fail("make folder", name, err)
	}
	made, err := dir.OpenRoot(base)
	if err != nil {
		return nil, err
	}
	if err := made.SetMode(mode, uid, gid); err != nil {
		made.Close()
		return nil, err
	}
	return made, nil
}

// MkdirAll makes the folders of a path that are missing and returns the last
// one opened. Those that are there stay as they are.
func (r *Root) MkdirAll(name string, mode uint32, uid, gid int) (*Root, error) {
	if !filepath.IsLocal(name) {
		return nil, r.fail("make folder", name, errors.New("the name leaves its folder"))
	}
	at, err := r.OpenRoot(".")
	if err != nil {
		return nil, err
	}
	for part := range strings.SplitSeq(filepath.Clean(name), "/") {
		next, err := at.OpenRoot(part)
		if errors.Is(err, fs.ErrNotExist) {
			next, err = at.Mkdir(part, mode, uid, gid)
			if errors.Is(err, fs.ErrExist) { // made by somebody else meanwhile
				next, err = at.OpenRoot(part)
			}
		}
		at.Close()
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

// SetMode sets the folder's own owner and mode, setgid included.
func (r *Root) SetMode(mode uint32, uid, gid int) error {
	if uid >= 0 || gid >= 0 {
		if err := unix.Fchown(r.fd(), uid, gid); err != nil {
			return r.fail("change the owner of", ".", err)
		}
	}
	if err := unix.Fchmod(r.fd(), mode); err != nil {
		return r.fail("change the mode of", ".", err)
	}
	return nil
}

// IsMountPoint says whether something is mounted on the folder, and the type
// of the file system that is (unix.TMPFS_MAGIC).
func (r *Root) IsMountPoint() (mounted bool, magic int64, err error) {
	var st unix.Statx_t
	if err := unix.Statx(r.fd(), "", unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st); err != nil {
		return false, 0, r.fail("stat", ".", err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, 0, r.fail("stat", ".", errors.New("the kernel does not tell mount points: Linux 5.8 or newer is needed"))
	}
	s, err := r.Statfs()
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, int64(s.Type), err
}

// Statfs describes the file system that the folder is on.
func (r *Root) Statfs() (unix.Statfs_t, error) {
	var s unix.Statfs_t
	if err := unix.Fstatfs(r.fd(), &s); err != nil {
		return s, r.fail("statfs", ".", err)
	}
	return s, nil
}

// Names calls f with the name of everything in the folder until f answers
// false, in batches: a folder may hold millions. Names that come or go
// meanwhile may be missed.
func (r *Root) Names(f func(name string) bool) error {
	dir, err := r.OpenRoot(".") // a place of its own to read from
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		names, err := dir.f.Readdirnames(512)
		for _, name := range names {
			if !f(name) {
				return nil
			}
		}
		if len(names) == 0 || err != nil {
			if err == nil || isEOF(err) {
				return nil
			}
			return r.fail("list", ".", err)
		}
	}
}
