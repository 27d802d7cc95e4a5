package hostile

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// TestSetGroupStaysBeneath gives a tree to a group in which a container has left
// links, a FIFO and a folder deeper than descriptors reach: what the links lead to
// stays as it was.
func TestSetGroupStaysBeneath(t *testing.T) {
	t.Parallel()
	needs.Root(t, "owners of files")
	dir, out := t.TempDir(), t.TempDir()
	secret := filepath.Join(out, "secret")
	require.NoError(t, os.WriteFile(secret, nil, 0o600))
	vol := filepath.Join(dir, "vol")
	deep := filepath.Join(vol, "a")
	for range 100 {
		deep = filepath.Join(deep, "a")
	}
	require.NoError(t, os.MkdirAll(deep, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(deep, "file"), nil, 0o604))
	require.NoError(t, os.WriteFile(filepath.Join(vol, "run"), nil, 0o700))
	require.NoError(t, os.Symlink(secret, filepath.Join(vol, "link")))
	require.NoError(t, os.Symlink(out, filepath.Join(vol, "folderlink")))
	require.NoError(t, unix.Mkfifo(filepath.Join(vol, "fifo"), 0o600))

	r := open(t, dir)
	has, err := r.HasGroup("vol", 4242, false)
	require.NoError(t, err)
	require.False(t, has)
	within(t, func() { require.NoError(t, r.SetGroup(t.Context(), "vol", 4242, false)) })
	has, err = r.HasGroup("vol", 4242, false)
	require.NoError(t, err)
	require.True(t, has)

	stat := func(path string) (st unix.Stat_t) {
		require.NoError(t, unix.Lstat(path, &st))
		return st
	}
	for path, want := range map[string]uint32{
		vol: 0o2770 | 0o005, deep: 0o2770, filepath.Join(deep, "file"): 0o664, filepath.Join(vol, "run"): 0o760, filepath.Join(vol, "fifo"): 0o660,
	} {
		st := stat(path)
		require.Equal(t, uint32(4242), st.Gid, path)
		if path == vol {
			want = st.Mode&0o005 | 0o2770
		}
		require.Equal(t, want, st.Mode&0o7777, path)
	}
	require.Equal(t, uint32(4242), stat(filepath.Join(vol, "link")).Gid)
	require.Equal(t, uint32(0), stat(secret).Gid)
	require.Equal(t, uint32(0o600), stat(secret).Mode&0o7777)
	require.Equal(t, uint32(0), stat(out).Gid)

	require.NoError(t, r.SetGroup(t.Context(), "vol/run", 4243, true))
	require.Equal(t, uint32(0o760), stat(filepath.Join(vol, "run")).Mode&0o7777)
	require.Error(t, r.SetGroup(t.Context(), "vol/../../x", 1, false))
	require.ErrorIs(t, r.SetGroup(t.Context(), "nothing", 1, false), os.ErrNotExist)
}

// TestSetGroupOfATreeOfAnyShape: a container may make a tree that is deeper than a
// path is long, and has more names in a folder than are to be kept. A mount in it is
// left out.
func TestSetGroupOfATreeOfAnyShape(t *testing.T) {
	needs.Root(t, "owners of files, mounts")
	dir, out := t.TempDir(), t.TempDir()
	r := open(t, dir)
	t.Cleanup(func() { require.NoError(t, r.RemoveAllIn(context.Background(), nil)) }) // deeper than t.TempDir can
	at, err := r.MkdirAll("vol", 0o700, -1, -1)
	require.NoError(t, err)
	const depth, long = 10_000, 40
	for i := range depth {
		name := "d"
		if i < long {
			name = strings.Repeat("n", 255)
		}
		next, err := at.Mkdir(name, 0o700, -1, -1)
		require.NoError(t, err)
		at.Close()
		at = &Root{f: next.f, path: "deep"}
	}
	require.NoError(t, at.Create("f", nil, 0o600, -1, -1))
	defer at.Close()
	mounted := filepath.Join(dir, "vol", "mounted")
	require.NoError(t, os.Mkdir(mounted, 0o700))
	require.NoError(t, unix.Mount(out, mounted, "", unix.MS_BIND, ""))
	defer unix.Unmount(mounted, unix.MNT_DETACH)

	require.NoError(t, r.SetGroup(t.Context(), "vol", 4242, false))
	st, err := at.Lstat("f")
	require.NoError(t, err)
	require.Equal(t, [2]uint32{4242, 0o660}, [2]uint32{st.Gid, st.Mode & 0o7777})
	st, err = at.Lstat(".")
	require.NoError(t, err)
	require.Equal(t, [2]uint32{4242, 0o2770}, [2]uint32{st.Gid, st.Mode & 0o7777})
	var other unix.Stat_t
	require.NoError(t, unix.Stat(out, &other))
	require.Equal(t, uint32(0), other.Gid, "a mount is another's")
}

// endsLater ends when it was asked for a number of times.
type endsLater struct {
	context.Context
	left int
}

func (c *endsLater) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestSetGroupGivesTheTopLast: what ended in between does not look as if it were done.
func TestSetGroupGivesTheTopLast(t *testing.T) {
	t.Parallel()
	needs.Root(t, "owners of files")
	r := open(t, t.TempDir())
	vol, err := r.MkdirAll("vol", 0o700, -1, -1)
	require.NoError(t, err)
	defer vol.Close()
	for i := range 3 * walkBatch {
		require.NoError(t, vol.Create(strconv.Itoa(i), nil, 0o600, -1, -1))
	}
	require.ErrorIs(t, r.SetGroup(&endsLater{t.Context(), 2}, "vol", 4242, false), context.Canceled)
	has, err := r.HasGroup("vol", 4242, false)
	require.NoError(t, err)
	require.False(t, has)
	require.NoError(t, r.SetGroup(t.Context(), "vol", 4242, false))
	has, err = r.HasGroup("vol", 4242, false)
	require.NoError(t, errors.Join(err, vol.Names(func(name string) bool {
		one, err := vol.HasGroup(name, 4242, false)
		require.NoError(t, err)
		require.True(t, one, name)
		return true
	})))
	require.True(t, has)
}
