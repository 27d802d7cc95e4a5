package consensus

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func (c *cluster) seed(id string, data map[string]string) error {
	return Seed(SeedConfig{DataDir: filepath.Join(c.dir, id), ClusterID: c.id, ID: id, Address: "127.0.0.1:1", Index: 5000, Term: 100, LogStore: c.logStore},
		func(w io.Writer) error { return gob.NewEncoder(w).Encode(mapState{Data: data, N: len(data)}) })
}

func TestSeed(t *testing.T) { forLogStores(t, testSeed) }

func testSeed(t *testing.T, c *cluster) {
	must(t, c.seed("c1", map[string]string{"old": "state"}))
	c.startAll(3)
	leader := c.leader()
	if index, term := leader.machine.position(); leader.cfg.ID != "c1" || index <= 5000 || term <= 100 {
		t.Errorf("%s leads at index %d, term %d", leader.cfg.ID, index, term)
	}
	c.node("c2").put(t, "new", "write")
	for _, id := range []string{"c1", "c2", "c3"} {
		eventually(t, "the state on "+id, func() error {
			f := c.node(id).fsm
			if f.get("old") != "state" || f.get("new") != "write" {
				return fmt.Errorf("%v", f.state().Data)
			}
			return nil
		})
	}
	eventually(t, "three voters", func() error {
		for _, m := range leader.Members() {
			if !m.Voter || m.Addr == "127.0.0.1:1" {
				return fmt.Errorf("%+v", m)
			}
		}
		if len(leader.Members()) != 3 {
			return errors.New("not all joined")
		}
		return nil
	})
	// It starts again from what is on its disk.
	c.kill("c1")
	c.start("c1")
	c.leader()
	if got := c.node("c1").fsm.get("old"); got != "state" {
		t.Errorf("after a restart it holds %q", got)
	}
}

// TestSeedBesideAFormerMember lets a member of the cluster that the seed
// replaces run on, with its data.
func TestSeedBesideAFormerMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.startAll(3)
	c.leader().put(t, "k", "lost")
	for _, id := range []string{"c1", "c2", "c3"} {
		c.kill(id)
	}
	c.wipe("c1")
	c.wipe("c3")
	must(t, c.seed("c1", map[string]string{"k": "restored"}))
	c.start("c2")
	c.start("c1")
	eventually(t, "c1 leads", func() error {
		if l := c.node("c1").leads.get(); l == nil || !l.isReady() {
			return errors.New("no")
		}
		return nil
	})
	c.start("c3")
	eventually(t, "c3 joins c1", func() error {
		if got := c.node("c3").fsm.get("k"); got != "restored" {
			return errors.New(got)
		}
		return nil
	})
	c.node("c1").put(t, "k", "new")
}

func TestSeedRefuses(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	dir := filepath.Join(c.dir, "c1")
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "raft.db"), []byte("data"), 0o600))
	if err := c.seed("c1", nil); err == nil || !strings.Contains(err.Error(), dir+" holds data already") {
		t.Errorf("a folder with data: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "raft.db")); err != nil || string(b) != "data" {
		t.Errorf("the data is gone: %q, %v", b, err)
	}
	dir = filepath.Join(c.dir, "c2")
	err := Seed(SeedConfig{DataDir: dir, ClusterID: "x", ID: "c2", Address: "127.0.0.1:1", Index: 1, Term: 1},
		func(w io.Writer) error { _, _ = w.Write(make([]byte, 1<<20)); return errors.New("cut off") })
	if err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Error(err)
	}
	if left, _ := filepath.Glob(dir + "*"); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	for name, c := range map[string]SeedConfig{
		"no name":    {DataDir: dir, ClusterID: "x", Address: "127.0.0.1:1", Index: 1, Term: 1},
		"no index":   {DataDir: dir, ClusterID: "x", ID: "c1", Address: "127.0.0.1:1", Term: 1},
		"log store":  {DataDir: dir, ClusterID: "x", ID: "c1", Address: "127.0.0.1:1", Index: 1, Term: 1, LogStore: "paper"},
		"no address": {DataDir: dir, ClusterID: "x", ID: "c1", Index: 1, Term: 1},
	} {
		if err := Seed(c, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestSeedBesideFormerQuorum lets a majority of the cluster that the seed
// replaces run on, with its data and in the same network, which nobody should: it
// stops when it meets the seed, and says what to do.
func TestSeedBesideFormerQuorum(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.startAll(3)
	c.leader().put(t, "k", "lost")
	for _, id := range []string{"c1", "c2", "c3"} {
		c.kill(id)
	}
	c.wipe("c1")
	must(t, c.seed("c1", map[string]string{"k": "restored"}))
	c.formerMajorityStops("c1", "restored", "c2", "c3")
}

// formerMajorityStops starts replicas of a cluster that n's data replaced, and
// then n. They stop, and join n when their folders are removed.
func (c *cluster) formerMajorityStops(id, value string, former ...string) {
	t := c.t
	t.Helper()
	for _, f := range former {
		c.start(f)
	}
	n := c.start(id)
	for _, f := range former {
		select {
		case <-c.node(f).Failed():
		case <-time.After(30 * time.Second):
			t.Fatalf("%s goes on with data of the former cluster", f)
		}
		if err := c.node(f).Err(); !strings.Contains(err.Error(), "from before the cluster was recovered or restored on") {
			t.Error(err)
		}
		c.kill(f)
		if _, err := c.tryStart(f); err == nil || !strings.Contains(err.Error(), "remove it and start again") {
			t.Errorf("%s starts again: %v", f, err)
		}
		c.wipe(f)
	}
	if got := n.fsm.get("k"); got != value || n.Err() != nil {
		t.Fatalf("%s holds %q, %v", id, got, n.Err())
	}
	for _, f := range former {
		c.start(f)
		eventually(t, f+" joins "+id, func() error {
			if got := c.node(f).fsm.get("k"); got != value {
				return fmt.Errorf("it holds %q", got)
			}
			return nil
		})
	}
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	c.node(former[0]).put(t, "k", "new")
}
