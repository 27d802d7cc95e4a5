package consensus

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestApplyAnywhereReadsItsOwnWrite(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	for i := range 30 {
		n := c.node(fmt.Sprintf("c%d", i%3+1))
		k, v := fmt.Sprintf("k%d", i), fmt.Sprint(i)
		n.put(t, k, v)
		if got := n.fsm.get(k); got != v {
			t.Fatalf("on %s: %s is %q right after the write, want %q", n.cfg.ID, k, got, v)
		}
	}
	c.sameState()
}

// sameState waits until all running replicas have the same state.
func (c *cluster) sameState() {
	c.t.Helper()
	eventually(c.t, "the same state on all replicas", func() error {
		want := c.leader().fsm.state()
		for _, n := range c.followers() {
			if got := n.fsm.state(); got.Hash != want.Hash || got.N != want.N {
				return fmt.Errorf("%s has %d commands, hash %x; the leader %d, %x", n.cfg.ID, got.N, got.Hash, want.N, want.Hash)
			}
		}
		return nil
	})
}

func TestFencedWrites(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	term := c.leader().Status().Term
	for _, n := range []*node{c.leader(), c.followers()[0]} {
		if _, err := n.Apply(WithTerm(context.Background(), term), []byte("a=1")); err != nil {
			t.Fatalf("write in the current term on %s: %v", n.cfg.ID, err)
		}
	}
	must(t, c.leader().TransferLeadership(""))
	eventually(t, "a new term", func() error {
		if now := c.leader().Status().Term; now == term {
			return errors.New("still the old one")
		}
		return nil
	})
	for _, n := range append(c.followers(), c.leader()) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_, err := n.Apply(WithTerm(ctx, term), []byte("a=2"))
		cancel()
		if !errors.Is(err, ErrTermChanged) {
			t.Errorf("late write on %s: %v, want ErrTermChanged", n.cfg.ID, err)
		}
	}
	if got := c.leader().fsm.get("a"); got != "1" {
		t.Errorf("a is %q, want 1", got)
	}
}
