package policy

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
)

// announcedFor is how long a pod may say that it is about to be disrupted without
// being marked for deletion.
const announcedFor = 2 * time.Minute

// announced returns the condition by which a pod says that it is about to be
// disrupted, if that may go stale: not on pods that are being deleted or have ended,
// and not when the node said it, which may take as long as it likes to end a pod.
func announced(pod *corev1.Pod) *corev1.PodCondition {
	c := reconcile.PodCondition(pod, corev1.DisruptionTarget)
	if c == nil || c.Status != corev1.ConditionTrue || c.Reason == corev1.PodReasonTerminationByKubelet || !reconcile.PodActive(pod) {
		return nil
	}
	return c
}

// reconcilePod takes back what a pod says of its disruption once that is stale, and
// tells of pods that no eviction can be granted for as they have several budgets.
func reconcilePod(in reconcile.Input, key reconcile.Key) (result reconcile.Result) {
	pod, ok := in.Snapshot.Pods().Get(key.Namespace, key.Name)
	if !ok {
		return result
	}
	if budgets := budgetsOf(in.Snapshot, pod); len(budgets) > 1 {
		result.Events = append(result.Events, *reconcile.NewEvent(reconcile.PodKind, pod, corev1.EventTypeWarning, "MultiplePodDisruptionBudgets",
			"Pod %q/%q matches multiple PodDisruptionBudgets.  Chose %q arbitrarily.", pod.Namespace, pod.Name, budgets[0].Name))
	}
	c := announced(pod)
	if c == nil {
		return result
	}
	if stale := c.LastTransitionTime.Add(announcedFor); stale.After(in.Now) {
		result.At(stale)
		return result
	}
	updated := pod.DeepCopy()
	*reconcile.PodCondition(updated, corev1.DisruptionTarget) = corev1.PodCondition{
		Type: corev1.DisruptionTarget, Status: corev1.ConditionFalse, ObservedGeneration: pod.Generation,
		LastTransitionTime: metav1.NewTime(in.Now).Rfc3339Copy(),
	}
	result.Add(reconcile.UpdateStatus(reconcile.PodsResource, updated))
	return result
}
