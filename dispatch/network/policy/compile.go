package policy

import (
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	netutils "k8s.io/utils/net"

	pb "timonel/proto/timonel/v1"
)

// Policy is a policy in the words of nodes, and the selections that it names.
type Policy struct {
	Item    *pb.NetworkPolicyItem
	subject ref
	groups  map[string]spec
}

// Compile is what a NetworkPolicy says. What in it cannot be read allows nothing: the API
// lets no such thing in.
func Compile(o *networkingv1.NetworkPolicy) *Policy {
	p := &Policy{
		Item:   &pb.NetworkPolicyItem{Namespace: o.Namespace, Name: o.Name, Uid: string(o.UID)},
		groups: make(map[string]spec),
	}
	subject, err := metav1.LabelSelectorAsSelector(&o.Spec.PodSelector)
	if err != nil {
		p.subject = ref{namespace: o.Namespace, pods: labels.Everything()}
		p.Item.IngressIsolated, p.Item.EgressIsolated = true, true
		return p
	}
	p.subject = ref{namespace: o.Namespace, pods: subject}
	if types := o.Spec.PolicyTypes; len(types) > 0 {
		p.Item.IngressIsolated = slices.Contains(types, networkingv1.PolicyTypeIngress)
		p.Item.EgressIsolated = slices.Contains(types, networkingv1.PolicyTypeEgress)
	} else {
		p.Item.IngressIsolated, p.Item.EgressIsolated = true, len(o.Spec.Egress) > 0
	}
	if p.Item.IngressIsolated {
		for i := range o.Spec.Ingress {
			p.Item.Ingress = append(p.Item.Ingress, p.rule(o.Spec.Ingress[i].From, o.Spec.Ingress[i].Ports, false))
		}
	}
	if p.Item.EgressIsolated {
		for i := range o.Spec.Egress {
			p.Item.Egress = append(p.Item.Egress, p.rule(o.Spec.Egress[i].To, o.Spec.Egress[i].Ports, true))
		}
	}
	return p
}

func (p *Policy) rule(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, egress bool) *pb.NetworkRule {
	r := &pb.NetworkRule{AnyPeer: len(peers) == 0, AnyPort: len(ports) == 0}
	var selections []ref
	var blocks []*block
	for _, peer := range peers {
		if peer.IPBlock != nil {
			if b := blockOf(peer.IPBlock); b != nil {
				blocks = append(blocks, b)
				r.Blocks = append(r.Blocks, b.proto())
			}
			continue
		}
		if s, ok := p.peer(peer); ok {
			selections = append(selections, s)
		}
	}
	for _, s := range selections {
		r.Groups = append(r.Groups, p.group(spec{of: s}))
	}
	for _, port := range ports {
		protocol := corev1.ProtocolTCP
		if port.Protocol != nil {
			protocol = *port.Protocol
		}
		out := &pb.NetworkPort{Protocol: protocolOf(protocol)}
		switch {
		case port.Port == nil:
		case port.Port.Type == intstr.String && !egress:
			out.Name = port.Port.StrVal
		case port.Port.Type == intstr.String:
			r.Targets = append(r.Targets, p.targets(selections, blocks, r.AnyPeer, out.Protocol, port.Port.StrVal)...)
			continue
		default:
			out.First, out.Last = portNumber(port.Port.IntVal), portNumber(port.Port.IntVal)
			if port.EndPort != nil {
				out.Last = portNumber(*port.EndPort)
			}
			if out.First == 0 || out.Last < out.First {
				continue // 0 to 0 would be all
			}
		}
		r.Ports = append(r.Ports, out)
	}
	r.Groups, r.Targets = unique(r.Groups), unique(r.Targets)
	return r
}

// peer is what a peer selects.
func (p *Policy) peer(peer networkingv1.NetworkPolicyPeer) (ref, bool) {
	r := ref{namespace: p.Item.GetNamespace(), pods: labels.Everything()}
	if peer.PodSelector == nil && peer.NamespaceSelector == nil {
		return r, false
	}
	var err error
	if peer.PodSelector != nil {
		if r.pods, err = metav1.LabelSelectorAsSelector(peer.PodSelector); err != nil {
			return r, false
		}
	}
	if peer.NamespaceSelector != nil {
		r.namespace = ""
		if r.namespaces, err = metav1.LabelSelectorAsSelector(peer.NamespaceSelector); err != nil {
			return r, false
		}
	}
	return r, true
}

