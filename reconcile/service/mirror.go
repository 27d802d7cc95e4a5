package service

import (
	"cmp"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	netutils "k8s.io/utils/net"

	"timonel/reconcile"
	"timonel/state/objects"
)

// mirrorManager marks the slices of this controller, in Kubernetes' word.
const mirrorManager = "endpointslicemirroring-controller.k8s.io"

// EndpointSliceMirroring copies Endpoints that users write for a Service without a
// selector into slices, which is what everybody reads: one slice for each subset and
// family of addresses.
type EndpointSliceMirroring struct {
	// PerSubset is how many addresses of a subset are copied at most. Default 1000.
	PerSubset int
}

// Name implements Reconciler.
func (EndpointSliceMirroring) Name() string { return "endpoint-slice-mirroring-controller" }

// Traits implements reconcile.Reconciler.
func (EndpointSliceMirroring) Traits() reconcile.Traits {
	return reconcile.Traits{Pace: 50 * time.Millisecond}
}

// All implements Reconciler.
func (EndpointSliceMirroring) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(endpointsKind, s.Endpoints().All())
}

// Keys implements Reconciler: Endpoints follow themselves, their Service and their slices.
func (EndpointSliceMirroring) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK {
	case endpointsKind, serviceKind:
		return []reconcile.Key{reconcile.KeyOf(endpointsKind, now)}
	case endpointSliceKind:
		var keys []reconcile.Key
		for _, m := range reconcile.Versions(c) {
			if m.Labels[discoveryv1.LabelManagedBy] == mirrorManager {
				keys = append(keys, reconcile.NewKey(endpointsKind, m.Namespace, m.Labels[discoveryv1.LabelServiceName]))
			}
		}
		return keys
	}
	return nil
}

// Reconcile implements Reconciler.
func (r EndpointSliceMirroring) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	ep, ok := in.Snapshot.Endpoints().Get(key.Namespace, key.Name)
	if !ok {
		return result, nil // its slices go with it, as its dependents
	}
	var existing []*discoveryv1.EndpointSlice
	for m := range in.Snapshot.OwnedBy(ep.UID) {
		slice, ok := m.Object.(*discoveryv1.EndpointSlice)
		if ok && slice.Namespace == ep.Namespace && slice.DeletionTimestamp == nil && slice.Labels[discoveryv1.LabelManagedBy] == mirrorManager {
			existing = append(existing, slice)
		}
	}
	w := newSliceWrites(in, ep, endpointsKind)
	if svc, ok := in.Snapshot.Services().Get(ep.Namespace, ep.Name); !ok || len(svc.Spec.Selector) > 0 ||
		ep.Labels[discoveryv1.LabelSkipMirror] == "true" || elects(ep) {
		w.deleted = existing
		w.requests(&result, ep.DeletionTimestamp == nil)
		return result, nil
	}
	groups := r.wanted(ep, &result)
	for _, slice := range existing {
		g := groups[groupID(slice.AddressType, slice.Ports)]
		if g == nil || g.written {
			w.deleted = append(w.deleted, slice)
			continue
		}
		g.written = true
		next := mirrored(ep, g)
		takePlace(next, slice)
		next.OwnerReferences = slice.OwnerReferences
		if !maps.Equal(next.Labels, slice.Labels) || !maps.Equal(next.Annotations, slice.Annotations) ||
			!equality.Semantic.DeepEqual(next.Endpoints, slice.Endpoints) {
			w.updated = append(w.updated, next)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(groups)) {
		if !groups[id].written {
			w.created = append(w.created, mirrored(ep, groups[id]))
		}
	}
	w.requests(&result, ep.DeletionTimestamp == nil && !createsNothing(in.Snapshot, ep.Namespace))
	return result, nil
}

// mirrorGroup is a slice that Endpoints are to have.
type mirrorGroup struct {
	family    discoveryv1.AddressType
	ports     []discoveryv1.EndpointPort
	endpoints []discoveryv1.Endpoint
	written   bool // there is a slice for it
}

// wanted returns the slices that Endpoints are to have, and notes what is left out.
func (r EndpointSliceMirroring) wanted(ep *corev1.Endpoints, result *reconcile.Result) map[string]*mirrorGroup {
	limit := cmp.Or(r.PerSubset, maxAddresses)
	groups := map[string]*mirrorGroup{}
	invalid, skipped := 0, 0
	for _, subset := range repack(ep.Subsets) {
		var ports []discoveryv1.EndpointPort
		for _, p := range subset.Ports {
			ports = append(ports, discoveryv1.EndpointPort{Name: &p.Name, Port: &p.Port, Protocol: &p.Protocol, AppProtocol: p.AppProtocol})
		}
		copied := 0
		each := func(addresses []corev1.EndpointAddress, ready bool) {
			for i := range addresses {
				a := &addresses[i]
				ip := netutils.ParseIPSloppy(a.IP)
				switch {
				case copied >= limit:
					skipped++
					continue
				case ip == nil:
					invalid++
					continue
				}
				copied++
				family := discoveryv1.AddressTypeIPv4
				if ip.To4() == nil {
					family = discoveryv1.AddressTypeIPv6
				}
				id := groupID(family, ports)
				if groups[id] == nil {
					groups[id] = &mirrorGroup{family: family, ports: ports}
				}
				endpoint := discoveryv1.Endpoint{
					Addresses: []string{ip.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
					TargetRef: a.TargetRef, NodeName: a.NodeName,
				}
				if a.Hostname != "" {
					endpoint.Hostname = &a.Hostname
				}
				groups[id].endpoints = append(groups[id].endpoints, endpoint)
			}
		}
		each(subset.Addresses, true)
		each(subset.NotReadyAddresses, false)
	}
	if invalid > 0 {
		result.Events = append(result.Events, *reconcile.NewEvent(endpointsKind, ep, corev1.EventTypeWarning, "InvalidIPAddress",
			"Skipped %d invalid IP addresses when mirroring to EndpointSlices", invalid))
	}
	if skipped > 0 {
		result.Events = append(result.Events, *reconcile.NewEvent(endpointsKind, ep, corev1.EventTypeWarning, "TooManyAddressesToMirror",
			"A max of %d addresses can be mirrored to EndpointSlices per Endpoints subset. %d addresses were skipped", limit, skipped+invalid))
	}
	return groups
}

// mirrored returns the slice of a group.
func mirrored(ep *corev1.Endpoints, g *mirrorGroup) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: ep.Namespace, Labels: maps.Clone(ep.Labels),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(ep, endpointsKind)},
		},
		AddressType: g.family, Ports: g.ports, Endpoints: g.endpoints,
	}
	slice.Labels = set(slice.Labels, discoveryv1.LabelServiceName, ep.Name)
	slice.Labels = set(slice.Labels, discoveryv1.LabelManagedBy, mirrorManager)
	for k, v := range ep.Annotations {
		if k != corev1.EndpointsLastChangeTriggerTime && k != corev1.LastAppliedConfigAnnotation {
			slice.Annotations = set(slice.Annotations, k, v)
		}
	}
	return slice
}
