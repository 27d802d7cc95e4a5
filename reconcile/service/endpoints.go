package service

import (
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

var (
	endpointsKind     = corev1.SchemeGroupVersion.WithKind("Endpoints")
	endpointsResource = corev1.SchemeGroupVersion.WithResource("endpoints")
)

const (
	endpointsManagedBy = "endpoints.kubernetes.io/managed-by"
	endpointsManager   = "endpoint-controller"
	leaderAnnotation   = "control-plane.alpha.kubernetes.io/leader"

	// overCapacity is what the annotation of Endpoints says that lack addresses.
	overCapacity = "truncated"
	maxAddresses = 1000
)

// Endpoints lists the pods behind each Service with a selector in the older API of
// the same name, which holds no more than 1,000 of them and one family of addresses.
type Endpoints struct{}

// Name implements Reconciler.
func (Endpoints) Name() string { return "endpoint-controller" }

// Traits implements reconcile.Reconciler: the whole list is written for each pod
// that changes, so pods that change at the same time share a write.
func (Endpoints) Traits() reconcile.Traits { return reconcile.Traits{Pace: 200 * time.Millisecond} }

// All implements Reconciler: every Service, and what is left of those that are gone.
func (Endpoints) All(s *objects.Snapshot) []reconcile.Key {
	keys := reconcile.KeysOf(serviceKind, s.Services().All())
	for ep := range s.Endpoints().All() {
		if _, ok := s.Services().Get(ep.Namespace, ep.Name); !ok {
			keys = append(keys, reconcile.KeyOf(serviceKind, ep))
		}
	}
	return keys
}

// Keys implements Reconciler. Endpoints without a Service are not looked at: their
// Service may come after them.
func (Endpoints) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK {
	case serviceKind:
		return []reconcile.Key{reconcile.KeyOf(serviceKind, now)}
	case endpointsKind:
		if _, ok := s.Services().Get(now.Namespace, now.Name); ok {
			return []reconcile.Key{reconcile.KeyOf(serviceKind, now)}
		}
	case reconcile.PodKind:
		return servicesOfPod(c, s)
	}
	return nil
}

// Reconcile implements Reconciler.
func (Endpoints) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	now, exists := in.Snapshot.Endpoints().Get(key.Namespace, key.Name)
	svc, ok := in.Snapshot.Services().Get(key.Namespace, key.Name)
	if !ok {
		if exists && !elects(now) && now.DeletionTimestamp == nil {
			result.Add(reconcile.Delete(endpointsResource, now))
		}
		return result, nil
	}
	if !selects(svc) || !exists && (svc.DeletionTimestamp != nil || createsNothing(in.Snapshot, svc.Namespace)) {
		return result, nil
	}
	subsets, trigger := packed{}, triggerTime{}
	for pod := range podsBehind(in.Snapshot, svc) {
		if svc.Spec.PublishNotReadyAddresses || pod.DeletionTimestamp == nil {
			subsets.add(svc, pod)
		}
	}
	wanted := subsets.subsets()
	truncated := truncate(&wanted)
	labels := endpointsLabels(svc)

	next := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: svc.Namespace, Name: svc.Name}}
	if exists {
		if equality.Semantic.DeepEqual(repack(now.Subsets), wanted) && maps.Equal(now.Labels, labels) &&
			(now.Annotations[corev1.EndpointsOverCapacity] == overCapacity) == truncated {
			return result, nil
		}
		next = now.DeepCopy()
		trigger.between(in.Snapshot, now.Subsets, wanted)
	} else {
		trigger.at(svc.CreationTimestamp.Time)
	}
	next.Subsets, next.Labels = wanted, labels
	next.Annotations = trigger.annotate(next.Annotations)
	if delete(next.Annotations, corev1.EndpointsOverCapacity); truncated {
		next.Annotations = set(next.Annotations, corev1.EndpointsOverCapacity, overCapacity)
	}
	c := reconcile.Create(endpointsResource, next)
	verb, what := "Create", fmt.Sprintf("Failed to create endpoint for service %s/%s", svc.Namespace, svc.Name)
	if exists {
		c = reconcile.Update(endpointsResource, next)
		verb, what = "Update", fmt.Sprintf("Failed to update endpoint %s/%s", svc.Namespace, svc.Name)
	}
	c.FailEvent = reconcile.NewEvent(endpointsKind, next, corev1.EventTypeWarning, "FailedTo"+verb+"Endpoint", "%s", what)
	result.Add(c)
	return result, nil
}

// elects says whether clients elect a leader by the object.
func elects(ep *corev1.Endpoints) bool {
	_, ok := ep.Annotations[leaderAnnotation]
	return ok
}

// endpointsLabels are the Service's labels and those that say what made the object.
func endpointsLabels(svc *corev1.Service) map[string]string {
	out := serviceLabels(svc)
	out[endpointsManagedBy] = endpointsManager
	return out
}

// set adds to a map that may be nil.
func set(m map[string]string, key, value string) map[string]string {
	if m == nil {
		m = map[string]string{}
	}
	m[key] = value
	return m
}
