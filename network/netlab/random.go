package netlab

import (
	"fmt"
	"math/rand/v2"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"timonel/network/feed"
)

// RandomService makes one random change of the cluster's Services, of few names and addresses,
// so that they take them from each other, and says which.
func RandomService(r *rand.Rand, t *feed.Txn) string {
	name := fmt.Sprintf("s%d", r.IntN(5))
	n := feed.Name{Namespace: "default", Name: name}
	some := func(of ...string) (out []string) {
		for _, o := range of {
			if r.IntN(3) == 0 {
				out = append(out, o)
			}
		}
		return out
	}
	switch r.IntN(8) {
	case 0:
		t.RemoveService(n)
		return "remove " + name
	case 1:
		t.SetZone([]string{"", "a", "b"}[r.IntN(3)])
		return "zone"
	case 2, 3, 4:
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, CreationTimestamp: metav1.Unix(int64(r.IntN(3)), 0)}}
		s.Spec.ClusterIP = fmt.Sprintf("10.96.0.%d", r.IntN(7)+1)
		s.Spec.ClusterIPs = []string{s.Spec.ClusterIP}
		if r.IntN(2) == 0 {
			s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, fmt.Sprintf("fd96::%d", r.IntN(7)+1))
		}
		s.Spec.Type = corev1.ServiceTypeClusterIP
		ports := []corev1.ServicePort{{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80}, {Name: "x", Protocol: corev1.ProtocolSCTP, Port: 9}}
		s.Spec.Ports = ports[:1+r.IntN(3)]
		if r.IntN(2) == 0 {
			s.Spec.Type = corev1.ServiceTypeLoadBalancer
			for i := range s.Spec.Ports {
				s.Spec.Ports[i].NodePort = int32(30000 + r.IntN(3))
			}
			for _, ip := range some("203.0.113.7", "203.0.113.8", "2001:db8:7::7") {
				s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
			}
			s.Spec.LoadBalancerSourceRanges = some("198.18.0.0/15", "198.18.1.0/24", "0.0.0.0/0", "2001:db8::/32")
		}
		s.Spec.ExternalIPs = some("203.0.113.7", "203.0.113.9", "2001:db8:7::7")
		if r.IntN(3) == 0 {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
		if r.IntN(3) == 0 {
			s.Spec.InternalTrafficPolicy = ptr.To(corev1.ServiceInternalTrafficPolicyLocal)
		}
		if r.IntN(3) == 0 {
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr.To(int32(1000 + r.IntN(2)))}}
		}
		t.SetService(s)
		return "set " + name
	default:
		s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: fmt.Sprintf("%s-%d", name, r.IntN(3)), Labels: map[string]string{discoveryv1.LabelServiceName: name},
		}, AddressType: discoveryv1.AddressTypeIPv4}
		if r.IntN(4) == 0 {
			t.RemoveSlice(feed.Name{Namespace: s.Namespace, Name: s.Name})
			return "remove slice " + s.Name
		}
		format := "10.244.%d.%d"
		if r.IntN(3) == 0 {
			s.AddressType, format = discoveryv1.AddressTypeIPv6, "fd00:%d::%d"
		}
		for range r.IntN(5) {
			node := 1 + r.IntN(2)
			e := discoveryv1.Endpoint{
				Addresses: []string{fmt.Sprintf(format, node, 2+r.IntN(5))}, NodeName: ptr.To(fmt.Sprint("n", node)),
				Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
			}
			switch r.IntN(6) {
			case 0:
				e.Conditions.Ready, e.Conditions.Serving = ptr.To(false), ptr.To(false)
			case 1:
				e.Conditions.Ready, e.Conditions.Terminating = ptr.To(false), ptr.To(true)
			case 2:
				e.Hints = &discoveryv1.EndpointHints{}
				for _, zone := range some("a", "b") {
					e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: zone})
				}
			case 3:
				e.Hints = &discoveryv1.EndpointHints{}
				for _, name := range some("n1", "n2") {
					e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: name})
				}
			}
			s.Endpoints = append(s.Endpoints, e)
		}
		for _, p := range []struct {
			name     string
			protocol corev1.Protocol
		}{{"tcp", corev1.ProtocolTCP}, {"udp", corev1.ProtocolUDP}, {"x", corev1.ProtocolSCTP}} {
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: ptr.To(p.name), Protocol: ptr.To(p.protocol), Port: ptr.To(int32(8080 + r.IntN(2)))})
		}
		t.SetSlice(s)
		return "slice " + s.Name
	}
}
