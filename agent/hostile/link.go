package hostile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// MakeLink makes a symbolic link at a path, which only the administrator can write, to a
// folder. One that leads there already, or that folder itself, is left as it is; anything
// else is an error and stays.
func MakeLink(path, folder string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	err := os.Symlink(folder, path)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	want, err := os.Stat(folder)
	if err != nil {
		return err
	}
	has, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s leads nowhere: %w", path, err)
	}
	if !os.SameFile(want, has) {
		return fmt.Errorf("%s is there, and is not %s", path, folder)
	}
	return nil
}

// RemoveLink removes a symbolic link that leads to a folder by that name, and nothing
// else.
func RemoveLink(path, folder string) error {
	to, err := os.Readlink(path)
	if err != nil || to != folder {
		return nil
	}
	return os.Remove(path)
}
