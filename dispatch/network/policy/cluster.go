package policy

import (
	"encoding/json"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	pb "timonel/proto/timonel/v1"
)

// ClusterPolicies is what the storage keys of ClusterNetworkPolicies have between the
// cache's prefix and the name.
const ClusterPolicies = "policy.networking.k8s.io/clusternetworkpolicies/"

// clusterPolicy is a ClusterNetworkPolicy of policy.networking.k8s.io, v1alpha2 or
// v1beta1, which are the same, with what the experimental channel adds.
type clusterPolicy struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     struct {
		Tier     string `json:"tier"`
		Priority int32  `json:"priority"`
		Subject  struct {
			Namespaces *metav1.LabelSelector `json:"namespaces"`
			Pods       *namespacedPods       `json:"pods"`
		} `json:"subject"`
		Ingress []clusterRule `json:"ingress"`
		Egress  []clusterRule `json:"egress"`
	} `json:"spec"`
}

type namespacedPods struct {
	NamespaceSelector metav1.LabelSelector `json:"namespaceSelector"`
	PodSelector       metav1.LabelSelector `json:"podSelector"`
}

type clusterRule struct {
	Name      string            `json:"name"`
	Action    string            `json:"action"`
	From      []clusterPeer     `json:"from"`
	To        []clusterPeer     `json:"to"`
	Protocols []clusterProtocol `json:"protocols"`
}

type clusterPeer struct {
	Namespaces *metav1.LabelSelector `json:"namespaces"`
	Pods       *namespacedPods       `json:"pods"`
	Nodes      *metav1.LabelSelector `json:"nodes"`
	Networks   []string              `json:"networks"`
}

type clusterProtocol struct {
	TCP       *clusterPorts `json:"tcp"`
	UDP       *clusterPorts `json:"udp"`
	SCTP      *clusterPorts `json:"sctp"`
	NamedPort string        `json:"destinationNamedPort"`
}

type clusterPorts struct {
	DestinationPort *struct {
		Number int32 `json:"number"`
		Range  *struct {
			Start int32 `json:"start"`
			End   int32 `json:"end"`
		} `json:"range"`
	} `json:"destinationPort"`
}

// CompileCluster is what a ClusterNetworkPolicy says, as it is stored, and what in it
// cannot be carried out. A rule with such a thing fails closed, as the API wants: one that
// accepts accepts nothing, and one that denies or passes on denies all.
func CompileCluster(raw []byte) (p *Policy, wrong []string, err error) {
	var o clusterPolicy
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, nil, fmt.Errorf("read a ClusterNetworkPolicy: %w", err)
	}
	p = &Policy{
		Item: &pb.NetworkPolicyItem{
			Name: o.Metadata.Name, Uid: string(o.Metadata.UID), Tier: pb.NetworkPolicyItem_ADMIN, Priority: o.Spec.Priority,
		},
		groups: make(map[string]spec),
	}
	switch o.Spec.Tier {
	case "Admin":
	case "Baseline":
		p.Item.Tier = pb.NetworkPolicyItem_BASELINE
	default:
		return nil, nil, fmt.Errorf("spec.tier of ClusterNetworkPolicy %s is %q", o.Metadata.Name, o.Spec.Tier)
	}
	subject, ok := selected(o.Spec.Subject.Namespaces, o.Spec.Subject.Pods)
	if !ok {
		return nil, nil, fmt.Errorf("spec.subject of ClusterNetworkPolicy %s selects nothing that can be read", o.Metadata.Name)
	}
	p.subject = subject
	rules := func(field string, in []clusterRule, egress bool) (out []*pb.NetworkRule) {
		for i := range in {
			rule, why := p.clusterRule(&in[i], egress)
			if why != "" {
				wrong = append(wrong, fmt.Sprintf("spec.%s[%d] %s", field, i, why))
			}
			if rule != nil {
				out = append(out, rule)
			}
		}
		return out
	}
	p.Item.Ingress, p.Item.Egress = rules("ingress", o.Spec.Ingress, false), rules("egress", o.Spec.Egress, true)
	return p, wrong, nil
}

