package consensus

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func TestRestartKeepsEverything(t *testing.T) { forLogStores(t, testRestartKeepsEverything) }

func testRestartKeepsEverything(t *testing.T, c *cluster) {
	c.startAll(3)
	for i := range 50 {
		c.leader().put(t, fmt.Sprint(i), "x")
	}
	want := c.leader().fsm.state()
	for _, id := range []string{"c1", "c2", "c3"} {
		c.kill(id)
	}
	c.startAll(3)
	for _, id := range []string{"c1", "c2", "c3"} {
		n := c.node(id)
		must(t, n.ReadBarrier(context.Background()))
		if got := n.fsm.state(); got.Hash != want.Hash || got.N != want.N {
			t.Errorf("%s has %d commands after the restart, want %d", id, got.N, want.N)
		}
	}
}

// smallSnapshots makes snapshots frequent and the log short.
func smallSnapshots(c *cluster) {
	c.tune = func(cfg *Config) {
		cfg.SnapshotThreshold, cfg.TrailingLogs = 20, 5
		cfg.SnapshotInterval = 50 * time.Millisecond
	}
}

func TestWipedReplicaComesBackAsNonVoterAndCatchesUp(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	smallSnapshots(c)
	c.startAll(3)
	victim := c.followers()[0].cfg.ID
	for i := range 100 {
		c.leader().put(t, fmt.Sprint(i), "x")
	}
	must(t, c.leader().Snapshot())
	c.kill(victim)
	c.wipe(victim)
	c.leader().put(t, "while", "away")
	n := c.start(victim)
	if id, _, _ := c.leader().Leader(); id == victim {
		t.Fatal("the empty replica leads")
	}
	must(t, n.ReadBarrier(context.Background()))
	if n.fsm.get("while") != "away" || n.fsm.get("7") != "x" {
		t.Errorf("the wiped replica did not catch up: %v", n.fsm.state())
	}
	eventually(t, "the wiped replica to vote again", func() error {
		for _, m := range c.leader().Members() {
			if m.ID == victim && m.Voter {
				return nil
			}
		}
		return fmt.Errorf("%v", c.leader().Members())
	})
	c.sameState()
	if first := n.Status().FirstIndex; first <= 1 {
		t.Errorf("the log starts at %d: it did not come by a snapshot", first)
	}
}

func TestWipedReplicaDoesNotFoundAnotherCluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.leader().put(t, "a", "b")
	// Two of three lose their data, the third is down: no quorum is left that
	// knows what was written. Founding a new cluster would lose it silently.
	for _, id := range []string{"c1", "c2", "c3"} {
		c.kill(id)
	}
	c.wipe("c1")
	c.wipe("c2")
	c.start("c1")
	c.start("c2")
	time.Sleep(500 * time.Millisecond) // the period in which nothing may happen
	c.start("c3")
	time.Sleep(500 * time.Millisecond)
	for _, id := range []string{"c1", "c2"} {
		if s := c.node(id).Status(); s.Role != "joining" || len(s.Problems) == 0 {
			t.Errorf("%s is %q (%q), want joining", id, s.Role, s.Problems)
		}
	}
}

func TestLateReplicaJoinsAndVotes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.leader().put(t, "a", "b")
	n := c.start("c4")
	must(t, n.ReadBarrier(context.Background()))
	if n.fsm.get("a") != "b" {
		t.Error("the new replica lacks a write")
	}
	eventually(t, "c4 to vote", func() error {
		for _, m := range c.leader().Members() {
			if m.ID == "c4" && m.Voter {
				return nil
			}
		}
		return errors.New("not yet")
	})
	must(t, c.leader().RemoveServer(context.Background(), "c4"))
	if m := c.leader().Members(); len(m) != 3 {
		t.Errorf("members after the removal: %v", m)
	}
}

func TestSingleReplica(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1).startAll(1)
	n := c.leader()
	n.put(t, "a", "b")
	must(t, n.ReadBarrier(context.Background()))
	must(t, n.Close())
}

// digest returns the name and the hash of every file below dir except lock
// files, which say nothing.
func digest(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == lockFile {
			return err
		}
		b, err := os.ReadFile(path)
		out[path] = fmt.Sprintf("%x", sha256.Sum256(b))
		return err
	}))
	return out
}

