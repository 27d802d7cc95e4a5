package network

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Labels and annotations that say how a Service is served.
var (
	serviceLabels = []string{"service.kubernetes.io/service-proxy-name", corev1.IsHeadlessService}
	sliceLabels   = []string{discoveryv1.LabelServiceName, corev1.IsHeadlessService}
)

// pick is those entries of a map that have one of the keys; nil when none has.
func pick(from map[string]string, keys []string) map[string]string {
	var out map[string]string
	for _, k := range keys {
		if v, ok := from[k]; ok {
			if out == nil {
				out = make(map[string]string, len(keys))
			}
			out[k] = v
		}
	}
	return out
}

// stripService is what nodes need of a Service.
func stripService(s *corev1.Service) *corev1.Service {
	out := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: s.Name, UID: s.UID, CreationTimestamp: s.CreationTimestamp,
			Labels: pick(s.Labels, serviceLabels),
		},
		Spec:   s.Spec,
		Status: corev1.ServiceStatus{LoadBalancer: s.Status.LoadBalancer},
	}
	out.Spec.Selector = nil
	return out
}

// stripSlice is what nodes need of an EndpointSlice, nil when it is of no Service and
// nobody needs it.
func stripSlice(s *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	if s.Labels[discoveryv1.LabelServiceName] == "" {
		return nil
	}
	out := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, Labels: pick(s.Labels, sliceLabels)},
		AddressType: s.AddressType, Ports: s.Ports, Endpoints: make([]discoveryv1.Endpoint, len(s.Endpoints)),
	}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		out.Endpoints[i] = discoveryv1.Endpoint{
			Addresses: e.Addresses, Conditions: e.Conditions, Hostname: e.Hostname, NodeName: e.NodeName, Zone: e.Zone, Hints: e.Hints,
		}
	}
	return out
}
