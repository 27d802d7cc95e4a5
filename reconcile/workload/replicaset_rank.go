package workload

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
)

// surplus picks the n pods of rs that are missed least: those that do not run
// or are not ready, are cheap to delete by annotation, share their node with
// others of the same owner, are young, or restart often.
func surplus(in reconcile.Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, n int) []*corev1.Pod {
	if n >= len(pods) {
		return pods
	}
	onNode := map[string]int{}
	for _, set := range siblings(in, rs) {
		for pod := range reconcile.OwnedPods(in.Snapshot, set) {
			if reconcile.PodActive(pod) {
				onNode[pod.Spec.NodeName]++
			}
		}
	}
	pods = slices.Clone(pods)
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return missedLess(a, b, onNode, in.Now) })
	return pods[:n]
}

// siblings returns the ReplicaSets with the same controller as rs, rs included.
func siblings(in reconcile.Input, rs *appsv1.ReplicaSet) []*appsv1.ReplicaSet {
	ref := metav1.GetControllerOfNoCopy(rs)
	if ref == nil {
		return []*appsv1.ReplicaSet{rs}
	}
	var out []*appsv1.ReplicaSet
	for m := range in.Snapshot.OwnedBy(ref.UID) {
		if set, ok := m.Object.(*appsv1.ReplicaSet); ok && metav1.GetControllerOfNoCopy(set) != nil && metav1.GetControllerOfNoCopy(set).UID == ref.UID {
			out = append(out, set)
		}
	}
	return out
}

// missedLess orders pods by how little they are missed, as Kubernetes does.
func missedLess(a, b *corev1.Pod, onNode map[string]int, now time.Time) int {
	first := func(isA, isB bool) int { // the one of which it is true comes first
		switch {
		case isA == isB:
			return 0
		case isA:
			return -1
		}
		return 1
	}
	aReady, bReady := reconcile.ReadyCondition(a), reconcile.ReadyCondition(b)
	if c := cmp.Or(
		first(a.Spec.NodeName == "", b.Spec.NodeName == ""),
		cmp.Compare(PhaseOrder(a), PhaseOrder(b)),
		first(aReady == nil, bReady == nil),
		cmp.Compare(deletionCost(a), deletionCost(b)),
		cmp.Compare(onNode[b.Spec.NodeName], onNode[a.Spec.NodeName]),
	); c != 0 {
		return c
	}
	if aReady != nil && bReady != nil {
		if c, ok := youngerFirst(aReady.LastTransitionTime, bReady.LastTransitionTime, now, a, b); ok {
			return c
		}
	}
	aRestarts, aSidecars := Restarts(a)
	bRestarts, bSidecars := Restarts(b)
	if c := cmp.Or(cmp.Compare(bRestarts, aRestarts), cmp.Compare(bSidecars, aSidecars)); c != 0 {
		return c
	}
	if c, ok := youngerFirst(a.CreationTimestamp, b.CreationTimestamp, now, a, b); ok {
		return c
	}
	return cmp.Compare(a.Name, b.Name)
}

// youngerFirst orders by the magnitude of two ages, so that among pods of
// similar age none is favoured; no time at all counts as youngest. It is not ok
// when the times are equal.
func youngerFirst(a, b metav1.Time, now time.Time, podA, podB *corev1.Pod) (int, bool) {
	if a.Equal(&b) {
		return 0, false
	}
	if a.IsZero() || b.IsZero() {
		if a.IsZero() {
			return -1, true
		}
		return 1, true
	}
	if c := cmp.Compare(magnitude(now.Sub(a.Time)), magnitude(now.Sub(b.Time))); c != 0 {
		return c, true
	}
	return cmp.Compare(podA.UID, podB.UID), true
}

// magnitude is the binary logarithm of an age, -1 for none.
func magnitude(d time.Duration) int64 {
	if d <= 0 {
		return -1
	}
	return int64(math.Log2(float64(d)))
}

// PhaseOrder is lower for pods that have come less far.
func PhaseOrder(pod *corev1.Pod) int {
	switch pod.Status.Phase {
	case corev1.PodUnknown:
		return 1
	case corev1.PodRunning:
		return 2
	}
	return 0
}

// deletionCost reads the annotation by which users say what to delete first; 0 if there is none that is valid.
func deletionCost(pod *corev1.Pod) int32 {
	value, ok := pod.Annotations[corev1.PodDeletionCost]
	if !ok || value == "" || value[0] == '+' || len(value) > 1 && value[0] == '0' {
		return 0
	}
	n, err := strconv.ParseInt(value, 10, 32)
	if err != nil {
		return 0
	}
	return int32(n)
}

// Restarts returns the highest restart counts of a pod's containers and of its sidecars.
func Restarts(pod *corev1.Pod) (regular, sidecar int32) {
	for i := range pod.Status.ContainerStatuses {
		regular = max(regular, pod.Status.ContainerStatuses[i].RestartCount)
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			continue
		}
		for j := range pod.Status.InitContainerStatuses {
			if pod.Status.InitContainerStatuses[j].Name == c.Name {
				sidecar = max(sidecar, pod.Status.InitContainerStatuses[j].RestartCount)
			}
		}
	}
	return regular, sidecar
}
