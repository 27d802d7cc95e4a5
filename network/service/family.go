package service

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	netutils "k8s.io/utils/net"
	"sigs.k8s.io/knftables"
)

// family is one of IPv4 and IPv6, and what nft calls its things.
type family struct {
	ip   corev1.IPFamily
	nft  knftables.Family // of the table; also the word before saddr and daddr
	addr string           // type of an address
}

var (
	ipv4 = family{ip: corev1.IPv4Protocol, nft: knftables.IPv4Family, addr: "ipv4_addr"}
	ipv6 = family{ip: corev1.IPv6Protocol, nft: knftables.IPv6Family, addr: "ipv6_addr"}
)

func (f family) v4() bool { return f.ip == corev1.IPv4Protocol }

// has says whether an address is of this family.
func (f family) has(ip netip.Addr) bool { return ip.IsValid() && ip.Is4() == f.v4() }

// addresses are those of a list that are of this family, each once.
func (f family) addresses(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		if ip, ok := parseIP(t); ok && f.has(ip) {
			out = appendNew(out, ip)
		}
	}
	return out
}

func appendNew[T comparable](list []T, one T) []T {
	if slices.Contains(list, one) {
		return list
	}
	return append(list, one)
}

// parseIP takes what the API takes, leading zeros included. Addresses that lead to no
// other machine are none.
func parseIP(text string) (netip.Addr, bool) {
	ip, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(text))
	ip = ip.Unmap()
	if !ok || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip.IsLinkLocalUnicast() {
		return netip.Addr{}, false
	}
	return ip, true
}

// prefixes are the networks of a list that are of this family, without those that
// are within others, in order.
func (f family) prefixes(all []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for i, p := range all {
		p = p.Masked()
		if !p.IsValid() || !f.has(p.Addr()) {
			continue
		}
		within := false
		for j, o := range all {
			o = o.Masked()
			if o.IsValid() && o.Overlaps(p) && (o.Bits() < p.Bits() || o == p && j < i) {
				within = true
			}
		}
		if !within {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// protocolOf is nft's word for a protocol; TCP where none is said.
func protocolOf(p *corev1.Protocol) string {
	if p == nil || *p == "" {
		return "tcp"
	}
	return strings.ToLower(string(*p))
}
