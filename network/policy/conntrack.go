package policy

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cut forgets the connections of addresses that new pods have: they are of whoever had an
// address before, and would be let through without a question.
func (r *Rules) cut(force map[string]inForce) error {
	r.mu.Lock()
	old := r.force
	r.mu.Unlock()
	addresses := map[netip.Addr]struct{}{}
	for uid, f := range force {
		if _, had := old[uid]; had {
			continue
		}
		for _, ip := range f.pod.Addresses {
			addresses[ip] = struct{}{}
		}
	}
	if len(addresses) == 0 {
		return nil
	}
	for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, flowsOf(addresses)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("forget the connections that the addresses of new pods had before: %w", err)
		}
	}
	return nil
}

type flowsOf map[netip.Addr]struct{}

// MatchConntrackFlow implements [netlink.CustomConntrackFilter].
func (f flowsOf) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	for _, ip := range [][]byte{flow.Forward.SrcIP, flow.Forward.DstIP, flow.Reverse.SrcIP, flow.Reverse.DstIP} {
		if addr, ok := netip.AddrFromSlice(ip); ok {
			if _, is := f[addr.Unmap()]; is {
				return true
			}
		}
	}
	return false
}
