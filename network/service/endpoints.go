package service

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// endpoint is one address and port behind a port of a Service.
type endpoint struct {
	ip   netip.Addr
	port uint16
	// local says that it is on this node.
	local bool
	// ready: it is ready, and is not terminating unless the Service publishes what is
	// not ready; serving: it answers, terminating or not.
	ready, serving, terminating bool
	// Of hints there is whether an endpoint has some, and whether this node or its zone
	// is among them.
	nodeHints, forNode, zoneHints, forZone bool
}

func (e endpoint) addrPort() netip.AddrPort { return netip.AddrPortFrom(e.ip, e.port) }

// endpointsOf are those of one port of a Service, in the order of their addresses.
func (c *compiler) endpointsOf(slicesOf []*discoveryv1.EndpointSlice, port *corev1.ServicePort) []endpoint {
	seen := make(map[netip.AddrPort]int)
	var out []endpoint
	for _, s := range slicesOf {
		if string(s.AddressType) != string(c.family.ip) {
			continue
		}
		for _, p := range s.Ports {
			if p.Name == nil || *p.Name != port.Name || p.Port == nil || *p.Port <= 0 || *p.Port > 65535 || protocolOf(p.Protocol) != protocolOf(&port.Protocol) {
				continue
			}
			for i := range s.Endpoints {
				e, ok := c.endpoint(&s.Endpoints[i], uint16(*p.Port))
				if !ok {
					continue
				}
				// While an endpoint moves from slice to slice it may be in both, and a pod
				// that ends may have had the address that another has now, which counts.
				at, is := seen[e.addrPort()]
				switch {
				case !is:
					seen[e.addrPort()] = len(out)
					out = append(out, e)
				case !e.terminating:
					out[at] = e
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b endpoint) int {
		return cmp.Or(a.ip.Compare(b.ip), cmp.Compare(a.port, b.port))
	})
	return out
}

func (c *compiler) endpoint(e *discoveryv1.Endpoint, port uint16) (endpoint, bool) {
	if len(e.Addresses) == 0 {
		return endpoint{}, false
	}
	ip, ok := parseIP(e.Addresses[0])
	if !ok || ip.Is4() != c.family.v4() {
		return endpoint{}, false
	}
	out := endpoint{
		ip: ip, port: port,
		local:       e.NodeName != nil && *e.NodeName == c.node && c.node != "",
		ready:       e.Conditions.Ready == nil || *e.Conditions.Ready,
		serving:     e.Conditions.Serving == nil || *e.Conditions.Serving,
		terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating,
	}
	if e.Hints != nil {
		out.zoneHints, out.nodeHints = len(e.Hints.ForZones) > 0, len(e.Hints.ForNodes) > 0
		out.forZone = slices.ContainsFunc(e.Hints.ForZones, func(z discoveryv1.ForZone) bool { return z.Name == c.zone })
		out.forNode = slices.ContainsFunc(e.Hints.ForNodes, func(n discoveryv1.ForNode) bool { return n.Name == c.node })
	}
	return out, true
}

// choice is where the packets of a port go from this node.
type choice struct {
	cluster []endpoint // by the policy Cluster
	local   []endpoint // by the policy Local
	any     bool       // some endpoint can be used, maybe on another node alone
}

// reachable are the endpoints of both lists.
func (c choice) reachable() []endpoint {
	out := slices.Clone(c.cluster)
	for _, e := range c.local {
		if !slices.ContainsFunc(out, func(o endpoint) bool { return o.addrPort() == e.addrPort() }) {
			out = append(out, e)
		}
	}
	return out
}

// choose says which endpoints are used. Terminating endpoints that still serve are
// used where there are no others, so that a rollout or a drain loses no connection.
func choose(all []endpoint, usesCluster, usesLocal bool) choice {
	var out choice
	if usesCluster {
		near := nearest(all)
		out.cluster = filter(all, func(e endpoint) bool { return e.ready && near(e) })
		if len(out.cluster) == 0 {
			out.cluster = filter(all, endpoint.last)
		}
		out.any = len(out.cluster) > 0
	}
	if usesLocal {
		out.any = out.any || slices.ContainsFunc(all, func(e endpoint) bool { return e.ready || e.last() })
		out.local = filter(all, func(e endpoint) bool { return e.local && e.ready })
		if len(out.local) == 0 {
			out.local = filter(all, func(e endpoint) bool { return e.local && e.last() })
		}
	}
	return out
}

// last says that an endpoint is used when there are no ready ones.
func (e endpoint) last() bool { return !e.ready && e.serving && e.terminating }

// nearest returns which ready endpoints are for this node: those that hints say, if all
// ready ones have hints and at least one is for it. Hints for nodes go before those for zones.
func nearest(all []endpoint) func(endpoint) bool {
	nodes, zones, some, forNode, forZone := true, true, false, false, false
	for _, e := range all {
		if !e.ready {
			continue
		}
		some = true
		nodes, zones = nodes && e.nodeHints, zones && e.zoneHints
		forNode, forZone = forNode || e.forNode, forZone || e.forZone
	}
	switch {
	case some && nodes && forNode:
		return func(e endpoint) bool { return e.forNode }
	case some && zones && forZone:
		return func(e endpoint) bool { return e.forZone }
	}
	return func(endpoint) bool { return true }
}

func filter[T any](all []T, keep func(T) bool) []T {
	var out []T
	for _, e := range all {
		if keep(e) {
			out = append(out, e)
		}
	}
	return out
}
