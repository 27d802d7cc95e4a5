package consensus

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	berrors "go.etcd.io/bbolt/errors"
)

// damage is the error of a file of the data folder that cannot be used.
func (r *Replica) damage(file string, err error) error {
	return fmt.Errorf("%s: %w: %s", file, err, remedy(err, r.cfg.DataDir))
}

// remedy says what to do about a data folder that cannot be used. Data that is whole must
// not be thrown away, on all replicas perhaps, for want of room or of a right.
func remedy(err error, dir string) string {
	const whole = "; the data is whole, do not remove it"
	switch {
	case isFull(err):
		return "make room on the file system of " + dir + " and start again" + whole
	case errors.Is(err, syscall.EROFS):
		return "make the file system of " + dir + " writable (after an error it makes itself read-only: see the kernel's log) and start again" + whole
	case errors.Is(err, fs.ErrPermission):
		return "let this process read and write all of " + dir + " and start again" + whole
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		return "give this process and machine more of it and start again" + whole
	case errors.Is(err, berrors.ErrTimeout):
		return "another process has the file open: stop it and start again" + whole
	}
	return "if the other replicas are healthy, remove " + dir + " and start again, to catch up from them; otherwise restore a backup"
}

// isFull reports that a write failed for want of room.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
