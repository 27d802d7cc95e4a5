package agent

import (
	"context"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/podnet"
	"timonel/network/feed"
	pb "timonel/proto/timonel/v1"
)

// routesEvery is how often routes are made anew at most: while many nodes change, their
// changes are merged.
const routesEvery = 200 * time.Millisecond

// networkLook is how often it is looked whether routes and what else the pod network needs
// are as they were left, and other nodes where they were.
const networkLook = 5 * time.Second

// followNetwork keeps the routes to other nodes' pods as the controllers say, until ctx
// ends.
func (a *Agent) followNetwork(ctx context.Context) error {
	nodes := make(chan struct{}, 1)
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		for after := uint64(0); ; {
			changes, err := a.known.Changes(ctx, after)
			if err != nil {
				return
			}
			after = changes.View.Revision()
			if changes.Nodes {
				select {
				case nodes <- struct{}{}:
				default:
				}
			}
		}
	}()
	defer func() { <-followed }()
	look := time.NewTicker(networkLook)
	defer look.Stop()
	lookedBad := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			text := ""
			if err := a.network.Look(); err != nil {
				text = err.Error()
			}
			if text != lookedBad && text != "" {
				a.log.Error("pod network", "error", text)
			}
			lookedBad = text
			continue
		case <-nodes:
		case <-a.told:
		}
		a.updateRoutes(a.known.View())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(routesEvery):
		}
	}
}

// updateRoutes gives the pod network what the controllers say of the nodes.
func (a *Agent) updateRoutes(v *feed.View) {
	a.mu.Lock()
	c := a.cluster
	a.mu.Unlock()
	var routes []*pb.NodeRoute
	var guard podnet.Guard
	switch {
	case c != nil && !c.RoutesInNetwork: // of a controller that does not know the feed
		routes, guard = c.Routes, a.guard(c)
	case !v.Synced():
		return
	case c != nil:
		routes, guard = slices.Collect(v.Nodes()), a.guard(c)
	default: // no controller has answered since the start; what is on the disk is the last that one said
		routes, guard = slices.Collect(v.Nodes()), a.network.Guard()
		if !guard.Pods.Known() {
			return
		}
	}
	var own []string
	var peers []podnet.Peer
	for _, r := range routes {
		if r.NodeName == a.cfg.Name {
			own = r.PodCidrs
			continue
		}
		addresses := r.MoreAddresses
		if r.NodeAddress != "" {
			addresses = append([]string{r.NodeAddress}, addresses...)
		}
		peers = append(peers, podnet.Peer{Name: r.NodeName, CIDRs: r.PodCidrs, Addresses: addresses})
	}
	if _, err := a.network.Update(own, peers, guard); err != nil {
		a.log.Error("pod network", "error", err)
	}
	a.tellServices()
	a.tellPolicies()
	a.tellHostPorts()
	a.kick()
}

// guard is what no route may touch, as far as it is known.
func (a *Agent) guard(c *pb.Cluster) podnet.Guard {
	keep := slices.Concat(a.cfg.Controllers, c.Controllers, a.podDNS().Servers, []string{a.cfg.KubernetesServiceIP})
	g := podnet.Guard{Keep: podnet.HostsOf(keep...)}
	services := c.ServiceNetworks
	g.Pods.Bits4, g.Pods.Bits6 = int(c.NodeBits4), int(c.NodeBits6)
	if len(c.PodNetworks) == 0 { // of a controller that knows of one network, or of none
		services = []string{c.ServiceNetwork}
		g.Pods.Bits4, g.Pods.Bits6 = int(c.NodeBits), int(c.NodeBits)
	}
	g.Pods.Networks, g.Services = podNetworks(c), prefixes(services)
	return g
}

// podNetworks are those of all pods, as far as the controller says.
func podNetworks(c *pb.Cluster) []netip.Prefix {
	if len(c.PodNetworks) == 0 { // it knows of one network, or of none
		return prefixes([]string{c.PodNetwork})
	}
	return prefixes(c.PodNetworks)
}

// prefixes are those of the texts that are networks.
func prefixes(text []string) (out []netip.Prefix) {
	for _, t := range text {
		if p, err := netip.ParsePrefix(t); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// networkEvent tells administrators what of the pod network does not work on this node.
func (a *Agent) networkEvent(reason, message string) {
	if a.stream == nil {
		return // it is in the log
	}
	a.nodeEvent(corev1.EventTypeWarning, reason, message)
}
