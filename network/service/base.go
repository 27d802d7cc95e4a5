package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/knftables"

	pb "timonel/proto/timonel/v1"
)

// surroundings are what a table says of this node and of the cluster, besides Services.
type surroundings struct {
	// pods are the networks of the cluster's pods. What comes from elsewhere to a
	// cluster address gets this node's address as its source, so that the answer comes
	// back this way.
	pods []netip.Prefix
	// ownPods are the networks of this node's pods, when its bridge hands packets
	// between two of them without asking conntrack: then they get this node's address too.
	ownPods []netip.Prefix
	// services are the networks of cluster addresses: what nobody has is dropped.
	services []netip.Prefix
	// nodePorts are addresses of this node where node ports are; allNodePorts: all of it
	// but those of loopback.
	nodePorts    []netip.Addr
	allNodePorts bool
	// served are cluster addresses that this node answers itself.
	served []netip.Addr
	// askers are networks from which served may be asked; none: any.
	askers []netip.Prefix
	// ports are those at which nodes and controllers talk to each other.
	ports []uint16
}

const (
	chainServices        = "services"
	chainServicesCheck   = "services-check"
	chainNodePortsCheck  = "nodeports-check"
	chainClusterIPsCheck = "cluster-ips-check"
	chainServedCheck     = "served-check"
	chainFirewallCheck   = "firewall-check"
	chainMasquerade      = "masquerading"
	chainReject          = "reject-all"
)

