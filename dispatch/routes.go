package dispatch

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"timonel/dispatch/network"
	"timonel/internal/podrange"
)

// Network says which addresses are whose, for what nodes are told of one another.
// The zero value tells them of no pod range.
type Network struct {
	// Pods are the networks of all pods, of which each node has a part.
	Pods podrange.Ranges
	// ForeignPods says that another pod network gives pods their addresses, of any part of
	// Pods, whichever node they are on.
	ForeignPods bool
	// Services are the networks of the Services' addresses.
	Services []netip.Prefix
	// Domain is that of the cluster's DNS names, DNS the addresses at which agents answer
	// for them; none: they do not.
	Domain string
	DNS    []netip.Addr
	// Ports are those that controllers have for each other and for gossip.
	Ports []uint16
	// Controllers lists the addresses of all controllers, alive or not. Nil: none.
	Controllers func() []netip.Addr
}

func (n Network) controllers() []netip.Addr {
	if n.Controllers == nil {
		return nil
	}
	return n.Controllers()
}

// CheckAddress says why no node may have an address.
func (n Network) CheckAddress(ip netip.Addr) error {
	switch {
	case !ip.IsValid() || ip.Zone() != "" || ip.Is4In6() || !ip.IsGlobalUnicast():
		return fmt.Errorf("%s is not a unicast address that others can reach", ip)
	case n.Pods.Contains(ip):
		return fmt.Errorf("%s is of the pods' network %s", ip, n.Pods)
	case slices.Contains(n.controllers(), ip):
		return fmt.Errorf("%s is a controller's address: give the agent another with --node-ip", ip)
	}
	for _, s := range n.Services {
		if s.Contains(ip) {
			return fmt.Errorf("%s is of the Services' network %s", ip, s)
		}
	}
	return nil
}

// CheckRange returns a pod range, or says why it cannot be a node's.
func (n Network) CheckRange(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not a network", text)
	case !n.Pods.Known():
		return p, fmt.Errorf("%s: no network of the pods is configured", p)
	case p != p.Masked():
		return p, fmt.Errorf("%s is not a network: %s is", p, p.Masked())
	}
	if err := n.Pods.CheckPart(p); err != nil {
		return p, err
	}
	for _, s := range n.Services {
		if s.Overlaps(p) {
			return p, fmt.Errorf("%s overlaps the Services' network %s", p, s)
		}
	}
	for _, c := range n.controllers() {
		if p.Contains(c) {
			return p, fmt.Errorf("%s holds the controller's address %s", p, c)
		}
	}
	return p, nil
}

// gossipAnnotation is where a Node says at which host:port its gossip is.
const gossipAnnotation = "timonel.io/gossip-address"

// GossipAddress is the host:port where a node's gossip is: at the port that it says, of
// an address that is its own. Empty: it does not say.
func GossipAddress(node *corev1.Node) string {
	host, port, err := net.SplitHostPort(node.Annotations[gossipAnnotation])
	if n, e := strconv.Atoi(port); err != nil || e != nil || n < 1 || n > 65535 {
		return ""
	}
	own := network.InternalIP(node)
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP && a.Address == host {
			own = host
		}
	}
	if own == "" {
		return ""
	}
	return net.JoinHostPort(own, port)
}

// CheckNodeAddress says why a node may not have an address: nobody's may it be but
// its own. It is for the API's admission.
func (d *Dispatcher) CheckNodeAddress(node string, ip netip.Addr) error {
	if err := d.config.Network.CheckAddress(ip); err != nil {
		return err
	}
	for other := range d.config.Objects.Snapshot().Nodes().All() {
		if other.Name == node {
			continue
		}
		for _, a := range other.Status.Addresses {
			if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
				continue
			}
			if taken, err := netip.ParseAddr(a.Address); err == nil && taken == ip {
				return fmt.Errorf("%s is the address of node %s", ip, other.Name)
			}
		}
	}
	return nil
}

// CheckPodAddress says why a pod of a node may not have an address: one on the network of
// its node has the node's own, any other one of the node's ranges. It is for the API's
// admission.
func (d *Dispatcher) CheckPodAddress(node string, hostNetwork bool, ip netip.Addr) error {
	n, ok := d.config.Objects.Snapshot().Nodes().Get("", node)
	switch {
	case !ok:
		return fmt.Errorf("there is no node %s", node)
	case hostNetwork:
		for _, a := range n.Status.Addresses {
			if own, err := netip.ParseAddr(a.Address); err == nil && own == ip {
				return nil
			}
		}
		return fmt.Errorf("it is not one of the addresses of node %s", node)
	case d.config.Network.ForeignPods:
		if d.config.Network.Pods.Contains(ip) {
			return nil
		}
		return fmt.Errorf("it is not of the pods' network %s", d.config.Network.Pods)
	}
	for _, r := range n.Spec.PodCIDRs {
		if p, err := d.config.Network.CheckRange(r); err == nil && p.Contains(ip) {
			return nil
		}
	}
	return fmt.Errorf("it is not of the ranges of node %s, %v (with a pod network that gives pods addresses of other ranges, "+
		"set --pod-addresses=cluster on all controllers)", node, n.Spec.PodCIDRs)
}
