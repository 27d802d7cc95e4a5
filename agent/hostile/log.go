package hostile

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// CreateNew makes a file, which must not be there yet, to be written to. mode is
// the whole of it.
func (r *Root) CreateNew(name string, mode uint32) (*os.File, error) {
	fd, err := r.openat2("make file", name, unix.OpenHow{
		Flags: unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW, Mode: 0o600, Resolve: beneath,
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), r.path+"/"+name)
	if err := unix.Fchmod(fd, mode); err != nil {
		f.Close()
		return nil, r.fail("change the mode of", name, err)
	}
	return f, nil
}

// HasWriter says whether somebody has this file, which was opened for reading,
// open for writing. Asked before the end is read, an answer of false makes that
// end the last. Some file systems do not tell: that is an error.
func HasWriter(f *os.File) (bool, error) {
	// A read lease is given on a file that nobody has open for writing. It is
	// given back at once: who opens the file meanwhile waits that long.
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	if errors.Is(err, unix.EAGAIN) {
		return true, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "ask for writers of", Path: f.Name(), Err: err}
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		return false, &fs.PathError{Op: "ask for writers of", Path: f.Name(), Err: err}
	}
	return false, nil
}

// tailChunk is within how many bytes KeepTail looks for the end of a line.
const tailChunk = 64 << 10

// KeepTail cuts a regular file with one name to its last keep bytes, from where
// a line begins. It is another file then: who has the old one open keeps it. The
// room of what is cut is free before any is needed for what stays. tmp is a name
// beside it for the time being, and is replaced.
func (r *Root) KeepTail(name, tmp string, keep int64) error {
	src, st, err := r.openStat(name)
	if err != nil {
		return err
	}
	defer src.Close()
	cut := st.Size - keep
	if cut <= 0 {
		return nil
	}
	if cut, err = lineAfter(src, cut, st.Size); err != nil {
		return r.fail("read", name, err)
	}
	if st.Nlink == 1 {
		punch(src, cut)
	}
	if err := r.copyNew(tmp, st.Mode&0o777, io.NewSectionReader(src, cut, st.Size-cut)); err != nil {
		return err
	}
	if err := r.Rename(tmp, name); err != nil {
		return errors.Join(err, r.Remove(tmp))
	}
	return nil
}

// Spill empties a regular file with one name that somebody appends to and that
// is longer than most; its last most bytes are in the file old then, which is
// replaced. It stays the same file. What is appended meanwhile may be lost.
func (r *Root) Spill(name, old string, most int64) error {
	src, st, err := r.openStat(name)
	if err != nil {
		return err
	}
	defer src.Close()
	if st.Size <= most {
		return nil
	}
	// A disk that is full is a reason more to go on.
	kept := r.copyNew(old, st.Mode&0o777, io.NewSectionReader(src, st.Size-most, most))
	return errors.Join(kept, r.Overwrite(name, nil, st.Mode&0o777))
}

// openStat opens a regular file and says what it is.
func (r *Root) openStat(name string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	f, err := r.Open(name)
	if err != nil {
		return nil, st, err
	}
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, st, r.fail("stat", name, err)
	}
	return f, st, nil
}

// copyNew makes a file of what src has, in the place of one of that name. What could
// not be written whole is not there.
func (r *Root) copyNew(name string, mode uint32, src io.Reader) error {
	if err := r.Remove(name); err != nil {
		return err
	}
	dst, err := r.CreateNew(name, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Close()); err != nil {
		return errors.Join(r.fail("write", name, err), r.Remove(name))
	}
	return nil
}

// lineAfter is where the first line begins at or after at, or at if none begins
// within tailChunk.
func lineAfter(f io.ReaderAt, at, size int64) (int64, error) {
	buf := make([]byte, min(tailChunk, size-at+1))
	n, err := f.ReadAt(buf, at-1)
	if err != nil && !isEOF(err) {
		return at, err
	}
	if i := bytes.IndexByte(buf[:n], '\n'); i >= 0 {
		return at + int64(i), nil
	}
	return at, nil
}

// punch frees what a file has before cut. Where that cannot be done its room is
// free only when the file is gone.
func punch(f *os.File, cut int64) {
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_ = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, cut)
}
