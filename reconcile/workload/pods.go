package workload

import (
	"iter"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/reconcile"
	"timonel/state/objects"
)

// burstBytes is how large the pods that one pass creates may be together, by their
// encoding. Each is a copy of a template that may have a MiB, and many times that in
// memory, and as many ReplicaSets are worked on at a time as the runner takes keys.
const burstBytes = 4 << 20

// MostPods is how many pods of a template one pass creates at most, by their size.
func MostPods(template *corev1.PodTemplateSpec) int {
	return max(1, burstBytes/max(1, template.Size()))
}

// CreatePod returns the request that creates a pod of an owner, which says so in its events.
func CreatePod(kind schema.GroupVersionKind, owner metav1.Object, pod *corev1.Pod) reconcile.Request {
	c := reconcile.Create(reconcile.PodsResource, pod)
	c.Event = reconcile.NewEvent(kind, owner, corev1.EventTypeNormal, "SuccessfulCreate", "Created pod: %s", pod.Name)
	c.FailEvent = reconcile.NewEvent(kind, owner, corev1.EventTypeWarning, "FailedCreate", "Error creating")
	return c
}

// DeletePod returns the request that deletes a pod of an owner, which says so in its events.
func DeletePod(kind schema.GroupVersionKind, owner metav1.Object, pod *corev1.Pod) reconcile.Request {
	c := reconcile.Delete(reconcile.PodsResource, pod)
	c.Event = reconcile.NewEvent(kind, owner, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted pod: %s", pod.Name)
	c.FailEvent = reconcile.NewEvent(kind, owner, corev1.EventTypeWarning, "FailedDelete", "Error deleting")
	return c
}

// available says whether a pod has been ready for long enough, and asks for another
// pass when one that is ready will have been.
func available(in reconcile.Input, pod *corev1.Pod, minReadySeconds int32, result *reconcile.Result) bool {
	due, ok := reconcile.AvailableAt(pod, minReadySeconds)
	if ok && due.After(in.Now) {
		result.At(due)
		return false
	}
	return ok
}

// claimable yields the objects of a type in an owner's namespace that have it among their
// owners and are controlled, and those that are nobody's: what a Claim decides about.
func claimable[T reconcile.Object](s *objects.Snapshot, owner metav1.Object, orphans func(namespace string) iter.Seq[T]) iter.Seq[T] {
	return func(yield func(T) bool) {
		for m := range s.OwnedBy(owner.GetUID()) {
			o, ok := m.Object.(T)
			if ok && m.Namespace == owner.GetNamespace() && metav1.GetControllerOfNoCopy(m) != nil && !yield(o) {
				return
			}
		}
		for o := range orphans(owner.GetNamespace()) {
			if !yield(o) {
				return
			}
		}
	}
}
