package service

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// triggerTime is the earliest time of what made endpoints change, as far as objects
// say it: when the Service was created, or a pod became ready or ceased to be. The
// annotation with it tells how long endpoints take to follow.
type triggerTime struct{ time.Time }

func (t *triggerTime) at(when time.Time) {
	if !when.IsZero() && (t.IsZero() || when.Before(t.Time)) {
		t.Time = when
	}
}

// pod notes the last change of a pod's readiness.
func (t *triggerTime) pod(s *objects.Snapshot, ref *corev1.ObjectReference) {
	if ref == nil {
		return
	}
	if pod, ok := s.Pods().Get(ref.Namespace, ref.Name); ok && pod.UID == ref.UID {
		if c := reconcile.PodCondition(pod, corev1.PodReady); c != nil {
			t.at(c.LastTransitionTime.Time)
		}
	}
}

// between notes the pods that are new in subsets, or whose readiness is.
func (t *triggerTime) between(s *objects.Snapshot, before, after []corev1.EndpointSubset) {
	was := map[string]bool{}
	for i := range before {
		for j := range before[i].Addresses {
			was[addressID(&before[i].Addresses[j])] = true
		}
		for j := range before[i].NotReadyAddresses {
			was[addressID(&before[i].NotReadyAddresses[j])] = false
		}
	}
	for i := range after {
		each := func(addresses []corev1.EndpointAddress, ready bool) {
			for j := range addresses {
				if before, ok := was[addressID(&addresses[j])]; !ok || before != ready {
					t.pod(s, addresses[j].TargetRef)
				}
			}
		}
		each(after[i].Addresses, true)
		each(after[i].NotReadyAddresses, false)
	}
}

// endpoint notes an endpoint that takes the place of another, or of none.
func (t *triggerTime) endpoint(s *objects.Snapshot, before, after *discoveryv1.Endpoint) {
	if before == nil || deref(before.Conditions.Serving) != deref(after.Conditions.Serving) {
		t.pod(s, after.TargetRef)
	}
}

// annotate returns annotations with the time, or without one when it is not known.
func (t triggerTime) annotate(annotations map[string]string) map[string]string {
	if t.IsZero() {
		delete(annotations, corev1.EndpointsLastChangeTriggerTime)
		return annotations
	}
	return set(annotations, corev1.EndpointsLastChangeTriggerTime, t.UTC().Format(time.RFC3339Nano))
}
