package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "timonel/proto/timonel/v1"
)

func TestReplicaThatDiffersFromTheMajorityStops(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"follower", "leader"} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3)
			c.tune = func(cfg *Config) { cfg.FingerprintInterval = 20 * time.Millisecond }
			c.startAll(3)
			c.leader().put(t, "a", "b")
			victim := c.followers()[0]
			if role == "leader" {
				victim = c.leader()
			}
			victim.fsm.spoil()
			c.leader().put(t, "c", "d")
			select {
			case <-victim.Failed():
			case <-time.After(20 * time.Second):
				t.Fatal("it goes on")
			}
			if err := victim.Err(); !errors.Is(err, ErrDiverged) || !strings.Contains(err.Error(), "revision") || !strings.Contains(err.Error(), "remove") {
				t.Errorf("it stopped for %v", err)
			}
			var others []*node
			for _, id := range []string{"c1", "c2", "c3"} {
				if n := c.node(id); n != victim {
					others = append(others, n)
				}
			}
			eventually(t, "the others to go on", func() error {
				_, err := others[0].Apply(context.Background(), []byte("e=f"))
				return err
			})
			for _, n := range others {
				if err := n.Err(); err != nil {
					t.Errorf("%s stopped too: %v", n.cfg.ID, err)
				}
			}
		})
	}
}

// With no majority nobody can say who is right: nobody stops, all is said.
func TestReplicasThatDifferWithoutAMajority(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.FingerprintInterval = 20 * time.Millisecond }
	c.startAll(3)
	c.kill(c.followers()[0].cfg.ID)
	c.followers()[0].fsm.spoil()
	c.leader().put(t, "c", "d")
	eventually(t, "the leader to say so", func() error {
		if problems := c.leader().Status().Problems; !slices.ContainsFunc(problems, func(p string) bool { return strings.Contains(p, "replicas differ at revision") }) {
			return fmt.Errorf("%q", problems)
		}
		return nil
	})
}

// A replica does not take another's word for it that it differs.
func TestFingerprintIsVerified(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	n := c.leader()
	n.put(t, "a", "b")
	position, hash := n.fsm.Fingerprint()
	victim := c.followers()[0]
	a, err := n.askFingerprint(t.Context(), victim.cfg.ID, &pb.FingerprintRequest{Position: position, Majority: hash, Differs: true})
	must(t, err)
	if !a.Known || a.Hash != hash || victim.Err() != nil {
		t.Errorf("%v, want %x; stopped: %v", a, hash, victim.Err())
	}
}

func TestVerdict(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		hashes    map[string]uint64
		members   int
		majority  uint64 // 0: none
		differing string
	}{
		"equal":                   {map[string]uint64{"a": 1, "b": 1, "c": 1}, 3, 0, ""},
		"one answers":             {map[string]uint64{"a": 1}, 3, 0, ""},
		"one differs":             {map[string]uint64{"a": 1, "b": 2, "c": 1}, 3, 1, "b"},
		"one of two":              {map[string]uint64{"a": 1, "b": 2}, 3, 0, "a b"},
		"all differ":              {map[string]uint64{"a": 1, "b": 2, "c": 3}, 3, 0, "a b c"},
		"two of five":             {map[string]uint64{"a": 1, "b": 2, "c": 1, "d": 1, "e": 3}, 5, 1, "b e"},
		"three of four, two away": {map[string]uint64{"a": 1, "b": 1, "c": 2}, 5, 0, "a b c"},
	} {
		majority, differing := verdict(tt.hashes, tt.members)
		got := uint64(0)
		if majority != nil {
			got = *majority
		}
		if got != tt.majority || strings.Join(differing, " ") != tt.differing {
			t.Errorf("%s: %d, %v; want %d, %s", name, got, differing, tt.majority, tt.differing)
		}
	}
}
