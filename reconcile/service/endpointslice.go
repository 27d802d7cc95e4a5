package service

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// All implements Reconciler.
func (EndpointSlice) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(serviceKind, s.Services().All())
}

// Keys implements Reconciler: a Service follows itself, its slices, the pods that it
// selects or did select, as far as they changed in what slices say, and those pods'
// Nodes when they appear or change their zone.
func (EndpointSlice) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case serviceKind.GroupKind():
		return []reconcile.Key{reconcile.KeyOf(serviceKind, now)}
	case endpointSliceKind.GroupKind():
		var keys []reconcile.Key
		for _, m := range reconcile.Versions(c) {
			if m.Labels[discoveryv1.LabelManagedBy] == sliceManager {
				keys = append(keys, reconcile.NewKey(serviceKind, m.Namespace, m.Labels[discoveryv1.LabelServiceName]))
			}
		}
		return keys
	case reconcile.PodKind.GroupKind():
		return servicesOfPod(c, s)
	case reconcile.NodeKind.GroupKind():
		if c.New == nil || c.Old != nil && c.Old.Labels[corev1.LabelTopologyZone] == c.New.Labels[corev1.LabelTopologyZone] {
			return nil
		}
		var keys []reconcile.Key
		for pod := range s.PodsOnNode(now.Name) {
			keys = append(keys, servicesOf(s, pod.Namespace, pod.Labels)...)
		}
		return keys
	}
	return nil
}

// sliceGroup is what slices have in common: the family and the ports.
type sliceGroup struct {
	family discoveryv1.AddressType
	ports  []discoveryv1.EndpointPort
	wanted map[string]discoveryv1.Endpoint // by endpointID
}

// Reconcile implements Reconciler.
func (e EndpointSlice) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	svc, ok := in.Snapshot.Services().Get(key.Namespace, key.Name)
	if !ok || !selects(svc) {
		return result, nil // slices of a Service that is gone go with it, as its dependents
	}
	groups := e.wanted(in, svc)
	w, trigger := newSliceWrites(in, svc, serviceKind), &triggerTime{}
	existing := map[string][]*discoveryv1.EndpointSlice{}
	none := true
	for slice := range ownSlices(in.Snapshot, svc) {
		none = false
		id := groupID(slice.AddressType, slice.Ports)
		if groups[id] == nil {
			w.deleted = append(w.deleted, slice)
			continue
		}
		existing[id] = append(existing[id], slice)
	}
	if none {
		trigger.at(svc.CreationTimestamp.Time)
	}
	kept := map[discoveryv1.AddressType]int{}
	for _, id := range slices.Sorted(maps.Keys(groups)) {
		kept[groups[id].family] += e.fill(svc, groups[id], existing[id], w, trigger)
	}
	for _, family := range addressFamilies(svc) {
		if kept[family] == 0 { // a slice that says that there are none
			w.created = append(w.created, newSlice(svc, &sliceGroup{family: family}))
		}
	}
	w.reuse()
	for _, slice := range slices.Concat(w.created, w.updated) {
		slice.Annotations = trigger.annotate(slice.Annotations)
	}
	w.requests(&result, svc.DeletionTimestamp == nil && !createsNothing(in.Snapshot, svc.Namespace))
	return result, nil
}

// ownSlices yields the slices that are this controller's of a Service.
func ownSlices(s *objects.Snapshot, svc *corev1.Service) iter.Seq[*discoveryv1.EndpointSlice] {
	return func(yield func(*discoveryv1.EndpointSlice) bool) {
		for m := range s.OwnedBy(svc.UID) {
			slice, ok := m.Object.(*discoveryv1.EndpointSlice)
			if ok && slice.Namespace == svc.Namespace && slice.DeletionTimestamp == nil &&
				slice.Labels[discoveryv1.LabelManagedBy] == sliceManager && !yield(slice) {
				return
			}
		}
	}
}

// wanted returns the groups of endpoints that a Service is to have. Each family has
// the group without ports, whose slice says that there are none if there are none.
func (e EndpointSlice) wanted(in reconcile.Input, svc *corev1.Service) map[string]*sliceGroup {
	groups := map[string]*sliceGroup{}
	group := func(family discoveryv1.AddressType, ports []discoveryv1.EndpointPort) *sliceGroup {
		id := groupID(family, ports)
		if groups[id] == nil {
			groups[id] = &sliceGroup{family: family, ports: ports, wanted: map[string]discoveryv1.Endpoint{}}
		}
		return groups[id]
	}
	families, some := addressFamilies(svc), map[discoveryv1.AddressType]bool{}
	for pod := range podsBehind(in.Snapshot, svc) {
		node, found := in.Snapshot.Nodes().Get("", pod.Spec.NodeName)
		if !found && !svc.Spec.PublishNotReadyAddresses {
			continue
		}
		ports := endpointPorts(svc, pod)
		for _, family := range families {
			if addresses := podAddresses(pod, family); len(addresses) > 0 {
				some[family] = true
				ep := endpoint(svc, pod, node, addresses)
				group(family, ports).wanted[endpointID(&ep)] = ep
			}
		}
	}
	for _, family := range families {
		if !some[family] {
			group(family, nil)
		}
	}
	return groups
}

