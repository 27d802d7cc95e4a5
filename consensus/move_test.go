//go:build !race

package consensus

import (
	"context"
	"fmt"
	"net"
	"testing"
)

// Not with the race detector: when Raft notes a peer's new address it writes the whole of
// what it knows of the peer, its id too, while the goroutine that takes the peer's answers may
// read the id without the lock (hashicorp/raft 1.8, startStopReplication and
// updateLastAppended). The id is the same before and after.

func TestMemberMovesToAnotherAddress(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	id := c.followers()[0].cfg.ID
	before := c.node(id).raft
	c.kill(id)
	c.tune = func(cfg *Config) { cfg.BindAddress = "127.0.0.1:0" }
	taken, err := net.Listen("tcp", before) // lest it gets the same port again
	must(t, err)
	n := c.start(id)
	must(t, taken.Close())
	must(t, n.ReadBarrier(context.Background()))
	eventually(t, "the configuration to have the new address", func() error {
		for _, m := range c.leader().Members() {
			if m.ID == id && m.Addr == n.raft && m.Voter {
				return nil
			}
		}
		return fmt.Errorf("%v", c.leader().Members())
	})
}
