package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/reconcile"
	"timonel/state/objects"
)

var (
	serviceKind            = corev1.SchemeGroupVersion.WithKind("Service")
	endpointSliceKind      = discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice")
	endpointSlicesResource = discoveryv1.SchemeGroupVersion.WithResource("endpointslices")
)

// sliceManager marks the slices of this controller, in the word Kubernetes uses,
// so that a cluster that moves over keeps its slices.
const sliceManager = "endpointslice-controller.k8s.io"

// EndpointSlice lists, for each Service with a selector, the pods behind it: one
// set of slices for each family of addresses and each set of ports that its
// pods resolve the Service's ports to.
type EndpointSlice struct {
	// PerSlice is how many endpoints a slice holds at most. Default 100.
	PerSlice int
}

// Name implements Reconciler.
func (EndpointSlice) Name() string { return "endpointslice-controller" }

// Traits implements reconcile.Reconciler: pods of one Service that change at the same
// time share a write.
func (EndpointSlice) Traits() reconcile.Traits { return reconcile.Traits{Pace: 50 * time.Millisecond} }

func serviceKey(namespace, name string) reconcile.Key {
	return reconcile.Key{Kind: serviceKind.Kind, Namespace: namespace, Name: name}
}

// All implements Reconciler.
func (EndpointSlice) All(s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for svc := range s.Services().All() {
		keys = append(keys, serviceKey(svc.Namespace, svc.Name))
	}
	return keys
}

// Keys implements Reconciler: a Service follows itself, its slices, and the pods
// that it selects or did select, as far as they changed in what slices say.
func (EndpointSlice) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case serviceKind.GroupKind():
		return []reconcile.Key{serviceKey(now.Namespace, now.Name)}
	case endpointSliceKind.GroupKind():
		if now.Labels[discoveryv1.LabelManagedBy] == sliceManager {
			return []reconcile.Key{serviceKey(now.Namespace, now.Labels[discoveryv1.LabelServiceName])}
		}
	case reconcile.PodKind.GroupKind():
		if !endpointsMatter(c) {
			return nil
		}
		var keys []reconcile.Key
		for svc := range s.Services().InNamespace(now.Namespace) {
			if len(svc.Spec.Selector) == 0 {
				continue
			}
			selector := labels.SelectorFromSet(svc.Spec.Selector)
			if slices.ContainsFunc(reconcile.Versions(c), func(m *objects.Meta) bool { return selector.Matches(labels.Set(m.Labels)) }) {
				keys = append(keys, serviceKey(svc.Namespace, svc.Name))
			}
		}
		return keys
	}
	return nil
}

// endpointsMatter says whether a pod changed in what a slice says of it.
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
		(reconcile.ReadyCondition(before) == nil) != (reconcile.ReadyCondition(after) == nil) || reconcile.PodEnded(before) != reconcile.PodEnded(after) ||
		(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) || before.Spec.NodeName != after.Spec.NodeName
}

// sliceGroup is what slices have in common: the family and the ports.
type sliceGroup struct {
	family discoveryv1.AddressType
	ports  []discoveryv1.EndpointPort
	wanted map[string]discoveryv1.Endpoint // by endpointID
}

// Reconcile implements Reconciler.
func (e EndpointSlice) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	svc, ok := in.Snapshot.Services().Get(key.Namespace, key.Name)
	if !ok || svc.DeletionTimestamp != nil || len(svc.Spec.Selector) == 0 || svc.Spec.Type == corev1.ServiceTypeExternalName {
		return reconcile.Result{}, nil // slices of a Service that is gone go with it, as its dependents
	}
	groups := e.wanted(in, svc)
	existing := map[string][]*discoveryv1.EndpointSlice{}
	var result reconcile.Result
	for m := range in.Snapshot.OwnedBy(svc.UID) {
		slice, ok := m.Object.(*discoveryv1.EndpointSlice)
		if !ok || slice.Namespace != svc.Namespace || slice.DeletionTimestamp != nil || slice.Labels[discoveryv1.LabelManagedBy] != sliceManager {
			continue
		}
		id := groupID(slice.AddressType, slice.Ports)
		if _, wanted := groups[id]; !wanted {
			result.Add(reconcile.Delete(endpointSlicesResource, slice))
			continue
		}
		existing[id] = append(existing[id], slice)
	}
	names := reconcile.NewNames(in, svc)
	names.Taken = func(name string) bool {
		_, ok := in.Snapshot.EndpointSlices().Get(svc.Namespace, name)
		return ok
	}
	for _, id := range slices.Sorted(maps.Keys(groups)) {
		e.fill(svc, groups[id], existing[id], names, &result)
	}
	return result, nil
}