// group notes that the policy names a group, and returns its name.
func (p *Policy) group(s spec) string {
	name := s.name()
	p.groups[name] = s
	return name
}

// targets are the groups of the ports of a name that peers have: of those that are
// selected, and of all pods within blocks, or anywhere.
func (p *Policy) targets(selections []ref, blocks []*block, any bool, protocol, port string) (out []string) {
	all := ref{namespaces: labels.Everything(), pods: labels.Everything()}
	for _, s := range selections {
		out = append(out, p.group(spec{of: s, protocol: protocol, port: port}))
	}
	for _, b := range blocks {
		out = append(out, p.group(spec{of: all, protocol: protocol, port: port, within: b}))
	}
	if any {
		out = append(out, p.group(spec{of: all, protocol: protocol, port: port}))
	}
	return out
}

func unique(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

func protocolOf(p corev1.Protocol) string {
	if p == "" {
		return string(corev1.ProtocolTCP)
	}
	return string(p)
}

func portNumber(n int32) uint32 {
	if n < 1 || n > 65535 {
		return 0
	}
	return uint32(n)
}

// prefixOf reads a CIDR as the API does, which lets leading zeros in that were there
// before it knew better.
func prefixOf(text string) (netip.Prefix, bool) {
	_, n, err := netutils.ParseCIDRSloppy(text)
	if err != nil {
		return netip.Prefix{}, false
	}
	ip, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	if ip.Is4In6() && ones >= 96 {
		ip, ones = ip.Unmap(), ones-96
	}
	return netip.PrefixFrom(ip, ones).Masked(), ok
}

// blockOf is nil for what cannot be read, exceptions included.
func blockOf(o *networkingv1.IPBlock) *block {
	cidr, ok := prefixOf(o.CIDR)
	if !ok {
		return nil
	}
	b := &block{cidr: cidr}
	for _, text := range o.Except {
		except, ok := prefixOf(text)
		if !ok {
			return nil
		}
		b.except = append(b.except, except)
	}
	return b
}

func (b *block) proto() *pb.NetworkBlock {
	out := &pb.NetworkBlock{Cidr: b.cidr.String()}
	for _, e := range b.except {
		out.Except = append(out.Except, e.String())
	}
	return out
}

// without is the policy when some of its groups are told as if nobody were in them: who
// is denied is then everybody, as it cannot be said who.
func (p *Policy) without(group func(name string) bool) *pb.NetworkPolicyItem {
	if !slices.ContainsFunc(slices.Collect(maps.Keys(p.groups)), group) {
		return p.Item
	}
	rules := func(in []*pb.NetworkRule) (out []*pb.NetworkRule) {
		for _, r := range in {
			if r.GetAction() == pb.NetworkRule_DENY && slices.ContainsFunc(r.GetTargets(), group) {
				r = denyAll()
			} else if r.GetAction() == pb.NetworkRule_DENY && slices.ContainsFunc(r.GetGroups(), group) {
				r = &pb.NetworkRule{Action: pb.NetworkRule_DENY, AnyPeer: true, AnyPort: r.GetAnyPort(), Ports: r.GetPorts()}
			}
			out = append(out, r)
		}
		return out
	}
	return p.bare(rules(p.Item.GetIngress()), rules(p.Item.GetEgress()))
}

// closed is the policy when it is too much: its pods are isolated, and where it denies
// anything, it denies all.
func (p *Policy) closed() *pb.NetworkPolicyItem {
	rules := func(in []*pb.NetworkRule) []*pb.NetworkRule {
		if slices.ContainsFunc(in, func(r *pb.NetworkRule) bool { return r.GetAction() == pb.NetworkRule_DENY }) {
			return []*pb.NetworkRule{denyAll()}
		}
		return nil
	}
	return p.bare(rules(p.Item.GetIngress()), rules(p.Item.GetEgress()))
}

func denyAll() *pb.NetworkRule {
	return &pb.NetworkRule{Action: pb.NetworkRule_DENY, AnyPeer: true, AnyPort: true}
}

func (p *Policy) bare(ingress, egress []*pb.NetworkRule) *pb.NetworkPolicyItem {
	i := p.Item
	return &pb.NetworkPolicyItem{
		Namespace: i.GetNamespace(), Name: i.GetName(), Uid: i.GetUid(), Tier: i.GetTier(), Priority: i.GetPriority(),
		IngressIsolated: i.GetIngressIsolated(), EgressIsolated: i.GetEgressIsolated(), Ingress: ingress, Egress: egress,
	}
}
