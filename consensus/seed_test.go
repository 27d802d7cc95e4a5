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
// goes on as before. What was restored does not mix with it, and is there again
// when the others were stopped and their folders removed.
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
	for _, id := range []string{"c2", "c3", "c1"} {
		c.start(id)
	}
	eventually(t, "the former majority leads", func() error {
		if l := c.node("c2").Status().Leader.ID; l != "c2" && l != "c3" {
			return fmt.Errorf("%q leads", l)
		}
		return nil
	})
	former := c.node(c.node("c2").Status().Leader.ID)
	if _, err := former.Apply(t.Context(), []byte("k=former")); err != nil {
		t.Logf("the former majority: %v", err) // it is electing, as c1 is in its way
	}
	for _, id := range []string{"c2", "c3"} {
		c.kill(id)
		c.wipe(id)
	}
	if got := c.node("c1").fsm.get("k"); got != "restored" || c.node("c1").Err() != nil {
		t.Fatalf("c1 holds %q, %v", got, c.node("c1").Err())
	}
	for _, id := range []string{"c2", "c3"} {
		c.start(id)
		eventually(t, id+" joins c1", func() error {
			if got := c.node(id).fsm.get("k"); got != "restored" {
				return fmt.Errorf("it holds %q", got)
			}
			return nil
		})
	}
	c.node("c3").put(t, "k", "new")
}
