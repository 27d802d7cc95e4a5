package workload_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/cleanup"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload"
)

// TestRolloutKeepsAvailability rolls a Deployment out under random interleavings
// of the reconcilers, the agents and users. At every moment there are no more
// pods than maxSurge allows, no available pod is given up beyond maxUnavailable,
// and in the end all pods are of the last template.
func TestRolloutKeepsAvailability(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := storytest.NewWorld(t)
		s := storytest.New(w, workload.Deployment{}, workload.ReplicaSet{}, cleanup.GarbageCollector{})
		s.Shuffle = func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "work") }

		replicas := int32(rapid.IntRange(1, 7).Draw(t, "replicas"))
		surge := int32(rapid.IntRange(0, 3).Draw(t, "maxSurge"))
		unavailable := int32(rapid.IntRange(0, 3).Draw(t, "maxUnavailable"))
		if surge == 0 && unavailable == 0 {
			surge = 1
		}
		unavailable = min(unavailable, replicas)
		w.Add(storytest.Deployment("web", replicas, surge, unavailable))

		settle(t, s)
		image := "v1"
		edits := rapid.IntRange(1, 3).Draw(t, "edits")
		s.Before = func(c reconcile.Request) {
			switch {
			case c.Resource == reconcile.PodsResource && c.Verb == reconcile.VerbCreate:
				if n := countPods(w, reconcile.PodActive) + 1; n > int(replicas+surge) {
					t.Fatalf("%s: %d pods, but %d replicas and a surge of %d", c, n, replicas, surge)
				}
			case c.Resource == reconcile.PodsResource && c.Verb == reconcile.VerbDelete:
				pod, ok := w.Snapshot().Pods().Get(c.Namespace, c.Name)
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
				if !s.Step() && edits == 0 {
					oneAgent(t, w)
				}
			}
		}
		settle(t, s)

		d, _ := w.Snapshot().Deployments().Get("default", "web")
		if d.Status.UpdatedReplicas != replicas || d.Status.AvailableReplicas != replicas || d.Status.Replicas != replicas {
			t.Fatalf("the rollout does not end: %+v", d.Status)
		}
		for pod := range w.Snapshot().Pods().All() {
			if pod.Spec.Containers[0].Image != image {
				t.Fatalf("pod %s still runs %s, not %s", pod.Name, pod.Spec.Containers[0].Image, image)
			}
		}
		sets := 0
		for range w.Snapshot().ReplicaSets().All() {
			sets++
		}
		if limit := int(*d.Spec.RevisionHistoryLimit); sets > limit+1 {
			t.Fatalf("%d ReplicaSets, but a history of %d", sets, limit)
		}
	})
}

func setImage(w *storytest.World, name, image string) {
	w.Edit(reconcile.DeploymentsResource, "default", name, func(obj map[string]any) {
		storytest.MergeJSON(obj, map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{
			"containers": []any{map[string]any{"name": "c", "image": image, "resources": map[string]any{}}},
		}}}})
	})
}

func available(pod *corev1.Pod) bool {
	return reconcile.PodActive(pod) && reconcile.ReadyCondition(pod) != nil
}

func countPods(w *storytest.World, which func(*corev1.Pod) bool) int {
	n := 0
	for pod := range w.Snapshot().Pods().All() {
		if which(pod) {
			n++
		}
	}
	return n
}

// oneAgent does for one pod what its agent does next.
func oneAgent(t *rapid.T, w *storytest.World) {
	var busy []*corev1.Pod
	for pod := range w.Snapshot().Pods().All() {
		if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodPending {
			busy = append(busy, pod)
		}
	}
	if len(busy) == 0 {
		return
	}
	agent(w, busy[rapid.IntRange(0, len(busy)-1).Draw(t, "pod")])
}

func agent(w *storytest.World, pod *corev1.Pod) {
	if pod.DeletionTimestamp != nil {
		w.EndPod(pod.Namespace, pod.Name)
		return
	}
	w.RunPod(pod.Namespace, pod.Name)
}

// settle runs reconcilers and agents until nothing is left to do.
func settle(t *rapid.T, s *storytest.Story) {
	for range 200 {
		for s.Step() {
		}
		var busy []*corev1.Pod
		for pod := range s.Snapshot().Pods().All() {
			if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodPending {
				busy = append(busy, pod)
			}
		}
		if len(busy) == 0 {
			return
		}
		for _, pod := range busy {
			agent(s.World, pod)
		}
	}
	t.Fatalf("no end:\n%s", s.Show(""))
}
