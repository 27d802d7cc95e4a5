package eviction

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// fakePods are a node's pods, of which each takes what the test says.
type fakePods struct {
	mu      sync.Mutex
	pods    []*corev1.Pod
	usage   map[types.UID]Usage
	endless map[types.UID]bool // measuring them never ends
	asked   map[types.UID]int
	evicted chan Eviction
	memory  map[types.UID]int64
	gone    map[types.UID]bool // once evicted
	over    map[types.UID]bool // evicted and gone
	ended   func()             // what removing containers that have ended does
}

func (f *fakePods) Active() []*corev1.Pod {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.pods), func(p *corev1.Pod) bool { return f.over[p.UID] })
}

func (f *fakePods) Running(context.Context) (Running, error) { return nil, nil }

func (f *fakePods) MeasureDisk(ctx context.Context, pod *corev1.Pod, _ []Container, stop Stop) (Usage, error) {
	f.mu.Lock()
	f.asked[pod.UID]++
	endless, u := f.endless[pod.UID], f.usage[pod.UID]
	f.mu.Unlock()
	for endless {
		if err := stop.Pause(); err != nil {
			return u, err
		}
	}
	return u, stop.Pause()
}

func (f *fakePods) Evict(e Eviction) {
	f.mu.Lock()
	if f.gone[e.Pod.UID] {
		f.over[e.Pod.UID] = true
	}
	f.mu.Unlock()
	f.evicted <- e
}

func (f *fakePods) MeasureMemory(pod *corev1.Pod, _ []Container, u *Usage) error {
	u.Memory = f.memory[pod.UID]
	return nil
}

func (f *fakePods) RemoveEnded(context.Context) error {
	if f.ended != nil {
		f.ended()
	}
	return nil
}

func (f *fakePods) Gone(uid types.UID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.over[uid]
}

// fakeNode has this much of everything left.
type fakeNode struct {
	mu        sync.Mutex
	seen      Observations
	ownImages bool
	images    func() // what removing images does
	changed   int
	events    []string
}

func (n *fakeNode) Observe(context.Context) (Observations, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.seen), n.ownImages
}

func (n *fakeNode) set(s Signal, available int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen[s] = Observation{Available: available, Capacity: 1000}
}

func (n *fakeNode) RemoveImages(context.Context) error {
	if n.images != nil {
		n.images()
	}
	return nil
}

func (n *fakeNode) Changed() { n.changed++ }

func (n *fakeNode) Event(_, reason, message string) { n.events = append(n.events, reason+": "+message) }

func namedPod(name string, limit string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name)},
		Spec:       corev1.PodSpec{Volumes: []corev1.Volume{emptyDir("x", limit, "")}},
	}
}

// Pods that cannot be measured to an end do not keep others from their limits.
func TestOthersAreMeasuredBesideWhatTakesForEver(t *testing.T) {
	t.Parallel()
	critical := namedPod("critical", "1Mi")
	priority := int32(criticalPriority)
	critical.Spec.Priority = &priority
	f := &fakePods{
		usage: map[types.UID]Usage{}, endless: map[types.UID]bool{}, asked: map[types.UID]int{}, evicted: make(chan Eviction),
		pods: []*corev1.Pod{critical, namedPod("none", "")},
	}
	for _, name := range []string{"e1", "e2", "e3", "e4", "e5", "e6"} {
		f.pods = append(f.pods, namedPod(name, "1Mi"))
		f.endless[types.UID(name)] = true
	}
	f.pods = append(f.pods, namedPod("over", "1Mi"), namedPod("within", "1Mi"))
	for _, p := range f.pods {
		f.usage[p.UID] = Usage{Volumes: map[string]Disk{"x": {Bytes: 2 * mib}}}
	}
	f.usage["within"] = Usage{Volumes: map[string]Disk{"x": {Bytes: 1 * mib}}}
	m := New(Config{Pods: f, Node: &fakeNode{}, Interval: time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	for range 3 { // it is said until it is done
		select {
		case e := <-f.evicted:
			require.Equal(t, "over", e.Pod.Name)
			require.Equal(t, `Usage of EmptyDir volume "x" exceeds the limit "1Mi". `, e.Message)
			require.False(t, e.Disruption)
		case <-time.After(time.Minute):
			t.Fatal("the pod that is over its limit is not evicted")
		}
	}
	f.mu.Lock()
	for _, name := range []types.UID{"e1", "e2", "e3", "e4", "e5", "e6"} {
		require.LessOrEqual(t, f.asked[name], 1, "one measuring of a pod at a time")
	}
	require.Zero(t, f.asked["none"])
	require.Zero(t, f.asked["critical"])
	f.pods = nil
	f.mu.Unlock()
	cancel()
	for ended := false; !ended; {
		select {
		case <-f.evicted:
		case err := <-done:
			require.NoError(t, err)
			ended = true
		case <-time.After(time.Minute):
			t.Fatal("the end is not waited for, or never comes")
		}
	}
}

// What takes long to measure is measured less often.
func TestAMeasuringThatTookLongIsPutOff(t *testing.T) {
	t.Parallel()
	f := &fakePods{usage: map[types.UID]Usage{}, asked: map[types.UID]int{}, evicted: make(chan Eviction, 10), pods: []*corev1.Pod{namedPod("p", "1Mi")}}
	m := New(Config{Pods: f, Node: &fakeNode{}, Interval: time.Hour, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, m.enforce(t.Context()))
	m.wg.Wait()
	require.False(t, time.Now().Before(m.measured["p"].next), "a quick one is due at the next look")
	m.measured["p"].next = time.Now().Add(time.Hour)
	require.NoError(t, m.enforce(t.Context()))
	m.wg.Wait()
	require.Equal(t, 1, f.asked["p"])
	f.pods = nil
	require.NoError(t, m.enforce(t.Context()))
	require.Empty(t, m.measured, "what is gone is forgotten")
}
