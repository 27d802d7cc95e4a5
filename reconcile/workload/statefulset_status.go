package workload

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"timonel/reconcile"
)

// count adds up the pods of the set.
func (r *stateful) count() {
	s := &r.status
	for pod := range r.pods {
		s.Replicas++
		if runningAndReady(pod) {
			s.ReadyReplicas++
			if r.available(pod) {
				s.AvailableReplicas++
			}
		}
		if pod.DeletionTimestamp != nil {
			continue
		}
		switch revision := podRevision(pod); {
		case revision == r.current.Name && revision == r.update.Name:
			s.CurrentReplicas++
			s.UpdatedReplicas++
		case revision == r.current.Name:
			s.CurrentReplicas++
		case revision == r.update.Name:
			s.UpdatedReplicas++
		}
	}
	// An update is complete when all pods are of it and ready.
	if n := int32(len(r.replicas)); s.UpdatedReplicas == n && s.ReadyReplicas == n && s.Replicas == n {
		s.CurrentReplicas, s.CurrentRevision = s.UpdatedReplicas, s.UpdateRevision
	}
}

// pods yields the pods that there are.
func (r *stateful) pods(yield func(*corev1.Pod) bool) {
	for _, pods := range [][]*corev1.Pod{r.replicas, r.condemned} {
		for _, pod := range pods {
			if pod != nil && !yield(pod) {
				return
			}
		}
	}
}

// report writes the status. Counts that pods of this pass are about to change are
// left to the next pass, which sees them, so that both are one write. One is not: the
// number of pods of the current revision says which revision new pods are of when the
// strategy says nothing (keepsCurrent).
func (r *stateful) report() {
	was := &r.set.Status
	for pod := range r.deleted {
		if r.set.Spec.UpdateStrategy.RollingUpdate == nil && r.current.Name != r.update.Name && podRevision(pod) == r.current.Name {
			r.status.CurrentReplicas--
		}
	}
	decides := r.set.Spec.UpdateStrategy.RollingUpdate == nil && was.CurrentReplicas != r.status.CurrentReplicas
	if r.created+len(r.deleted) > 0 && len(r.in.Failed) == 0 && !decides && was.ObservedGeneration == r.status.ObservedGeneration &&
		was.CurrentRevision == r.status.CurrentRevision && was.UpdateRevision == r.status.UpdateRevision {
		return
	}
	if equality.Semantic.DeepEqual(r.status, *was) {
		return
	}
	updated := r.set.DeepCopy()
	updated.Status = r.status
	r.result.Add(reconcile.UpdateStatus(reconcile.StatefulSetsResource, updated))
}
