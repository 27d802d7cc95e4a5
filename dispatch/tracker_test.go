package dispatch

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/gossip"
	pb "timonel/proto/timonel/v1"
)

// track runs a tracker on a controller until the test ends.
func (c *cluster) track(name string) *Tracker {
	tracker := c.controllers[name].NewTracker()
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = tracker.Run(ctx) })
	c.t.Cleanup(func() { cancel(); done.Wait() })
	eventually(c.t, "the tracker runs", func() bool { return !tracker.Health().Since.IsZero() })
	return tracker
}

// health waits until what is known of a node is as wanted.
func (t *Tracker) await(tb testing.TB, node string, want func(NodeHealth) bool) NodeHealth {
	tb.Helper()
	timeout := time.After(patience)
	for {
		n := t.Health().Nodes[node]
		if want(n) {
			return n
		}
		select {
		case <-t.changed:
		case <-time.After(50 * time.Millisecond):
		case <-timeout:
			tb.Fatalf("%s never was as wanted: %+v", node, n)
		}
	}
}

func TestTrackerFollowsStreams(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	c.put(nodeObject("a3")) // never connected
	c.gossip.set(gossip.Member{Name: "a1", Role: gossip.RoleAgent, State: gossip.Alive})
	a1 := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a1.batch()
	tracker := c.track("c1")
	a2 := c.connect("c2", &pb.Hello{NodeName: "a2"})
	a2.batch()

	n := tracker.await(t, "a1", func(n NodeHealth) bool { return n.Stream && n.Gossip == gossip.Alive })
	require.Equal(t, []string{"c1"}, n.Holders)
	n = tracker.await(t, "a2", func(n NodeHealth) bool { return n.Stream })
	require.Equal(t, []string{"c2"}, n.Holders)
	n = tracker.await(t, "a3", func(n NodeHealth) bool { return !n.StreamSince.IsZero() })
	require.False(t, n.Stream)
	require.Equal(t, tracker.Health().Since, n.StreamSince)

	// It moves from one controller to the other.
	again := c.connect("c1", &pb.Hello{NodeName: "a2"})
	again.batch()
	since := tracker.await(t, "a2", func(n NodeHealth) bool { return len(n.Holders) == 2 }).StreamSince
	a2.cancel()
	n = tracker.await(t, "a2", func(n NodeHealth) bool { return len(n.Holders) == 1 })
	require.Equal(t, since, n.StreamSince, "it was connected all the while")

	again.say(&pb.AgentMessage{Message: &pb.AgentMessage_Goodbye{Goodbye: &pb.Goodbye{Reason: "test"}}})
	require.NoError(t, again.stream.CloseSend())
	n = tracker.await(t, "a2", func(n NodeHealth) bool { return !n.Stream })
	require.True(t, n.Goodbye)
	a1.cancel()
	n = tracker.await(t, "a1", func(n NodeHealth) bool { return !n.Stream })
	require.False(t, n.Goodbye)

	a1 = c.connect("c2", &pb.Hello{NodeName: "a1"})
	a1.batch()
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.Stream && n.ProbesFailed == 0 })
}

func TestTrackerProbes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2", "c3")
	c.gossip.set(gossip.Member{Name: "a1", Role: gossip.RoleAgent, State: gossip.Alive})
	a := c.connect("c2", &pb.Hello{NodeName: "a1"})
	a.batch()
	eventually(t, "a1 is registered", func() bool { return c.node("a1") != nil })
	tracker := c.track("c1")
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.Stream })

	c.gossip.setSilent("a1", true)
	// a2 is probed several times meanwhile. A stream that had only just come may have
	// found probes on their way: from some moment on there are none.
	c.put(nodeObject("a2"))
	eventually(t, "a node with a stream is not probed, while one without is", func() bool {
		before, others := c.gossip.probed("a1"), c.gossip.probed("a2")
		eventually(t, "a2, which has no stream, is probed", func() bool { return c.gossip.probed("a2") >= others+3*3 })
		return c.gossip.probed("a1") == before
	})
	require.Zero(t, tracker.Health().Nodes["a1"].ProbesFailed)
	gone := time.Now()
	a.cancel()
	n := tracker.await(t, "a1", func(n NodeHealth) bool { return n.ProbesFailed == 3 })
	require.False(t, n.ProbesSince.Before(gone))
	require.WithinDuration(t, gone, time.Now(), 3*time.Second, "two witnesses in time")

	c.gossip.set(gossip.Member{Name: "a1", Role: gossip.RoleAgent, State: gossip.Dead})
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.Gossip == gossip.Dead })

	// It answers again, though it has no stream yet.
	c.gossip.setSilent("a1", false)
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.ProbesFailed == 0 })
}

// The agents of a controller that died need time to find another one.
func TestTrackerLosesAController(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	a := c.connect("c2", &pb.Hello{NodeName: "a1"})
	a.batch()
	tracker := c.track("c1")
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.Stream })
	before := time.Now()
	c.controllers["c2"].stop()
	n := tracker.await(t, "a1", func(n NodeHealth) bool { return !n.Stream })
	require.False(t, n.StreamSince.Before(before))
	require.False(t, n.Goodbye)
	a = c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.Stream && fmt.Sprint(n.Holders) == "[c1]" })
}

func TestTrackerResetsAfterAPause(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	c.gossip.setSilent("a1", true)
	tracker := c.controllers["c1"].NewTracker()
	var mu sync.Mutex
	var jump time.Duration
	tracker.now = func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return time.Now().Add(jump)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { _ = tracker.Run(ctx) })
	defer done.Wait()
	defer cancel()
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.ProbesFailed == 1 })
	since := tracker.Health().Since
	mu.Lock()
	jump = time.Minute
	mu.Unlock()
	eventually(t, "the clocks start again", func() bool { return tracker.Health().Since.After(since.Add(50 * time.Second)) })
	require.Equal(t, tracker.Health().Since, tracker.Health().Nodes["a1"].StreamSince)
}

// A node that gossip does not know is probed where it says that its gossip is, at an
// address that is its own, and not at all if it does not say.
func TestTrackerProbesWhereNodesSay(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	said := func(name, at string) {
		node := nodeObject(name)
		if node.Annotations = nil; at != "" {
			node.Annotations = map[string]string{gossipAnnotation: at}
		}
		c.put(node)
	}
	own := nodeAddress("a1")
	said("a1", own+":27946")
	said("a2", "")
	said("a3", "192.0.2.1:7000") // nobody's of the cluster: its own address, at that port
	said("a4", "nonsense")
	said("a5", "192.0.2.1:70000")
	c.track("c1")
	at := func(name string) string {
		c.gossip.mu.Lock()
		defer c.gossip.mu.Unlock()
		return c.gossip.probedAt[name]
	}
	eventually(t, "nodes are probed by both controllers, again and again", func() bool { return c.gossip.probed("a1") > 6 && c.gossip.probed("a3") > 6 })
	require.Equal(t, own+":27946", at("a1"))
	require.Equal(t, nodeAddress("a3")+":7000", at("a3"))
	for _, name := range []string{"a2", "a4", "a5"} {
		require.Zero(t, c.gossip.probed(name), "%s at %s", name, at(name))
	}
}
