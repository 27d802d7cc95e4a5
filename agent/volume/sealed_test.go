package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What is mounted below a mount can be written to unless that is sealed; the volume itself
// stays as it is.
func TestSealed(t *testing.T) {
	m := manager(t, Config{})
	pod := newPod()
	vol := t.TempDir()
	inner := filepath.Join(vol, "sub/inner")
	require.NoError(t, os.MkdirAll(inner, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(vol, "file"), []byte("x"), 0o600))
	require.NoError(t, unix.Mount("tmpfs", inner, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(inner, 0)) })
	write := func(path string) error { return os.WriteFile(path, nil, 0o600) }

	plain, err := m.SubPath(pod, "c", 0, vol, "sub")
	require.NoError(t, err)
	require.NoError(t, write(filepath.Join(plain, "inner/a")))
	sub, err := m.SubPath(pod, "c", 1, vol, "sub")
	require.NoError(t, err)
	for _, tt := range []struct {
		index      int
		path, into string
	}{{1, sub, "inner"}, {2, vol, "sub/inner"}, {2, vol, "sub"}, {3, vol, ""}} {
		sealed, err := m.Sealed(pod, "c", tt.index, tt.path)
		require.NoError(t, err)
		require.ErrorIs(t, write(filepath.Join(sealed, tt.into, "b")), unix.EROFS, "%s in %s", tt.into, tt.path)
		require.FileExists(t, filepath.Join(sealed, map[string]string{sub: "inner/a", vol: "sub/inner/a"}[tt.path]))
	}
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(vol, link))
	sealed, err := m.Sealed(pod, "c", 4, link)
	require.NoError(t, err, "hostPath volumes may be links, as /var/run is")
	require.ErrorIs(t, write(filepath.Join(sealed, "sub/inner/b")), unix.EROFS)
	sealed, err = m.Sealed(pod, "c", 5, "/")
	require.NoError(t, err)
	require.ErrorIs(t, write(filepath.Join(sealed, inner, "b")), unix.EROFS)
	for _, plain := range []string{filepath.Join(vol, "file"), filepath.Join(vol, "nothing")} {
		sealed, err = m.Sealed(pod, "c", 6, plain)
		require.NoError(t, err)
		require.Equal(t, plain, sealed, "nothing is mounted below it")
	}

	later := filepath.Join(vol, "sub/later")
	require.NoError(t, os.Mkdir(later, 0o755))
	require.NoError(t, unix.Mount("tmpfs", later, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(later, 0)) })
	require.ErrorIs(t, write(filepath.Join(m.PodDir(pod.UID), "subpaths/c/2/sub/later/x")), unix.EROFS, "what comes later does not come in")

	require.NoError(t, write(filepath.Join(inner, "c")), "the volume itself can be written to")
	require.NoError(t, write(filepath.Join(vol, "sub/d")))
	require.NoError(t, m.Teardown(t.Context(), pod.UID))
	require.FileExists(t, filepath.Join(vol, "file"))
	require.FileExists(t, filepath.Join(inner, "a"))
}
