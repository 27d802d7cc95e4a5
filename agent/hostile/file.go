package hostile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrKind marks what is not of the kind that is read or used: a link, a FIFO, a
// device, a socket, a folder where a file should be, a mount.
var ErrKind = errors.New("refused")

// ErrTooLarge marks what is longer than the limit that it is read through.
var ErrTooLarge = errors.New("too large")

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// KindName names a file's kind for a message, from st_mode.
func KindName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFDIR:
		return "a folder"
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR:
		return "a character device"
	case unix.S_IFBLK:
		return "a block device"
	}
	return "of an unknown kind"
}

// regular opens for reading what a descriptor of O_PATH pins, if it is a
// regular file. Opening anything else may block or do something.
func regular(fd int, path string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, &os.PathError{Op: "open", Path: path, Err: fmt.Errorf("%w: it is %s, not a regular file", ErrKind, KindName(st.Mode))}
	}
	again, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(again), path), nil
}

// Open opens a regular file for reading.
func (r *Root) Open(name string) (*os.File, error) {
	fd, err := r.openat2("open", name, unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return regular(fd, r.path+"/"+name)
}

// OpenRegular opens a regular file for reading by a path that the machine's
// administrator chose: links in it are followed, what it leads to has to be a
// regular file all the same.
func OpenRegular(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return regular(fd, path)
}

// Read reads all of src, which may be limit bytes long. What is longer is
// [ErrTooLarge], of which at most limit bytes were taken to memory.
func Read(src io.Reader, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(src, limit))
	if err != nil {
		return raw, err
	}
	if int64(len(raw)) == limit {
		var one [1]byte
		if n, _ := io.ReadFull(src, one[:]); n > 0 {
			return nil, fmt.Errorf("%w: longer than %d bytes", ErrTooLarge, limit)
		}
	}
	return raw, nil
}

// ReadFile reads a regular file that may be limit bytes long.
func (r *Root) ReadFile(name string, limit int64) ([]byte, error) {
	f, err := r.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := Read(f, limit)
	if err != nil {
		return nil, r.fail("read", name, err)
	}
	return raw, nil
}

// ReadTail reads the last limit bytes of a regular file of any length.
func (r *Root) ReadTail(name string, limit int64) ([]byte, error) {
	f, err := r.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, r.fail("stat", name, err)
	}
	raw := make([]byte, min(st.Size, limit))
	n, err := f.ReadAt(raw, st.Size-int64(len(raw)))
	if err != nil && !isEOF(err) { // it may have been cut meanwhile
		return nil, r.fail("read", name, err)
	}
	return raw[:n], nil
}

// ReadFile reads a regular file beneath the folder root, a path as for
// [OpenRoot].
func ReadFile(root, name string, limit int64) ([]byte, error) {
	r, err := OpenRoot(root)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.ReadFile(name, limit)
}

// Create makes a file, which must not be there yet, with this content. mode is
// the whole of it, the umask does not count; owner and group -1 mean root's.
func (r *Root) Create(name string, data []byte, mode uint32, uid, gid int) error {
	fd, err := r.openat2("make file", name, unix.OpenHow{
		Flags: unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW, Mode: 0o600, Resolve: beneath,
	})
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return r.fill(f, name, data, mode, uid, gid)
}

// Overwrite gives a file new content without making it another file: what has
// it mounted sees the change. It is made when missing. Only a regular file with
// one name is written to.
func (r *Root) Overwrite(name string, data []byte, mode uint32) error {
	fd, err := r.openat2("open", name, unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath})
	if errors.Is(err, os.ErrNotExist) {
		return r.Create(name, data, mode, -1, -1)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return r.fail("stat", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return r.fail("write", name, fmt.Errorf("%w: it is %s with %d names, not a regular file with one", ErrKind, KindName(st.Mode), st.Nlink))
	}
	again, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return r.fail("open", name, err)
	}
	f := os.NewFile(uintptr(again), name)
	defer f.Close()
	if err := f.Truncate(0); err != nil {
		return r.fail("write", name, err)
	}
	return r.fill(f, name, data, mode, -1, -1)
}

func (r *Root) fill(f *os.File, name string, data []byte, mode uint32, uid, gid int) error {
	if _, err := f.Write(data); err != nil {
		return r.fail("write", name, err)
	}
	if uid >= 0 || gid >= 0 {
		if err := unix.Fchown(int(f.Fd()), uid, gid); err != nil {
			return r.fail("change the owner of", name, err)
		}
	}
	if err := unix.Fchmod(int(f.Fd()), mode); err != nil {
		return r.fail("change the mode of", name, err)
	}
	return nil
}

// ReadRegular reads a regular file by a path as for [OpenRegular].
func ReadRegular(path string, limit int64) ([]byte, error) {
	f, err := OpenRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := Read(f, limit)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: path, Err: err}
	}
	return raw, nil
}

// MaxOwn is a limit for files that the agent or the kernel wrote, which are
// small unless something is broken.
const MaxOwn = 16 << 20
