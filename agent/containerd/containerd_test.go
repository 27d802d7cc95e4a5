package containerd

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func config(dir string) DaemonConfig {
	return DaemonConfig{Dir: dir, PauseImage: "docker.io/timonel/pause:latest", CNIConfDir: filepath.Join(dir, "cni"), CNIBinDirs: []string{"/opt/cni"}}
}

func TestConfigIsDerivedFromItsFolder(t *testing.T) {
	t.Parallel()
	c := config("/data/a1")
	text := string(c.render())
	for _, want := range []string{
		`root = "/data/a1/root"`, `state = "/data/a1/state"`, `address = "/data/a1/containerd.sock"`, `Root = "/data/a1/runc"`,
		`conf_dir = "/data/a1/cni"`, `bin_dir = "/opt/cni"`, `config_path = "/data/a1/certs.d"`, `sandbox_image = "docker.io/timonel/pause:latest"`,
	} {
		require.Contains(t, text, want)
	}
	if path, err := exec.LookPath("containerd"); err == nil {
		file := filepath.Join(t.TempDir(), "config.toml")
		require.NoError(t, os.WriteFile(file, c.render(), 0o600))
		out, err := exec.Command(path, "--config", file, "config", "dump").CombinedOutput()
		require.NoError(t, err, string(out))
	}
	deep := config("/" + strings.Repeat("d", 120))
	require.Less(t, len(deep.paths().socket), maxSocketPath)
	require.NotEqual(t, deep.paths().socket, (&DaemonConfig{Dir: "/" + strings.Repeat("e", 120)}).paths().socket)
}

func TestValidateNamesTheField(t *testing.T) {
	t.Parallel()
	for field, spoil := range map[string]func(*DaemonConfig){
		"Dir":        func(c *DaemonConfig) { c.Dir = "relative" },
		"PauseImage": func(c *DaemonConfig) { c.PauseImage = "" },
		"CNIConfDir": func(c *DaemonConfig) { c.CNIConfDir = "" },
		"CNIBinDirs": func(c *DaemonConfig) { c.CNIBinDirs = nil },
	} {
		c := config("/data")
		spoil(&c)
		require.ErrorContains(t, c.Validate(), field)
	}
	c := config("/data")
	c.Binary = "no-such-containerd"
	if os.Geteuid() == 0 {
		_, err := NewDaemon(c)
		require.ErrorContains(t, err, "apt-get install containerd")
	}
}

func TestProcessIdentity(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "100")
	require.NoError(t, cmd.Start())
	start, err := startTime(cmd.Process.Pid)
	require.NoError(t, err)
	p := process{pid: cmd.Process.Pid, start: start}
	done := make(chan error, 1)
	go func() { done <- p.wait(t.Context()) }()
	select {
	case <-done:
		t.Fatal("it still runs")
	case <-time.After(50 * time.Millisecond):
	}
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.NoError(t, <-done)
	require.NoError(t, process{pid: os.Getpid(), start: "other"}.wait(t.Context()), "a pid used again is another process")
}

func TestAnArchiveIsARegularFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo.tar"), 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "folder.tar"), 0o700))
	im := NewImporter(nil, dir, filepath.Join(dir, "record"), slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- im.ImportAll(t.Context()) }()
	select {
	case err := <-done:
		require.ErrorContains(t, err, "a FIFO")
		require.ErrorContains(t, err, "a folder")
	case <-time.After(20 * time.Second):
		t.Fatal("blocks")
	}
}

// The smallest archives come first, and no more than are asked for; Run brings in the
// rest, tries again what failed, and says once that all were tried.
func TestImportsInOrder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, size := range map[string]int{"a.tar": 30, "b.tar": 10, "c.tar": 20} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o600))
	}
	im := NewImporter(nil, dir, filepath.Join(dir, "record"), slog.New(slog.DiscardHandler))
	var loaded []string
	bad := true
	im.Load = func(_ context.Context, path string) ([]string, error) {
		name := filepath.Base(path)
		loaded = append(loaded, name)
		if name == "c.tar" && bad {
			return nil, errors.New("containerd does not answer")
		}
		return nil, nil
	}
	require.NoError(t, im.ImportUntil(t.Context(), func() bool { return len(loaded) > 0 }))
	require.Equal(t, []string{"b.tar"}, loaded)
	require.True(t, im.Coming())

	require.ErrorContains(t, im.ImportAll(t.Context()), "containerd does not answer")
	require.Equal(t, []string{"b.tar", "c.tar", "a.tar"}, loaded)
	require.True(t, im.Coming(), "until Run has")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	waited := make(chan struct{})
	im.Tried = func() { close(waited) } // once only, or it panics
	bad = false
	go func() { done <- im.Run(ctx) }()
	<-waited
	require.False(t, im.Coming())
	require.Equal(t, []string{"b.tar", "c.tar", "a.tar", "c.tar"}, loaded, "what was imported is not again")
	cancel()
	require.NoError(t, <-done)
}

func TestNothingIsComingWithoutAFolder(t *testing.T) {
	t.Parallel()
	require.False(t, NewImporter(nil, "", filepath.Join(t.TempDir(), "record"), slog.New(slog.DiscardHandler)).Coming())
}
