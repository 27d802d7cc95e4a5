package service

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	netutils "k8s.io/utils/net"

	"timonel/network/feed"
)

// compiler makes of a Service what it is in the table of one family. It is all that
// is known of this node, and changes nothing.
type compiler struct {
	family family
	node   string
	zone   string
	// nodeIPs are this node's own, which source ranges may let in.
	nodeIPs []netip.Addr
	// served are cluster addresses that this node answers itself.
	served []netip.Addr
}

// frontend is where a port of a Service is reached: an address and a port, or a port
// of the node when there is no address. No two Services have the same.
type frontend struct {
	ip       netip.Addr
	protocol string
	port     uint16
}

func (f frontend) key() string {
	if !f.ip.IsValid() {
		return join(f.protocol, strconv.Itoa(int(f.port)))
	}
	return join(f.ip.String(), f.protocol, strconv.Itoa(int(f.port)))
}

func (f frontend) String() string {
	if !f.ip.IsValid() {
		return "node port " + strconv.Itoa(int(f.port)) + "/" + f.protocol
	}
	return netip.AddrPortFrom(f.ip, f.port).String() + "/" + f.protocol
}

// addresses are those of a Service in one family.
type addresses struct {
	cluster  netip.Addr // zero: the Service is not there for this family
	external []netip.Addr
	balancer []netip.Addr
}

func (a addresses) outside() []netip.Addr {
	out := a.external
	for _, ip := range a.balancer {
		out = appendNew(out[:len(out):len(out)], ip)
	}
	return out
}

// addressesOf are none for headless Services, names of other hosts, and Services that
// do not have this family.
func (c *compiler) addressesOf(s *corev1.Service) (addresses, bool) {
	if s == nil || s.Spec.Type == corev1.ServiceTypeExternalName || s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone {
		return addresses{}, false
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	mine := c.family.addresses(ips)
	if len(mine) == 0 {
		return addresses{}, false
	}
	out := addresses{cluster: mine[0], external: c.family.addresses(s.Spec.ExternalIPs)}
	for _, in := range s.Status.LoadBalancer.Ingress {
		if in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP {
			if ip := c.family.addresses([]string{in.IP}); len(ip) > 0 {
				out.balancer = appendNew(out.balancer, ip[0])
			}
		}
	}
	return out, true
}

// frontends are all of a Service, each once.
func (c *compiler) frontends(s *corev1.Service) []frontend {
	a, ok := c.addressesOf(s)
	if !ok {
		return nil
	}
	var out []frontend
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		if !valid(p) {
			continue
		}
		for _, f := range c.of(a, p) {
			out = appendNew(out, f)
		}
	}
	return out
}

func (c *compiler) of(a addresses, p *corev1.ServicePort) []frontend {
	protocol := protocolOf(&p.Protocol)
	out := []frontend{{a.cluster, protocol, uint16(p.Port)}}
	for _, ip := range a.outside() {
		out = append(out, frontend{ip, protocol, uint16(p.Port)})
	}
	if p.NodePort != 0 {
		out = append(out, frontend{protocol: protocol, port: uint16(p.NodePort)})
	}
	return out
}

// valid is what the API server checks as well; here it keeps what is written into a
// rule to what can be written there.
func valid(p *corev1.ServicePort) bool {
	switch protocolOf(&p.Protocol) {
	case "tcp", "udp", "sctp":
		return p.Port > 0 && p.Port <= 65535 && p.NodePort >= 0 && p.NodePort <= 65535
	}
	return false
}

// service returns what a Service is in the table. lost are frontends that another
// Service has.
func (c *compiler) service(name feed.Name, s *corev1.Service, of []*discoveryv1.EndpointSlice, lost map[frontend]struct{}) *objects {
	o := &objects{}
	a, ok := c.addressesOf(s)
	if !ok {
		return o
	}
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		if !valid(p) {
			continue
		}
		b := &builder{compiler: c, objects: o, lost: lost, protocol: protocolOf(&p.Protocol), affinity: affinityOf(s)}
		b.name = name.Namespace + "/" + name.Name + "/" + b.protocol + "/" + p.Name
		b.comment = name.String()
		if p.Name != "" {
			b.comment += ":" + p.Name
		}
		b.spec(s, a, p, c.endpointsOf(of, p))
	}
	return o
}

