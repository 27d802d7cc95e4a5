package dispatch

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	pb "timonel/proto/timonel/v1"
)

func (a *agent) takes(cpu uint64) {
	a.t.Helper()
	raw, err := proto.Marshal(&pb.Usage{Window: int64(15 * time.Second), Cpu: cpu, Pods: []*pb.PodUsage{{Uid: "u1"}}})
	require.NoError(a.t, err)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Usage{Usage: &pb.UsageReport{Usage: raw}}})
}

// TestNodesUsage: any controller tells what a node takes, wherever its agent is, and of a
// node whose agent has gone nobody does.
func TestNodesUsage(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	c.put(nodeObject("a1"))
	c.put(nodeObject("a2"))
	one, two := c.connect("c1", &pb.Hello{NodeName: "a1"}), c.connect("c2", &pb.Hello{NodeName: "a2"})
	one.batch()
	two.batch()
	one.takes(1)
	one.takes(11)
	two.takes(22)
	c.settle(one)
	c.settle(two)
	all := []string{"a1", "a2", "nobody"}
	for _, name := range []string{"c1", "c2"} {
		got := c.controllers[name].NodesUsage(t.Context(), all)
		require.Len(t, got, 2, name)
		require.EqualValues(t, 11, got["a1"].GetCpu(), "the newest, by %s", name)
		require.EqualValues(t, 22, got["a2"].GetCpu(), name)
		require.Equal(t, "u1", got["a2"].GetPods()[0].GetUid())
		require.WithinDuration(t, time.Now(), got["a2"].When, time.Minute)
	}
	require.Len(t, c.controllers["c1"].NodesUsage(t.Context(), []string{"a2"}), 1, "of what was asked for")

	two.cancel()
	eventually(t, "a2 is not told of", func() bool {
		got := c.controllers["c1"].NodesUsage(t.Context(), all)
		_, there := got["a2"]
		return !there && len(got) == 1
	})
	eventually(t, "its room is given back", func() bool { return c.controllers["c2"].usageBytes.Load() == 0 })
}

func TestUsageHasABound(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	d := c.controllers["c1"]
	a.takes(1)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Usage{Usage: &pb.UsageReport{Usage: make([]byte, pb.MaxUsage+1)}}})
	c.settle(a)
	require.EqualValues(t, 1, d.NodesUsage(context.Background(), []string{"a1"})["a1"].GetCpu(), "what is too long is not taken")
	d.usageBytes.Add(d.config.UsageBytes)
	a.takes(2)
	c.settle(a)
	require.Empty(t, d.NodesUsage(context.Background(), []string{"a1"}), "there is no room, and what was said before is too old")
	require.EqualValues(t, d.config.UsageBytes, d.usageBytes.Load())
	d.usageBytes.Add(-d.config.UsageBytes)
	a.takes(3)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Usage{Usage: &pb.UsageReport{Usage: []byte("no message")}}})
	c.settle(a)
	require.Empty(t, d.NodesUsage(context.Background(), []string{"a1"}), "an agent may say anything")
}

func TestUsageGetsStale(t *testing.T) {
	t.Parallel()
	var u usage
	at := time.Unix(1000, 0)
	d := &Dispatcher{}
	require.True(t, u.set(&said{[]byte("x"), at}, &d.usageBytes, 100))
	require.NotNil(t, u.get(at.Add(usageStale)))
	require.Nil(t, u.get(at.Add(usageStale+1)))
	require.True(t, u.set(nil, &d.usageBytes, 100))
	require.True(t, u.set(&said{[]byte("x"), at}, &d.usageBytes, 100), "after the end nothing is kept")
	require.Nil(t, u.get(at))
	require.Zero(t, d.usageBytes.Load())
}
