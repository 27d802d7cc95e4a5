package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// dataLink is the link that a reader goes through: every visible name points
// into it, and replacing it replaces all files at once.
const dataLink = "..data"

// writeAtomic makes dir hold exactly files. Each file is reached as
// dir/NAME -> ..data/NAME -> ..VERSION/NAME; an unchanged volume is not touched.
func writeAtomic(dir string, files map[string]entry, gid *int64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	link := filepath.Join(dir, dataLink)
	old, err := os.Readlink(link)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if old != "" && same(filepath.Join(dir, old), files) {
		return removeStale(dir, old, files)
	}
	version, err := os.MkdirTemp(dir, "..version-")
	if err != nil {
		return err
	}
	if err := writeVersion(version, files, gid); err != nil {
		os.RemoveAll(version)
		return err
	}
	temp := filepath.Join(dir, "..data_new")
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Base(version), temp); err != nil {
		return err
	}
	if err := os.Rename(temp, link); err != nil {
		return err
	}
	for name := range files {
		top, _, _ := strings.Cut(name, "/")
		err := os.Symlink(filepath.Join(dataLink, top), filepath.Join(dir, top))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return removeStale(dir, filepath.Base(version), files)
}

func writeVersion(version string, files map[string]entry, gid *int64) error {
	dirMode := fs.FileMode(0o755)
	if gid != nil {
		dirMode |= fs.ModeSetgid
	}
	own := func(path string, uid int) error {
		group := -1
		if gid != nil {
			group = int(*gid)
		}
		if uid < 0 && group < 0 {
			return nil
		}
		return os.Lchown(path, uid, group)
	}
	if err := errors.Join(own(version, -1), os.Chmod(version, dirMode)); err != nil {
		return err
	}
	for name, e := range files {
		path := filepath.Join(version, name)
		for sub := version; ; {
			rest, err := filepath.Rel(sub, filepath.Dir(path))
			if err != nil || rest == "." {
				break
			}
			first, _, _ := strings.Cut(rest, "/")
			sub = filepath.Join(sub, first)
			if err := os.Mkdir(sub, 0o755); errors.Is(err, fs.ErrExist) {
				continue
			} else if err != nil {
				return err
			}
			if err := errors.Join(own(sub, -1), os.Chmod(sub, dirMode)); err != nil {
				return err
			}
		}
		mode := fs.FileMode(e.mode) & 0o777
		if gid != nil {
			mode |= (mode & 0o600) >> 3 // the group may what the owner may
		}
		if err := os.WriteFile(path, e.data, 0o600); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if err := errors.Join(own(path, e.uid), os.Chmod(path, mode)); err != nil {
			return err
		}
	}
	return nil
}

// same says whether a version folder already holds exactly files.
func same(version string, files map[string]entry) bool {
	count, differs := 0, false
	err := filepath.WalkDir(version, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(version, path)
		if err != nil {
			return err
		}
		e, ok := files[name]
		if !ok {
			differs = true
			return fs.SkipAll
		}
		data, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(data, e.data) {
			return fs.SkipAll
		}
		count++
		return nil
	})
	return err == nil && !differs && count == len(files)
}

// removeStale removes old versions and names that no file has any more.
func removeStale(dir, current string, files map[string]entry) error {
	keep := map[string]bool{dataLink: true, current: true}
	for name := range files {
		top, _, _ := strings.Cut(name, "/")
		keep[top] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
