package consensus

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestSuperfluous(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		name                    string
		voters, healthy, expect int
		want                    bool
	}{
		{"a dead one of three", 3, 2, 3, false},
		{"replaced", 4, 3, 3, true},
		{"two dead, replaced by one", 5, 3, 5, false},
		{"one of six", 6, 5, 5, true},
		{"two of seven", 7, 5, 5, true},
		{"two of six: one lacks", 6, 4, 5, false},
		{"grown to three, back to two", 3, 2, 1, false},
		{"grown to five, back to three", 5, 3, 3, true},
		{"no majority", 4, 2, 1, false},
		{"none dead", 3, 3, 3, false},
	} {
		if got := superfluous(x.voters, x.healthy, x.expect); got != x.want {
			t.Errorf("%s: %v", x.name, got)
		}
	}
}

// peersAlive is what gossip sees when it has found out who is dead.
func (c *cluster) peersAlive() []Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Server
	for id, n := range c.nodes {
		if n.ctx.Err() == nil {
			out = append(out, Server{ID: id, Addr: n.raft})
		}
	}
	return out
}

func TestDeadMemberIsRemovedWhenItIsReplaced(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) {
		cfg.Peers, cfg.DeadMemberCleanupAfter, cfg.HeartbeatTimeout = c.peersAlive, 200*time.Millisecond, 250*time.Millisecond
	}
	c.startAll(3)
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	c.kill("c3")
	c.waitRoles("c1 voter, c2 voter, c3 voter!")
	time.Sleep(time.Second) // the period in which it must not be removed
	c.waitRoles("c1 voter, c2 voter, c3 voter!")
	c.start("c4")
	c.waitRoles("c1 voter, c2 voter, c4 voter")
	// It comes back: it serves nothing, disturbs nobody and says why.
	n := c.start("c3")
	eventually(t, "c3 to know that it was removed", func() error {
		s := n.Status()
		if n.MemberErr() == nil || s.Role != "removed" || !strings.Contains(strings.Join(s.Problems, "\n"), "replica c3 was removed from the cluster: stop it") {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	c.leader().put(t, "a", "b")
	eventually(t, "a second without an election", func() error { // on a busy machine there are some without its doing
		term := c.leader().Status().Term
		time.Sleep(time.Second)
		if now := c.leader().Status().Term; now != term {
			return fmt.Errorf("it brought the others from term %d to %d", term, now)
		}
		return nil
	})
	// Both ways back.
	eventually(t, "the leader to know where c3 is, and to add it", func() error {
		_, err := c.leader().ChangeMembers(t.Context(), Change{Kind: addMember, ID: "c3"})
		return err
	})
	eventually(t, "c3 to be a member again", func() error {
		if err := n.MemberErr(); err != nil || n.fsm.get("a") != "b" {
			return errors.Join(err, errors.New("not yet"))
		}
		return nil
	})
	c.waitRoles("c1 voter, c2 voter, c3 voter, c4 voter")
}

// TestHalfJoinedMember lets a replica die between being let in and having caught
// up: it does not count for the quorum.
func TestHalfJoinedMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) {
		cfg.Peers, cfg.DeadMemberCleanupAfter, cfg.HeartbeatTimeout = c.peersAlive, 500*time.Millisecond, 250*time.Millisecond
		if cfg.ID != "c4" {
			cfg.StabilizationTime = time.Hour
		}
	}
	c.startAll(3)
	c.start("c4")
	c.waitRoles("c1 voter, c2 voter, c3 voter, c4 non-voter")
	c.kill("c4")
	c.kill(c.followers()[0].cfg.ID) // two of three voters are left: enough
	c.leader().put(t, "a", "b")
	eventually(t, "the half joined one to be cleaned up", func() error {
		for _, m := range c.leader().Members() {
			if m.ID == "c4" {
				return fmt.Errorf("%v", c.leader().Members())
			}
		}
		return nil
	})
	if n := len(c.leader().Members()); n != 3 {
		t.Errorf("%d members: a voter was removed", n)
	}
	c.wipe("c4")
	n := c.start("c4")
	eventually(t, "c4 to catch up", func() error {
		if n.fsm.get("a") != "b" {
			return errors.New("not yet")
		}
		return nil
	})
}

// TestAllAddressesChange starts all replicas at new addresses, as after a move to
// another network: gossip knows them, the configuration has the old ones.
func TestAllAddressesChange(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.leader().put(t, "a", "b")
	was := map[string]string{}
	for _, id := range []string{"c1", "c2", "c3"} {
		was[id] = c.node(id).raft
		c.kill(id)
	}
	c.mu.Lock()
	clear(c.nodes)
	c.mu.Unlock()
	c.startAll(3)
	c.leader().put(t, "c", "d")
	eventually(t, "the members to have the new addresses", func() error {
		for _, m := range c.leader().Members() {
			if m.Addr == was[m.ID] || m.Addr != c.node(m.ID).raft {
				return fmt.Errorf("%v", c.leader().Members())
			}
		}
		return nil
	})
	c.sameState()
}
