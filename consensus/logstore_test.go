package consensus

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A damaged write-ahead log is refused, as a damaged file of raft-boltdb is: but
// for damage to its last append, which looks like one cut off by a crash.
func TestBadWALIsRefusedAndLeftAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.logStore = LogStoreWAL
	c.startAll(1)
	for range 20 {
		c.leader().put(t, "key", strings.Repeat("x", 2000))
	}
	c.leader().put(t, "last", "one")
	c.kill("c1")
	template := filepath.Join(c.dir, "c1")
	segment := func(t *testing.T, dir string) string {
		t.Helper()
		files, err := filepath.Glob(filepath.Join(dir, walDir, "*.wal"))
		must(t, err)
		if len(files) == 0 {
			t.Fatal("no segment")
		}
		return files[0]
	}
	for name, tt := range map[string]struct {
		spoil func(t *testing.T, dir string, cfg *Config)
		want  []string
	}{
		"intact": {func(*testing.T, string, *Config) {}, nil},
		"segment cut": {func(t *testing.T, dir string, _ *Config) {
			must(t, os.Truncate(segment(t, dir), 20000))
		}, []string{".wal", "truncated", "remove"}},
		"index of segments removed": {func(t *testing.T, dir string, _ *Config) {
			must(t, os.Remove(filepath.Join(dir, walDir, walMeta)))
		}, []string{walMeta, "missing", "remove"}},
		"index of segments cut": {func(t *testing.T, dir string, _ *Config) {
			must(t, os.Truncate(filepath.Join(dir, walDir, walMeta), 8192))
		}, []string{walMeta, "truncated", "remove"}},
		"removed": {func(t *testing.T, dir string, _ *Config) {
			must(t, os.RemoveAll(filepath.Join(dir, walDir)))
		}, []string{walDir, "missing or empty", "remove"}},
		"one bit of an entry flipped": {func(t *testing.T, dir string, _ *Config) {
			b, err := os.ReadFile(segment(t, dir))
			must(t, err)
			i := strings.Index(string(b), "key=xxx")
			if i < 0 {
				t.Fatal("the entry is not there")
			}
			b[i+5] ^= 1
			must(t, os.WriteFile(segment(t, dir), b, 0o600))
		}, []string{walDir, "checksum", "remove"}},
		"another kind configured": {func(_ *testing.T, _ string, cfg *Config) {
			cfg.LogStore = LogStoreBolt
		}, []string{"wal one", "boltdb is configured"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := c.config("c1")
			cfg.DataDir = filepath.Join(t.TempDir(), "data")
			must(t, os.CopyFS(cfg.DataDir, os.DirFS(template)))
			tt.spoil(t, cfg.DataDir, &cfg)
			n, err := c.open(cfg)
			if tt.want == nil {
				must(t, err)
				n.close(false)
				return
			}
			if err == nil {
				n.close(false)
				t.Fatal("it was opened")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q lacks %q", err, w)
				}
			}
		})
	}
}
