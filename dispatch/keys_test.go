package dispatch

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/state"
	"timonel/trust"
)

// gossipStep takes the rotation of the nodes' key a step further, or begins one, and
// returns the names of the keys that there are then.
func (c *cluster) gossipStep() []string {
	c.t.Helper()
	ring, err := c.trust.GossipRing(pki.PoolNodes)
	require.NoError(c.t, err)
	if ring.Step == trust.GossipRest {
		err = c.trust.RotateGossip(context.Background(), []string{pki.PoolNodes}, time.Minute, "test")
	} else {
		err = c.trust.AdvanceGossip(context.Background(), pki.PoolNodes, ring.Generation)
	}
	require.NoError(c.t, err)
	ring, err = c.trust.GossipRing(pki.PoolNodes)
	require.NoError(c.t, err)
	return ring.IDs()
}

// toldKeys waits until the agent is told keys, and returns their names.
func (a *agent) toldKeys() []string {
	a.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case m, ok := <-a.got:
			require.True(a.t, ok, "the stream ended: %v", a.err)
			if keys := m.GetGossipKeys(); keys != nil {
				return pki.GossipKeyIDs(keys.Keys)
			}
		case <-timeout:
			a.t.Fatal("no keys of gossip came")
		}
	}
}

func (a *agent) keep(ids []string) {
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_GossipKeysKept{GossipKeysKept: &pb.GossipKeysKept{Ids: ids}}})
}

// TestGossipKeysOverTheStream: an agent that knows of keys is told them when it has
// others, at once and when it connects; what it says that it has kept other controllers
// hear. One of before is told nothing that it does not understand.
func TestGossipKeysOverTheStream(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	c.mu.Lock()
	c.apply(state.Change{Key: state.VersionKey, Value: []byte("3")})
	c.mu.Unlock()
	first := []string{pki.GossipKeyID(c.bundle.GossipKey())}
	a1 := c.connect("c1", &pb.Hello{NodeName: "a1", GossipKeys: first})
	before := c.connect("c2", &pb.Hello{NodeName: "a2"})
	identity, err := c.bundle.Controller("c9", nil, nil)
	require.NoError(t, err)
	peers := map[string]pb.PeersClient{}
	for name := range c.controllers {
		peers[name] = pb.NewPeersClient(c.dial(name, identity.ClusterClientTLS()))
	}
	kept := func(controller string, ids []string) (with, lacking []string) {
		r, err := peers[controller].GossipKept(t.Context(), &pb.GossipKeptRequest{Pool: pki.PoolNodes, Ids: ids})
		require.NoError(t, err)
		slices.Sort(r.Agents)
		return r.Agents, r.Lacking
	}
	a1.batch()
	before.batch()
	with, _ := kept("c1", first)
	require.Equal(t, []string{"a1"}, with, "it had them by itself")

	for range 3 { // install, use, rest
		ids := c.gossipStep()
		require.Equal(t, ids, a1.toldKeys())
		with, lacking := kept("c1", ids)
		require.Empty(t, with, "told is not kept")
		require.Equal(t, []string{"a1"}, lacking)
		a1.keep(ids)
		eventually(t, "the controller hears that they are kept", func() bool {
			with, _ := kept("c1", ids)
			return slices.Equal(with, []string{"a1"})
		})
		_, lacking = kept("c2", ids)
		require.Equal(t, []string{"a2"}, lacking, "an agent of before has not kept them")
	}
	ring, err := c.trust.GossipRing(pki.PoolNodes)
	require.NoError(t, err)
	require.NotEqual(t, first, ring.IDs())
	c.settle(a1)
	for len(before.got) > 0 {
		require.Nil(t, (<-before.got).GetGossipKeys())
	}

	// One that was away for all of it is told when it comes back, by any controller; one
	// that has them is not.
	a1.cancel()
	eventually(t, "the stream is gone", func() bool { return c.controllers["c1"].hub.session("a1") == nil })
	again := c.connect("c2", &pb.Hello{NodeName: "a1", GossipKeys: first})
	require.Equal(t, ring.IDs(), again.toldKeys())
	again.keep(ring.IDs())
	eventually(t, "it has kept them", func() bool { with, _ := kept("c2", ring.IDs()); return len(with) == 1 })
	again.cancel()
	eventually(t, "the stream is gone", func() bool { return c.controllers["c2"].hub.session("a1") == nil })
	has := c.connect("c1", &pb.Hello{NodeName: "a1", GossipKeys: ring.IDs()})
	has.batch()
	c.settle(has)
	with, _ = kept("c1", ring.IDs())
	require.Equal(t, []string{"a1"}, with)

	// Whoever joins gets the newest, agents of before the one that seals.
	_, secret, err := c.trust.CreateToken(t.Context(), trust.TokenSpec{})
	require.NoError(t, err)
	ids := c.gossipStep()
	answer, err := c.joinTo("c1", secret, "a7", newCSR(t, "a7").CSR)
	require.NoError(t, err)
	require.Equal(t, ids, pki.GossipKeyIDs(answer.GossipKeys))
	require.Equal(t, ring.Secrets[0], answer.GossipKey)
}

// TestGossipKeysAreForControllers: nobody else may ask for them, or who has them.
func TestGossipKeysAreForControllers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	peers := pb.NewPeersClient(c.dial("c1", c.nodeTLS("a1")))
	_, err := peers.GossipKeys(t.Context(), &pb.GossipKeysRequest{})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
	_, err = peers.GossipKept(t.Context(), &pb.GossipKeptRequest{Pool: pki.PoolNodes})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)

	a := c.connect("c1", &pb.Hello{NodeName: "a1", GossipKeys: []string{"1", "2", "3", "4", "5"}})
	for range a.got {
	}
	require.Equal(t, codes.InvalidArgument, status.Code(a.err), "%v", a.err)
}

// TestAgentsKeepGossipKeys: the agents' own end keeps what it is told, says so, and is
// told what it missed while no controller was there.
func TestAgentsKeepGossipKeys(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.mu.Lock()
	c.apply(state.Change{Key: state.VersionKey, Value: []byte("3")})
	c.mu.Unlock()
	c.realAgent("a1", c.addr("c1"))
	keeps := func(controller string, ids []string) {
		t.Helper()
		eventually(t, "the agent has kept the keys, and the controller knows", func() bool {
			return slices.Equal(c.kept("a1"), ids) && slices.Equal(c.controllers[controller].Kept(pki.PoolNodes, ids).Agents, []string{"a1"})
		})
	}
	keeps("c1", c.kept("a1"))
	for range 3 {
		keeps("c1", c.gossipStep())
	}
	c.start("c2")
	eventually(t, "the agent knows of c2", func() bool { return len(c.knownTo("a1")) == 2 })
	c.controllers["c1"].stop()
	c.gossipStep()
	keeps("c2", c.gossipStep())
}
