// Package durable changes files and folders so that a power cut leaves the old or the
// new: what a function here returned nil for is on the disk, name and content. (A rename
// without a sync of its folder may be undone by a power cut, also after the new file was
// written to for days.)
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// WriteFile makes a file of b, or replaces one: it is there whole, or as before. What
// is at path+".tmp" is overwritten.
func WriteFile(path string, b []byte, perm fs.FileMode) error {
	temp := path + ".tmp"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return Rename(temp, path)
}

// Rename renames a file or a folder whose content was synced before. After an error it
// may have been renamed, and that may be undone by a power cut: do it again, or go on
// with neither.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return SyncParents(from, to)
}

// SyncParents makes the names of files last: those that were made, renamed, exchanged
// or removed.
func SyncParents(paths ...string) error {
	synced := map[string]bool{}
	for _, p := range paths {
		dir := filepath.Dir(p)
		if synced[dir] {
			continue
		}
		synced[dir] = true
		if err := SyncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// SyncDir makes the names in a folder last.
func SyncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// MkdirAll makes a folder, and those that it is in, if they are not there.
func MkdirAll(path string, perm fs.FileMode) error {
	path = filepath.Clean(path)
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	}
	if err == nil {
		// Whoever made it may have been killed before its name was on the disk.
		return SyncParents(path)
	}
	if parent := filepath.Dir(path); parent != path {
		if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
			if err := MkdirAll(parent, perm); err != nil {
				return err
			}
		}
	}
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return SyncParents(path)
}
