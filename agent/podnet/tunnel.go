package podnet

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// VXLAN is where the packets are that are carried to nodes of other segments. All nodes
// must have the same.
type VXLAN struct {
	// Device is its name. Default "timonel-vxlan".
	Device string
	// ID is the network's number (VNI). Default 157.
	ID int
	// Port is the UDP port. Default 4789, as assigned.
	Port int
}

// Defaults of VXLAN.
const (
	DefaultVXLANDevice = "timonel-vxlan"
	DefaultVXLANID     = 157
	DefaultVXLANPort   = 4789
)

func (v VXLAN) withDefaults() VXLAN {
	if v.Device == "" {
		v.Device = DefaultVXLANDevice
	}
	if v.ID == 0 {
		v.ID = DefaultVXLANID
	}
	if v.Port == 0 {
		v.Port = DefaultVXLANPort
	}
	return v
}

// What VXLAN puts before a packet: the outer IP header, UDP's, its own and the inner
// Ethernet header.
const (
	overhead4 = 50
	overhead6 = 70
)

func (n *Network) overhead() int {
	if len(n.cfg.NodeIPs) > 0 && n.cfg.NodeIPs[0].Is6() {
		return overhead6
	}
	return overhead4
}

// tunnels says whether this node takes part in VXLAN. Where nodes share a segment it does
// so too: the other one may see that differently, and then sends by VXLAN what comes back
// by a route.
func (n *Network) tunnels() bool { return n.cfg.Mode != Direct && len(n.cfg.NodeIPs) > 0 }

// underlay is the MTU of the device with this node's address, by which the others are
// reached; 0: it is not known.
func (n *Network) underlay() (mtu int, err error) {
	if len(n.cfg.NodeIPs) == 0 {
		return 0, nil
	}
	links, err := net.Interfaces()
	if err != nil {
		return 0, fmt.Errorf("list network devices: %w", err)
	}
	for _, link := range links {
		addresses, err := link.Addrs()
		if err != nil {
			continue // it has just gone
		}
		for _, a := range addresses {
			if ip, ok := a.(*net.IPNet); ok && ip.IP.Equal(n.cfg.NodeIPs[0].AsSlice()) {
				return link.MTU, nil
			}
		}
	}
	return 0, fmt.Errorf("no network device has this node's address %s (--node-ip) any more: restart the agent with the address that it has now", n.cfg.NodeIPs[0])
}

// hardware is the address of the tunnel's end at a node: made of the node's own, so that
// nobody has to be told.
func hardware(node netip.Addr) net.HardwareAddr {
	if node.Is4() {
		b := node.As4()
		return net.HardwareAddr{0x02, 0x76, b[0], b[1], b[2], b[3]}
	}
	sum := sha256.Sum256(node.AsSlice())
	return net.HardwareAddr{0x06, sum[0], sum[1], sum[2], sum[3], sum[4]}
}

// tunnel makes the device and, for each path that leads through it, the entries that say
// where to. It fills in the paths' device. What is there too much stays until routes
// lead elsewhere (sweepTunnel).
func (n *Network) tunnel(ranges []netip.Prefix, paths []path, mtu int) error {
	link, err := n.tunnelDevice(mtu)
	if err != nil {
		return err
	}
	index := link.Attrs().Index
	if err := n.tunnelAddresses(link, ranges); err != nil {
		return err
	}
	have, err := neighbours(index)
	if err != nil {
		return err
	}
	for i, p := range paths {
		if !p.end.IsValid() {
			continue
		}
		paths[i].link = index
		for _, want := range p.entries(index) {
			if have[entryKey(&want)] {
				continue
			}
			if err := netlink.NeighSet(&want); err != nil {
				paths[i].link = 0
				return fmt.Errorf("%s: entry of node %s (%s): %w", link.Attrs().Name, p.node, p.end, err)
			}
		}
	}
	return nil
}

