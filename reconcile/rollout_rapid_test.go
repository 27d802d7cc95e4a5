package reconcile

import (
	"fmt"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
)

// TestRolloutKeepsAvailability rolls a Deployment out under random interleavings
// of the reconcilers, the agents and users. At every moment there are no more
// pods than maxSurge allows, no available pod is given up beyond maxUnavailable,
// and in the end all pods are of the last template.
func TestRolloutKeepsAvailability(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		s := newStory(w, Deployment{}, ReplicaSet{}, GarbageCollector{})
		s.shuffle = func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "work") }

		replicas := int32(rapid.IntRange(1, 7).Draw(t, "replicas"))
		surge := int32(rapid.IntRange(0, 3).Draw(t, "maxSurge"))
		unavailable := int32(rapid.IntRange(0, 3).Draw(t, "maxUnavailable"))
		if surge == 0 && unavailable == 0 {
			surge = 1
		}
		unavailable = min(unavailable, replicas)
		w.add(testDeployment("web", replicas, surge, unavailable))

		settle(t, s)
		image := "v1"
		edits := rapid.IntRange(1, 3).Draw(t, "edits")
		s.before = func(c Change) {
			switch {
			case c.Resource == podsResource && c.Verb == Create:
				if n := countPods(w, podActive) + 1; n > int(replicas+surge) {
					t.Fatalf("%s: %d pods, but %d replicas and a surge of %d", c, n, replicas, surge)
				}
			case c.Resource == podsResource && c.Verb == Delete:
				pod, ok := w.snapshot().Pods().Get(c.Namespace, c.Name)
				if !ok || !available(pod) {
					return
				}
				if n := countPods(w, available) - 1; n < int(replicas-unavailable) {
					t.Fatalf("%s: %d pods left available, but %d replicas of which %d may be unavailable", c, n, replicas, unavailable)
				}
			}
		}
		for range 120 {
			switch rapid.IntRange(0, 9).Draw(t, "who") {
			case 0:
				if edits > 0 {
					edits--
					image = fmt.Sprintf("v%d", rapid.IntRange(1, 4).Draw(t, "image"))
					setImage(w, "web", image)
				}
			case 1, 2:
				oneAgent(t, w)
			default:
				if !s.step() && edits == 0 {
					oneAgent(t, w)
				}
			}
		}
		settle(t, s)

		d, _ := w.snapshot().Deployments().Get("default", "web")
		if d.Status.UpdatedReplicas != replicas || d.Status.AvailableReplicas != replicas || d.Status.Replicas != replicas {
			t.Fatalf("the rollout does not end: %+v", d.Status)
		}
		for pod := range w.snapshot().Pods().All() {
			if pod.Spec.Containers[0].Image != image {
				t.Fatalf("pod %s still runs %s, not %s", pod.Name, pod.Spec.Containers[0].Image, image)
			}
		}
		sets := 0
		for range w.snapshot().ReplicaSets().All() {
			sets++
		}
		if limit := int(*d.Spec.RevisionHistoryLimit); sets > limit+1 {
			t.Fatalf("%d ReplicaSets, but a history of %d", sets, limit)
		}
	})
}

func testDeployment(name string, replicas, surge, unavailable int32) *appsv1.Deployment {
	history, deadline := int32(2), int32(600)
	s, u := intstr.FromInt32(surge), intstr.FromInt32(unavailable)
	app := map[string]string{"app": name}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, RevisionHistoryLimit: &history, ProgressDeadlineSeconds: &deadline,
			Selector: &metav1.LabelSelector{MatchLabels: app},
			Strategy: appsv1.DeploymentStrategy{
				Type:          appsv1.RollingUpdateDeploymentStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &s, MaxUnavailable: &u},
			},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: app},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "v1"}}},
			},
		},
	}
}

func setImage(w *world, name, image string) {
	w.edit(deploymentsResource, "default", name, func(obj map[string]any) {
		mergeJSON(obj, map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{
			"containers": []any{map[string]any{"name": "c", "image": image, "resources": map[string]any{}}},
		}}}})
	})
}

func available(pod *corev1.Pod) bool { return podActive(pod) && readyCondition(pod) != nil }

func countPods(w *world, which func(*corev1.Pod) bool) int {
	n := 0
	for pod := range w.snapshot().Pods().All() {
		if which(pod) {
			n++
		}
	}
	return n
}

// oneAgent does for one pod what its agent does next.
func oneAgent(t *rapid.T, w *world) {
	var busy []*corev1.Pod
	for pod := range w.snapshot().Pods().All() {
		if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodPending {
			busy = append(busy, pod)
		}
	}
	if len(busy) == 0 {
		return
	}
	agent(w, busy[rapid.IntRange(0, len(busy)-1).Draw(t, "pod")])
}

func agent(w *world, pod *corev1.Pod) {
	if pod.DeletionTimestamp != nil {
		w.endPod(pod.Namespace, pod.Name)
		return
	}
	w.runPod(pod.Namespace, pod.Name)
}

// settle runs reconcilers and agents until nothing is left to do.
func settle(t *rapid.T, s *story) {
	for range 200 {
		for s.step() {
		}
		var busy []*corev1.Pod
		for pod := range s.snapshot().Pods().All() {
			if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodPending {
				busy = append(busy, pod)
			}
		}
		if len(busy) == 0 {
			return
		}
		for _, pod := range busy {
			agent(s.world, pod)
		}
	}
	t.Fatalf("no end:\n%s", s.show(""))
}

// TestSpreadSizes checks the proportions of a scaling in the middle of a rollout
// for any sizes: they add up to what is allowed.
func TestSpreadSizes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		was := int32(rapid.IntRange(1, 50).Draw(t, "was"))
		now := int32(rapid.IntRange(0, 50).Draw(t, "now"))
		surge := int32(rapid.IntRange(0, 10).Draw(t, "surge"))
		d := testDeployment("web", was, surge, 1)
		r := &rollout{d: d}
		if was+surge < 2 {
			t.Skip("no room for two sets")
		}
		left := was + surge
		for i := range rapid.IntRange(2, 4).Draw(t, "sets") {
			n := int32(rapid.IntRange(1, max(1, int(left)/2)).Draw(t, "size"))
			if left -= n; left < 0 {
				break
			}
			rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(i)}, Spec: appsv1.ReplicaSetSpec{Replicas: &n}}
			r.markReplicas(rs)
			r.old = append(r.old, rs)
		}
		r.current, r.old = r.old[0], r.old[1:]
		if len(active(r.all())) < 2 {
			t.Skip("one set is no proportion")
		}
		r.d = testDeployment("web", now, surge, 1)
		r.scale()
		var want int32
		if now > 0 {
			want = now + surge
		}
		if sum := total(r.all(), specReplicas); sum != want {
			t.Fatalf("the sizes %v add up to %d, not %d", slices.Collect(func(yield func(int32) bool) {
				for _, rs := range r.all() {
					if !yield(*rs.Spec.Replicas) {
						return
					}
				}
			}), sum, want)
		}
	})
}