// selected is the selection of a subject or a peer.
func selected(namespaces *metav1.LabelSelector, pods *namespacedPods) (r ref, ok bool) {
	r.pods = labels.Everything()
	var err error
	switch {
	case namespaces != nil:
		r.namespaces, err = metav1.LabelSelectorAsSelector(namespaces)
	case pods != nil:
		if r.namespaces, err = metav1.LabelSelectorAsSelector(&pods.NamespaceSelector); err == nil {
			r.pods, err = metav1.LabelSelectorAsSelector(&pods.PodSelector)
		}
	default:
		return r, false
	}
	return r, err == nil
}

func (p *Policy) clusterRule(in *clusterRule, egress bool) (rule *pb.NetworkRule, why string) {
	action, known := map[string]pb.NetworkRule_Action{"Accept": pb.NetworkRule_ALLOW, "Deny": pb.NetworkRule_DENY, "Pass": pb.NetworkRule_PASS}[in.Action]
	if !known {
		return denyAll(), fmt.Sprintf("has the action %q", in.Action)
	}
	rule = &pb.NetworkRule{Action: action, AnyPort: len(in.Protocols) == 0}
	var selections []ref
	for _, peer := range slices.Concat(in.From, in.To) {
		if s, ok := selected(peer.Namespaces, peer.Pods); ok {
			selections = append(selections, s)
			rule.Groups = append(rule.Groups, p.group(spec{of: s}))
			continue
		}
		switch {
		case peer.Nodes != nil && egress:
			nodes, err := metav1.LabelSelectorAsSelector(peer.Nodes)
			if err != nil {
				why = "has a selector of nodes that cannot be read"
				continue
			}
			// Nodes are what is in no namespace.
			rule.Groups = append(rule.Groups, p.group(spec{of: ref{pods: nodes}}))
		case len(peer.Networks) > 0 && egress:
			for _, text := range peer.Networks {
				cidr, ok := prefixOf(text)
				if !ok {
					why = fmt.Sprintf("has the network %q", text)
					continue
				}
				rule.Blocks = append(rule.Blocks, &pb.NetworkBlock{Cidr: cidr.String()})
			}
		default:
			why = "has a peer of a kind that is not carried out: only namespaces, pods, and of egress nodes and networks are"
		}
	}
	for _, protocol := range in.Protocols {
		if !p.clusterPort(rule, protocol, selections, egress) {
			why = "has a protocol that is not carried out"
		}
	}
	rule.Groups, rule.Targets = unique(rule.Groups), unique(rule.Targets)
	switch {
	case why == "":
		return rule, ""
	case action == pb.NetworkRule_ALLOW:
		return nil, why
	}
	return denyAll(), why
}

// clusterPort puts one of a rule's protocols, and says whether it knows it.
func (p *Policy) clusterPort(rule *pb.NetworkRule, in clusterProtocol, selections []ref, egress bool) bool {
	if in.NamedPort != "" {
		for _, protocol := range []string{"TCP", "UDP", "SCTP"} {
			if egress {
				rule.Targets = append(rule.Targets, p.targets(selections, nil, false, protocol, in.NamedPort)...)
			} else {
				rule.Ports = append(rule.Ports, &pb.NetworkPort{Protocol: protocol, Name: in.NamedPort})
			}
		}
		return true
	}
	for protocol, ports := range map[string]*clusterPorts{"TCP": in.TCP, "UDP": in.UDP, "SCTP": in.SCTP} {
		if ports == nil {
			continue
		}
		out := &pb.NetworkPort{Protocol: protocol}
		if at := ports.DestinationPort; at != nil {
			out.First, out.Last = portNumber(at.Number), portNumber(at.Number)
			if at.Range != nil {
				out.First, out.Last = portNumber(at.Range.Start), portNumber(at.Range.End)
			}
			if out.First == 0 || out.Last < out.First {
				return false
			}
		}
		rule.Ports = append(rule.Ports, out)
		return true
	}
	return false
}
