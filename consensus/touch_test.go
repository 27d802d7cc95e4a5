package consensus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// touchLimit is what a loss of touch may take in these tests, on a busy machine.
const touchLimit = 15 * time.Second

// quick makes a replica notice sooner what it has to.
func quick(cfg *Config) {
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = 300*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	cfg.ProposeTimeout = 2 * time.Second
}

// awaitTouch waits until a replica is in touch and returns what ends that.
func awaitTouch(t testing.TB, n *node) (lost <-chan struct{}) {
	t.Helper()
	eventually(t, n.cfg.ID+" in touch", func() (err error) {
		lost, err = n.InTouch()
		return err
	})
	return lost
}

// requireLost waits until touch is lost, and checks what is said then.
func requireLost(t testing.TB, n *node, lost <-chan struct{}, why string) {
	t.Helper()
	select {
	case <-lost:
	case <-time.After(touchLimit):
		t.Fatalf("%s is in touch after %v", n.cfg.ID, touchLimit)
	}
	if _, err := n.InTouch(); !errors.Is(err, ErrOutOfTouch) {
		t.Errorf("%s says %v", n.cfg.ID, err)
	}
	eventually(t, n.cfg.ID+" says why", func() error { // on a busy machine another reason may come first
		if _, err := n.InTouch(); err == nil || !strings.Contains(err.Error(), why) {
			return fmt.Errorf("it says %v, want %q", err, why)
		}
		return nil
	})
}

func TestATouchIsLostWithTheMajority(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"leader", "follower"} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3)
			c.tune = quick
			c.startAll(3)
			left := c.leader()
			if role == "follower" {
				left = c.followers()[0]
			}
			lost := awaitTouch(t, left)
			var others []string
			for id := range c.nodes {
				if id != left.cfg.ID {
					others = append(others, id)
				}
			}
			for _, id := range others {
				c.kill(id)
			}
			requireLost(t, left, lost, "no leader with a majority")
			if s := left.Status(); s.InTouch || !strings.Contains(strings.Join(s.Problems, "\n"), ErrOutOfTouch.Error()) {
				t.Errorf("status: in touch %v, problems %q", s.InTouch, s.Problems)
			}
			c.start(others[0])
			awaitTouch(t, left)
		})
	}
}

func TestAnElectionCostsNoTouch(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.startAll(3)
	lost := map[*node]<-chan struct{}{}
	for _, n := range c.nodes {
		lost[n] = awaitTouch(t, n)
	}
	for range 3 {
		old := c.leader()
		eventually(t, "another leader", func() error {
			if c.leader() != old {
				return nil
			}
			return errors.Join(errors.New("the same one"), old.TransferLeadership(""))
		})
	}
	dead := c.leader()
	c.kill(dead.cfg.ID)
	delete(lost, dead)
	c.leader()
	c.followers()[0].put(t, "k", "v")
	for n, ended := range lost {
		select {
		case <-ended:
			t.Errorf("%s lost touch", n.cfg.ID)
		default:
		}
	}
}

// A replica that follows a leader and gets no further serves old state like one that is
// cut off.
func TestAReplicaThatStandsStillIsOutOfTouch(t *testing.T) {
	t.Parallel()
	write := func(t *testing.T, c *cluster, stop chan struct{}) {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			c.leader().Apply(ctx, fmt.Appendf(nil, "k=%d", i))
			cancel()
		}
	}
	for name, test := range map[string]struct {
		spoil func(*node)
		why   string
	}{
		"its disk fails": {func(n *node) {
			fault := func(string) error { return errors.New("no space left") }
			n.disk.fault.Store(&fault)
		}, "no space left"},
		"its state machine hangs": {func(n *node) { n.fsm.mu.Lock() }, "behind the others"},
		"its data is damaged":     {func(n *node) { n.fail(errors.New("entry 7 is damaged")) }, "entry 7 is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3)
			c.tune = quick
			c.startAll(3)
			n := c.followers()[0]
			lost := awaitTouch(t, n)
			stop, done := make(chan struct{}), make(chan struct{})
			go func() { defer close(done); write(t, c, stop) }()
			test.spoil(n)
			requireLost(t, n, lost, test.why)
			if name == "its disk fails" { // also when it was out of touch for another reason before
				if err := n.touchErr(n.touch.clock(), n.touch.clock()); err == nil || !strings.Contains(err.Error(), test.why) {
					t.Errorf("it says %v, want %q", err, test.why)
				}
			}
			close(stop)
			<-done
			for _, other := range c.nodes {
				if other != n {
					awaitTouch(t, other)
				}
			}
			n.disk.fault.Store(nil)
			if name == "its state machine hangs" {
				n.fsm.mu.Unlock()
			}
			if name != "its data is damaged" {
				awaitTouch(t, n)
			}
		})
	}
}

