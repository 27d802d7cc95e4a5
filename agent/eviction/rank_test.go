package eviction

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// rankPod is a pod of one container, what it requests, and what it takes.
type rankPod struct {
	name            string
	priority        int32
	memory, disk    string // requested
	usesMemory      int64  // MiB
	processes       int64
	volume, layer   int64 // MiB
	logs, other     int64
	inodes, inLayer int64
	unknown         bool
}

func (r rankPod) make() (*corev1.Pod, *Usage) {
	c := corev1.Container{Name: "app", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{}}}
	if r.memory != "" {
		c.Resources.Requests[corev1.ResourceMemory] = resource.MustParse(r.memory)
	}
	if r.disk != "" {
		c.Resources.Requests[corev1.ResourceEphemeralStorage] = resource.MustParse(r.disk)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: r.name, UID: types.UID(r.name)},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{c}, Priority: &r.priority},
	}
	return pod, &Usage{
		UID: pod.UID, Memory: r.usesMemory * mib, Processes: r.processes, Volumes: map[string]Disk{"v": {r.volume * mib, r.inodes}},
		Other:      Disk{Bytes: r.other * mib},
		Containers: []ContainerUsage{{Name: "app", Rootfs: Disk{r.layer * mib, r.inLayer}, Logs: Disk{Bytes: r.logs * mib}, Memory: r.usesMemory * mib}},
	}
}

// Names are in the order in which pods are evicted.
func TestRank(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name      string
		signal    Signal
		ownImages bool
		pods      []rankPod
		critical  []string // are left out
	}{
		{"memory: beyond the request before within it, whatever the priority", MemoryAvailable, false, []rankPod{
			{name: "beyond", priority: 1000, memory: "10Mi", usesMemory: 11},
			{name: "within", priority: 0, memory: "1Gi", usesMemory: 1024},
		}, nil},
		{"memory: then by priority", MemoryAvailable, false, []rankPod{
			{name: "negative", priority: -5, usesMemory: 1}, {name: "zero", usesMemory: 500}, {name: "high", priority: 10, usesMemory: 900},
		}, nil},
		{"memory: then by how much beyond the request", MemoryAvailable, false, []rankPod{
			{name: "200 beyond", memory: "300Mi", usesMemory: 500}, {name: "150 beyond", usesMemory: 150}, {name: "1 beyond", memory: "899Mi", usesMemory: 900},
			{name: "1 within", memory: "100Mi", usesMemory: 99}, {name: "50 within", memory: "100Mi", usesMemory: 50},
		}, nil},
		{"memory: nothing known first", MemoryAvailable, false, []rankPod{
			{name: "unknown", priority: 100, unknown: true}, {name: "known", usesMemory: 1000},
		}, nil},
		{"critical ones never", MemoryAvailable, false, []rankPod{
			{name: "high", priority: 1_999_999_999, usesMemory: 1}, {name: "cluster", priority: 2_000_000_000, usesMemory: 900}, {name: "node", priority: 2_000_001_000, usesMemory: 900},
		}, []string{"cluster", "node"}},
		{"disk: volumes, layers, logs and the rest together", NodeFsAvailable, false, []rankPod{
			{name: "40", volume: 10, layer: 10, logs: 10, other: 10}, {name: "35", volume: 35}, {name: "30", layer: 30}, {name: "5 with 30 requested", disk: "30Mi", volume: 35},
			{name: "within", disk: "100Mi", volume: 99},
		}, nil},
		{"disk: by priority among those beyond", ImageFsAvailable, false, []rankPod{
			{name: "low", priority: 1, volume: 1}, {name: "high", priority: 2, volume: 100}, {name: "within", priority: 0, disk: "10Mi", volume: 10},
		}, nil},
		{"images of their own: layers count there", ImageFsAvailable, true, []rankPod{
			{name: "layer", layer: 10}, {name: "volume", volume: 100, logs: 100},
		}, nil},
		{"images of their own: and not on the node's", NodeFsAvailable, true, []rankPod{
			{name: "volume", volume: 10}, {name: "log", logs: 5}, {name: "layer", layer: 100},
		}, nil},
		{"inodes", NodeFsInodesFree, false, []rankPod{
			{name: "many", inodes: 500, inLayer: 500}, {name: "some", inodes: 400, volume: 1000}, {name: "none", volume: 2000},
		}, nil},
		{"process ids: by priority, then number", PIDAvailable, false, []rankPod{
			{name: "low few", priority: 0, processes: 1}, {name: "high many", priority: 5, processes: 1000}, {name: "high few", priority: 5, processes: 2},
		}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var pods []*corev1.Pod
			usage := map[types.UID]*Usage{}
			var want []string
			for _, r := range tc.pods {
				pod, u := r.make()
				pods = append(pods, pod)
				if !r.unknown {
					usage[pod.UID] = u
				}
				if !slices.Contains(tc.critical, r.name) {
					want = append(want, r.name)
				}
			}
			for range 20 {
				rand.Shuffle(len(pods), func(i, j int) { pods[i], pods[j] = pods[j], pods[i] })
				var got []string
				for _, p := range Rank(tc.signal, pods, usage, tc.ownImages) {
					got = append(got, p.Name)
				}
				require.Equal(t, want, got)
			}
		})
	}
}

func TestStarvedSaysWhatAndWho(t *testing.T) {
	t.Parallel()
	thresholds, err := ParseHard("memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,pid.available<10%")
	require.NoError(t, err)
	seen := Observations{
		MemoryAvailable: {50 * mib, 1000 * mib}, NodeFsAvailable: {60 * mib, 1000 * mib}, NodeFsInodesFree: {30, 1000},
		ImageFsAvailable: {70 * mib, 1000 * mib}, PIDAvailable: {20, 1000},
	}
	pod, u := rankPod{name: "p", memory: "10Mi", disk: "2Mi", usesMemory: 30, layer: 5, logs: 1, volume: 100}.make()
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "idle"})
	u.Containers = append(u.Containers, ContainerUsage{Name: "idle"}, ContainerUsage{Name: "debugger", Memory: mib})
	for i, want := range []string{
		"The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container app was using 30Mi, request is 10Mi, has larger consumption of memory. ",
		"The node was low on resource: ephemeral-storage. Threshold quantity: 100Mi, available: 60Mi. Container app was using 6Mi, request is 2Mi, has larger consumption of ephemeral-storage. ",
		"The node was low on resource: inodes. Threshold quantity: 50, available: 30. ",
		"The node was low on resource: ephemeral-storage. Threshold quantity: 150Mi, available: 70Mi. Container app was using 6Mi, request is 2Mi, has larger consumption of ephemeral-storage. ",
		"The node was low on resource: pids. Threshold quantity: 100, available: 20. ",
	} {
		e := Starved(pod, u, thresholds[i], thresholds[i:], seen)
		require.Equal(t, want, e.Message)
		require.True(t, e.Disruption)
		require.Equal(t, string(thresholds[i].Signal.resource()), e.Annotations["starved_resource"])
	}
	e := Starved(pod, u, thresholds[0], thresholds, seen)
	require.Equal(t, map[string]string{"offending_containers": "app", "offending_containers_usage": "30Mi", "starved_resource": "memory"}, e.Annotations)
	e = Starved(pod, nil, thresholds[0], thresholds, seen)
	require.Equal(t, "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. ", e.Message)

	pod.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("20Mi")}}
	e = Starved(pod, u, thresholds[0], thresholds, seen)
	require.Contains(t, e.Message, "Pod p was using 30Mi, request is 20Mi, has larger consumption of memory. Container app")
	require.Equal(t, "p", e.Annotations["offending_pod"])
}
