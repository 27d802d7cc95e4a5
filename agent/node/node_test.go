package node

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

func TestNodeChangesOnlyWithItsMachine(t *testing.T) {
	t.Parallel()
	f := &Facts{Name: "a1", IPs: []net.IP{net.ParseIP("10.0.0.1")}, MaxPods: 20, DataDir: t.TempDir(), Labels: map[string]string{"zone": "z"}, Runtime: "containerd://1"}
	begin := time.Unix(1000, 0)
	waiting, err := Make(f, Health{Network: "no pod CIDR"}, nil, begin)
	require.NoError(t, err)
	require.Equal(t, corev1.ConditionFalse, condition(waiting, corev1.NodeReady).Status)
	require.Equal(t, corev1.ConditionTrue, condition(waiting, corev1.NodeNetworkUnavailable).Status)

	later := begin.Add(time.Minute)
	ready, err := Make(f, Health{}, waiting, later)
	require.NoError(t, err)
	require.Equal(t, corev1.ConditionTrue, condition(ready, corev1.NodeReady).Status)
	require.True(t, condition(ready, corev1.NodeReady).LastTransitionTime.Time.Equal(later))
	require.True(t, condition(ready, corev1.NodePIDPressure).LastTransitionTime.Time.Equal(begin))
	require.EqualValues(t, 20, ready.Status.Capacity.Pods().Value())
	require.Positive(t, ready.Status.Capacity.Memory().Value())
	require.Equal(t, "a1", ready.Labels[corev1.LabelHostname])
	require.Equal(t, "z", ready.Labels["zone"])

	again, err := Make(f, Health{}, ready, later.Add(time.Hour))
	require.NoError(t, err)
	require.True(t, Same(ready, again), "an hour with nothing new is nothing to write")
	require.False(t, Same(ready, waiting))
}

func condition(n *corev1.Node, t corev1.NodeConditionType) corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if c.Type == t {
			return c
		}
	}
	return corev1.NodeCondition{}
}
