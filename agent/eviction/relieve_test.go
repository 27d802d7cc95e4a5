package eviction

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// starving is a manager of three pods, of which "large" takes most of all.
func starving(t *testing.T, thresholds string) (*Manager, *fakePods, *fakeNode) {
	t.Helper()
	list, err := ParseHard(thresholds)
	require.NoError(t, err)
	f := &fakePods{
		usage: map[types.UID]Usage{}, asked: map[types.UID]int{}, evicted: make(chan Eviction, 10), memory: map[types.UID]int64{}, gone: map[types.UID]bool{}, over: map[types.UID]bool{},
		endless: map[types.UID]bool{},
	}
	for name, n := range map[string]int64{"small": 1, "large": 100, "medium": 10} {
		pod := namedPod(name, "")
		f.pods = append(f.pods, pod)
		f.usage[pod.UID] = Usage{Volumes: map[string]Disk{"x": {Bytes: n}}}
		f.memory[pod.UID] = n
	}
	n := &fakeNode{seen: Observations{}}
	for _, s := range signals {
		n.set(s, 500)
	}
	return New(Config{Pods: f, Node: n, Thresholds: list, Transition: 5 * time.Minute, Logger: slog.New(slog.DiscardHandler)}), f, n
}

func evictedNames(f *fakePods) []string {
	out := []string{}
	for {
		select {
		case e := <-f.evicted:
			out = append(out, e.Pod.Name)
		default:
			return out
		}
	}
}

func TestRelieve(t *testing.T) {
	t.Parallel()
	const hard = "memory.available<10%,nodefs.available<10%,imagefs.available<10%"
	for _, tc := range []struct {
		name      string
		short     Signal
		own       bool
		ended     int64 // what is left after ended containers were removed; 0: no change
		images    int64 // and after images were
		want      []string
		cond      corev1.NodeConditionType
		freed     bool // something was freed, or tried
		wantEvent string
	}{
		{name: "memory", short: MemoryAvailable, want: []string{"large"}, cond: corev1.NodeMemoryPressure, wantEvent: "EvictionThresholdMet: Attempting to reclaim memory"},
		{name: "disk", short: NodeFsAvailable, want: []string{"large"}, cond: corev1.NodeDiskPressure, freed: true, wantEvent: "EvictionThresholdMet: Attempting to reclaim ephemeral-storage"},
		{name: "images are enough", short: NodeFsAvailable, images: 200, want: []string{}, cond: corev1.NodeDiskPressure, freed: true, wantEvent: "EvictionThresholdMet: Attempting to reclaim ephemeral-storage"},
		{name: "containers are enough", short: ImageFsAvailable, ended: 200, want: []string{}, cond: corev1.NodeDiskPressure, freed: true, wantEvent: "EvictionThresholdMet: Attempting to reclaim ephemeral-storage"},
		{name: "images do not help", short: NodeFsAvailable, images: 99, want: []string{"large"}, cond: corev1.NodeDiskPressure, freed: true, wantEvent: "EvictionThresholdMet: Attempting to reclaim ephemeral-storage"},
		{name: "images are elsewhere", short: NodeFsAvailable, own: true, images: 500, want: []string{"large"}, cond: corev1.NodeDiskPressure, wantEvent: "EvictionThresholdMet: Attempting to reclaim ephemeral-storage"},
		{name: "images are elsewhere, where room is short", short: ImageFsAvailable, own: true, images: 500, want: []string{}, cond: corev1.NodeDiskPressure, freed: true, wantEvent: "EvictionThresholdMet: Attempting to reclaim ephemeral-storage"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m, f, n := starving(t, hard)
				n.ownImages = tc.own
				freed := false
				f.ended = func() {
					freed = true
					if tc.ended > 0 {
						n.set(tc.short, tc.ended)
					}
				}
				n.images = func() {
					freed = true
					if tc.images > 0 {
						n.set(tc.short, tc.images)
					}
				}
				m.relieve(t.Context())
				require.Empty(t, evictedNames(f), "there is enough of everything")
				require.Empty(t, m.Conditions())
				n.set(tc.short, 50)
				f.gone["large"] = true // at once
				m.relieve(t.Context())
				require.Equal(t, tc.want, evictedNames(f))
				require.Equal(t, []corev1.NodeConditionType{tc.cond}, m.Conditions())
				require.Equal(t, 1, n.changed)
				require.Equal(t, tc.freed, freed)
				require.Equal(t, []string{tc.wantEvent}, n.events)
			})
		})
	}
}

// One pod at a time; one that takes long to end is waited for, for a while, and
// then another one is evicted and not the same again.
func TestOnePodAtATime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, f, n := starving(t, "memory.available<10%")
		n.set(MemoryAvailable, 50)
		began := time.Now()
		m.relieve(t.Context())
		require.GreaterOrEqual(t, time.Since(began), cleanupTime)
		require.Equal(t, []string{"large"}, evictedNames(f))
		f.gone["medium"] = true
		m.relieve(t.Context())
		require.Equal(t, []string{"medium"}, evictedNames(f))
		f.gone["small"] = true
		m.relieve(t.Context())
		require.Equal(t, []string{"small"}, evictedNames(f), "large takes its time, and is not evicted again")
		m.relieve(t.Context())
		require.Empty(t, evictedNames(f))
		require.Len(t, n.events, 1, "the cluster is told once a minute")
		time.Sleep(2 * time.Minute)
		evictedNames(f)
		m.relieve(t.Context())
		require.Len(t, n.events, 2)

		n.set(MemoryAvailable, 500)
		evictedNames(f)
		m.relieve(t.Context())
		require.Empty(t, evictedNames(f))
		require.NotEmpty(t, m.Conditions())
		time.Sleep(5 * time.Minute)
		m.relieve(t.Context())
		require.Empty(t, m.Conditions())
	})
}

// A pod that cannot be measured to its end keeps no other from being evicted.
func TestMeasuringHasATime(t *testing.T) {
	t.Parallel()
	m, f, n := starving(t, "nodefs.available<10%")
	m.measureTime = 3 * time.Second
	f.endless["small"] = true
	f.gone["large"] = true
	n.set(NodeFsAvailable, 50)
	m.relieve(t.Context())
	require.Equal(t, []string{"large"}, evictedNames(f))
}

// What is first said of a node is what is so.
func TestLook(t *testing.T) {
	t.Parallel()
	m, f, n := starving(t, "nodefs.available<10%")
	n.set(NodeFsAvailable, 50)
	m.Look(t.Context())
	require.Equal(t, []corev1.NodeConditionType{corev1.NodeDiskPressure}, m.Conditions())
	require.Empty(t, evictedNames(f))
}