// wanted returns the groups of endpoints that a Service is to have. A family
// without any has one group without ports, whose slice says that there are none.
func (e EndpointSlice) wanted(in reconcile.Input, svc *corev1.Service) map[string]*sliceGroup {
	groups := map[string]*sliceGroup{}
	group := func(family discoveryv1.AddressType, ports []discoveryv1.EndpointPort) *sliceGroup {
		id := groupID(family, ports)
		if groups[id] == nil {
			groups[id] = &sliceGroup{family: family, ports: ports, wanted: map[string]discoveryv1.Endpoint{}}
		}
		return groups[id]
	}
	families := addressFamilies(svc)
	selector := labels.SelectorFromSet(svc.Spec.Selector)
	for pod := range in.Snapshot.Pods().InNamespace(svc.Namespace) {
		if reconcile.PodEnded(pod) || len(pod.Status.PodIPs) == 0 || !selector.Matches(labels.Set(pod.Labels)) {
			continue
		}
		node, found := in.Snapshot.Nodes().Get("", pod.Spec.NodeName)
		if !found && !svc.Spec.PublishNotReadyAddresses {
			continue
		}
		ports := endpointPorts(svc, pod)
		for _, family := range families {
			if addresses := podAddresses(pod, family); len(addresses) > 0 {
				ep := endpoint(svc, pod, node, addresses)
				group(family, ports).wanted[endpointID(&ep)] = ep
			}
		}
	}
	for _, family := range families {
		if !slices.ContainsFunc(slices.Collect(maps.Values(groups)), func(g *sliceGroup) bool { return g.family == family }) {
			group(family, nil)
		}
	}
	return groups
}

// fill makes the existing slices of a group say what is wanted, changing as few as
// it can: endpoints stay where they are, and new ones go where there is room.
func (e EndpointSlice) fill(svc *corev1.Service, g *sliceGroup, existing []*discoveryv1.EndpointSlice, names *reconcile.Names, result *reconcile.Result) {
	limit := cmp.Or(e.PerSlice, 100)
	left := maps.Clone(g.wanted)
	updated := make([]*discoveryv1.EndpointSlice, len(existing))
	for i, slice := range existing {
		next := slice.DeepCopy()
		next.Labels = sliceLabels(svc)
		next.Endpoints = slices.DeleteFunc(next.Endpoints, func(ep discoveryv1.Endpoint) bool { _, ok := left[endpointID(&ep)]; return !ok })
		for j := range next.Endpoints {
			id := endpointID(&next.Endpoints[j])
			want := left[id]
			want.Hints, want.DeprecatedTopology = next.Endpoints[j].Hints, next.Endpoints[j].DeprecatedTopology
			next.Endpoints[j] = want
			delete(left, id)
		}
		updated[i] = next
	}
	added := slices.Sorted(maps.Keys(left))
	take := func(n int) []discoveryv1.Endpoint {
		out := make([]discoveryv1.Endpoint, 0, n)
		for _, id := range added[:n] {
			out = append(out, left[id])
		}
		added = added[n:]
		return out
	}
	for _, next := range updated {
		if n := min(len(added), limit-len(next.Endpoints)); n > 0 {
			next.Endpoints = append(next.Endpoints, take(n)...)
		}
	}
	kept := 0
	for i, next := range updated {
		switch {
		case len(next.Endpoints) == 0 && (len(g.wanted) > 0 || kept > 0):
			result.Add(reconcile.Delete(endpointSlicesResource, existing[i]))
			continue
		case !equality.Semantic.DeepEqual(next.Endpoints, existing[i].Endpoints) || !maps.Equal(next.Labels, existing[i].Labels):
			result.Add(reconcile.Update(endpointSlicesResource, next))
		}
		kept++
	}
	for len(added) > 0 || kept == 0 {
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Name: names.Next(), GenerateName: reconcile.NamePrefix(svc.Name), Namespace: svc.Namespace, Labels: sliceLabels(svc),
				OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(svc, serviceKind)},
			},
			AddressType: g.family, Ports: g.ports, Endpoints: take(min(len(added), limit)),
		}
		c := reconcile.Create(endpointSlicesResource, slice)
		c.FailEvent = reconcile.NewEvent(serviceKind, svc, corev1.EventTypeWarning, "FailedToUpdateEndpointSlices", "Error creating Endpoint Slice for Service %s/%s", svc.Namespace, svc.Name)
		result.Add(c)
		kept++
	}
}

