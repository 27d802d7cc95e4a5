// Package oracle says who may talk to whom by the words of the API about the objects alone,
// for tests of those who say it by addresses; and makes objects at random.
package oracle

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// World is objects as the API has them.
type World struct {
	Namespaces map[string]*corev1.Namespace
	Pods       map[types.NamespacedName]*corev1.Pod
	Policies   map[types.NamespacedName]*networkingv1.NetworkPolicy
}

// NewWorld returns one without objects.
func NewWorld() *World {
	return &World{map[string]*corev1.Namespace{}, map[types.NamespacedName]*corev1.Pod{}, map[types.NamespacedName]*networkingv1.NetworkPolicy{}}
}

// NamespaceObject makes a namespace with labels.
func NamespaceObject(name string, set map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: set}}
}

// PodObject makes a pod with labels, of a node, with ports named http and dns.
func PodObject(namespace, name, node string, set map[string]string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-" + name), Labels: set},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
			{Name: "http", ContainerPort: 8080}, {Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP},
		}}}},
	}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

// Allowed says, by upstream's words about the objects alone, whether policies let a pod be
// talked to by (ingress), or talk to, an address at a port.
func (w *World) Allowed(pod *corev1.Pod, ingress bool, peer netip.Addr, protocol corev1.Protocol, port uint16) bool {
	isolated := false
	for _, p := range w.Policies {
		if p.Namespace != pod.Namespace || !selects(&p.Spec.PodSelector, pod.Labels) {
			continue
		}
		types := p.Spec.PolicyTypes
		if len(types) == 0 {
			types = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
			if len(p.Spec.Egress) > 0 {
				types = append(types, networkingv1.PolicyTypeEgress)
			}
		}
		if ingress && slices.Contains(types, networkingv1.PolicyTypeIngress) {
			isolated = true
			for _, r := range p.Spec.Ingress {
				if w.ruled(p, r.From, r.Ports, pod, true, peer, protocol, port) {
					return true
				}
			}
		}
		if !ingress && slices.Contains(types, networkingv1.PolicyTypeEgress) {
			isolated = true
			for _, r := range p.Spec.Egress {
				if w.ruled(p, r.To, r.Ports, pod, false, peer, protocol, port) {
					return true
				}
			}
		}
	}
	return !isolated
}

func (w *World) ruled(p *networkingv1.NetworkPolicy, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, pod *corev1.Pod, ingress bool, peer netip.Addr, protocol corev1.Protocol, port uint16) bool {
	// is says whether one of the peers is a pod, or when it is nil, the address.
	is := func(other *corev1.Pod) bool {
		if len(peers) == 0 {
			return other == nil || w.Namespaces[other.Namespace] != nil
		}
		return slices.ContainsFunc(peers, func(from networkingv1.NetworkPolicyPeer) bool {
			if from.IPBlock != nil {
				in := netip.MustParsePrefix(from.IPBlock.CIDR).Contains(peer) && (other == nil || w.Namespaces[other.Namespace] != nil)
				for _, e := range from.IPBlock.Except {
					in = in && !netip.MustParsePrefix(e).Contains(peer)
				}
				return in
			}
			if other == nil {
				return false
			}
			namespace := other.Namespace == p.Namespace
			if from.NamespaceSelector != nil {
				o := w.Namespaces[other.Namespace]
				namespace = o != nil && selects(from.NamespaceSelector, o.Labels)
			}
			return namespace && (from.PodSelector == nil || selects(from.PodSelector, other.Labels))
		})
	}
	at := w.at(peer)
	who := is(nil)
	for other := range at {
		who = who || is(other)
	}
	if len(ports) == 0 {
		return who
	}
	return slices.ContainsFunc(ports, func(want networkingv1.NetworkPolicyPort) bool {
		proto := corev1.ProtocolTCP
		if want.Protocol != nil {
			proto = *want.Protocol
		}
		switch {
		case proto != protocol:
			return false
		case want.Port == nil:
			return who
		case want.Port.Type == intstr.String && ingress:
			return who && Port(pod, proto, want.Port.StrVal) == port
		case want.Port.Type == intstr.String:
			for other := range at {
				if is(other) && Port(other, proto, want.Port.StrVal) == port {
					return true
				}
			}
			return false
		case want.EndPort != nil:
			return who && int32(port) >= want.Port.IntVal && int32(port) <= *want.EndPort
		}
		return who && int32(port) == want.Port.IntVal
	})
}

// Port is the number of a pod's port of that name, 0 when there is none.
func Port(p *corev1.Pod, protocol corev1.Protocol, name string) uint16 {
	for _, c := range p.Spec.Containers {
		for _, port := range c.Ports {
			if port.Name == name && cmp.Or(port.Protocol, corev1.ProtocolTCP) == protocol {
				return uint16(port.ContainerPort)
			}
		}
	}
	return 0
}

// at are the pods of an address.
func (w *World) at(ip netip.Addr) map[*corev1.Pod]bool {
	out := map[*corev1.Pod]bool{}
	for _, p := range w.Pods {
		if p.Spec.HostNetwork || p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded {
			continue
		}
		for _, a := range p.Status.PodIPs {
			if netip.MustParseAddr(a.IP) == ip {
				out[p] = true
			}
		}
	}
	return out
}

func selects(s *metav1.LabelSelector, set map[string]string) bool {
	selector, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && selector.Matches(labels.Set(set))
}
