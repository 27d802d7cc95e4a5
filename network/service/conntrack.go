package service

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/network/feed"
)

// Packets of UDP have no connection that ends: a client that goes on sending keeps the
// translation to an endpoint that is gone, or to none from before there were endpoints.
// So the kernel's entries of such are deleted. Those of TCP are not: what still comes from
// a terminating endpoint is let through.

// flows deletes entries of UDP ports whose endpoints have changed so that some may
// lead nowhere.
func (s *side) flows(old, view *feed.View, names map[feed.Name]struct{}, whole bool, around surroundings) error {
	match := flowFilter{family: s.compiler.family, serving: map[frontend]map[netip.AddrPort]struct{}{}}
	one := func(name feed.Name) {
		was := s.compiler.serving(old.Service(name), old.Slices(name))
		is := s.compiler.serving(view.Service(name), view.Slices(name))
		for f, now := range is {
			if _, lost := s.claims.lost[name][f]; !lost && (whole || stale(was[f], now)) {
				match.serving[f] = now
			}
		}
		for f := range was {
			if _, still := s.claims.owner[f]; !still {
				match.serving[f] = nil // nobody is reached there any more
			}
		}
	}
	if whole {
		for name := range view.Services() {
			one(name)
		}
	} else {
		for name := range names {
			one(name)
		}
	}
	if whole {
		match.clusters = around.services // Services may have gone while no agent was there
	}
	if len(match.serving) == 0 && len(match.clusters) == 0 {
		return nil
	}
	match.node = map[netip.Addr]struct{}{}
	for _, ip := range around.nodePorts {
		match.node[ip] = struct{}{}
	}
	if around.allNodePorts {
		for _, ip := range hostAddresses() {
			match.node[ip] = struct{}{}
		}
	}
	family := netlink.InetFamily(unix.AF_INET)
	if !s.compiler.family.v4() {
		family = unix.AF_INET6
	}
	if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, &match); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("conntrack: %w", err)
	}
	return nil
}

// stale says whether there may be entries that lead elsewhere than to now.
func stale(was, now map[netip.AddrPort]struct{}) bool {
	if len(was) == 0 && len(now) > 0 {
		return true
	}
	for e := range was {
		if _, still := now[e]; !still {
			return true
		}
	}
	return false
}

// serving are the endpoints behind each UDP frontend of a Service that answer, whatever
// its policies: a policy that changes ends no flow.
func (c *compiler) serving(svc *corev1.Service, of []*discoveryv1.EndpointSlice) map[frontend]map[netip.AddrPort]struct{} {
	a, ok := c.addressesOf(svc)
	if !ok {
		return nil
	}
	var out map[frontend]map[netip.AddrPort]struct{}
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		if p.Protocol != corev1.ProtocolUDP || !valid(p) {
			continue
		}
		list := map[netip.AddrPort]struct{}{}
		for _, e := range c.endpointsOf(of, p) {
			if e.serving {
				list[e.addrPort()] = struct{}{}
			}
		}
		if out == nil {
			out = map[frontend]map[netip.AddrPort]struct{}{}
		}
		for _, f := range c.of(a, p) {
			out[f] = list
		}
	}
	return out
}

// flowFilter matches entries of frontends that lead to none of their endpoints.
type flowFilter struct {
	family  family
	node    map[netip.Addr]struct{} // where node ports are
	serving map[frontend]map[netip.AddrPort]struct{}
	// clusters are networks of cluster addresses, where nobody but who is in serving has
	// translations.
	clusters []netip.Prefix
}

// MatchConntrackFlow says whether an entry is to be deleted.
func (m *flowFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	to, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	from, ok2 := netip.AddrFromSlice(flow.Reverse.SrcIP)
	if !ok || !ok2 {
		return false
	}
	to, from = to.Unmap(), from.Unmap()
	list, is := m.serving[frontend{to, "udp", flow.Forward.DstPort}]
	if !is && from != to && slices.ContainsFunc(m.clusters, func(p netip.Prefix) bool { return p.Contains(to) }) {
		return true
	}
	if !is {
		if _, here := m.node[to]; !here {
			return false
		}
		if list, is = m.serving[frontend{protocol: "udp", port: flow.Forward.DstPort}]; !is {
			return false
		}
	}
	_, serves := list[netip.AddrPortFrom(from, flow.Reverse.SrcPort)]
	return !serves
}
