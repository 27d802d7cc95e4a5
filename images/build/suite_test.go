package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
)

// A suite that names three images that there are recipes for, one of them in two
// versions, and one that there is none for.
func TestSuiteImagesHaveTheNamesThatTheSuiteAsksFor(t *testing.T) {
	// Not parallel: a program that is started meanwhile would hold e2e.test open.
	dir, out := t.TempDir(), t.TempDir()
	write := func(name, content string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755))
	}
	write("e2e.test", "#!/bin/sh\nprintf '%s\\n' 127.0.0.1:1/e2e/agnhost:2 127.0.0.1:1/e2e/agnhost:1 127.0.0.1:1/private/agnhost:1 127.0.0.1:1/gc/pause:3 127.0.0.1:1/e2e/nginx:1 127.0.0.1:1/e2e/nonewprivs:1 127.0.0.1:1/storage/nothing:1\n")
	write("agnhost", "a program")
	write("nonewprivs", "another")
	write("debian.tar", string(folder(t, t.TempDir())))

	require.NoError(t, writeSuite(dir, out, "amd64", "", []byte("pause"), nil))

	archive := filepath.Join(out, "suite.tar")
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(archive) })
	require.NoError(t, err)
	var names []string
	for _, image := range manifest {
		names = append(names, image.RepoTags...)
	}
	require.ElementsMatch(t, []string{"127.0.0.1:1/e2e/agnhost:1", "127.0.0.1:1/e2e/agnhost:2", "127.0.0.1:1/gc/pause:3", "127.0.0.1:1/e2e/nginx:1", "127.0.0.1:1/e2e/nonewprivs:1"}, names)

	tag, err := name.NewTag("127.0.0.1:1/e2e/agnhost:2")
	require.NoError(t, err)
	img, err := tarball.ImageFromPath(archive, &tag)
	require.NoError(t, err)
	config, err := img.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, []string{"/agnhost"}, config.Config.Entrypoint)
	require.Equal(t, []string{"pause"}, config.Config.Cmd)
	layers, err := img.Layers()
	require.NoError(t, err)
	require.Len(t, layers, 2, "Debian, and what is agnhost's own")

	tag, err = name.NewTag("127.0.0.1:1/e2e/nonewprivs:1")
	require.NoError(t, err)
	img, err = tarball.ImageFromPath(archive, &tag)
	require.NoError(t, err)
	layers, err = img.Layers()
	require.NoError(t, err)
	own, err := layers[len(layers)-1].Uncompressed()
	require.NoError(t, err)
	defer own.Close()
	h, err := tar.NewReader(own).Next()
	require.NoError(t, err)
	require.Equal(t, "usr/local/bin/nnp 6755", fmt.Sprintf("%s %o", h.Name, h.Mode), "who runs it becomes root unless that is forbidden")
}

func TestSuiteWithoutItsProgram(t *testing.T) {
	t.Parallel()
	err := writeSuite(t.TempDir(), t.TempDir(), "amd64", "", nil, nil)
	require.ErrorContains(t, err, "make conformance builds")
}

func TestWriteFolder(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	for _, dir := range []string{"usr/bin", "usr/share/doc/x", "tmp", "etc"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "usr/bin/su"), []byte("x"), 0o755))
	require.NoError(t, os.Chmod(filepath.Join(root, "usr/bin/su"), os.ModeSetuid|0o755))
	require.NoError(t, os.Chmod(filepath.Join(root, "tmp"), os.ModeSticky|0o777))
	require.NoError(t, os.Symlink("usr/bin", filepath.Join(root, "bin")))
	require.NoError(t, os.WriteFile(filepath.Join(root, "usr/share/doc/x/README"), nil, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(root, "tmp/left"), nil, 0o644))
	require.NoError(t, syscall.Mkfifo(filepath.Join(root, "etc/fifo"), 0o644))

	have := map[string]tar.Header{}
	for r := tar.NewReader(bytes.NewReader(folder(t, root))); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		require.True(t, h.ModTime.Equal(epoch), h.Name)
		have[h.Name] = *h
	}
	require.Contains(t, have, "usr/share/doc/", "programs may look for the folder")
	for _, name := range []string{"usr/share/doc/x/", "tmp/left", "etc/fifo"} {
		require.NotContains(t, have, name)
	}
	require.EqualValues(t, 0o4755, have["usr/bin/su"].Mode)
	require.EqualValues(t, 0o1777, have["tmp/"].Mode)
	require.Equal(t, "usr/bin", have["bin"].Linkname)
}

func folder(t *testing.T, root string) []byte {
	var b bytes.Buffer
	require.NoError(t, writeFolder(&b, root))
	return b.Bytes()
}
