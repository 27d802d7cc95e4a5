package service

import (
	"iter"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/reconcile"
	"timonel/state/objects"
)

// podsBehind yields the pods of a Service's namespace that its selector matches,
// have an address and have not ended.
func podsBehind(s *objects.Snapshot, svc *corev1.Service) iter.Seq[*corev1.Pod] {
	selector := labels.SelectorFromSet(svc.Spec.Selector)
	return func(yield func(*corev1.Pod) bool) {
		for pod := range s.PodsSelected(svc.Namespace, selector) {
			if !objects.PodEnded(pod) && len(pod.Status.PodIPs) > 0 && !yield(pod) {
				return
			}
		}
	}
}

// servicesOf returns the keys of the Services in a namespace that select one of the
// sets of labels.
func servicesOf(s *objects.Snapshot, namespace string, sets ...map[string]string) []reconcile.Key {
	var keys []reconcile.Key
	for _, set := range sets {
		for svc := range s.ServicesSelecting(namespace, set) {
			if key := reconcile.KeyOf(serviceKind, svc); selects(svc) && !slices.Contains(keys, key) {
				keys = append(keys, key)
			}
		}
	}
	return keys
}

// selects says whether a Service's endpoints are the pods that it selects.
func selects(svc *corev1.Service) bool {
	return len(svc.Spec.Selector) > 0 && svc.Spec.Type != corev1.ServiceTypeExternalName
}

// servicesOfPod returns the keys of the Services that select a changed pod, or did,
// if it changed in what is said of it.
func servicesOfPod(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	if !endpointsMatter(c) {
		return nil
	}
	var sets []map[string]string
	for _, m := range reconcile.Versions(c) {
		sets = append(sets, m.Labels)
	}
	return servicesOf(s, c.Meta().Namespace, sets...)
}

// endpointsMatter says whether a pod changed in what is said of it as an endpoint.
func endpointsMatter(c objects.Changed) bool {
	if c.Old == nil || c.New == nil {
		return true
	}
	before, _ := c.Old.Object.(*corev1.Pod)
	after, _ := c.New.Object.(*corev1.Pod)
	if before == nil || after == nil {
		return true
	}
	return !maps.Equal(before.Labels, after.Labels) || !slices.Equal(before.Status.PodIPs, after.Status.PodIPs) ||
		(reconcile.ReadyCondition(before) == nil) != (reconcile.ReadyCondition(after) == nil) || objects.PodEnded(before) != objects.PodEnded(after) ||
		(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) || before.Spec.NodeName != after.Spec.NodeName
}

// createsNothing says whether the API refuses to create anything in a namespace,
// because it is on its way out.
func createsNothing(s *objects.Snapshot, namespace string) bool {
	ns, ok := s.Namespaces().Get("", namespace)
	return ok && ns.DeletionTimestamp != nil
}

// hostname is a pod's name below a Service, if the pod says that it has one.
func hostname(svc *corev1.Service, pod *corev1.Pod) string {
	if pod.Spec.Subdomain == svc.Name {
		return pod.Spec.Hostname
	}
	return ""
}

// headless says whether a Service has no address of its own.
func headless(svc *corev1.Service) bool {
	return svc.Spec.ClusterIP == "" || svc.Spec.ClusterIP == corev1.ClusterIPNone
}
