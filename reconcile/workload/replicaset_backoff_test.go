package workload_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload"
)

// refusing is a story of one ReplicaSet whose pods a node ends as told.
type refusing struct {
	*storytest.Story
	creates []time.Time
}

func newRefusing(t *testing.T, replicas int32) *refusing {
	r := &refusing{Story: storytest.New(storytest.NewWorld(t), workload.ReplicaSet{})}
	r.Before = func(c reconcile.Request) {
		if c.Verb == reconcile.VerbCreate {
			r.creates = append(r.creates, r.Now)
		}
	}
	set := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}}
	set.SetGroupVersionKind(reconcile.ReplicaSetKind)
	set.Spec.Replicas = &replicas
	set.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	set.Spec.Template.Labels = set.Spec.Selector.MatchLabels
	set.Spec.Template.Spec.Containers = []corev1.Container{{Name: "c"}}
	r.Add(set)
	r.Start()
	return r
}

// pods are those in a phase.
func (r *refusing) pods(phase corev1.PodPhase) []string {
	var out []string
	for p := range r.Snapshot().Pods().All() {
		if p.Status.Phase == phase {
			out = append(out, p.Name)
		}
	}
	return out
}

// live lets time pass in steps of the clock's resolution; the node deals with
// every pod as soon as it is created.
func (r *refusing) live(d time.Duration, node func(name string)) {
	const step = 500 * time.Millisecond
	for end := r.Now.Add(d); r.Now.Before(end); r.Now = r.Now.Add(step) {
		for range 20 {
			if r.Run(400) == "nothing\n" {
				break
			}
			for _, name := range r.pods(corev1.PodPending) {
				node(name)
			}
		}
	}
}

func (r *refusing) fail(name string) {
	r.SetStatus(reconcile.PodsResource, "default", name, map[string]any{"phase": "Failed", "reason": "PodFeatureUnsupported"})
}

func (r *refusing) ready(name string) { r.RunPod("default", name) }

// Pods that a node refuses at once are replaced after a pause that doubles, and
// at once again when the cause has gone.
func TestRefusedPodsAreReplacedAtAPace(t *testing.T) {
	t.Parallel()
	for _, replicas := range []int32{1, 5} {
		t.Run(fmt.Sprint(replicas), func(t *testing.T) {
			t.Parallel()
			r := newRefusing(t, replicas)
			r.live(time.Minute, r.fail)
			inMinute := len(r.creates)
			require.GreaterOrEqual(t, inMinute, 4*int(replicas), "it goes on trying")
			require.LessOrEqual(t, inMinute, 7*int(replicas))
			r.live(2*time.Hour, r.fail)
			require.LessOrEqual(t, len(r.creates)-inMinute, 30*int(replicas), "the pace is kept")
			require.GreaterOrEqual(t, len(r.creates)-inMinute, 20*int(replicas))

			r.live(workload.LastHold+2*time.Second, r.ready)
			require.Len(t, r.pods(corev1.PodRunning), int(replicas), "they run soon after they can")
			gone := r.pods(corev1.PodRunning)[0]
			r.SetStatus(reconcile.PodsResource, "default", gone, map[string]any{"phase": "Failed", "reason": "Evicted", "containerStatuses": []any{
				map[string]any{"name": "c", "state": map[string]any{"terminated": map[string]any{"exitCode": 137, "finishedAt": r.Now.Add(2 * workload.AtOnce).Format(time.RFC3339)}}},
			}})
			before := len(r.creates)
			r.live(3*time.Second, r.ready)
			require.Len(t, r.creates, before+1)
			require.Len(t, r.pods(corev1.PodRunning), int(replicas))
		})
	}
}

// One pod that is refused again and again does not keep others from being
// replaced for longer than those that were refused lately are many.
func TestOthersAreReplacedBesideARefusedPod(t *testing.T) {
	t.Parallel()
	r := newRefusing(t, 40)
	bad := false
	r.live(time.Second, func(name string) { // one of them is refused
		if !bad {
			bad = true
			r.fail(name)
			return
		}
		r.ready(name)
	})
	r.live(40*time.Second, r.fail)
	running := r.pods(corev1.PodRunning)
	require.Len(t, running, 39)
	for _, name := range running[:20] {
		r.EndPod("default", name)
	}
	require.Len(t, r.pods(corev1.PodRunning), 19)
	r.live(time.Second, r.ready)
	require.GreaterOrEqual(t, len(r.pods(corev1.PodRunning)), 32)
	r.live(time.Minute, r.ready)
	require.Len(t, r.pods(corev1.PodRunning), 40)
}

// A pod that ran, was deleted, or was lost with its node is replaced at once.
func TestWhatDidNotFailAtOnceIsReplacedAtOnce(t *testing.T) {
	t.Parallel()
	created := metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	ended := func(after time.Duration) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: metav1.NewTime(created.Add(after))}}
	}
	for name, c := range map[string]struct {
		state   corev1.ContainerState
		phase   corev1.PodPhase
		deleted bool
		want    bool
	}{
		"refused":         {phase: corev1.PodFailed, want: true},
		"evicted at once": {phase: corev1.PodFailed, state: ended(20 * time.Second), want: true},
		"evicted":         {phase: corev1.PodFailed, state: ended(2 * time.Minute)},
		"lost":            {phase: corev1.PodFailed, state: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}},
		"deleted":         {phase: corev1.PodFailed, deleted: true},
		"done":            {phase: corev1.PodSucceeded, state: ended(time.Second)},
		"runs":            {phase: corev1.PodRunning},
	} {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: created}}
		p.Status.Phase = c.phase
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: c.state}}
		if c.deleted {
			p.DeletionTimestamp = &created
		}
		require.Equal(t, c.want, workload.FailedAtOnce(p), name)
	}
}
