package dispatch

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	pb "timonel/proto/timonel/v1"
)

// An agent hears its own labels and taints before the pods that were bound for
// their sake, again when they change, and not when only conditions do.
func TestNodeComesBeforeItsPods(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	node := nodeObject("a1")
	node.Labels["disk"] = "ssd"
	c.put(node)
	c.put(podOn("a1", "first", "u1"))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	timeout := time.After(patience)
	var labels map[string]string
	// until reads what the agent gets up to a pod's name, and counts NodeSets.
	until := func(pod string) (sets int) {
		t.Helper()
		for {
			select {
			case m := <-a.got:
				if s := m.GetNodeSet(); s != nil {
					n := &corev1.Node{}
					require.NoError(t, n.Unmarshal(s.Node))
					require.Equal(t, "a1", n.Name)
					require.Empty(t, n.Status.Conditions)
					labels = n.Labels
					sets++
				}
				if p := m.GetPodSet(); p != nil {
					got := &corev1.Pod{}
					require.NoError(t, got.Unmarshal(p.Pod))
					if got.Name == pod {
						return sets
					}
				}
			case <-timeout:
				t.Fatalf("pod %s did not come", pod)
			}
		}
	}
	require.Equal(t, 1, until("first"))
	require.Equal(t, "ssd", labels["disk"])

	node = node.DeepCopy()
	node.Labels["zone"] = "b"
	c.put(node)
	c.put(podOn("a1", "second", "u2"))
	require.Equal(t, 1, until("second"))
	require.Equal(t, "b", labels["zone"])

	node = node.DeepCopy()
	node.Status.Conditions[0].Message = "still ready"
	c.put(node)
	c.put(podOn("a1", "third", "u3"))
	require.Zero(t, until("third"))
}
