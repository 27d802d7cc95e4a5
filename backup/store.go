package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"timonel/internal/durable"
)

// Store is where snapshot files are kept.
type Store interface {
	// String says where, for people.
	String() string
	// List returns the files named as [Name] names them, in any order.
	List(ctx context.Context) ([]Item, error)
	// Put stores what write writes, whole or not at all.
	Put(ctx context.Context, name string, write func(io.Writer) error) error
	// Open reads a file.
	Open(ctx context.Context, name string) (io.ReadCloser, error)
	// Delete removes a file.
	Delete(ctx context.Context, name string) error
}

// Item is a file in a store.
type Item struct {
	Name      string    `json:"name"`
	ClusterID string    `json:"clusterID"`
	Time      time.Time `json:"time"`
	Revision  int64     `json:"revision"`
	Size      int64     `json:"size"`
}

const nameTime = "20060102T150405Z"

var nameRE = regexp.MustCompile(`^timonel-([A-Za-z0-9._-]+)-([0-9]{8}T[0-9]{6}Z)-([0-9]{1,19})\.snapshot$`)

// Name is what a scheduled snapshot's file is called. Nothing of another name is
// ever deleted.
func Name(clusterID string, at time.Time, revision int64) string {
	return fmt.Sprintf("timonel-%s-%s-%d.snapshot", clusterID, at.UTC().Format(nameTime), revision)
}

func parseName(name string) (Item, bool) {
	m := nameRE.FindStringSubmatch(name)
	if m == nil {
		return Item{}, false
	}
	at, err := time.Parse(nameTime, m[2])
	if err != nil {
		return Item{}, false
	}
	revision, err := strconv.ParseInt(m[3], 10, 64)
	return Item{Name: name, ClusterID: m[1], Time: at, Revision: revision}, err == nil
}

// newestFirst sorts by time, then revision.
func newestFirst(items []Item) {
	slices.SortFunc(items, func(a, b Item) int {
		return cmp.Or(b.Time.Compare(a.Time), cmp.Compare(b.Revision, a.Revision), strings.Compare(a.Name, b.Name))
	})
}

// Folder is a store in a folder that is there.
type Folder string

func (f Folder) String() string { return string(f) }

func (f Folder) path(name string) string { return filepath.Join(string(f), name) }

// List implements Store.
func (f Folder) List(context.Context) ([]Item, error) {
	entries, err := os.ReadDir(string(f))
	if err != nil {
		return nil, err
	}
	var items []Item
	for _, entry := range entries {
		item, ok := parseName(entry.Name())
		if !ok || !entry.Type().IsRegular() {
			continue
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		item.Size = info.Size()
		items = append(items, item)
	}
	return items, nil
}

// Put implements Store. A partial file of an earlier attempt is replaced.
func (f Folder) Put(_ context.Context, name string, write func(io.Writer) error) error {
	return WriteFile(f.path(name), write)
}

// Open implements Store.
func (f Folder) Open(_ context.Context, name string) (io.ReadCloser, error) {
	return os.Open(f.path(name))
}

// Delete implements Store.
func (f Folder) Delete(_ context.Context, name string) error { return os.Remove(f.path(name)) }

// sweep removes what attempts that were cut off left.
func (f Folder) sweep(before time.Time) error {
	entries, err := os.ReadDir(string(f))
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		name, partial := strings.CutSuffix(entry.Name(), partialSuffix)
		if _, ours := parseName(name); !partial || !ours {
			continue
		}
		if info, err := entry.Info(); err == nil && info.ModTime().Before(before) {
			errs = append(errs, os.Remove(f.path(entry.Name())))
		}
	}
	return errors.Join(errs...)
}

const partialSuffix = ".partial"

// WriteFile makes a file of what write writes, which is verified to be a
// snapshot file, synced to the disk and renamed to path only then: path is a
// whole snapshot or as it was before.
func WriteFile(path string, write func(io.Writer) error) (err error) {
	partial := path + partialSuffix
	file, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(partial)
		}
	}()
	if err := write(file); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	r, err := NewReader(file, path)
	if err != nil {
		return err
	}
	if _, err := Inspect(r); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return durable.Rename(partial, path)
}
