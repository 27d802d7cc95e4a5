package address

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// link is a network device of this machine, as far as one family of addresses on it goes.
type link struct {
	device net.Interface
	mac    mac
	v4     bool
	conn   *packet.Conn
	groups *ipv6.PacketConn // what holds memberships of multicast groups; nil for IPv4
	joined map[netip.Addr]int
	up     bool
}

// frame is one that a link received, or why it receives none any more.
type frame struct {
	link *link
	raw  []byte
	err  error
}

// deviceFor is the device on whose segment an address is: that with the smallest network
// that holds it, else that of the node's own address.
func deviceFor(ip netip.Addr, nodeIPs []netip.Addr, skip []string) (net.Interface, error) {
	devices, err := net.Interfaces()
	if err != nil {
		return net.Interface{}, fmt.Errorf("list network devices: %w", err)
	}
	best, bits, own := -1, -1, -1
	for i, d := range devices {
		if d.Flags&net.FlagLoopback != 0 || d.Flags&net.FlagUp == 0 || len(d.HardwareAddr) != len(mac{}) || slices.Contains(skip, d.Name) {
			continue
		}
		addrs, err := d.Addrs()
		if err != nil {
			continue // it is gone
		}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			has, _ := netip.AddrFromSlice(n.IP)
			has = has.Unmap()
			ones, _ := n.Mask.Size()
			if p, err := has.Prefix(ones); err == nil && p.Contains(ip) && ones > bits {
				best, bits = i, ones
			}
			if slices.Contains(nodeIPs, has) && (own < 0 || has.Is4() == ip.Is4()) {
				own = i
			}
		}
	}
	if best < 0 {
		best = own
	}
	if best < 0 {
		return net.Interface{}, fmt.Errorf("no Ethernet device of this machine is on the segment of %s, or has the node's own address", ip)
	}
	return devices[best], nil
}

// neighbours lets through what is for us of IPv6: solicitations and advertisements.
var neighbours = []bpf.Instruction{
	bpf.LoadAbsolute{Off: headerBytes + 6, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: icmpv6, SkipTrue: 3},
	bpf.LoadAbsolute{Off: headerBytes + ipv6Bytes, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(ipv6.ICMPTypeNeighborSolicitation), SkipTrue: 2},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(ipv6.ICMPTypeNeighborAdvertisement), SkipTrue: 1},
	bpf.RetConstant{Val: 0},
	bpf.RetConstant{Val: 1 << 16},
}

func openLink(device net.Interface, v4 bool) (*link, error) {
	l := &link{device: device, mac: mac(device.HardwareAddr), v4: v4, up: true, joined: map[netip.Addr]int{}}
	protocol, config := unix.ETH_P_ARP, &packet.Config{}
	if !v4 {
		protocol = unix.ETH_P_IPV6
		var err error
		if config.Filter, err = bpf.Assemble(neighbours); err != nil {
			return nil, fmt.Errorf("filter of neighbours: %w", err)
		}
		socket, err := net.ListenPacket("udp6", "[::]:0")
		if err != nil {
			return nil, fmt.Errorf("open a socket for multicast groups: %w", err)
		}
		l.groups = ipv6.NewPacketConn(socket)
	}
	conn, err := packet.Listen(&device, packet.Raw, protocol, config)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a packet socket on %s: %w", device.Name, err), l.close())
	}
	l.conn = conn
	return l, nil
}

func (l *link) close() (err error) {
	if l.conn != nil {
		err = l.conn.Close()
	}
	if l.groups != nil {
		err = errors.Join(err, l.groups.Close())
	}
	return err
}

// join has questions after an address come to this machine; leave undoes it.
func (l *link) join(ip netip.Addr) error {
	if l.v4 {
		return nil
	}
	group, err := ndp.SolicitedNodeMulticast(ip)
	if err != nil {
		return err
	}
	if l.joined[group]++; l.joined[group] == 1 {
		if err := l.groups.JoinGroup(&l.device, &net.UDPAddr{IP: group.AsSlice()}); err != nil {
			return fmt.Errorf("join the multicast group %s on %s: %w", group, l.device.Name, err)
		}
	}
	return nil
}

func (l *link) leave(ip netip.Addr) {
	if l.v4 {
		return
	}
	group, err := ndp.SolicitedNodeMulticast(ip)
	if err != nil {
		return
	}
	if l.joined[group]--; l.joined[group] == 0 {
		delete(l.joined, group)
		_ = l.groups.LeaveGroup(&l.device, &net.UDPAddr{IP: group.AsSlice()}) // it ends with the socket at the latest
	}
}

// look says whether the link is there, and whether it went down or came up.
func (l *link) look() (changed bool, err error) {
	now, err := netlink.LinkByIndex(l.device.Index)
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", l.device.Name, err)
	}
	attrs := now.Attrs()
	if len(attrs.HardwareAddr) != len(l.mac) || mac(attrs.HardwareAddr) != l.mac {
		return false, fmt.Errorf("%s has another hardware address now", l.device.Name)
	}
	up := attrs.RawFlags&unix.IFF_UP != 0 && attrs.RawFlags&unix.IFF_RUNNING != 0
	changed, l.up = up != l.up, up
	return changed, nil
}

// read passes on what comes until the link is closed or fails.
func (l *link) read(ctx context.Context, to chan<- frame, running *sync.WaitGroup) {
	running.Go(func() {
		buffer := make([]byte, 4096)
		for {
			n, _, err := l.conn.ReadFrom(buffer)
			f := frame{link: l, err: err}
			if err == nil {
				f.raw = append([]byte(nil), buffer[:n]...)
			}
			select {
			case to <- f:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
}

// send sends a message of this machine.
func (l *link) send(o out) error {
	o.from = l.mac
	to := o.to
	if to == (mac{}) {
		to = broadcast
	}
	var errs []error
	for _, raw := range render(o.message, to) {
		if _, err := l.conn.WriteTo(raw, &packet.Addr{HardwareAddr: raw[:6]}); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
