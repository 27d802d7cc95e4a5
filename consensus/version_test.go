package consensus

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// versions are the cluster version that a test's replicas go by, and the newest that
// each one's program knows.
type versions struct {
	current atomic.Int32
	mu      sync.Mutex
	newest  map[string]int
}

func (v *versions) tune(cfg *Config) {
	v.mu.Lock()
	defer v.mu.Unlock()
	cfg.NewestVersion = v.newest[cfg.ID]
	cfg.ClusterVersion = func() int { return int(max(v.current.Load(), 1)) }
}

func (v *versions) set(id string, newest int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.newest[id] = newest
}

func (v *versions) raise(_ context.Context, version int) error {
	v.current.Store(int32(version))
	return nil
}

func TestVersionIsTheLeastOfTheMembers(t *testing.T) {
	t.Parallel()
	v := &versions{newest: map[string]int{"c3": 1}}
	c := newCluster(t, 3)
	c.tune = v.tune
	c.startAll(3)

	agree := func() (least int, held string) {
		t.Helper()
		eventually(t, "all members' answers", func() (err error) {
			n := c.leader()
			if n.cfg.ID == "c3" {
				return errors.Join(errors.New("the older one leads"), n.TransferLeadership("c1"))
			}
			least, held, err = n.AgreeVersion(t.Context(), v.raise)
			return err
		})
		return least, held
	}
	if least, held := agree(); least != 1 || !strings.Contains(held, "c3") || !strings.Contains(held, "knows cluster version 1") {
		t.Fatalf("with an older member: %d, held by %q", least, held)
	}
	if v.current.Load() > 1 {
		t.Fatal("raised while a member cannot read it")
	}

	c.kill("c3")
	if least, held := agree(); least != 1 || !strings.Contains(held, "c3 does not answer") {
		t.Fatalf("with a silent member: %d, held by %q", least, held)
	}
	v.set("c3", 2)
	c.start("c3")
	eventually(t, "the version to rise", func() error {
		if least, held := agree(); least != 2 {
			return errors.New(held)
		}
		return nil
	})
	if v.current.Load() != 2 {
		t.Fatalf("cluster version %d, want 2", v.current.Load())
	}
	for _, n := range append(c.followers(), c.leader()) {
		n.put(t, "a", n.cfg.ID)
	}
	leader := c.leader()
	last, _ := leader.disk.LastIndex()
	var l raft.Log
	must(t, leader.disk.GetLog(last, &l))
	if l.Type != raft.LogCommand || l.Data[0] != 2 {
		t.Errorf("the last entry (%v) begins with %d, want the cluster version 2: an older program would not stand still", l.Type, l.Data[0])
	}
}

func TestOlderProgramIsNotLetIn(t *testing.T) {
	t.Parallel()
	v := &versions{newest: map[string]int{"c4": 1}}
	v.current.Store(2)
	c := newCluster(t, 3)
	c.tune = v.tune
	c.startAll(3)
	c.expect = 0
	old := c.start("c4")
	eventually(t, "the older program to be refused", func() error {
		err := c.leader().admitEmpty(t.Context(), "c4", old.raft, old.incarnation())
		if err == nil {
			t.Fatal("let in an older program")
		}
		if !strings.Contains(err.Error(), "run a newer one there") {
			return err // a busy machine does not ask it in time
		}
		return nil
	})
	for _, m := range c.leader().Members() {
		if m.ID == "c4" {
			t.Error("the older program is a member")
		}
	}
}

func TestOlderProgramStandsStill(t *testing.T) {
	t.Parallel()
	v := &versions{newest: map[string]int{}}
	c := newCluster(t, 3)
	c.tune = v.tune
	c.startAll(3)
	c.leader().put(t, "a", "1")
	behind := c.followers()[0].cfg.ID
	c.kill(behind)
	v.current.Store(2)
	c.leader().put(t, "a", "2")

	v.set(behind, 1)
	n := c.start(behind)
	select {
	case <-n.Failed():
	case <-time.After(20 * time.Second):
		t.Fatal("the older program goes on with entries of a newer cluster version")
	}
	if err := n.Err(); !errors.Is(err, ErrNewerVersion) {
		t.Errorf("it stopped for %v, want ErrNewerVersion", err)
	}
	if got := n.fsm.get("a"); got == "2" {
		t.Error("it applied what it cannot read")
	}

	c.kill(behind)
	v.set(behind, 2)
	n = c.start(behind)
	eventually(t, "the newer program to catch up", func() error {
		if got := n.fsm.get("a"); got != "2" {
			return errors.New("a=" + got)
		}
		return nil
	})
}
