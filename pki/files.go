package pki

import (
	"fmt"
	"io/fs"
	"os"

	"timonel/internal/durable"
)

// readFile reads a regular file, and refuses a secret one that others may read.
func readFile(path string, secret bool) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); secret && mode&0o077 != 0 {
		return nil, fmt.Errorf("%s is secret but its mode is %04o: run chmod 600 on it, and replace the bundle if others could read it", path, mode)
	}
	return os.ReadFile(path)
}

// writeSynced writes a new file that is on disk when it returns.
func writeSynced(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// replaceFile writes a file beside path and renames it over path.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := writeSynced(tmp, data, mode); err != nil {
		return err
	}
	return durable.Rename(tmp, path)
}