// hooks are the chains that the kernel calls. Before address translation source ranges
// are looked at; after it, what is still addressed to a Service has nobody to go to.
var hooks = []struct {
	name     string
	kind     knftables.BaseChainType
	hook     knftables.BaseChainHook
	priority knftables.BaseChainPriority
	rules    []string
}{
	{"filter-prerouting", knftables.FilterType, knftables.PreroutingHook, knftables.DNATPriority + "-10", []string{"ct state new jump " + chainFirewallCheck}},
	{"filter-output-pre-dnat", knftables.FilterType, knftables.OutputHook, "-110", []string{"ct state new jump " + chainFirewallCheck}},
	{"filter-input", knftables.FilterType, knftables.InputHook, knftables.FilterPriority, []string{
		"ct state new jump " + chainNodePortsCheck, "ct state new jump " + chainServicesCheck, "ct state new jump " + chainServedCheck}},
	{"filter-forward", knftables.FilterType, knftables.ForwardHook, knftables.FilterPriority, []string{
		"ct state new jump " + chainServicesCheck, "ct state new jump " + chainClusterIPsCheck}},
	{"filter-output", knftables.FilterType, knftables.OutputHook, knftables.FilterPriority, []string{
		"ct state new jump " + chainServicesCheck, "ct state new jump " + chainClusterIPsCheck}},
	{"nat-prerouting", knftables.NATType, knftables.PreroutingHook, knftables.DNATPriority, []string{"jump " + chainServices}},
	{"nat-output", knftables.NATType, knftables.OutputHook, "-100", []string{"jump " + chainServices}},
	{"nat-postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority, []string{"jump " + chainMasquerade}},
}

// ownRules let pass what nodes and controllers say to each other, before any Service is
// looked for: whoever may make a Service may give it a controller's address in
// spec.externalIPs, and all nodes would be cut off from the controllers, and so never hear
// that the Service is gone. Pods find such a Service, as anywhere.
func ownRules(hook knftables.BaseChainHook, f family, s surroundings) (out []string) {
	ip, ports := string(f.nft), ""
	if len(s.ports) > 0 {
		var texts []string
		for _, p := range s.ports {
			texts = append(texts, strconv.Itoa(int(p)))
		}
		ports = " meta l4proto { tcp, udp } th dport { " + strings.Join(texts, ", ") + " } return"
	}
	switch hook {
	case knftables.OutputHook:
		out = append(out, fmt.Sprintf("meta mark and %#x != 0 return", pb.OwnMark))
		if ports != "" {
			out = append(out, ip+" daddr != @"+setClusterIPs+ports)
		}
	case knftables.PreroutingHook, knftables.InputHook:
		if ports != "" {
			out = append(out, "fib daddr type local"+ports)
		}
	}
	return out
}

// fixedMap is a map or, without a value's type, a set.
type fixedMap struct {
	name, typ, typeOf string
	interval          bool
}

func fixedMaps(f family) []fixedMap {
	ip := string(f.nft)
	at := f.addr + " . inet_proto . inet_service"
	out := []fixedMap{
		{name: setPods, typ: f.addr, interval: true},
		{name: setServiceNetworks, typ: f.addr, interval: true},
		{name: setNodePortIPs, typ: f.addr},
		{name: setServed, typ: f.addr},
		{name: setClusterIPs, typ: f.addr},
		{name: setHairpin, typ: f.addr + " . " + f.addr + " . inet_proto . inet_service"},
		{name: mapServiceIPs, typ: at + " : verdict"},
		{name: mapNodePorts, typ: "inet_proto . inet_service : verdict"},
		{name: mapNoEndpoints, typ: at + " : verdict"},
		{name: mapNoEndpointsNodePorts, typ: "inet_proto . inet_service : verdict"},
		{name: mapFirewall, typ: at + " : verdict"},
	}
	for _, protocol := range []string{"tcp", "udp", "sctp"} {
		port := " . " + protocol + " dport"
		number, to := "numgen random mod 65535", " : "+ip+" daddr"+port
		for _, m := range []fixedMap{
			{name: mapEndpoints, typeOf: number + " . " + ip + " daddr" + port + to},
			{name: mapLocalEndpoints, typeOf: number + " . " + ip + " daddr" + port + to},
			{name: mapNodePortEndpoints, typeOf: number + port + to},
			{name: mapNodePortLocalEndpoints, typeOf: number + port + to},
		} {
			m.name += "-" + protocol
			out = append(out, m)
		}
	}
	return out
}

func (m fixedMap) object() knftables.Object {
	if !isMap(m.name) {
		s := &knftables.Set{Name: m.name, Type: m.typ}
		if m.interval {
			s.Flags = []knftables.SetFlag{knftables.IntervalFlag}
		}
		return s
	}
	return &knftables.Map{Name: m.name, Type: m.typ, TypeOf: m.typeOf}
}

func isMap(name string) bool {
	switch name {
	case setPods, setServiceNetworks, setNodePortIPs, setServed, setClusterIPs, setHairpin:
		return false
	}
	return true
}

// fixedChains are those that the hooks jump to, and what they jump to in turn.
func fixedChains(f family, s surroundings) []chain {
	ip := string(f.nft)
	at := ip + " daddr . meta l4proto . th dport vmap @"
	services, nodePort := []string{}, ip+" daddr @"+setNodePortIPs
	if s.allNodePorts {
		nodePort = "fib daddr type local " + ip + " daddr != " + map[bool]string{true: "127.0.0.0/8", false: "::1"}[f.v4()]
	}
	nodePort += " meta l4proto . th dport vmap @"
	if len(f.prefixes(s.pods)) > 0 {
		services = append(services, ip+" daddr @"+setClusterIPs+" "+ip+" saddr != @"+setPods+" "+markRule)
	}
	services = append(services, at+mapServiceIPs, nodePort+mapNodePorts)
	masquerade := []string{
		"mark and " + masqueradeMark + " != 0 mark set mark xor " + masqueradeMark + " masquerade fully-random",
		"ct status dnat " + ip + " saddr . " + ip + " daddr . meta l4proto . th dport @" + setHairpin + " masquerade fully-random",
	}
	if own := f.prefixes(s.ownPods); len(own) > 0 {
		var texts []string
		for _, p := range own {
			texts = append(texts, p.String())
		}
		list := "{ " + strings.Join(texts, ", ") + " }"
		masquerade = append(masquerade, "ct status dnat "+ip+" saddr "+list+" "+ip+" daddr "+list+" masquerade fully-random")
	}
	return []chain{
		{chainServedCheck, servedRules(f, s)},
		{chainServices, services},
		{chainServicesCheck, []string{at + mapNoEndpoints}},
		{chainNodePortsCheck, []string{nodePort + mapNoEndpointsNodePorts}},
		{chainClusterIPsCheck, []string{
			ip + " daddr @" + setServed + " return",
			ip + " daddr @" + setClusterIPs + " reject",
			ip + " daddr @" + setServiceNetworks + " drop",
		}},
		{chainFirewallCheck, []string{at + mapFirewall}},
		{chainMasquerade, masquerade},
		{chainReject, []string{"reject"}},
	}
}

// servedRules keep strangers from what this node answers itself: names, of which whoever can
// ask many small questions in the name of somebody else could make many large answers to them.
func servedRules(f family, s surroundings) []string {
	ip := string(f.nft)
	if len(s.askers) == 0 {
		return nil
	}
	var texts []string
	for _, p := range f.prefixes(s.askers) {
		texts = append(texts, p.String())
	}
	rule := ip + " daddr @" + setServed + " fib saddr type != local "
	if len(texts) > 0 {
		rule += ip + " saddr != { " + strings.Join(texts, ", ") + " } "
	}
	return []string{rule + "drop"}
}

// base writes all of a table that is not a Service's, and empties what Services fill.
func base(tx *knftables.Transaction, f family, s surroundings) {
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("Services, of the Timonel agent")})
	for _, m := range fixedMaps(f) {
		tx.Add(m.object())
		tx.Flush(m.object())
	}
	chains := fixedChains(f, s)
	for _, c := range chains {
		tx.Add(&knftables.Chain{Name: c.name})
		tx.Flush(&knftables.Chain{Name: c.name})
	}
	for _, c := range chains {
		write(tx, c)
	}
	for _, h := range hooks {
		c := &knftables.Chain{Name: h.name, Type: knftables.PtrTo(h.kind), Hook: knftables.PtrTo(h.hook), Priority: knftables.PtrTo(h.priority)}
		tx.Add(c)
		tx.Flush(&knftables.Chain{Name: h.name})
		write(tx, chain{h.name, slices.Concat(ownRules(h.hook, f, s), h.rules)})
	}
	fill := func(set, key string) { tx.Add(element{in: set, key: key}.object()) }
	for _, p := range f.prefixes(s.pods) {
		fill(setPods, p.String())
	}
	for _, p := range f.prefixes(s.services) {
		fill(setServiceNetworks, p.String())
	}
	for _, ip := range s.nodePorts {
		if f.has(ip) {
			fill(setNodePortIPs, ip.String())
		}
	}
	for _, ip := range s.served {
		if f.has(ip) {
			fill(setServed, ip.String())
		}
	}
}

func write(tx *knftables.Transaction, c chain) {
	for _, r := range c.rules {
		tx.Add(&knftables.Rule{Chain: c.name, Rule: r})
	}
}

func (e element) object() *knftables.Element {
	out := &knftables.Element{Key: []string{e.key}}
	if !isMap(e.in) {
		out.Set = e.in
		return out
	}
	out.Map, out.Value = e.in, []string{e.value}
	if e.comment != "" {
		out.Comment = knftables.PtrTo(e.comment[:min(len(e.comment), knftables.CommentLengthMax)])
	}
	return out
}

// object is the set of the clients of one endpoint. The kernel wants the flag dynamic.
func (s affinitySet) object(f family) *knftables.Set {
	return &knftables.Set{
		Name: s.name, Type: f.addr, Timeout: knftables.PtrTo(s.timeout),
		Flags: []knftables.SetFlag{knftables.DynamicFlag, knftables.TimeoutFlag},
	}
}
