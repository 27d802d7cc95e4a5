package node

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestNodeChangesOnlyWithItsMachine(t *testing.T) {
	t.Parallel()
	f := &Facts{Name: "a1", IPs: []net.IP{net.ParseIP("10.0.0.1")}, MaxPods: 20, DataDir: t.TempDir(), Labels: map[string]string{"zone": "z"}, Runtime: "containerd://1", RecursiveReadOnly: true, Declared: []string{"SomeFeature"}}
	begin := time.Unix(1000, 0)
	waiting, err := Make(f, Health{Network: "no pod CIDR"}, nil, begin)
	require.NoError(t, err)
	require.Equal(t, corev1.ConditionFalse, condition(waiting, corev1.NodeReady).Status)
	require.Equal(t, corev1.ConditionTrue, condition(waiting, corev1.NodeNetworkUnavailable).Status)

	later := begin.Add(time.Minute)
	handlers := Handlers(f, nil, "runc")
	ready, err := Make(f, Health{Handlers: handlers}, waiting, later)
	require.NoError(t, err)
	require.Equal(t, corev1.ConditionTrue, condition(ready, corev1.NodeReady).Status)
	require.True(t, condition(ready, corev1.NodeReady).LastTransitionTime.Time.Equal(later))
	require.True(t, condition(ready, corev1.NodePIDPressure).LastTransitionTime.Time.Equal(begin))
	require.EqualValues(t, 20, ready.Status.Capacity.Pods().Value())
	require.Positive(t, ready.Status.Capacity.Memory().Value())
	require.Equal(t, "a1", ready.Labels[corev1.LabelHostname])
	require.Equal(t, "z", ready.Labels["zone"])
	require.EqualValues(t, 10250, ready.Status.DaemonEndpoints.KubeletEndpoint.Port, "clients say it in paths of the API")
	features := &corev1.NodeRuntimeHandlerFeatures{RecursiveReadOnlyMounts: new(true), UserNamespaces: new(false)}
	require.Equal(t, []corev1.NodeRuntimeHandler{{Features: features}, {Name: "runc", Features: features}}, ready.Status.RuntimeHandlers)
	require.False(t, *ready.Status.Features.SupplementalGroupsPolicy)
	require.Equal(t, []string{"SomeFeature"}, ready.Status.DeclaredFeatures)

	again, err := Make(f, Health{Handlers: handlers}, ready, later.Add(time.Hour))
	require.NoError(t, err)
	require.True(t, Same(ready, again), "an hour with nothing new is nothing to write")
	require.False(t, Same(ready, waiting))
}

// What CRI says of its runtimes is what the Node says of them, in one order; mounts are the
// agent's own doing.
func TestHandlersAreCRIs(t *testing.T) {
	t.Parallel()
	got := Handlers(&Facts{RecursiveReadOnly: true, MapsUsers: true}, []*runtimev1.RuntimeHandler{
		{Name: "sandboxed"}, {Name: "", Features: &runtimev1.RuntimeHandlerFeatures{UserNamespaces: true}},
		{Name: "runc", Features: &runtimev1.RuntimeHandlerFeatures{UserNamespaces: true}},
	}, "not asked")
	with := func(users bool) *corev1.NodeRuntimeHandlerFeatures {
		return &corev1.NodeRuntimeHandlerFeatures{RecursiveReadOnlyMounts: new(true), UserNamespaces: &users}
	}
	require.Equal(t, []corev1.NodeRuntimeHandler{{Features: with(true)}, {Name: "runc", Features: with(true)}, {Name: "sandboxed", Features: with(false)}}, got)
}

// What the node is short of is in its conditions, in upstream's words, and what
// is kept for that is not for pods.
func TestPressureAndWhatIsKept(t *testing.T) {
	t.Parallel()
	f := &Facts{Name: "a1", IPs: []net.IP{net.ParseIP("10.0.0.1")}, MaxPods: 20, DataDir: t.TempDir(), Reserved: corev1.ResourceList{
		corev1.ResourceMemory: resource.MustParse("100Mi"), corev1.ResourceEphemeralStorage: resource.MustParse("1000Ei"),
	}}
	begin := time.Unix(1000, 0)
	well, err := Make(f, Health{}, nil, begin)
	require.NoError(t, err)
	for _, c := range []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
		require.Equal(t, corev1.ConditionFalse, condition(well, c).Status, c)
	}
	kept := well.Status.Capacity.Memory().DeepCopy()
	kept.Sub(*well.Status.Allocatable.Memory())
	require.Equal(t, "100Mi", kept.String())
	require.Zero(t, well.Status.Allocatable.StorageEphemeral().Value(), "not less than nothing")
	require.Equal(t, well.Status.Capacity.Pods(), well.Status.Allocatable.Pods())

	bad, err := Make(f, Health{Pressure: []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure}}, well, begin.Add(time.Minute))
	require.NoError(t, err)
	for c, want := range map[corev1.NodeConditionType]string{
		corev1.NodeMemoryPressure: "KubeletHasInsufficientMemory: kubelet has insufficient memory available",
		corev1.NodeDiskPressure:   "KubeletHasDiskPressure: kubelet has disk pressure",
		corev1.NodePIDPressure:    "KubeletHasInsufficientPID: kubelet has insufficient PID available",
	} {
		got := condition(bad, c)
		require.Equal(t, corev1.ConditionTrue, got.Status, c)
		require.Equal(t, want, got.Reason+": "+got.Message)
		require.True(t, got.LastTransitionTime.Time.Equal(begin.Add(time.Minute)))
	}
}

func TestWhatTheMachineHas(t *testing.T) {
	t.Parallel()
	total, available, err := Memory()
	require.NoError(t, err)
	require.Positive(t, available)
	require.Less(t, available, total)
	most, used, err := Pids()
	require.NoError(t, err)
	require.Positive(t, used)
	require.Less(t, used, most)
	fs, err := FileSystemOf(t.TempDir())
	require.NoError(t, err)
	require.Positive(t, fs.Capacity)
	require.LessOrEqual(t, fs.Available, fs.Capacity)
	_, err = FileSystemOf("/does/not/exist")
	require.Error(t, err)
}

func condition(n *corev1.Node, t corev1.NodeConditionType) corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if c.Type == t {
			return c
		}
	}
	return corev1.NodeCondition{}
}