// snapshotDirs returns the replica's snapshots, oldest first.
func (c *cluster) snapshotDirs(id string) []string {
	dirs, err := filepath.Glob(filepath.Join(c.dir, id, snapshotDir, "*-*-*"))
	must(c.t, err)
	return dirs
}

func TestBadDataIsRefusedAndLeftAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	smallSnapshots(c)
	c.startAll(1)
	for i := range 60 {
		c.leader().put(t, fmt.Sprint(i), strings.Repeat("x", 2000))
	}
	must(t, c.leader().Snapshot())
	c.leader().put(t, "last", "one")
	c.kill("c1")
	template := filepath.Join(c.dir, "c1")

	truncate := func(t *testing.T, file string, to int64) {
		t.Helper()
		must(t, os.Truncate(file, to))
	}
	newestState := func(dir string) string {
		dirs, _ := filepath.Glob(filepath.Join(dir, snapshotDir, "*-*-*"))
		return filepath.Join(dirs[len(dirs)-1], "state.bin")
	}
	tests := []struct {
		name  string
		spoil func(t *testing.T, dir string, cfg *Config)
		want  []string
	}{
		{"another cluster's", func(t *testing.T, _ string, cfg *Config) { cfg.ClusterID = "other" },
			[]string{identityFile, `cluster "test"`, `cluster "other"`}},
		{"another replica's", func(t *testing.T, _ string, cfg *Config) {
			cfg.ID = "c9"
			cfg.TLS = c.ca.config(t, "timonel:controller:c9", "timonel:controllers")
		}, []string{identityFile, `replica "c1"`, `replica "c9"`}},
		{"log cut in half", func(t *testing.T, dir string, _ *Config) {
			truncate(t, filepath.Join(dir, logFile), 20000)
		}, []string{logFile, "truncated", "remove"}},
		{"log cut to nothing", func(t *testing.T, dir string, _ *Config) {
			truncate(t, filepath.Join(dir, logFile), 0)
		}, []string{logFile, "missing or empty", "remove"}},
		{"log cut to a page", func(t *testing.T, dir string, _ *Config) {
			truncate(t, filepath.Join(dir, logFile), 4096)
		}, []string{logFile, "remove"}},
		{"log removed", func(t *testing.T, dir string, _ *Config) {
			must(t, os.Remove(filepath.Join(dir, logFile)))
		}, []string{logFile, "missing or empty", "remove"}},
		{"log overwritten with noise", func(t *testing.T, dir string, _ *Config) {
			f, err := os.OpenFile(filepath.Join(dir, logFile), os.O_WRONLY, 0)
			must(t, err)
			defer f.Close()
			for off := int64(8192); off < 200000; off += 4096 {
				_, err := f.WriteAt([]byte(strings.Repeat("\xa5", 4096)), off)
				must(t, err)
			}
		}, []string{logFile, "damaged", "remove"}},
		{"one bit of an entry flipped", func(t *testing.T, dir string, _ *Config) {
			file := filepath.Join(dir, logFile)
			b, err := os.ReadFile(file)
			must(t, err)
			mark := []byte("last=one")
			for i := bytes.Index(b, mark); i >= 0; i = bytes.Index(b, mark) { // every copy
				b[i+5] ^= 1
			}
			must(t, os.WriteFile(file, b, 0o600))
		}, []string{logFile, "checksum", "remove"}},
		{"snapshots truncated", func(t *testing.T, dir string, _ *Config) {
			dirs, _ := filepath.Glob(filepath.Join(dir, snapshotDir, "*-*-*"))
			for _, d := range dirs {
				truncate(t, filepath.Join(d, "state.bin"), 100)
			}
		}, []string{"state.bin", "100 bytes", "remove"}},
		{"snapshot with a wrong byte", func(t *testing.T, dir string, _ *Config) {
			dirs, _ := filepath.Glob(filepath.Join(dir, snapshotDir, "*-*-*"))
			for _, d := range dirs[:len(dirs)-1] {
				must(t, os.RemoveAll(d))
			}
			b, err := os.ReadFile(newestState(dir))
			must(t, err)
			b[len(b)/2] ^= 1
			must(t, os.WriteFile(newestState(dir), b, 0o600))
		}, []string{"state.bin", "checksum", "remove"}},
		{"snapshot without its description", func(t *testing.T, dir string, _ *Config) {
			dirs, _ := filepath.Glob(filepath.Join(dir, snapshotDir, "*-*-*"))
			for _, d := range dirs {
				truncate(t, filepath.Join(d, "meta.json"), 10)
			}
		}, []string{"meta.json", "remove"}},
		{"snapshots removed", func(t *testing.T, dir string, _ *Config) {
			must(t, os.RemoveAll(filepath.Join(dir, snapshotDir)))
		}, []string{snapshotDir, "no snapshot reaches", "remove"}},
		{"identity removed", func(t *testing.T, dir string, _ *Config) {
			must(t, os.Remove(filepath.Join(dir, identityFile)))
		}, []string{identityFile, "missing", "restore"}},
		{"identity garbled", func(t *testing.T, dir string, _ *Config) {
			must(t, os.WriteFile(filepath.Join(dir, identityFile), []byte("{"), 0o600))
		}, []string{identityFile, "cannot be read", "restore"}},
		{"format of the future", func(t *testing.T, dir string, _ *Config) {
			must(t, os.WriteFile(filepath.Join(dir, identityFile), []byte(`{"format":7}`), 0o600))
		}, []string{identityFile, "format 7"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := c.config("c1")
			cfg.DataDir = filepath.Join(t.TempDir(), "data")
			must(t, os.CopyFS(cfg.DataDir, os.DirFS(template)))
			tt.spoil(t, cfg.DataDir, &cfg)
			before := digest(t, cfg.DataDir)
			_, err := c.open(cfg)
			if err == nil {
				t.Fatal("it was opened")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q lacks %q", err, w)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q has more than one line", err)
			}
			after := digest(t, cfg.DataDir)
			for path, sum := range before {
				if after[path] != sum {
					t.Errorf("%s was changed", path)
				}
			}
		})
	}
	t.Run("in use", func(t *testing.T) {
		cfg := c.config("c1")
		c.start("c1")
		defer c.kill("c1")
		_, err := c.open(cfg)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
			t.Errorf("second open: %v", err)
		}
	})
	t.Run("port in use", func(t *testing.T) {
		n := c.start("c1")
		defer c.kill("c1")
		cfg := c.config("c1")
		cfg.DataDir, cfg.BindAddress = t.TempDir(), n.raft
		_, err := c.open(cfg)
		if err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("open on a port in use: %v", err)
		}
	})
}

