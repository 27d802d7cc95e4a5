package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// fakeImages mounts a folder as what any image holds.
type fakeImages struct {
	content string
	views   map[string]string // image by key
	refuse  error
}

func (f *fakeImages) MountView(_ context.Context, key, image, target string) error {
	if f.refuse != nil {
		return f.refuse
	}
	f.views[key] = image
	if err := unix.Mount(f.content, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

func (f *fakeImages) RemoveView(_ context.Context, key string) error {
	delete(f.views, key)
	return f.refuse
}

func TestImageVolume(t *testing.T) {
	t.Parallel()
	content := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(content, "etc"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(content, "etc/os"), []byte("x"), 0o644))
	require.NoError(t, os.Symlink("/etc", filepath.Join(content, "out")))
	require.NoError(t, os.Symlink("etc/os", filepath.Join(content, "in")))
	images := &fakeImages{content: content, views: map[string]string{}}
	m := manager(t, Config{Images: images})
	v := corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "some/image"}}}
	pod := newPod(v)
	require.True(t, ReadOnly(&v))

	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	has, err := m.HasImage(pod, "v")
	require.NoError(t, err)
	require.False(t, has, "it has to be pulled first")
	require.NoError(t, m.MountImage(t.Context(), pod, "v", "sha256:1"))
	require.Equal(t, map[string]string{"timonel-volume-uid-1-v": "sha256:1"}, images.views)
	m = New(m.cfg) // an agent that begins anew
	has, err = m.HasImage(pod, "v")
	require.NoError(t, err)
	require.True(t, has)
	again, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, mounts, again)
	require.FileExists(t, filepath.Join(mounts["v"], "etc/os"))

	for i, good := range []string{"etc", "etc/os", "in"} {
		path, err := m.SubPath(pod, "c", i, mounts["v"], good)
		require.NoError(t, err, good)
		_, err = os.Stat(path)
		require.NoError(t, err)
	}
	for _, bad := range []string{"out", "out/passwd", "../x", "missing", "etc/missing"} {
		_, err := m.SubPath(pod, "c", 9, mounts["v"], bad)
		require.Error(t, err, bad)
		require.NotErrorIs(t, err, unix.EROFS, "nothing is made in an image")
	}

	images.refuse = errors.New("containerd is away")
	require.ErrorContains(t, m.Teardown(t.Context(), pod.UID), "containerd is away")
	require.DirExists(t, m.PodDir(pod.UID), "what there was of it is still known")
	images.refuse = nil
	require.NoError(t, m.Teardown(t.Context(), pod.UID))
	require.Empty(t, images.views)
	require.NoDirExists(t, m.PodDir(pod.UID))
	require.FileExists(t, filepath.Join(content, "etc/os"))
}