func TestARemovedReplicaIsOutOfTouch(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = quick
	c.startAll(3)
	n := c.followers()[0]
	lost := awaitTouch(t, n)
	must(t, c.leader().RemoveServer(context.Background(), n.cfg.ID))
	requireLost(t, n, lost, "")
	eventually(t, "the reason", func() error {
		if _, err := n.InTouch(); err == nil || !strings.Contains(err.Error(), "was removed from the cluster") {
			return fmt.Errorf("says %v", err)
		}
		return nil
	})
}

// A process that was paused does not know for how long, and may find old heartbeats in
// its sockets.
func TestAPausedReplicaIsOutOfTouch(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	n := c.followers()[0]
	lost := awaitTouch(t, n)
	n.touch.looked.Store(n.touch.clock() - int64(time.Minute)) // as watchTouch finds it
	if _, err := n.InTouch(); !errors.Is(err, ErrOutOfTouch) {
		select {
		case <-lost: // watchTouch was faster
		default:
			t.Errorf("in touch: %v", err)
		}
	}
	eventually(t, "the end", func() error {
		select {
		case <-lost:
			return nil
		default:
			n.touch.looked.Store(n.touch.clock() - int64(time.Minute))
			return errors.New("in touch")
		}
	})
	awaitTouch(t, n)
}

func TestWithoutDataThereIsNoTouch(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	n := c.start("c1")
	if _, err := n.InTouch(); !errors.Is(err, ErrOutOfTouch) {
		t.Errorf("says %v", err)
	}
	c.start("c2")
	c.start("c3")
	lost := awaitTouch(t, n)
	must(t, n.Close())
	requireLost(t, n, lost, "closed")
}

func TestAMajorityIsContact(t *testing.T) {
	t.Parallel()
	voter := func(ids ...raft.ServerID) (out []raft.Server) {
		for _, id := range ids {
			out = append(out, raft.Server{ID: id, Suffrage: raft.Voter})
		}
		return out
	}
	at := map[raft.ServerID]int64{"c1": 50, "c2": 40, "c3": 30, "c4": 20, "c9": 60}
	for name, test := range map[string]struct {
		members []raft.Server
		want    int64
	}{
		"alone":                      {voter("c1"), 50},
		"both of two":                {voter("c1", "c2"), 40},
		"two of three":               {voter("c1", "c3", "c4"), 30},
		"three of four":              {voter("c1", "c2", "c3", "c4"), 30},
		"three of five":              {voter("c1", "c2", "c3", "c7", "c8"), 30},
		"two of five are not enough": {voter("c1", "c2", "c6", "c7", "c8"), 0},
		"who does not vote":          {append(voter("c1", "c2", "c7"), raft.Server{ID: "c9", Suffrage: raft.Nonvoter}), 40},
		"nobody":                     {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			if got := majorityHeard(test.members, at); got != test.want {
				t.Errorf("heard of at %d, want %d", got, test.want)
			}
		})
	}
}

func BenchmarkInTouch(b *testing.B) {
	n := newCluster(b, 1).startAll(1).leader()
	awaitTouch(b, n)
	for b.Loop() {
		if _, err := n.InTouch(); err != nil {
			b.Fatal(err)
		}
	}
}