// builder makes the objects of one port.
type builder struct {
	*compiler
	*objects
	lost     map[frontend]struct{}
	protocol string
	name     string // of the port among all, for chains
	comment  string
	affinity time.Duration // zero: none
	choice
	externalLocal bool
}

func (b *builder) spec(s *corev1.Service, a addresses, p *corev1.ServicePort, all []endpoint) {
	outside := a.outside()
	accessible := p.NodePort != 0 || len(outside) > 0
	b.externalLocal = accessible && s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	internalLocal := s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	// Even where the policy is Local for what comes from outside, this node and its
	// pods reach any endpoint.
	b.choice = choose(all, !internalLocal || accessible, internalLocal || b.externalLocal)
	for _, e := range b.reachable() {
		if e.local {
			b.share(element{in: setHairpin, key: join(e.ip.String(), e.ip.String(), b.protocol, strconv.Itoa(int(e.port)))})
		}
	}
	b.sticky(accessible)

	if !slices.Contains(b.served, a.cluster) {
		b.share(element{in: setClusterIPs, key: a.cluster.String()})
		list, own := b.cluster, kindCluster
		if internalLocal {
			list, own = b.local, kindLocal
		}
		b.internal(frontend{a.cluster, b.protocol, uint16(p.Port)}, list, own)
	}
	for _, ip := range outside {
		b.external(frontend{ip, b.protocol, uint16(p.Port)})
	}
	if p.NodePort != 0 {
		b.external(frontend{protocol: b.protocol, port: uint16(p.NodePort)})
	}
	b.firewall(s, a, p)
}

// internal makes the frontend of a cluster address.
func (b *builder) internal(f frontend, list []endpoint, own string) {
	switch _, lost := b.lost[f]; {
	case lost:
	case len(list) == 0:
		b.refuse(f)
	case b.affinity > 0:
		b.dispatch(f, ownName(own, b.name))
	default:
		b.dispatch(f, b.common(pick(b.family, f, false, len(list))))
		b.fill(f, f.maps().endpoints, list)
	}
}

// external makes a frontend for packets from outside the cluster.
func (b *builder) external(f frontend) {
	if _, lost := b.lost[f]; lost {
		return
	}
	if !b.any || b.externalLocal && len(b.local) == 0 {
		b.refuse(f)
	}
	if !b.any {
		return
	}
	if b.affinity > 0 {
		b.dispatch(f, ownName(kindExternal, b.name))
		return
	}
	b.fill(f, f.maps().endpoints, b.cluster)
	all := b.common(pick(b.family, f, false, len(b.cluster)))
	if !b.externalLocal {
		b.dispatch(f, b.common(fromOutside(f, len(b.cluster), all)))
		return
	}
	local := ""
	if len(b.local) > 0 {
		b.fill(f, f.maps().local, b.local)
		local = b.common(pick(b.family, f, true, len(b.local)))
	}
	b.dispatch(f, b.common(fromOutsideLocal(b.family, f, len(b.local), len(b.cluster), all, local)))
}

func (b *builder) dispatch(f frontend, chain string) {
	b.elements = append(b.elements, element{in: f.maps().dispatch, key: f.key(), value: "goto " + chain, comment: b.comment})
}

// refuse rejects what nobody answers anywhere, so that clients know at once, and drops
// what another node would answer, so that a balancer in front tries that one.
func (b *builder) refuse(f frontend) {
	verdict := "drop"
	if !b.any {
		verdict = "goto " + chainReject
	}
	b.elements = append(b.elements, element{in: f.maps().refused, key: f.key(), value: verdict, comment: b.comment})
}

// fill writes the endpoints of a frontend into the map that its chain looks in.
func (b *builder) fill(f frontend, in string, list []endpoint) {
	for i, e := range list {
		b.elements = append(b.elements, element{in: in, key: f.inList(i), value: join(e.ip.String(), strconv.Itoa(int(e.port)))})
	}
}

