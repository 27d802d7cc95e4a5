package policy

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"timonel/network/netlab"
)

// What a pod with raw sockets sends in another's name reaches nobody; that what it sends is
// good is seen without the rules.
func TestSpoofedFrames(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b := l.pod(2), l.pod(3)
		l.pod(4)
		macA, macB, macC := l.pods["uid-pod2"].MAC, l.pods["uid-pod3"].MAC, l.pods["uid-pod4"].MAC
		other := net.HardwareAddr{2, 0, 0, 0, 0, 9}
		for _, tc := range []struct {
			name  string
			frame []byte
			own   bool
		}{
			{"own IPv4", frame(macB, macA, 0x0800, udp4(addr(2), addr(3))), true},
			{"own IPv6", frame(macB, macA, 0x86dd, udp6(addr6(2), addr6(3))), true},
			{"own ARP", frame(macB, macA, 0x0806, arp(macA, addr(2), macB, addr(3))), true},
			{"own NDP", frame(macB, macA, 0x86dd, advertisement(addr6(2), addr6(3), addr6(2), macA)), true},
			{"another's IPv4", frame(macB, macA, 0x0800, udp4(addr(4), addr(3))), false},
			{"another's IPv6", frame(macB, macA, 0x86dd, udp6(addr6(4), addr6(3))), false},
			{"the node's IPv4", frame(macB, macA, 0x0800, udp4(addr(1), addr(3))), false},
			{"another's MAC", frame(macB, macC, 0x0800, udp4(addr(2), addr(3))), false},
			{"nobody's MAC", frame(macB, other, 0x0806, arp(other, addr(2), macB, addr(3))), false},
			{"another's ARP", frame(macB, macA, 0x0806, arp(macA, addr(4), macB, addr(3))), false},
			{"the gateway's ARP", frame(macB, macA, 0x0806, arp(macA, addr(1), macB, addr(3))), false},
			{"ARP with another's MAC", frame(macB, macA, 0x0806, arp(macC, addr(2), macB, addr(3))), false},
			{"another's NDP", frame(macB, macA, 0x86dd, advertisement(addr6(2), addr6(3), addr6(4), macA)), false},
			{"the gateway's NDP", frame(macB, macA, 0x86dd, advertisement(addr6(2), addr6(3), addr6(1), macA)), false},
			{"a router's", frame(macB, macA, 0x86dd, icmp6(addr6(2), addr6(3), 134, make([]byte, 12))), false},
			{"a VLAN", frame(macB, macA, 0x8100, append([]byte{0, 7, 8, 0}, udp4(addr(2), addr(3))...)), false},
			{"another protocol", frame(macB, macA, 0x88cc, make([]byte, 46)), false},
		} {
			l.Must(Remove(t.Context(), l.rules.cfg.Table))
			require.True(t, l.arrives(a, b, tc.frame, netlab.Patience), "%s, without rules", tc.name)
			l.start(Config{})
			l.pass()
			if tc.own {
				require.True(t, l.arrives(a, b, tc.frame, netlab.Patience), tc.name)
			} else {
				require.False(t, l.arrives(a, b, tc.frame, netlab.Impatience), tc.name)
			}
		}
	})
}

// arrives says whether a frame of one reaches the other.
func (l *lab) arrives(a, b *netlab.Host, frame []byte, d time.Duration) (seen bool) {
	l.t.Helper()
	end, open := -1, func(h *netlab.Host) (fd, index int) {
		h.Do(func() {
			link, err := netlink.LinkByName("p-" + h.Name)
			l.Must(err)
			index = link.Attrs().Index
			fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swap(unix.ETH_P_ALL)))
			l.Must(err)
			l.Must(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: swap(unix.ETH_P_ALL), Ifindex: index}))
		})
		return fd, index
	}
	in, _ := open(b)
	end = in
	defer unix.Close(end)
	l.Must(unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}))
	out, index := open(a)
	defer unix.Close(out)
	vlan := frame[12] == 0x81 // the tag is not in what is read
	buf := make([]byte, 2000)
	for until := time.Now().Add(d); time.Now().Before(until); {
		l.Must(unix.Sendto(out, frame, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6, Addr: [8]byte(append(slices.Clone(frame[:6]), 0, 0))}))
		for {
			n, _, err := unix.Recvfrom(in, buf, 0)
			if err != nil {
				break
			}
			want := frame
			if vlan {
				want = slices.Concat(frame[:12], frame[16:])
			}
			if n >= len(want) && slices.Equal(buf[:len(want)], want) {
				return true
			}
		}
	}
	return false
}

func swap(n uint16) uint16 { return n<<8 | n>>8 }

func frame(to, from net.HardwareAddr, kind uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(slices.Concat(to, from), kind), payload...)
}

func sum(parts ...[]byte) uint16 {
	var n uint32
	for _, p := range parts {
		for i := 0; i+1 < len(p); i += 2 {
			n += uint32(binary.BigEndian.Uint16(p[i:]))
		}
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return ^uint16(n)
}

// datagram is one of UDP, of which a checksum is not looked at on its way.
func datagram() []byte {
	return append([]byte{0x30, 0x39, 0x1f, 0x90, 0, 16, 0, 0}, "spoofed!"...)
}

func udp4(from, to netip.Addr) []byte {
	d := datagram()
	head := slices.Concat([]byte{0x45, 0, 0, byte(20 + len(d)), 0, 1, 0, 0, 64, 17, 0, 0}, from.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(head[10:], sum(head))
	return append(head, d...)
}

func ip6(from, to netip.Addr, protocol byte, payload []byte) []byte {
	return slices.Concat([]byte{0x60, 0, 0, 0, 0, byte(len(payload)), protocol, 255}, from.AsSlice(), to.AsSlice(), payload)
}

func udp6(from, to netip.Addr) []byte {
	d := datagram()
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, 0, 0, byte(len(d)), 0, 0, 0, 17})
	binary.BigEndian.PutUint16(d[6:], sum(pseudo, d))
	return ip6(from, to, 17, d)
}

func icmp6(from, to netip.Addr, kind byte, rest []byte) []byte {
	p := append([]byte{kind, 0, 0, 0}, rest...)
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, 0, 0, byte(len(p)), 0, 0, 0, 58})
	binary.BigEndian.PutUint16(p[2:], sum(pseudo, p))
	return ip6(from, to, 58, p)
}

func advertisement(from, to, target netip.Addr, mac net.HardwareAddr) []byte {
	return icmp6(from, to, 136, slices.Concat([]byte{0x60, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, mac))
}

func arp(sender net.HardwareAddr, ip netip.Addr, target net.HardwareAddr, to netip.Addr) []byte {
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 2}, sender, ip.AsSlice(), target, to.AsSlice())
}
