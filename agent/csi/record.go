package csi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"timonel/agent/hostile"
)

// The folders of the records, in the agent's own folder for them, where no driver sees it.
const (
	stagedDir    = "staged"    // a file a volume
	publishedDir = "published" // a file a pod's volume
)

// maxRecord bounds what is read of one record, in bytes.
const maxRecord = 64 << 10

// key names a volume of a driver.
type key struct{ Driver, Handle string }

// unique is how the attach/detach controller names a volume (GetUniqueVolumeName).
func (k key) unique() string { return "kubernetes.io/csi/" + k.Driver + "^" + k.Handle }

// staged is the record of a volume that may be staged: written before the driver is asked
// to stage it, removed once it says that it is unstaged.
type staged struct {
	key
	Name  string // of the PersistentVolume
	Path  string // staging path, beneath the root
	Block bool   `json:",omitempty"`
	// Attached: it is attached to the node by others, who wait until it is not in use.
	Attached bool `json:",omitempty"`
	Done     bool // the driver said so
	Mounted  bool `json:",omitempty"` // something was mounted there then
}

// user is a pod's volume.
type user struct {
	UID    types.UID
	Volume string
}

// published is the record of a volume that a pod may have, written and removed likewise.
type published struct {
	key
	user
	Name     string // of the PersistentVolume, or as Volume
	Path     string // target path, beneath the root
	Block    bool   `json:",omitempty"`
	Inline   bool   `json:",omitempty"`
	Attached bool   `json:",omitempty"`
	Staged   bool   `json:",omitempty"` // it was staged before
	Done     bool
	Mounted  bool  `json:",omitempty"`
	Size     int64 `json:",omitempty"` // bytes that the node's part was last made to have; 0: not known
}

func (s *staged) file() string { return filepath.Join(stagedDir, digest(s.Driver, s.Handle)+".json") }

func (p *published) file() string {
	return filepath.Join(publishedDir, string(p.UID)+"_"+p.Volume+".json")
}

// records are the files.
type records struct{ dir string }

// save writes a record whole or not at all.
func (r records) save(name string, record any) error {
	raw, err := json.Marshal(record)
	if err != nil {
		return err
	}
	if len(raw) > maxRecord {
		return fmt.Errorf("record %s has %d bytes, %d are kept", name, len(raw), maxRecord)
	}
	root, err := hostile.MakeRoot(filepath.Join(r.dir, filepath.Dir(name)), 0o700)
	if err != nil {
		return err
	}
	defer root.Close()
	making := "." + filepath.Base(name) + ".new"
	if err := root.Remove(making); err != nil {
		return err
	}
	if err := root.Create(making, raw, 0o600, -1, -1); err != nil {
		return err
	}
	return root.Rename(making, filepath.Base(name))
}

func (r records) remove(name string) error {
	root, err := hostile.OpenRoot(filepath.Join(r.dir, filepath.Dir(name)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	return root.Remove(filepath.Base(name))
}

// load reads all records. damaged says which could not be read, and why.
func (r records) load() (s []*staged, p []*published, damaged error) {
	var errs []error
	each := func(dir string, read func(raw []byte) (file string, keep func(), err error)) {
		root, err := hostile.OpenRoot(filepath.Join(r.dir, dir))
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if err != nil {
			errs = append(errs, err)
			return
		}
		defer root.Close()
		err = root.Names(func(name string) bool {
			if strings.HasPrefix(name, ".") || !strings.HasSuffix(name, ".json") {
				return true
			}
			raw, err := root.ReadFile(name, maxRecord)
			if err == nil {
				file, keep, bad := read(raw)
				switch {
				case bad != nil:
					err = bad
				case file != filepath.Join(dir, name):
					err = errors.New("it is of another volume")
				default:
					keep()
				}
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", filepath.Join(r.dir, dir, name), err))
			}
			return true
		})
		if err != nil {
			errs = append(errs, err)
		}
	}
	each(stagedDir, func(raw []byte) (string, func(), error) {
		rec := &staged{}
		if err := json.Unmarshal(raw, rec); err != nil {
			return "", nil, err
		}
		return rec.file(), func() { s = append(s, rec) }, errors.Join(checkKey(rec.key), checkPath(rec.Path))
	})
	each(publishedDir, func(raw []byte) (string, func(), error) {
		rec := &published{}
		if err := json.Unmarshal(raw, rec); err != nil {
			return "", nil, err
		}
		return rec.file(), func() { p = append(p, rec) }, errors.Join(checkKey(rec.key), checkPath(rec.Path), checkUser(rec.user))
	})
	return s, p, errors.Join(errs...)
}

// maxHandle bounds a volume's handle, in bytes: it is sent, and hashed into paths.
const maxHandle = 16 << 10

// checkKey says why a volume cannot be had: its driver's name becomes a path.
func checkKey(k key) error {
	if len(validation.IsDNS1123Subdomain(strings.ToLower(k.Driver))) > 0 || len(k.Driver) > 63 {
		return fmt.Errorf("%q is no name of a CSI driver", k.Driver)
	}
	if k.Handle == "" || len(k.Handle) > maxHandle {
		return fmt.Errorf("the handle of a volume of %s has %d bytes: want 1 to %d", k.Driver, len(k.Handle), maxHandle)
	}
	return nil
}

func checkUser(u user) error {
	for _, name := range []string{string(u.UID), u.Volume} {
		if !filepath.IsLocal(name) || strings.ContainsAny(name, "/_") || strings.HasPrefix(name, ".") {
			return fmt.Errorf("volume %q of pod %q cannot be named on a disk", u.Volume, u.UID)
		}
	}
	return nil
}

func checkPath(path string) error {
	if !filepath.IsLocal(path) || filepath.Clean(path) != path {
		return fmt.Errorf("%q leaves the folder", path)
	}
	return nil
}

// mounted says whether there is a mount at a path beneath a folder, without following a
// link.
func mounted(root, path string) bool {
	dir, err := hostile.OpenRoot(root)
	if err != nil {
		return false
	}
	defer dir.Close()
	at, err := dir.OpenMount(path)
	if err != nil {
		st, statErr := dir.Lstat(path) // a device on a file
		return statErr == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK
	}
	defer at.Close()
	is, _, err := at.IsMountPoint()
	return err == nil && is
}
