package volume

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

const (
	// dataLink is the link that a reader goes through: every visible name points
	// into it, and replacing it replaces all files at once.
	dataLink = "..data"
	// nextLink becomes dataLink.
	nextLink = "..data_next"
	// versionPrefix begins the names of the folders that dataLink points to.
	versionPrefix = "..version-"
)

// content is what one volume shows.
type content struct {
	files map[string]entry // by clean relative path
	gid   *int64           // fsGroup
}

// tops are the names that are visible: of files, and of the folders they are in.
func (c *content) tops() map[string]bool {
	out := map[string]bool{}
	for name := range c.files {
		top, _, _ := strings.Cut(name, "/")
		out[top] = true
	}
	return out
}

// dirs are the folders that the files are in, "." among them.
func (c *content) dirs() map[string]bool {
	out := map[string]bool{".": true}
	for name := range c.files {
		for dir := path.Dir(name); !out[dir]; dir = path.Dir(dir) {
			out[dir] = true
		}
	}
	return out
}

// size is the room that the files and the links to them take on a tmpfs.
func (c *content) size() (bytes, inodes int64) {
	for _, e := range c.files {
		bytes += e.size()
	}
	return bytes, int64(2*len(c.files) + len(c.dirs()))
}

// page is what a file's data is rounded up to, and more than what the kernel has of
// an inode and its names.
const page = 4096

// size is the room that a file takes on a tmpfs, and what the kernel has of it.
func (e *entry) size() int64 {
	return (int64(len(e.data))+page-1)/page*page + page
}

// mode, uid and gid of a file. With an fsGroup the group may read what anybody
// may, as upstream: these volumes are read-only.
func (c *content) owner(e entry) (mode uint32, uid, gid int) {
	mode, uid, gid = uint32(e.mode)&0o777, e.uid, -1
	if c.gid != nil {
		mode, gid = mode|0o440, int(*c.gid)
	}
	return mode, uid, gid
}

func (c *content) dirMode() (mode uint32, gid int) {
	if c.gid != nil {
		return 0o755 | unix.S_ISGID, int(*c.gid)
	}
	return 0o755, -1
}

// writeAtomic makes the folder hold exactly c. Each file is reached as
// NAME -> ..data/NAME -> ..version-X/NAME; an unchanged volume is not touched.
//
// The folder is visible to containers, and one that can do more than it should
// may change it at any moment. So nothing is believed that is read from it, all
// of it is reached beneath root without following links, and what is not as
// it should be is removed or made anew.
func writeAtomic(ctx context.Context, root *hostile.Root, c *content) error {
	current := currentVersion(root)
	if current != "" && holds(root, current, c) {
		return settle(ctx, root, current, c)
	}
	// What does not belong here must not take the room of what comes. The names
	// that readers go by now stay until the new ones are there.
	if err := root.RemoveAllIn(ctx, func(name string) bool {
		if name == dataLink || name == current {
			return true
		}
		target, err := root.Readlink(name)
		return err == nil && target == dataLink+"/"+name
	}); err != nil {
		return err
	}
	next := versionPrefix + strings.ToLower(rand.Text()[:10])
	if err := writeVersion(root, next, c); err != nil {
		return errors.Join(err, root.RemoveAll(context.WithoutCancel(ctx), next))
	}
	if err := root.RemoveAll(ctx, nextLink); err != nil {
		return err
	}
	if err := root.Symlink(next, nextLink); err != nil {
		return err
	}
	if current == "" { // a folder in its place would not be replaced
		if err := root.RemoveAll(ctx, dataLink); err != nil {
			return err
		}
	}
	if err := root.Rename(nextLink, dataLink); err != nil {
		return err
	}
	return settle(ctx, root, next, c)
}

// currentVersion is the folder that readers see, if it may be one of ours.
func currentVersion(root *hostile.Root) string {
	name, err := root.Readlink(dataLink)
	if err != nil || !strings.HasPrefix(name, versionPrefix) || strings.Contains(name, "/") {
		return ""
	}
	return name
}

func writeVersion(root *hostile.Root, version string, c *content) error {
	dirMode, gid := c.dirMode()
	dir, err := root.Mkdir(version, dirMode, -1, gid)
	if err != nil {
		return err
	}
	defer dir.Close()
	for name, e := range c.files {
		if d := path.Dir(name); d != "." {
			sub, err := dir.MkdirAll(d, dirMode, -1, gid)
			if err != nil {
				return err
			}
			sub.Close()
		}
		mode, uid, gid := c.owner(e)
		if err := dir.Create(name, e.data, mode, uid, gid); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// holds says whether a version folder holds exactly c already.
func holds(root *hostile.Root, version string, c *content) bool {
	dir, err := root.OpenRoot(version)
	if err != nil {
		return false
	}
	defer dir.Close()
	for name, e := range c.files {
		if !same(dir, name, e, c) {
			return false
		}
	}
	dirs := c.dirs()
	for d := range dirs {
		sub, err := dir.OpenRoot(d)
		if err != nil {
			return false
		}
		foreign := false
		err = sub.Names(func(name string) bool {
			name = path.Join(d, name)
			_, file := c.files[name]
			foreign = !file && !dirs[name]
			return !foreign
		})
		sub.Close()
		if err != nil || foreign {
			return false
		}
	}
	return true
}

func same(dir *hostile.Root, name string, e entry, c *content) bool {
	st, err := dir.Lstat(name)
	if err != nil || st.Size != int64(len(e.data)) {
		return false
	}
	mode, uid, gid := c.owner(e)
	if st.Mode != mode|unix.S_IFREG || st.Uid != uint32(max(uid, 0)) || gid >= 0 && st.Gid != uint32(gid) {
		return false
	}
	data, err := dir.ReadFile(name, int64(len(e.data)))
	return err == nil && bytes.Equal(data, e.data)
}

// settle makes the visible names what they should be: those that are missing,
// after a crash in the middle of an update, and those that are something else
// are made, those of files that are gone and old versions are removed.
func settle(ctx context.Context, root *hostile.Root, current string, c *content) error {
	tops := c.tops()
	for _, name := range slices.Sorted(maps.Keys(tops)) {
		want := dataLink + "/" + name
		switch target, err := root.Readlink(name); {
		case err == nil && target == want:
			continue
		case err == nil || !errors.Is(err, fs.ErrNotExist):
			if err := root.RemoveAll(ctx, name); err != nil {
				return err
			}
		}
		if err := root.Symlink(want, name); err != nil {
			return err
		}
	}
	return root.RemoveAllIn(ctx, func(name string) bool { return name == dataLink || name == current || tops[name] })
}
