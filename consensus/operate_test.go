package consensus

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "timonel/proto/timonel/v1"
)

const (
	addMember      = pb.MemberChange_MEMBER_CHANGE_ADD
	promoteMember  = pb.MemberChange_MEMBER_CHANGE_PROMOTE
	removeMember   = pb.MemberChange_MEMBER_CHANGE_REMOVE
	transferLeader = pb.MemberChange_MEMBER_CHANGE_TRANSFER_LEADER
)

// roles waits until the leader's list of members is the one given, as in
// "c1 voter, c2 leader, c3 non-voter!", where ! marks one that is not healthy.
// Leaders are voters here.
func (c *cluster) waitRoles(want string) {
	c.t.Helper()
	eventually(c.t, "members "+want, func() error {
		list, err := c.leader().ListMembers(c.t.Context())
		if err != nil {
			return err
		}
		var got []string
		for _, m := range list.Members {
			s := m.ID + " " + strings.Replace(m.Role, "leader", "voter", 1)
			if !m.Healthy {
				s += "!"
			}
			got = append(got, s)
		}
		if s := strings.Join(got, ", "); s != want {
			return fmt.Errorf("%s (%+v)", s, list)
		}
		return nil
	})
}

func (n *node) change(t testing.TB, kind pb.MemberChange, id string) string {
	t.Helper()
	done, err := n.ChangeMembers(t.Context(), Change{Kind: kind, ID: id})
	must(t, err)
	return done
}

func (n *node) requireRefused(t testing.TB, kind pb.MemberChange, id, why string) {
	t.Helper()
	done, err := n.ChangeMembers(t.Context(), Change{Kind: kind, ID: id})
	var refused *RefusedError
	if !errors.As(err, &refused) || !strings.Contains(refused.Reason, why) {
		t.Errorf("%v %s: %q, %v, want a refusal with %q", kind, id, done, err, why)
	}
}

func TestListMembersFromAnyReplica(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.Version = "v1-" + cfg.ID }
	c.startAll(3)
	c.leader().put(t, "a", "b")
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	leader := c.leader()
	for _, id := range []string{"c1", "c2", "c3"} {
		list, err := c.node(id).ListMembers(t.Context())
		must(t, err)
		if list.Leader != leader.cfg.ID || list.Quorum != 2 || list.Healthy != 3 || list.Term == 0 {
			t.Errorf("%s: %+v", id, list)
		}
		for _, m := range list.Members {
			if m.Version != "v1-"+m.ID || !m.Removable || m.AppliedIndex == 0 || m.LastContact < 0 || m.Address != c.node(m.ID).raft {
				t.Errorf("%s lists %+v", id, m)
			}
		}
	}
	victim := c.followers()[0].cfg.ID
	c.kill(victim)
	eventually(t, "the dead one to be known", func() error {
		list, err := leader.ListMembers(t.Context())
		i := slices.IndexFunc(list.Members, func(m MemberInfo) bool { return m.ID == victim })
		if err != nil || list.Members[i].Healthy || list.Members[i].Problem == "" || !list.Members[i].Removable {
			return fmt.Errorf("%+v, %v", list, err)
		}
		for j, m := range list.Members {
			if j != i && (m.Removable || !strings.Contains(m.Removal, "they need 2")) {
				return fmt.Errorf("%+v", m)
			}
		}
		return nil
	})
}

func TestListMembersWithoutALeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.ProposeTimeout = time.Second }
	c.startAll(3)
	c.kill("c2")
	c.kill("c3")
	eventually(t, "a list without a leader", func() error {
		list, err := c.node("c1").ListMembers(t.Context())
		if err != nil || list.Leader != "" || len(list.Members) != 3 || len(list.Problems) != 1 {
			return fmt.Errorf("%+v, %v", list, err)
		}
		return nil
	})
}

func TestRemoveKeepsTheQuorum(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	followers := c.followers()
	dead, live := followers[0].cfg.ID, followers[1].cfg.ID
	c.node(live).requireRefused(t, removeMember, "c9", `"c9" is not a member: the members are c1, c2, c3`)
	c.kill(dead)
	c.node(live).requireRefused(t, removeMember, live, "would stand still")
	c.node(live).requireRefused(t, removeMember, c.leader().cfg.ID, "would stand still")
	if done := c.node(live).change(t, removeMember, dead); !strings.Contains(done, "2 voters are left, of which 0 may fail") {
		t.Error(done)
	}
	c.leader().put(t, "a", "b")
	// The leader can be removed: it hands over first.
	was := c.leader().cfg.ID
	c.node(was).change(t, removeMember, was)
	eventually(t, "the other leads", func() error {
		if id, _, _ := c.node(live).Leader(); id != live {
			return errors.New(id)
		}
		return nil
	})
	c.node(live).put(t, "c", "d")
	c.node(live).requireRefused(t, removeMember, live, "the last voter")
}

// Of two removals at the same time, each of which leaves a quorum, the second is judged
// by what the first leaves.
func TestConcurrentRemovalsKeepTheQuorum(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.start("c4")
	c.waitRoles("c1 voter, c2 voter, c3 voter, c4 voter")
	followers := c.followers()
	c.kill(followers[0].cfg.ID)
	leader := c.leader()
	eventually(t, "the dead one to be known", func() error {
		if list, err := leader.ListMembers(t.Context()); err != nil || list.Healthy != 3 {
			return fmt.Errorf("%+v, %v", list, err)
		}
		return nil
	})
	results := make(chan error, 2)
	for _, f := range followers[1:3] {
		go func() {
			_, err := leader.ChangeMembers(t.Context(), Change{Kind: removeMember, ID: f.cfg.ID})
			results <- err
		}()
	}
	refusals := 0
	for range 2 {
		var refused *RefusedError
		if err := <-results; errors.As(err, &refused) {
			refusals++
		} else if err != nil {
			t.Error(err)
		}
	}
	if refusals != 1 {
		t.Errorf("%d of two removals were refused, must be 1", refusals)
	}
	leader.put(t, "writes", "go on")
}

func TestAddPromoteAndTransfer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	f := c.followers()[0]
	if done := f.change(t, transferLeader, f.cfg.ID); done != f.cfg.ID+" leads." {
		t.Error(done)
	}
	eventually(t, "it leads", func() error {
		if id, _, _ := f.Leader(); id != f.cfg.ID {
			return errors.New(id)
		}
		return nil
	})
	f.requireRefused(t, addMember, "c4", "address is not known")
	if _, err := f.ChangeMembers(t.Context(), Change{Kind: addMember, ID: "c4", Address: "127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	c.waitRoles("c1 voter, c2 voter, c3 voter, c4 non-voter!")
	f.requireRefused(t, promoteMember, "c4", "not healthy")
	f.requireRefused(t, transferLeader, "c4", "does not vote")
	f.put(t, "writes", "go on")
	c.start("c4")
	c.waitRoles("c1 voter, c2 voter, c3 voter, c4 voter")
}

// A member whose connection turns out to be broken when it is asked, as after the
// network was cut, and which heartbeats reach, is healthy.
func TestMemberAskedOnABrokenConnection(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	for range 5 {
		c.breakHello.Store(1)
		list, err := c.leader().ListMembers(t.Context())
		must(t, err)
		for _, m := range list.Members {
			if !m.Healthy {
				t.Errorf("%s: %s", m.ID, m.Problem)
			}
		}
	}
}