// fill makes the existing slices of a group say what is wanted, changing as few as it
// can, and returns how many there are then. Endpoints stay where they are. New ones go
// first where something changes anyway, into the fullest slices; then, if they fit
// whole, into the one slice that they fill best; else into new slices.
func (e EndpointSlice) fill(svc *corev1.Service, g *sliceGroup, existing []*discoveryv1.EndpointSlice, w *sliceWrites, trigger *triggerTime) int {
	limit, labels := cmp.Or(e.PerSlice, 100), sliceLabels(svc)
	left := maps.Clone(g.wanted)
	var changed, same []*discoveryv1.EndpointSlice
	for _, slice := range existing {
		next := slice.DeepCopy()
		next.Labels, next.Endpoints = labels, nil
		for i := range slice.Endpoints {
			was := &slice.Endpoints[i]
			if want, ok := left[endpointID(was)]; ok {
				trigger.endpoint(w.in.Snapshot, was, &want)
				next.Endpoints = append(next.Endpoints, want)
				delete(left, endpointID(was))
			}
		}
		switch {
		case equality.Semantic.DeepEqual(next.Endpoints, slice.Endpoints) && maps.Equal(labels, slice.Labels):
			same = append(same, next)
		case len(next.Endpoints) == 0 && len(slice.Endpoints) > 0:
			w.deleted = append(w.deleted, slice)
		default:
			changed = append(changed, next)
		}
	}
	added := slices.Sorted(maps.Keys(left))
	take := func(slice *discoveryv1.EndpointSlice) {
		n := max(0, min(len(added), limit-len(slice.Endpoints)))
		for _, id := range added[:n] {
			want := left[id]
			trigger.endpoint(w.in.Snapshot, nil, &want)
			slice.Endpoints = append(slice.Endpoints, want)
		}
		added = added[n:]
	}
	slices.SortStableFunc(changed, func(a, b *discoveryv1.EndpointSlice) int { return cmp.Compare(len(b.Endpoints), len(a.Endpoints)) })
	for _, slice := range changed {
		take(slice)
	}
	kept := len(changed) + len(same)
	for len(added) > 0 {
		if i := bestFit(same, len(added), limit); i >= 0 {
			take(same[i])
			changed = append(changed, same[i])
			break
		}
		slice := newSlice(svc, g)
		take(slice)
		w.created = append(w.created, slice)
		kept++
	}
	w.updated = append(w.updated, changed...)
	return kept
}

// bestFit returns the fullest of the slices that have room for n more, or -1.
func bestFit(of []*discoveryv1.EndpointSlice, n, limit int) int {
	best := -1
	for i, slice := range of {
		if room := limit - len(slice.Endpoints); room >= n && (best < 0 || len(slice.Endpoints) > len(of[best].Endpoints)) {
			best = i
		}
	}
	return best
}

// newSlice returns an empty slice for a group.
func newSlice(svc *corev1.Service, g *sliceGroup) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: svc.Namespace, Labels: sliceLabels(svc),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(svc, serviceKind)},
		},
		AddressType: g.family, Ports: g.ports, Endpoints: []discoveryv1.Endpoint{},
	}
}

// sliceLabels are the Service's labels and those by which slices are found.
func sliceLabels(svc *corev1.Service) map[string]string {
	out := serviceLabels(svc)
	out[discoveryv1.LabelServiceName] = svc.Name
	out[discoveryv1.LabelManagedBy] = sliceManager
	return out
}

// serviceLabels are the Service's labels, and the one that says that it is headless,
// which nobody else's may say.
func serviceLabels(svc *corev1.Service) map[string]string {
	out := map[string]string{}
	maps.Copy(out, svc.Labels)
	delete(out, corev1.IsHeadlessService)
	if headless(svc) {
		out[corev1.IsHeadlessService] = ""
	}
	return out
}

// addressFamilies are the families of a Service's addresses, in its own order.
func addressFamilies(svc *corev1.Service) []discoveryv1.AddressType {
	var out []discoveryv1.AddressType
	for _, f := range svc.Spec.IPFamilies {
		out = append(out, discoveryv1.AddressType(f))
	}
	if len(out) == 0 && headless(svc) {
		return []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6}
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
	if host := hostname(svc, pod); host != "" {
		ep.Hostname = &host
	}
	ep.Hints = hints(svc, &ep)
	return ep
}

// hints says which clients an endpoint is for, as far as the Service asks for traffic
// to stay near: those of its zone, and with PreferSameNode those of its Node.
func hints(svc *corev1.Service, ep *discoveryv1.Endpoint) *discoveryv1.EndpointHints {
	if !*ep.Conditions.Ready || zonesByCapacity(svc) {
		return nil
	}
	out := &discoveryv1.EndpointHints{}
	switch deref(svc.Spec.TrafficDistribution) {
	case corev1.ServiceTrafficDistributionPreferSameNode:
		if ep.NodeName != nil {
			out.ForNodes = []discoveryv1.ForNode{{Name: *ep.NodeName}}
		}
	case corev1.ServiceTrafficDistributionPreferSameZone, corev1.ServiceTrafficDistributionPreferClose:
	default:
		return nil
	}
	if ep.Zone != nil {
		out.ForZones = []discoveryv1.ForZone{{Name: *ep.Zone}}
	}
	if len(out.ForNodes)+len(out.ForZones) == 0 {
		return nil
	}
	return out
}

// zonesByCapacity says whether a Service asks, by an annotation that goes before its
// trafficDistribution, for its endpoints to be dealt out to zones by their CPUs. That
// is not done: traffic goes to all of them, as where Kubernetes knows no zones.
func zonesByCapacity(svc *corev1.Service) bool {
	mode, ok := svc.Annotations[corev1.DeprecatedAnnotationTopologyAwareHints]
	if !ok {
		mode = svc.Annotations[corev1.AnnotationTopologyMode]
	}
	return mode == "Auto" || mode == "auto"
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
