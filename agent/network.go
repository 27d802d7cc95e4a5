package agent

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"timonel/agent/podnet"
	"timonel/network/feed"
	pb "timonel/proto/timonel/v1"
)

// routesEvery is how often routes are made anew at most: while many nodes change, their
// changes are merged.
const routesEvery = 200 * time.Millisecond

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
	for {
		select {
		case <-ctx.Done():
			return nil
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
		if !guard.Pods.IsValid() {
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
		peers = append(peers, podnet.Peer{Name: r.NodeName, CIDRs: r.PodCidrs, Address: r.NodeAddress})
	}
	if _, err := a.network.Update(own, peers, guard); err != nil {
		a.log.Error("pod network", "error", err)
	}
	a.tellServices()
	a.kick()
}

// guard is what no route may touch, as far as it is known.
func (a *Agent) guard(c *pb.Cluster) podnet.Guard {
	keep := slices.Concat(a.cfg.Controllers, c.Controllers, a.podDNS().Servers, []string{a.cfg.KubernetesServiceIP})
	g := podnet.Guard{NodeBits: int(c.NodeBits), Keep: podnet.HostsOf(keep...)}
	g.Pods, _ = netip.ParsePrefix(c.PodNetwork) // an older controller does not say
	g.Services, _ = netip.ParsePrefix(c.ServiceNetwork)
	return g
}