// sticky makes the chains of a port whose clients come back to the same endpoint. An
// endpoint has a set of the addresses of its clients, as in kube-proxy.
func (b *builder) sticky(accessible bool) {
	if b.affinity == 0 {
		return
	}
	ip := string(b.family.nft)
	reachable := b.reachable()
	for _, e := range reachable {
		name := b.name + "__" + e.ip.String() + "/" + strconv.Itoa(int(e.port))
		set := affinitySet{name: ownName(kindAffinity, name+"/"+b.affinity.String()), timeout: b.affinity}
		b.sets = append(b.sets, set)
		b.chains = append(b.chains, chain{ownName(kindEndpoint, name), []string{
			"update @" + set.name + " { " + ip + " saddr }",
			"meta l4proto " + b.protocol + " dnat to " + e.addrPort().String(),
		}})
	}
	for _, list := range []struct {
		kind string
		of   []endpoint
	}{{kindCluster, b.cluster}, {kindLocal, b.local}} {
		if len(list.of) == 0 {
			continue
		}
		var rules, choices []string
		for i, e := range list.of {
			name := b.name + "__" + e.ip.String() + "/" + strconv.Itoa(int(e.port))
			to := ownName(kindEndpoint, name)
			rules = append(rules, ip+" saddr @"+ownName(kindAffinity, name+"/"+b.affinity.String())+" goto "+to)
			choices = append(choices, strconv.Itoa(i)+" : goto "+to)
		}
		rules = append(rules, "numgen random mod "+strconv.Itoa(len(list.of))+" vmap { "+strings.Join(choices, ", ")+" }")
		b.chains = append(b.chains, chain{ownName(list.kind, b.name), rules})
	}
	if accessible && b.any {
		all, local := ownName(kindCluster, b.name), ""
		if len(b.local) > 0 {
			local = ownName(kindLocal, b.name)
		}
		rules := outsideRules(all)
		if b.externalLocal {
			rules = outsideLocalRules(b.family, all, local)
		}
		b.chains = append(b.chains, chain{ownName(kindExternal, b.name), rules})
	}
}

// firewall drops what comes to a load balancer's address from elsewhere than from the
// ranges that the Service names.
func (b *builder) firewall(s *corev1.Service, a addresses, p *corev1.ServicePort) {
	var ranges []netip.Prefix
	for _, text := range s.Spec.LoadBalancerSourceRanges {
		_, n, err := netutils.ParseCIDRSloppy(strings.TrimSpace(text))
		if err != nil {
			continue
		}
		ones, _ := n.Mask.Size()
		ip, _ := netip.AddrFromSlice(n.IP)
		if ones == 0 && b.family.has(ip.Unmap()) {
			return // from everywhere
		}
		ranges = append(ranges, netip.PrefixFrom(ip.Unmap(), ones))
	}
	ranges = b.family.prefixes(ranges)
	if len(ranges) == 0 || len(a.balancer) == 0 {
		return
	}
	// A packet of this node to a balancer's address that the node has may carry that
	// address as its source.
	for _, r := range ranges[:len(ranges):len(ranges)] {
		if !slices.ContainsFunc(b.nodeIPs, r.Contains) {
			continue
		}
		for _, ip := range a.balancer {
			ranges = append(ranges, netip.PrefixFrom(ip, ip.BitLen()))
		}
		break
	}
	var texts []string
	for _, r := range b.family.prefixes(ranges) {
		texts = append(texts, r.String())
	}
	name := ownName(kindFirewall, b.name)
	b.chains = append(b.chains, chain{name, []string{
		string(b.family.nft) + " saddr != { " + strings.Join(texts, ", ") + " } drop",
	}})
	for _, ip := range a.balancer {
		f := frontend{ip, b.protocol, uint16(p.Port)}
		if _, lost := b.lost[f]; !lost {
			b.elements = append(b.elements, element{in: mapFirewall, key: f.key(), value: "goto " + name, comment: b.comment})
		}
	}
}

func affinityOf(s *corev1.Service) time.Duration {
	if s.Spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return 0
	}
	if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil && *c.ClientIP.TimeoutSeconds > 0 {
		return time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
	}
	return time.Duration(corev1.DefaultClientIPServiceAffinitySeconds) * time.Second
}
