package hostile

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Stat describes what a path leads to, links followed, without opening it: the
// path is the administrator's or of a pod that may name any (hostPath).
func Stat(path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return st, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st, nil
}

// CreateFile makes an empty file by a path as for [Stat]. One that is there by
// now is left alone, and not opened.
func CreateFile(path string, mode uint32) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, mode)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "make file", Path: path, Err: err}
	}
	return unix.Close(fd)
}

// MakeFolder makes a folder and those above it by a path as for [Stat].
func MakeFolder(path string, mode fs.FileMode) error { return os.MkdirAll(path, mode) }
