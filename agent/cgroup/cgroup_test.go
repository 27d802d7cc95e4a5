package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/test/needs"
)

func content(t *testing.T, parts ...string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(parts...))
	require.NoError(t, err)
	return strings.TrimSpace(string(raw))
}

// On the unified hierarchy, by the files that are written.
func TestV2Files(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	require.NoError(t, weighV2(root, "/timonel/a1/besteffort", 2))
	require.NoError(t, weighV2(root, "/timonel/a1/burstable", 1024))
	require.NoError(t, applyV2(root, "/timonel/a1/podu", Limits{CPUShares: 2048, CPUQuota: 200000, CPUPeriod: 100000, Memory: 1 << 20}))
	require.Equal(t, "1", content(t, root, "timonel/a1/besteffort/cpu.weight"), "less than any request, and than the default of 100")
	require.Equal(t, "39", content(t, root, "timonel/a1/burstable/cpu.weight"))
	require.Equal(t, "79", content(t, root, "timonel/a1/podu/cpu.weight"))
	require.Equal(t, "200000 100000", content(t, root, "timonel/a1/podu/cpu.max"))
	require.Equal(t, "1048576", content(t, root, "timonel/a1/podu/memory.max"))
	for _, dir := range []string{"", "timonel", "timonel/a1"} {
		require.FileExists(t, filepath.Join(root, dir, "cgroup.subtree_control"), "controllers are handed down")
	}
	require.NoFileExists(t, filepath.Join(root, "timonel/a1/burstable/cpu.max"), "a class has a weight and no limits")

	require.NoError(t, applyV2(root, "/timonel/a1/podu", Limits{CPUShares: 2}))
	require.Equal(t, "max 100000", content(t, root, "timonel/a1/podu/cpu.max"))
	require.Equal(t, "max", content(t, root, "timonel/a1/podu/memory.max"))
}

func TestWeight(t *testing.T) {
	t.Parallel()
	for shares, want := range map[int64]int64{0: 1, 2: 1, 1024: 39, 262144: 10000} {
		require.Equal(t, want, weight(shares), shares)
	}
}

func TestCPU(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dir := filepath.Join(root, "timonel", "podu")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "cpu.stat"), []byte("usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n"), 0o644))
	took, err := cpuV2(root, "/timonel/podu")
	require.NoError(t, err)
	require.Equal(t, 1500*time.Microsecond, took)
	took, err = cpuV2(root, "/timonel/none")
	require.NoError(t, err)
	require.Zero(t, took, "one that is not there takes nothing")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "cpu.stat"), []byte("usage_usec much\n"), 0o644))
	_, err = cpuV2(root, "/timonel/podu")
	require.Error(t, err)
}

// On this machine's own hierarchy, whichever it is.
func TestWeigh(t *testing.T) {
	needs.Root(t, "makes cgroups")
	path := "/timonel-test-" + filepath.Base(t.TempDir())
	t.Cleanup(func() { require.NoError(t, Remove(path)) })
	require.NoError(t, Check())
	require.NoError(t, Weigh(path+"/besteffort", 2))
	require.NoError(t, Weigh(path+"/burstable", 512))
	require.NoError(t, Weigh(path+"/burstable", 1500))
	if V2() {
		require.Equal(t, "1", content(t, Root, path, "besteffort/cpu.weight"))
		require.Equal(t, "58", content(t, Root, path, "burstable/cpu.weight"))
		return
	}
	require.Equal(t, "2", content(t, Root, "cpu", path, "besteffort/cpu.shares"))
	require.Equal(t, "1500", content(t, Root, "cpu", path, "burstable/cpu.shares"))
}

func TestUsage(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dir := filepath.Join(root, "timonel", "podu")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	for name, text := range map[string]string{
		"memory.current": "1000000\n", "memory.stat": "anon 500000\ninactive_file 300000\nactive_file 200000\n", "pids.current": "7\n",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	u, err := usageV2(root, "/timonel/podu")
	require.NoError(t, err)
	require.Equal(t, Usage{Memory: 700000, Pids: 7}, u)
	u, err = usageV2(root, "/timonel/none")
	require.NoError(t, err)
	require.Zero(t, u, "one that is not there takes nothing")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pids.current"), []byte("many"), 0o644))
	_, err = usageV2(root, "/timonel/podu")
	require.Error(t, err)
}

// On this machine's own hierarchy, whichever it is: this process is in one.
func TestUsageHere(t *testing.T) {
	t.Parallel()
	needs.Root(t, "makes cgroups")
	path := "/timonel-test-" + filepath.Base(t.TempDir())
	t.Cleanup(func() { require.NoError(t, Remove(path)) })
	require.NoError(t, Apply(path, Limits{Pids: 100}))
	sleep := exec.Command("sleep", "1000")
	require.NoError(t, sleep.Start())
	t.Cleanup(func() { _ = sleep.Process.Kill(); _ = sleep.Wait() })
	for _, h := range hierarchies() {
		if _, err := os.Stat(filepath.Join(h, path)); err == nil {
			require.NoError(t, os.WriteFile(filepath.Join(h, path, "cgroup.procs"), []byte(strconv.Itoa(sleep.Process.Pid)), 0o644))
		}
	}
	u, err := UsageOf(path)
	require.NoError(t, err)
	require.EqualValues(t, 1, u.Pids)
}
