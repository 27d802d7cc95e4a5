package podnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks the routes that are ours in the kernel's table.
const routeProtocol = 157

// path is a range and how it is reached.
type path struct {
	dst  netip.Prefix
	node string
	via  netip.Addr // the next hop
	link int        // the device; that of the tunnel is filled in when it is there
	end  netip.Addr // the node's address that its packets are carried to; zero: none are
}

// paths says how each range is reached, and which is not.
func (n *Network) paths(hops []hop) (out []path, far error) {
	var errs []error
	links := map[netip.Addr]int{} // of next hops; -1: there is a gateway between
	for _, h := range hops {
		via, end := h.address(h.dst.Addr().Is4()), netip.Addr{}
		if n.tunnels() {
			end = h.address(n.cfg.NodeIPs[0].Is4())
		}
		if len(h.addresses) == 0 {
			continue // it has not said where it is
		}
		if via.IsValid() && n.cfg.Mode != Tunnel {
			link, seen := links[via]
			if !seen {
				index, ok, err := onSegment(via.AsSlice())
				if err != nil {
					errs = append(errs, fmt.Errorf("route to node %s: %w", h.node, err))
				}
				if link = index; !ok {
					link = -1
				}
				links[via] = link
			}
			if link >= 0 {
				out = append(out, path{dst: h.dst, node: h.node, via: via, link: link})
				continue
			}
		}
		switch {
		case end.IsValid():
			// As the network's own address it is nobody's.
			out = append(out, path{dst: h.dst, node: h.node, via: h.dst.Addr(), end: end})
		case n.tunnels():
			errs = append(errs, fmt.Errorf("pods of node %s, %s, cannot be reached from here: it has no address of the family of this node's first, %s, by which VXLAN goes; give both with --node-ip", h.node, h.dst, n.cfg.NodeIPs[0]))
		case via.IsValid():
			errs = append(errs, fmt.Errorf("pods of node %s, %s, cannot be reached from here: its address %s is on another network segment; give --pod-network-mode=auto for VXLAN", h.node, h.dst, via))
		default:
			errs = append(errs, fmt.Errorf("pods of node %s, %s, cannot be reached from here: it has no address of that family; give one with --node-ip, or --pod-network-mode=auto for VXLAN", h.node, h.dst))
		}
	}
	return out, summary(errs)
}

// onSegment says by which device an address is reached without a gateway, where packets
// for others can be sent to it.
func onSegment(ip net.IP) (link int, ok bool, err error) {
	routes, err := netlink.RouteGet(ip)
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	for _, r := range routes {
		if r.Gw != nil || r.Via != nil || len(r.MultiPath) > 0 || r.Type != unix.RTN_UNICAST {
			continue
		}
		dev, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			return 0, false, nil // it has just gone
		}
		// A tunnel of somebody's has no gateway either, and takes what is for its other
		// end alone.
		if dev.Attrs().Flags&net.FlagPointToPoint == 0 && dev.Attrs().RawFlags&unix.IFF_NOARP == 0 {
			return r.LinkIndex, true, nil
		}
	}
	return 0, false, nil
}

// routes makes the kernel's routes to the pods of peers, and removes those of
// ours that lead nowhere any more. Routes that are not ours stay as they are.
func (n *Network) routes(paths []path) error {
	all, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	var errs []error
	foreign, ours := map[string]bool{}, map[string][]netlink.Route{}
	for _, r := range all {
		switch {
		case r.Dst == nil:
		case r.Protocol == routeProtocol:
			ours[r.Dst.String()] = append(ours[r.Dst.String()], r)
		default:
			foreign[r.Dst.String()] = true
		}
	}
	for _, p := range paths {
		want := &netlink.Route{Dst: ipNet(p.dst), Gw: p.via.AsSlice(), LinkIndex: p.link, Protocol: routeProtocol}
		if p.end.IsValid() {
			want.Flags = int(netlink.FLAG_ONLINK)
		}
		key := want.Dst.String()
		if foreign[key] {
			errs = append(errs, fmt.Errorf("route %s via node %s: this machine has another route to there, which is not the agent's", key, p.node))
			continue
		}
		have := ours[key]
		ours[key] = slices.DeleteFunc(have, func(r netlink.Route) bool { return sameRoute(&r, want) })
		if len(ours[key]) < len(have) {
			continue // there is one such; the rest is removed
		}
		if err := netlink.RouteReplace(want); err != nil {
			errs = append(errs, fmt.Errorf("route %s via node %s (%s): %w", key, p.node, p.via, err))
			continue
		}
		if p.dst.Addr().Is4() {
			delete(ours, key) // what was there is replaced
		}
	}
	for _, rest := range ours {
		for _, r := range rest {
			errs = append(errs, remove(&r))
		}
	}
	return errors.Join(errs...)
}

func sameRoute(have, want *netlink.Route) bool {
	return have.LinkIndex == want.LinkIndex && have.Gw.Equal(want.Gw) && have.Flags&int(netlink.FLAG_ONLINK) == want.Flags && len(have.MultiPath) == 0
}

func ourRoutes() ([]netlink.Route, error) {
	have, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return have, nil
}

func remove(r *netlink.Route) error {
	if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route %s: %w", r.Dst, err)
	}
	return nil
}

// sweep removes routes of ours that may not be, such as an earlier version made, so
// that a node that they cut off comes back.
func (n *Network) sweep() error {
	addresses, err := n.ownAddresses()
	if err != nil {
		return err
	}
	have, err := ourRoutes()
	if err != nil {
		return err
	}
	var errs []error
	guard := n.guard
	guard.Keep = slices.Concat(guard.Keep, n.cfg.Keep)
	for _, r := range have {
		if r.Dst == nil {
			continue
		}
		if _, wrong := guard.checkRange(r.Dst.String(), addresses); wrong != nil {
			n.log.Warn("removing a route that must not be", "route", r.Dst.String(), "reason", wrong)
			errs = append(errs, remove(&r))
		}
	}
	return errors.Join(errs...)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
