package kubelet

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestALogIsARegularFile has a pod that collects logs put something else there.
func TestALogIsARegularFile(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "0.log"), []byte("SECRET"), 0o600))
	for _, tc := range []struct {
		name string
		ok   bool
		make func(path string) error
	}{
		{"a log", true, func(p string) error { return os.WriteFile(p, nil, 0o600) }},
		{"a link", false, func(p string) error { return os.Symlink(filepath.Join(outside, "0.log"), p) }},
		{"a fifo", false, func(p string) error { return unix.Mkfifo(p, 0o600) }},
		{"a folder", false, func(p string) error { return os.Mkdir(p, 0o700) }},
		{"a link for its folder", false, func(p string) error {
			if err := os.Remove(filepath.Dir(p)); err != nil {
				return err
			}
			return os.Symlink(outside, filepath.Dir(p))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "logs", "ns_pod_uid", "c", "0.log")
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, tc.make(path))
			done := make(chan error, 1)
			go func() { done <- checkLog(path) }()
			select {
			case err := <-done:
				require.Equal(t, tc.ok, err == nil, "%v", err)
			case <-time.After(20 * time.Second):
				t.Fatal("blocks")
			}
		})
	}
}
