package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxMountInfo bounds the kernel's list of mounts (100,000 of them by default).
const maxMountInfo = 64 << 20

// MountsBelow lists the mount points at or below dir in the order they were
// mounted.
func MountsBelow(dir string) ([]string, error) {
	raw, err := ReadRegular("/proc/self/mountinfo", maxMountInfo)
	if err != nil {
		return nil, err
	}
	var out []string
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range bytes.Lines(raw) {
		fields := bytes.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape.Replace(string(fields[4]))
		if point == dir || strings.HasPrefix(point, dir+"/") {
			out = append(out, point)
		}
	}
	return out, nil
}

// Unmount unmounts everything at or below a folder whose path is the agent's
// own, innermost first. The way to each mount is looked up without following
// links, so what a container put there leads to no other mount.
func Unmount(dir string) error {
	dir, err := filepath.EvalSymlinks(dir) // as the kernel names it
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	parent, err := OpenRoot(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	for {
		points, err := MountsBelow(dir)
		if err != nil || len(points) == 0 {
			return err
		}
		var errs []error
		done := 0
		for _, point := range slices.Backward(points) {
			rel, err := filepath.Rel(parent.path, point)
			if err == nil {
				err = parent.detach(rel)
			}
			if err != nil {
				errs = append(errs, err)
			} else {
				done++
			}
		}
		// One that another hid is seen once that is gone.
		if done == 0 {
			return fmt.Errorf("unmount what is below %s: %w", dir, errors.Join(errs...))
		}
	}
}

// detach unmounts what is mounted on name.
func (r *Root) detach(name string) error {
	fd, err := r.openat2("unmount", name, unix.OpenHow{
		Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath &^ unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Unmount("/proc/self/fd/"+strconv.Itoa(fd), unix.MNT_DETACH); err != nil {
		return r.fail("unmount", name, err)
	}
	return nil
}
