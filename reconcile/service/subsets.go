package service

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
)

// packed collects addresses by port, to be written as the fewest subsets that say
// the same: ports that are open at the same addresses share one.
type packed map[string]*offered // by portID

// offered is where a port is open.
type offered struct {
	port      *corev1.EndpointPort // nil for addresses without ports
	addresses map[string]offer     // by addressID
}

type offer struct {
	address corev1.EndpointAddress
	ready   bool
}

// addressID is equal for the same address of the same pod.
func addressID(a *corev1.EndpointAddress) string {
	id := a.IP
	if a.TargetRef != nil {
		id += " " + string(a.TargetRef.UID)
	}
	return id
}

func portID(p *corev1.EndpointPort) string {
	if p == nil {
		return ""
	}
	return fmt.Sprintf("%05d/%s/%s/%s", p.Port, p.Protocol, p.Name, deref(p.AppProtocol))
}

// put notes that a port is open at an address. An address that is said to be both
// ready and not is not.
func (p packed) put(port *corev1.EndpointPort, address corev1.EndpointAddress, ready bool) {
	id := portID(port)
	if p[id] == nil {
		p[id] = &offered{port: port, addresses: map[string]offer{}}
	}
	at := addressID(&address)
	if before, ok := p[id].addresses[at]; ok {
		address, ready = before.address, before.ready && ready
	}
	p[id].addresses[at] = offer{address, ready}
}

// add notes what a pod offers to a Service, in the first family of its addresses.
func (p packed) add(svc *corev1.Service, pod *corev1.Pod) {
	addresses := podAddresses(pod, addressFamilies(svc)[0])
	if len(addresses) == 0 {
		return
	}
	node := pod.Spec.NodeName
	address := corev1.EndpointAddress{
		IP: addresses[0], Hostname: hostname(svc, pod), NodeName: &node,
		TargetRef: &corev1.ObjectReference{Kind: reconcile.PodKind.Kind, Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
	}
	ready := svc.Spec.PublishNotReadyAddresses || reconcile.ReadyCondition(pod) != nil
	if len(svc.Spec.Ports) == 0 && svc.Spec.ClusterIP == corev1.ClusterIPNone {
		p.put(nil, address, ready)
	}
	for i := range svc.Spec.Ports {
		port := &svc.Spec.Ports[i]
		if number, ok := targetPort(pod, port); ok {
			p.put(&corev1.EndpointPort{Name: port.Name, Port: number, Protocol: port.Protocol, AppProtocol: port.AppProtocol}, address, ready)
		}
	}
}

// subsets returns what was put, sorted.
func (p packed) subsets() []corev1.EndpointSubset {
	sets := map[string]*corev1.EndpointSubset{} // by addresses
	for _, id := range slices.Sorted(maps.Keys(p)) {
		var ready, notReady []corev1.EndpointAddress
		for _, at := range slices.Sorted(maps.Keys(p[id].addresses)) {
			if o := p[id].addresses[at]; o.ready {
				ready = append(ready, o.address)
			} else {
				notReady = append(notReady, o.address)
			}
		}
		var key strings.Builder
		for _, addresses := range [][]corev1.EndpointAddress{ready, notReady} {
			for i := range addresses {
				key.WriteString(addressID(&addresses[i]) + ",")
			}
			key.WriteString(";")
		}
		if sets[key.String()] == nil {
			sets[key.String()] = &corev1.EndpointSubset{Addresses: ready, NotReadyAddresses: notReady}
		}
		if port := p[id].port; port != nil {
			sets[key.String()].Ports = append(sets[key.String()].Ports, *port)
		}
	}
	var out []corev1.EndpointSubset
	for _, key := range slices.Sorted(maps.Keys(sets)) {
		out = append(out, *sets[key])
	}
	return out
}

// repack returns subsets that somebody wrote in the form of packed.subsets.
func repack(subsets []corev1.EndpointSubset) []corev1.EndpointSubset {
	p := packed{}
	for i := range subsets {
		s := &subsets[i]
		put := func(port *corev1.EndpointPort) {
			for _, a := range s.Addresses {
				p.put(port, a, true)
			}
			for _, a := range s.NotReadyAddresses {
				p.put(port, a, false)
			}
		}
		for j := range s.Ports {
			put(&s.Ports[j])
		}
		if len(s.Ports) == 0 {
			put(nil)
		}
	}
	return p.subsets()
}

// truncate leaves maxAddresses in subsets, ready ones before others and from each
// subset its share, and says whether there were more.
func truncate(subsets *[]corev1.EndpointSubset) bool {
	ready, notReady := 0, 0
	for _, s := range *subsets {
		ready += len(s.Addresses)
		notReady += len(s.NotReadyAddresses)
	}
	if ready+notReady <= maxAddresses {
		return false
	}
	total, room := notReady, maxAddresses-ready
	if ready > maxAddresses {
		total, room = ready, maxAddresses
	}
	left := room
	for i := range *subsets {
		s := &(*subsets)[i]
		part := &s.NotReadyAddresses
		if ready > maxAddresses {
			part, s.NotReadyAddresses = &s.Addresses, nil
		}
		share := int(math.Ceil(float64(len(*part)) / float64(total) * float64(room)))
		n := min(share, left, len(*part))
		*part = (*part)[:n:n]
		left -= n
	}
	// The API takes no subset without addresses.
	*subsets = slices.DeleteFunc(*subsets, func(s corev1.EndpointSubset) bool {
		return cmp.Or(len(s.Addresses), len(s.NotReadyAddresses)) == 0
	})
	return true
}
