package hostile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Pinned is a regular file or a folder that was found and not opened: the very
// one, whatever happens to its name. It can be mounted by its [Pinned.Path].
type Pinned struct {
	f *os.File
	// Mode is st_mode.
	Mode uint32
}

// Close lets go of it.
func (p *Pinned) Close() error { return p.f.Close() }

// IsDir says whether it is a folder; else it is a regular file.
func (p *Pinned) IsDir() bool { return p.Mode&unix.S_IFMT == unix.S_IFDIR }

// Path names it for calls of this process that take a path.
func (p *Pinned) Path() string { return "/proc/self/fd/" + strconv.Itoa(int(p.f.Fd())) }

// Pin finds what name leads to. Unlike everything else here it follows links as
// long as they stay beneath the folder (a key of a configMap volume is one), and
// crosses mounts (a hostPath volume may hold several file systems). What is
// neither a regular file nor a folder is refused.
func (r *Root) Pin(name string) (*Pinned, error) {
	fd, err := r.openat2("find", name, unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, err
	}
	p := &Pinned{f: os.NewFile(uintptr(fd), filepath.Join(r.path, name))}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		p.Close()
		return nil, r.fail("stat", name, err)
	}
	p.Mode = st.Mode
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		p.Close()
		return nil, r.fail("find", name, fmt.Errorf("%w: it is %s, neither a regular file nor a folder", ErrKind, KindName(st.Mode)))
	}
	return p, nil
}

// PinOrMake is Pin of what exists. What does not is made as folders, with the
// mode that this folder has, in the last one that exists.
func (r *Root) PinOrMake(name string) (*Pinned, error) {
	p, err := r.Pin(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(r.fd(), &st); err != nil {
		return nil, r.fail("stat", ".", err)
	}
	parts := strings.Split(filepath.Clean(name), "/")
	have := len(parts) - 1
	for ; have > 0; have-- {
		p, err = r.Pin(filepath.Join(parts[:have]...))
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if have == 0 {
		p, err = r.Pin(".")
	}
	if err != nil {
		return nil, err
	}
	at, err := OpenRoot(p.Path())
	p.Close()
	if err != nil {
		return nil, r.fail("make folder", name, err)
	}
	defer at.Close()
	at.path = filepath.Join(r.path, filepath.Join(parts[:have]...))
	rest := filepath.Join(parts[have:]...)
	made, err := at.MkdirAll(rest, st.Mode&0o7777, -1, -1)
	if err != nil {
		return nil, err
	}
	defer made.Close()
	return made.Pin(".")
}
