package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"timonel/internal/podrange"
)

// networks is a flag of networks with commas between. Given again it replaces what was
// given before, as one of a single network did: lists of flags have an override at the end.
type networks []string

// Set implements pflag.Value.
func (n *networks) Set(text string) error {
	*n = strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
	return nil
}

func (n *networks) String() string { return strings.Join(*n, ",") }

// Type implements pflag.Value.
func (n *networks) Type() string { return "networks" }

// Values of --pod-addresses.
const podsOfNode, podsOfCluster = "node", "cluster"

// pods are the networks of --cluster-cidr, and what of one is a node's.
func (c config) pods() podrange.Ranges {
	r, _ := podrange.Parse(c.clusterCIDR) // checked by validate
	r.Bits4, r.Bits6 = c.nodeBits4, c.nodeBits6
	return r
}

// services are the networks of --service-cidr.
func (c config) services() []netip.Prefix {
	r, _ := podrange.Parse(c.serviceCIDR) // checked by validate
	return r.Networks
}

// validateNetworks says what is wrong with the networks of pods and of Services.
func (c *config) validateNetworks(bad func(flag, format string, args ...any)) {
	if c.podAddresses != podsOfNode && c.podAddresses != podsOfCluster {
		bad("pod-addresses", "%q is not %s or %s", c.podAddresses, podsOfNode, podsOfCluster)
	}
	pods, err := podrange.Parse(c.clusterCIDR)
	if err != nil {
		bad("cluster-cidr", "%v", err)
		return
	}
	pods.Bits4, pods.Bits6 = c.nodeBits4, c.nodeBits6
	if err := pods.Validate(); err != nil {
		bad("cluster-cidr", "%v (--node-cidr-mask-size-ipv4 and --node-cidr-mask-size-ipv6 say how long the prefix of a node's part is)", err)
		return
	}
	services, err := podrange.Parse(c.serviceCIDR)
	switch {
	case err != nil:
		bad("service-cidr", "%v", err)
		return
	case len(services.Networks) == 0 || len(services.Networks) > 2 || len(services.Families()) != len(services.Networks):
		bad("service-cidr", "%s: give one network, or one of IPv4 and one of IPv6", services)
		return
	}
	own, link := c.ownNetworks()
	for _, n := range services.Networks {
		if n.Addr().BitLen()-n.Bits() > mostServiceBits {
			bad("service-cidr", "%s has more addresses than 2^%d: give a longer prefix", n, mostServiceBits)
		}
		for _, p := range pods.Networks {
			if p.Overlaps(n) {
				bad("service-cidr", "%s overlaps %s of --cluster-cidr: Services and pods need networks of their own", n, p)
			}
		}
	}
	for flag, networks := range map[string][]netip.Prefix{"cluster-cidr": pods.Networks, "service-cidr": services.Networks} {
		for _, n := range networks {
			for _, o := range own {
				if n.Overlaps(o) {
					bad(flag, "%s overlaps %s, which is this machine's own (%s): give a network that nobody uses yet", n, o, link)
				}
			}
		}
	}
}

// mostServiceBits is how many bits of a Service's address may differ, as in Kubernetes.
const mostServiceBits = 64

// ownNetworks are those that this machine is reached in by others. That of an agent's pods,
// on the same machine, is not among them.
func (c *config) ownNetworks() (out []netip.Prefix, link string) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, "" // nothing to compare with
	}
	for _, l := range links {
		addresses, err := l.Addrs()
		if err != nil {
			continue
		}
		var here []netip.Prefix
		is := false
		for _, a := range addresses {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			addr, _ := netip.AddrFromSlice(n.IP)
			ones, _ := n.Mask.Size()
			if p, err := addr.Unmap().Prefix(ones); err == nil && !addr.Unmap().IsLoopback() {
				here = append(here, p)
				is = is || n.IP.Equal(net.ParseIP(c.bindIP)) || n.IP.Equal(net.ParseIP(c.advertiseIP))
			}
		}
		if is {
			return here, fmt.Sprintf("of device %s", l.Name)
		}
	}
	return nil, ""
}

// dnsAddresses are the cluster's DNS servers': the tenth address of the Services'
// first network, where kubeadm's is; none in a network that has no tenth.
func (c config) dnsAddresses() []netip.Addr {
	first := c.services()[0]
	ip := first.Addr()
	for range 10 {
		ip = ip.Next()
	}
	if !first.Contains(ip.Next()) { // it would be the last, which is nobody's
		return nil
	}
	return []netip.Addr{ip}
}