// tunnelDevice makes the device as it should be, or returns the one that is so already.
func (n *Network) tunnelDevice(mtu int) (netlink.Link, error) {
	v, local := n.cfg.VXLAN, n.cfg.NodeIPs[0]
	want := &netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: v.Device, MTU: max(mtu, 0), HardwareAddr: hardware(local), TxQLen: -1},
		VxlanId:   v.ID, Port: v.Port, SrcAddr: local.AsSlice(), Learning: false,
	}
	link, err := netlink.LinkByName(v.Device)
	if err == nil && !sameTunnel(link, want) {
		if link.Type() != "vxlan" {
			return nil, fmt.Errorf("%s exists and is a %s, not the agent's VXLAN: rename or remove it", v.Device, link.Type())
		}
		if err := netlink.LinkDel(link); err != nil {
			return nil, fmt.Errorf("remove %s, which has other settings: %w", v.Device, err)
		}
		link = nil
	} else if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, fmt.Errorf("find %s: %w", v.Device, err)
	}
	if err != nil || link == nil {
		if err := netlink.LinkAdd(want); err != nil {
			if errors.Is(err, unix.EEXIST) {
				return nil, fmt.Errorf("make %s: another VXLAN of this machine has number %d at port %d: give another --pod-network-vxlan-id or --pod-network-vxlan-port to all nodes", v.Device, v.ID, v.Port)
			}
			return nil, fmt.Errorf("make %s (does the kernel have the module vxlan?): %w", v.Device, err)
		}
		if link, err = netlink.LinkByName(v.Device); err != nil {
			return nil, fmt.Errorf("find %s: %w", v.Device, err)
		}
		// Nobody is asked for there, so nothing must be said or listened for.
		for path, value := range map[string]string{
			"ipv6/conf/" + v.Device + "/accept_ra": "0", "ipv6/conf/" + v.Device + "/addr_gen_mode": "1", "ipv6/conf/" + v.Device + "/accept_dad": "0",
			// The other node may send by VXLAN what is answered by a route.
			"ipv4/conf/" + v.Device + "/rp_filter": "2",
		} {
			if err := setSysctl(path, value); err != nil {
				return nil, fmt.Errorf("set %s: %w", path, err)
			}
		}
	}
	if mtu > 0 && link.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return nil, fmt.Errorf("set the MTU of %s to %d: %w", v.Device, mtu, err)
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("UDP port %d, which VXLAN needs, is used by another process of this machine: end it, or give another --pod-network-vxlan-port to all nodes. Until then pods of nodes of other segments are not reached", v.Port)
		} else if err != nil {
			return nil, fmt.Errorf("set %s up: %w", v.Device, err)
		}
	}
	return link, nil
}

func sameTunnel(link netlink.Link, want *netlink.Vxlan) bool {
	have, ok := link.(*netlink.Vxlan)
	return ok && have.VxlanId == want.VxlanId && have.Port == want.Port && have.SrcAddr.Equal(want.SrcAddr) &&
		!have.Learning && have.HardwareAddr.String() == want.HardwareAddr.String()
}

// tunnelAddresses gives the device the address of each of the node's ranges that no pod
// gets, the first: what the node itself sends to other nodes' pods comes from there, and
// the answers find back.
func (n *Network) tunnelAddresses(link netlink.Link, ranges []netip.Prefix) error {
	want := map[string]*netlink.Addr{}
	for _, p := range ranges {
		a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(p.Addr(), p.Addr().BitLen())), Flags: unix.IFA_F_NODAD}
		want[a.IPNet.String()] = a
	}
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range have {
		if want[a.IPNet.String()] != nil {
			delete(want, a.IPNet.String())
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take %s from %s: %w", a.IPNet, link.Attrs().Name, err)
		}
	}
	for _, a := range want {
		if err := netlink.AddrReplace(link, a); err != nil {
			return fmt.Errorf("give %s to %s: %w", a.IPNet, link.Attrs().Name, err)
		}
	}
	return nil
}

// entries are what the kernel must know of a path: the hardware address of its next hop,
// and at which node that is.
func (p path) entries(link int) []netlink.Neigh {
	family := netlink.FAMILY_V4
	if p.via.Is6() {
		family = netlink.FAMILY_V6
	}
	mac := hardware(p.end)
	return []netlink.Neigh{
		{LinkIndex: link, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: p.end.AsSlice(), HardwareAddr: mac},
		{LinkIndex: link, Family: family, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: p.via.AsSlice(), HardwareAddr: mac},
	}
}

func entryKey(n *netlink.Neigh) string {
	return fmt.Sprintf("%d %s %s", n.Family, n.IP, n.HardwareAddr)
}

// neighbours are the entries of the tunnel's device.
func neighbours(link int) (map[string]bool, error) {
	out := map[string]bool{}
	err := eachNeighbour(link, func(e *netlink.Neigh) error {
		out[entryKey(e)] = e.State&netlink.NUD_PERMANENT != 0
		return nil
	})
	return out, err
}

func eachNeighbour(link int, f func(*netlink.Neigh) error) error {
	for _, family := range []int{unix.AF_BRIDGE, netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.NeighList(link, family)
		if err != nil {
			return fmt.Errorf("list the tunnel's neighbours: %w", err)
		}
		for _, e := range list {
			e.Family = family
			if err := f(&e); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweepTunnel removes the entries of the tunnel's device that no path needs.
func (n *Network) sweepTunnel(paths []path) error {
	link, err := netlink.LinkByName(n.cfg.VXLAN.Device)
	if err != nil {
		return nil // tunnel said why
	}
	index := link.Attrs().Index
	want := map[string]bool{}
	for _, p := range paths {
		if p.end.IsValid() {
			for _, e := range p.entries(index) {
				want[entryKey(&e)] = true
			}
		}
	}
	return eachNeighbour(index, func(e *netlink.Neigh) error {
		if want[entryKey(e)] || e.State&netlink.NUD_NOARP != 0 && e.Family != unix.AF_BRIDGE {
			return nil
		}
		if err := netlink.NeighDel(e); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("%s: remove the entry of %s: %w", link.Attrs().Name, e.IP, err)
		}
		return nil
	})
}

// removeTunnel removes the device, and with it all that is of it.
func (n *Network) removeTunnel() error {
	link, err := netlink.LinkByName(n.cfg.VXLAN.Device)
	if err != nil || link.Type() != "vxlan" {
		return nil
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove %s: %w", link.Attrs().Name, err)
	}
	return nil
}
