package dns

import (
	"net/netip"
	"slices"
	"strconv"

	"timonel/network/feed"
)

// reverseAddress is the address that the labels before in-addr.arpa or ip6.arpa name.
func reverseAddress(labels []string, six bool) (netip.Addr, bool) {
	if !six {
		var b [4]byte
		if len(labels) != 4 {
			return netip.Addr{}, false
		}
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 10, 8)
			if err != nil || len(l) > 1 && l[0] == '0' {
				return netip.Addr{}, false
			}
			b[3-i] = byte(n)
		}
		return netip.AddrFrom4(b), true
	}
	var b [16]byte
	if len(labels) != 32 {
		return netip.Addr{}, false
	}
	for i, l := range labels {
		n, err := strconv.ParseUint(l, 16, 4)
		if err != nil || len(l) != 1 {
			return netip.Addr{}, false
		}
		b[15-i/2] |= byte(n) << (4 * (i % 2))
	}
	return netip.AddrFrom16(b), true
}

// pointers are the names of an address: the Service's whose own it is, or those of
// the endpoints with it.
func (z *zone) pointers(v *feed.View, ip netip.Addr) (out []name) {
	z.mu.RLock()
	owners := z.owners[ip.As16()] // a list that is never changed
	z.mu.RUnlock()
	var own *feed.Name // there is one, but for a moment while an address changes hands
	for o := owners; o != nil; o = o.next {
		if svc := v.Service(o.service); svc != nil && slices.Contains(clusterIPs(svc), ip) {
			if own == nil || o.service.String() < own.String() {
				own = &o.service
			}
		}
	}
	if own != nil {
		return []name{z.name(own.Name, own.Namespace, "svc")}
	}
	for o := owners; o != nil; o = o.next {
		svc := v.Service(o.service)
		if svc == nil {
			continue
		}
		seen := map[string]bool{}
		for e := range endpoints(v, o.service, svc) {
			if e.ip == ip && !seen[e.host()] {
				seen[e.host()] = true
				out = append(out, z.name(e.host(), o.service.Name, o.service.Namespace, "svc"))
			}
		}
	}
	return out
}
