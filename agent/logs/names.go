package logs

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

// Names as the kubelet's: N.log is written to, N.log.20060102-150405 was rotated
// at that time, .gz is a compressed one, .tmp one that is being made. Of several
// in one second the later ones have _001 to _999 after the time, so that names
// are in the order of their age.
const (
	keyFormat = "20060102-150405"
	gzSuffix  = ".gz"
	tmpSuffix = ".tmp"
)

// kept is one rotated file of a log.
type kept struct {
	key  string // time and number
	name string // in the container's folder
	gz   bool
	size int64
}

// parseName says what a name in a container's folder is of the log base. tmp
// marks one that is being made. Names that are not of this form are others'.
func parseName(base, name string) (k kept, tmp, ok bool) {
	rest, ok := strings.CutPrefix(name, base+".")
	if !ok {
		return kept{}, false, false
	}
	rest, tmp = strings.CutSuffix(rest, tmpSuffix)
	rest, gz := strings.CutSuffix(rest, gzSuffix)
	if !isKey(rest) {
		return kept{}, false, false
	}
	return kept{key: rest, name: name, gz: gz}, tmp, true
}

func isKey(s string) bool {
	if len(s) < len(keyFormat) {
		return false
	}
	if _, err := time.Parse(keyFormat, s[:len(keyFormat)]); err != nil {
		return false
	}
	n := s[len(keyFormat):]
	return n == "" || len(n) == 4 && n[0] == '_' && strings.Trim(n[1:], "0123456789") == ""
}

// nextKey is a key for now that is later than last ("": none), whatever the
// clock does.
func nextKey(now time.Time, last string) string {
	key := now.Format(keyFormat)
	if last == "" || key > last {
		return key
	}
	second, number := last[:len(keyFormat)], 0
	if len(last) > len(keyFormat) {
		number, _ = strconv.Atoi(last[len(keyFormat)+1:]) // isKey saw to it
	}
	if number < 999 {
		return second + "_" + strconv.Itoa(1000 + number + 1)[1:]
	}
	t, _ := time.Parse(keyFormat, second) // likewise
	if next := t.Add(time.Second).Format(keyFormat); isKey(next) {
		return next
	}
	return key // after the year 9999, which somebody put there
}

// maxListed bounds how many rotated files of one log are looked at together.
// More of them can only be somebody else's doing; the oldest are removed.
const maxListed = 1024

// list finds the rotated files of a log, oldest first, and removes what an
// interrupted step left: files being made but that of the key making, and the plain
// file of a compressed one. What is of such a name and no regular file goes too.
// What could not be removed is said beside the list.
func list(ctx context.Context, dir *hostile.Root, base, making string) ([]kept, error) {
	var out []kept
	var errs []error
	tidy := func(name string) {
		if err := dir.RemoveAll(ctx, name); err != nil {
			errs = append(errs, err)
		}
	}
	err := dir.Names(func(name string) bool {
		k, tmp, ok := parseName(base, name)
		switch {
		case !ok:
		case tmp:
			if k.key != making {
				tidy(name)
			}
		default:
			out = append(out, k)
			if len(out) > 2*maxListed {
				out = oldestOut(out, maxListed, tidy)
			}
		}
		return true
	})
	if err != nil {
		errs = append(errs, err)
	}
	out = oldestOut(out, maxListed, tidy)
	use := out[:0]
	for i, k := range out {
		if !k.gz && i+1 < len(out) && out[i+1].key == k.key { // the compressed one is whole
			tidy(k.name)
			continue
		}
		st, err := dir.Lstat(k.name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			tidy(k.name)
			continue
		}
		k.size = st.Size
		use = append(use, k)
	}
	return use, errors.Join(errs...)
}

// oldestOut sorts by age and removes all but the newest n.
func oldestOut(list []kept, n int, remove func(name string)) []kept {
	slices.SortFunc(list, func(a, b kept) int { return strings.Compare(a.name, b.name) })
	for len(list) > n {
		remove(list[0].name)
		list = list[1:]
	}
	return list
}

// Depth is how many names a log's path has below the folder of all logs:
// NAMESPACE_NAME_UID/CONTAINER/N.log.
const Depth = 3

// Remove removes the log of a container that is gone, with all that was rotated
// of it.
func Remove(ctx context.Context, path string) error {
	root, rel := hostile.Split(path, Depth)
	logs, err := hostile.OpenRoot(root)
	if err != nil {
		return ignoreMissing(err)
	}
	defer logs.Close()
	dir, err := logs.OpenRoot(filepath.Dir(rel))
	if err != nil {
		return ignoreMissing(err)
	}
	defer dir.Close()
	base := filepath.Base(rel)
	errs := []error{dir.RemoveAll(ctx, base)}
	err = dir.Names(func(name string) bool {
		if _, _, ok := parseName(base, name); ok {
			errs = append(errs, dir.RemoveAll(ctx, name))
		}
		return len(errs) < maxListed
	})
	return errors.Join(append(errs, err)...)
}