func TestOlderSnapshotServesWhenTheLogReachesBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1).startAll(1)
	for range 2 {
		for i := range 20 {
			c.leader().put(t, fmt.Sprint(i), "x")
		}
		must(t, c.leader().Snapshot())
	}
	want := c.leader().fsm.state()
	c.kill("c1")
	dirs := c.snapshotDirs("c1")
	if len(dirs) != 2 {
		t.Fatalf("%d snapshots, want 2", len(dirs))
	}
	must(t, os.Truncate(filepath.Join(dirs[1], "state.bin"), 50))
	n := c.start("c1")
	must(t, n.ReadBarrier(context.Background()))
	if got := n.fsm.state(); got.Hash != want.Hash {
		t.Errorf("state %d commands, want %d", got.N, want.N)
	}
	eventually(t, "no other problem", func() error { // in touch, at last
		if p := n.Status().Problems; len(p) != 1 || !strings.Contains(p[0], "damaged snapshot") {
			return fmt.Errorf("problems: %q", p)
		}
		return nil
	})
}

func TestLogFileIsCompactedAtStart(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), logFile)
	log := testLog(t)
	store, err := openLog(file, logExtent{}, log)
	must(t, err)
	d := newDisk(store, nil, log, nil)
	for i := range uint64(60) {
		must(t, d.StoreLog(&raft.Log{Index: i + 1, Term: 1, Type: raft.LogNoop, Data: make([]byte, 1<<20)}))
	}
	must(t, d.DeleteRange(1, 58))
	must(t, store.Close())
	before, err := os.Stat(file)
	must(t, err)
	x, err := inspectLog(file, true)
	must(t, err)
	store, err = openLog(file, x, log)
	must(t, err)
	must(t, store.Close())
	after, err := os.Stat(file)
	must(t, err)
	if after.Size() > before.Size()/4 {
		t.Errorf("%d bytes before, %d after", before.Size(), after.Size())
	}
	if x, err := inspectLog(file, true); x.first != 59 || x.last != 60 || err != nil {
		t.Errorf("log after compaction: %d to %d, %v", x.first, x.last, err)
	}
}