// sliceLabels are the Service's labels and those by which slices are found.
func sliceLabels(svc *corev1.Service) map[string]string {
	out := map[string]string{}
	maps.Copy(out, svc.Labels)
	delete(out, corev1.IsHeadlessService)
	if svc.Spec.ClusterIP == "" || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		out[corev1.IsHeadlessService] = ""
	}
	out[discoveryv1.LabelServiceName] = svc.Name
	out[discoveryv1.LabelManagedBy] = sliceManager
	return out
}

// addressFamilies are the families of a Service's addresses, in its own order.
func addressFamilies(svc *corev1.Service) []discoveryv1.AddressType {
	var out []discoveryv1.AddressType
	for _, f := range svc.Spec.IPFamilies {
		out = append(out, discoveryv1.AddressType(f))
	}
	if len(out) == 0 {
		family := discoveryv1.AddressTypeIPv4
		if ip, err := netip.ParseAddr(svc.Spec.ClusterIP); err == nil && ip.Is6() {
			family = discoveryv1.AddressTypeIPv6
		}
		out = append(out, family)
	}
	return out
}

// podAddresses are a pod's addresses of a family.
func podAddresses(pod *corev1.Pod, family discoveryv1.AddressType) []string {
	var out []string
	for _, p := range pod.Status.PodIPs {
		if ip, err := netip.ParseAddr(p.IP); err == nil && ip.Is6() == (family == discoveryv1.AddressTypeIPv6) {
			out = append(out, ip.String())
		}
	}
	return out
}

// endpoint is what a slice says of a pod.
func endpoint(svc *corev1.Service, pod *corev1.Pod, node *corev1.Node, addresses []string) discoveryv1.Endpoint {
	serving, terminating := reconcile.ReadyCondition(pod) != nil, pod.DeletionTimestamp != nil
	ready := svc.Spec.PublishNotReadyAddresses || serving && !terminating
	ep := discoveryv1.Endpoint{
		Addresses:  addresses,
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		TargetRef:  &corev1.ObjectReference{Kind: reconcile.PodKind.Kind, Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
	}
	if name := pod.Spec.NodeName; name != "" {
		ep.NodeName = &name
	}
	if node != nil {
		if zone := node.Labels[corev1.LabelTopologyZone]; zone != "" {
			ep.Zone = &zone
		}
	}
	if host := pod.Spec.Hostname; host != "" && pod.Spec.Subdomain == svc.Name {
		ep.Hostname = &host
	}
	return ep
}

// endpointPorts resolves a Service's ports on a pod; a name that the pod does not
// know is left out.
func endpointPorts(svc *corev1.Service, pod *corev1.Pod) []discoveryv1.EndpointPort {
	var out []discoveryv1.EndpointPort
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		number, ok := targetPort(pod, p)
		if !ok {
			continue
		}
		name, protocol := p.Name, p.Protocol
		out = append(out, discoveryv1.EndpointPort{Name: &name, Port: &number, Protocol: &protocol, AppProtocol: p.AppProtocol})
	}
	return out
}

// targetPort finds the number of a Service's port on a pod.
func targetPort(pod *corev1.Pod, p *corev1.ServicePort) (int32, bool) {
	if p.TargetPort.Type == intstr.Int {
		if n := p.TargetPort.IntVal; n != 0 {
			return n, true
		}
		return p.Port, true
	}
	find := func(containers []corev1.Container, want func(*corev1.Container) bool) (int32, bool) {
		for i := range containers {
			if !want(&containers[i]) {
				continue
			}
			for _, port := range containers[i].Ports {
				if port.Name == p.TargetPort.StrVal && port.Protocol == p.Protocol {
					return port.ContainerPort, true
				}
			}
		}
		return 0, false
	}
	if n, ok := find(pod.Spec.Containers, func(*corev1.Container) bool { return true }); ok {
		return n, true
	}
	return find(pod.Spec.InitContainers, func(c *corev1.Container) bool {
		return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	})
}

// groupID is equal for slices with the same family and ports, in whatever order.
func groupID(family discoveryv1.AddressType, ports []discoveryv1.EndpointPort) string {
	var parts []string
	for i := range ports {
		p := &ports[i]
		parts = append(parts, fmt.Sprintf("%s/%d/%s/%s", deref(p.Name), deref(p.Port), deref(p.Protocol), deref(p.AppProtocol)))
	}
	slices.Sort(parts)
	return string(family) + " " + strings.Join(parts, " ")
}

// endpointID is equal for endpoints of the same pod with the same addresses.
func endpointID(ep *discoveryv1.Endpoint) string {
	id := strings.Join(ep.Addresses, ",")
	if t := ep.TargetRef; t != nil {
		id = t.Name + "/" + string(t.UID) + "/" + id
	}
	return id
}

// deref returns what p points to, or nothing.
func deref[T any](p *T) T {
	var none T
	if p == nil {
		return none
	}
	return *p
}
