package hostile

import (
	"os"
	"path/filepath"
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
