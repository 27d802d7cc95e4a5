package oracle

import (
	"fmt"
	"math/rand/v2"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Dice makes objects.
type Dice struct {
	*rand.Rand
	// Blocks are what rules may name.
	Blocks []networkingv1.IPBlock
}

// Pick is one of some.
func Pick[T any](d Dice, from ...T) T { return from[d.IntN(len(from))] }

// Labels are some.
func (d Dice) Labels() map[string]string {
	out := map[string]string{}
	for _, k := range []string{"app", "tier"} {
		if d.IntN(3) > 0 {
			out[k] = Pick(d, "a", "b", "")
		}
	}
	return out
}

func (d Dice) selector() metav1.LabelSelector {
	switch d.IntN(6) {
	case 0:
		return metav1.LabelSelector{}
	case 1:
		return metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{
			Key: Pick(d, "app", "tier"), Operator: Pick(d, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist),
		}}}
	case 2:
		return metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{
			Key: Pick(d, "app", "tier"), Operator: Pick(d, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn), Values: []string{"a", "b"}[:1+d.IntN(2)],
		}}}
	}
	return metav1.LabelSelector{MatchLabels: d.Labels()}
}

func (d Dice) peers() (out []networkingv1.NetworkPolicyPeer) {
	for range d.IntN(3) {
		var p networkingv1.NetworkPolicyPeer
		one, other := d.selector(), d.selector()
		switch d.IntN(4) {
		case 0:
			p.PodSelector = &one
		case 1:
			p.NamespaceSelector = &one
		case 2:
			p.PodSelector, p.NamespaceSelector = &one, &other
		case 3:
			p.IPBlock = new(Pick(d, d.Blocks...))
		}
		out = append(out, p)
	}
	return out
}

func (d Dice) ports() (out []networkingv1.NetworkPolicyPort) {
	for range d.IntN(3) {
		var p networkingv1.NetworkPolicyPort
		if d.IntN(2) == 0 {
			p.Protocol = new(Pick(d, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP))
		}
		switch d.IntN(4) {
		case 0:
			p.Port = new(intstr.FromInt32(Pick(d, int32(53), 80)))
		case 1:
			p.Port, p.EndPort = new(intstr.FromInt32(80)), new(int32(8080))
		case 2:
			p.Port = new(intstr.FromString(Pick(d, "http", "dns")))
		}
		out = append(out, p)
	}
	return out
}

// Policy makes one of that name.
func (d Dice) Policy(namespace, name string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u"},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: d.selector()},
	}
	p.Spec.PolicyTypes = Pick(d, nil, nil, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Ingress", "Egress"})
	for range d.IntN(3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: d.peers(), Ports: d.ports()})
	}
	for range d.IntN(3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: d.peers(), Ports: d.ports()})
	}
	return p
}

// Pod makes one of that name, on a node or none, with addresses or none.
func (d Dice) Pod(namespace, name string) *corev1.Pod {
	ips := []string{fmt.Sprintf("10.0.0.%d", d.IntN(8)), fmt.Sprintf("fd00::%x", d.IntN(8))}[:d.IntN(3)]
	p := PodObject(namespace, name, Pick(d, "", "n1", "n2", "n3"), d.Labels(), ips...)
	p.UID += types.UID(Pick(d, "", "", "", "x"))
	p.Status.Phase = Pick(d, corev1.PodRunning, corev1.PodRunning, corev1.PodRunning, corev1.PodFailed, corev1.PodSucceeded)
	p.Spec.HostNetwork = d.IntN(8) == 0
	if d.IntN(3) == 0 {
		p.Spec.Containers[0].Ports[0].ContainerPort = 8081
	}
	return p
}
