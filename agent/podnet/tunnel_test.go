package podnet

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/network/netlab"
)

// two segments with a router between: a and b in one, c in the other.
func twoSegments(t *testing.T) (l *lab, a, b, c *machine) {
	l = newLab(t)
	a, b, c = l.machine("a"), l.machine("b"), l.machine("c")
	l.join(a, "seg1", "10.9.0.1/24", 1500, "10.9.0.101/24")
	l.join(b, "seg1", "10.9.0.1/24", 1500, "10.9.0.102/24")
	l.join(c, "seg2", "10.9.1.1/24", 1500, "10.9.1.103/24")
	a.node(Auto, "10.9.0.101", "10.244.1.0/24", "fd00:244:0:1::/64")
	b.node(Auto, "10.9.0.102", "10.244.2.0/24", "fd00:244:0:2::/64")
	c.node(Auto, "10.9.1.103", "10.244.3.0/24", "fd00:244:0:3::/64")
	return l, a, b, c
}

// Pods reach the pods of nodes of the same segment by routes and those of others by VXLAN,
// in both families where nodes have one, each by its own address, with packets as large as
// their device takes. Nodes reach them too.
func TestPodsOfTwoSegments(t *testing.T) {
	t.Parallel()
	_, a, b, c := twoSegments(t)
	require.NoError(t, a.update(b, c))
	require.NoError(t, b.update(a, c))
	require.NoError(t, c.update(a, b))
	routes := a.run("ip route; ip -6 route")
	require.Contains(t, routes, "10.244.2.0/24 via 10.9.0.102 dev eth0")
	require.Contains(t, routes, "10.244.3.0/24 via 10.244.3.0 dev timonel-vxlan")
	require.Contains(t, routes, "fd00:244:0:2::/64 via fd00:244:0:2:: dev timonel-vxlan", "there is no IPv6 between the nodes")

	pods, ips := map[*machine]*machine{}, map[*machine][]netip.Addr{}
	for _, n := range []*machine{a, b, c} {
		pods[n], ips[n] = n.pod("pod-" + n.name)
		require.Len(t, ips[n], 2)
		for _, ip := range ips[n] {
			pods[n].answer(ip)
		}
		require.Contains(t, pods[n].run("ip link show eth0"), "mtu 1450")
	}
	for _, from := range []*machine{a, b, c} {
		for _, to := range []*machine{a, b, c} {
			if from == to {
				continue
			}
			for i, header := range []int{20 + 8, 40 + 8} {
				pods[from].reaches(ips[to][i], 64, ips[from][i])
				pods[from].reaches(ips[to][i], 1450-header, ips[from][i])
				_, err := pods[from].ask(ips[to][i], 1450-header+1, 3)
				require.ErrorIs(t, err, unix.EMSGSIZE)
			}
		}
	}
	a.reaches(ips[c][0], 64, netip.MustParseAddr("10.244.1.0"))
	a.reaches(ips[c][1], 64, netip.MustParseAddr("fd00:244:0:1::"))
	a.reaches(ips[b][0], 64, netip.MustParseAddr("10.9.0.101"))

	// What leaves the cluster has the node's address, but for networks that are said.
	a.l.router.answer(netip.MustParseAddr("10.9.1.1"))
	pods[a].reaches(netip.MustParseAddr("10.9.1.1"), 64, netip.MustParseAddr("10.9.0.101"))
	a.l.router.run("ip route add 10.244.1.0/24 via 10.9.0.101")
	a.start(Config{NodeIPs: a.net.cfg.NodeIPs, KeepSource: []netip.Prefix{netip.MustParsePrefix("10.9.1.0/28")}})
	require.NoError(t, a.update(b, c))
	pods[a].reaches(netip.MustParseAddr("10.9.1.1"), 64, ips[a][0])
}

// Nodes of one segment need no VXLAN: pods have all of the segment's packets.
func TestPodsOfOneSegmentHaveItsMTU(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.machine("a"), l.machine("b")
	l.join(a, "seg1", "10.9.0.1/24", 8000, "10.9.0.101/24")
	l.join(b, "seg1", "10.9.0.1/24", 8000, "10.9.0.102/24")
	a.node(Auto, "10.9.0.101", "10.244.1.0/24")
	b.node(Direct, "10.9.0.102", "10.244.2.0/24")
	require.NoError(t, a.update(b))
	require.NoError(t, b.update(a))
	pa, _ := a.pod("pod-a")
	pb, ips := b.pod("pod-b")
	pb.answer(ips[0])
	require.Contains(t, pa.run("ip link show eth0"), "mtu 8000")
	_, err := pa.ask(ips[0], 8000-28, 50)
	require.NoError(t, err)
	require.NotContains(t, b.run("ip link"), "timonel-vxlan")

	a.start(Config{NodeIPs: a.net.cfg.NodeIPs, MTU: 1300})
	require.NoError(t, a.update(b))
	small, _ := a.pod("small")
	require.Contains(t, small.run("ip link show eth0"), "mtu 1300")
}

// One node sends by VXLAN and the other answers by a route.
func TestNodesThatSeeTheirSegmentDifferently(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.machine("a"), l.machine("b")
	l.join(a, "seg1", "10.9.0.1/24", 1500, "10.9.0.101/24")
	l.join(b, "seg1", "10.9.0.1/24", 1500, "10.9.0.102/24")
	a.node(Tunnel, "10.9.0.101", "10.244.1.0/24")
	b.node(Auto, "10.9.0.102", "10.244.2.0/24")
	require.NoError(t, a.update(b))
	require.NoError(t, b.update(a))
	require.Contains(t, a.run("ip route"), "10.244.2.0/24 via 10.244.2.0 dev timonel-vxlan")
	require.Contains(t, b.run("ip route"), "10.244.1.0/24 via 10.9.0.101 dev eth0")
	pa, ipa := a.pod("pod-a")
	pb, ipb := b.pod("pod-b")
	pa.answer(ipa[0])
	pb.answer(ipb[0])
	pa.reaches(ipb[0], 64, ipa[0])
	pb.reaches(ipa[0], 64, ipb[0])
}

// forge is a VXLAN packet with a UDP packet in it.
func forge(to *machine, number int, src, dst netip.Addr) []byte {
	udp := make([]byte, 8)
	binary.BigEndian.PutUint16(udp[0:], 4000)
	binary.BigEndian.PutUint16(udp[2:], 9)
	binary.BigEndian.PutUint16(udp[4:], 8) // no checksum
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(udp)))
	copy(ip[12:], src.AsSlice())
	copy(ip[16:], dst.AsSlice())
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	mac := hardware(netip.MustParseAddr(to.peer.Addresses[0]))
	frame := slices.Concat([]byte(mac), net.HardwareAddr{2, 2, 2, 2, 2, 2}, []byte{8, 0}, ip, udp)
	head := []byte{8, 0, 0, 0, byte(number >> 16), byte(number >> 8), byte(number), 0}
	return slices.Concat(head, frame)
}

// From VXLAN a node takes what another node sent, from a pod of another to one of its own.
func TestVXLANIsTakenFromNodesAlone(t *testing.T) {
	t.Parallel()
	l, a, b, c := twoSegments(t)
	stranger := l.machine("stranger")
	l.join(stranger, "seg1", "10.9.0.1/24", 1500, "10.9.0.66/24")
	require.NoError(t, a.update(b, c))
	pa, ipa := a.pod("pod-a")
	var heard *net.UDPConn
	var err error
	pa.in(func() { heard, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(ipa[0], 9))) })
	require.NoError(t, err)
	defer heard.Close()
	outside := l.machine("outside")
	l.join(outside, "seg2", "10.9.1.1/24", 1500, "10.9.1.200/24")

	ip := netip.MustParseAddr
	good := forge(a, DefaultVXLANID, ip("10.244.2.7"), ipa[0])
	for _, tc := range []struct {
		name   string
		from   *machine
		packet []byte
	}{
		{"from nobody's node", stranger, good},
		{"as a pod of this node", b, forge(a, DefaultVXLANID, ip("10.244.1.9"), ipa[0])},
		{"as a machine", b, forge(a, DefaultVXLANID, ip("10.9.1.200"), ipa[0])},
		{"to a machine", b, forge(a, DefaultVXLANID, ip("10.244.2.7"), ip("10.9.1.200"))},
		{"of another number", b, forge(a, 9, ip("10.244.2.7"), ipa[0])},
		{"from a node", b, good},
		{"from a node of another segment", c, forge(a, DefaultVXLANID, ip("10.244.3.7"), ipa[0])},
	} {
		tc.from.in(func() {
			conn, err := net.Dial("udp", "10.9.0.101:4789")
			require.NoError(t, err)
			defer conn.Close()
			_, err = conn.Write(tc.packet)
			require.NoError(t, err, tc.name)
		})
	}
	// They come in order, so that those before were dropped when the last two are there.
	buf := make([]byte, 100)
	var got []string
	for len(got) < 2 {
		_, from, err := heard.ReadFromUDPAddrPort(buf)
		require.NoError(t, err)
		got = append(got, from.Addr().Unmap().String())
	}
	slices.Sort(got)
	require.Equal(t, []string{"10.244.2.7", "10.244.3.7"}, got)
}

// Another pod network's node: nothing is made, what was made before it came is taken away,
// and its configuration stays as it is.
func TestAnotherPodNetwork(t *testing.T) {
	t.Parallel()
	_, a, b, c := twoSegments(t)
	require.NoError(t, a.update(b, c))
	require.Contains(t, a.run("ip route show proto 157"), "timonel-vxlan")
	theirs := t.TempDir()
	conf := filepath.Join(theirs, "05-theirs.conflist")
	require.NoError(t, os.WriteFile(conf, []byte("{}"), 0o600))
	cfg := a.net.cfg
	cfg.Foreign, cfg.ConfDir, cfg.BinDir = true, theirs, t.TempDir()
	var err error
	a.in(func() { a.net, err = New(cfg) })
	require.NoError(t, err)
	require.True(t, a.net.Ready(), "it gives the addresses")
	a.run("ip link add cni0 type bridge; ip addr add 10.244.1.1/24 dev cni0; ip link set cni0 up")
	require.NoError(t, a.update(b, c))
	a.in(func() { err = a.net.Look() })
	require.NoError(t, err)
	require.Equal(t, a.peer.CIDRs, a.net.CIDRs(), "Services know which addresses are this node's pods'")
	require.Equal(t, labGuard.Pods, a.net.Guard().Pods)
	require.Empty(t, a.run("ip route show proto 157; ip -6 route show proto 157; nft list tables"))
	require.NotContains(t, a.run("ip link"), "timonel-vxlan")
	files, err := os.ReadDir(theirs)
	require.NoError(t, err)
	require.Len(t, files, 1)
}

// state is all that an agent made in a machine, without what its node's device numbers are.
func (m *machine) state() string {
	var text string
	m.in(func() { text = netlab.Routes(m.l.t, "timonel-vxlan") })
	text += m.run("nft list table inet timonel-test")
	raw, _ := os.ReadFile(m.net.confPath())
	return text + strings.ReplaceAll(string(raw), m.dir, "")
}

// After any sequence of nodes that come, go, and have other addresses and ranges, of routes,
// entries and devices that somebody took away and of restarts, a node is as a fresh agent
// would make it.
func TestRandomSequencesLeaveWhatAFreshAgentMakes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	old, fresh := l.machine("n"), l.machine("n")
	for i, m := range []*machine{old, fresh} {
		l.join(m, fmt.Sprint("seg", i), "10.9.0.1/24", 1500, "10.9.0.101/24")
		m.node(Auto, "10.9.0.101", "10.244.1.0/24", "fd00:244:0:1::/64")
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	addresses := []string{"10.9.0.102", "10.9.0.103", "10.9.1.102", "10.9.1.103", "10.9.2.104", ""}
	ranges := []string{"10.244.2.0/24", "10.244.3.0/24", "10.244.4.0/24", "fd00:244:0:2::/64", "fd00:244:0:3::/64", "10.244.0.0/23"}
	modes := []Mode{Auto, Auto, Direct, Tunnel}
	mode, own := Auto, old.peer.CIDRs
	peers := map[string]Peer{}
	for step := range 30 {
		switch random.IntN(8) {
		case 0, 1, 2: // a node comes, or changes
			p := Peer{Name: fmt.Sprint("p", random.IntN(4))}
			if a := addresses[random.IntN(len(addresses))]; a != "" {
				p.Addresses = []string{a}
			}
			for _, i := range random.Perm(len(ranges))[:random.IntN(3)] {
				p.CIDRs = append(p.CIDRs, ranges[i])
			}
			peers[p.Name] = p
		case 3:
			delete(peers, fmt.Sprint("p", random.IntN(4)))
		case 4: // somebody was here
			old.run([]string{
				"ip route flush proto 157; ip -6 route flush proto 157", "ip link del timonel-vxlan || true",
				"ip neigh flush dev timonel-vxlan nud permanent || true", "ip link set eth0 down; ip link set eth0 up; ip route replace default via 10.9.0.1",
				"ip link set timonel-vxlan mtu 1300 || true", "bridge fdb add 02:76:01:02:03:04 dev timonel-vxlan dst 10.9.7.7 self permanent || true",
			}[random.IntN(6)])
		case 5: // an agent starts, perhaps with another flag
			mode = modes[random.IntN(len(modes))]
			old.start(Config{Mode: mode, NodeIPs: old.net.cfg.NodeIPs})
		case 6:
			own = [][]string{{"10.244.1.0/24", "fd00:244:0:1::/64"}, {"10.244.5.0/24", "fd00:244:0:5::/64"}, {"10.244.1.0/24"}}[random.IntN(3)]
		}
		var list []Peer
		for _, name := range slices.Sorted(maps.Keys(peers)) {
			list = append(list, peers[name])
		}
		errOld := old.updateWith(own, list)
		fresh.in(func() { require.NoError(t, Remove(fresh.net.cfg)) })
		fresh.dir = t.TempDir()
		fresh.start(Config{Mode: mode, NodeIPs: fresh.net.cfg.NodeIPs})
		errFresh := fresh.updateWith(own, list)
		require.Equal(t, errFresh == nil, errOld == nil, "%v, %v", errFresh, errOld)
		require.Equal(t, fresh.state(), old.state(), "step %d: mode %s, own %v, peers %v", step, mode, own, list)
	}
}

// The VXLAN's port is another's: the event says so, what needs no VXLAN works, and when it
// is free all does.
func TestPortOfVXLANInUse(t *testing.T) {
	t.Parallel()
	_, a, b, c := twoSegments(t)
	var taken net.PacketConn
	var err error
	a.in(func() { taken, err = net.ListenPacket("udp", ":4789") })
	require.NoError(t, err)
	defer taken.Close()
	require.ErrorContains(t, a.update(b, c), "UDP port 4789")
	require.Len(t, a.events, 1, "once")
	require.Contains(t, a.events[0], "PodTunnelFailed: UDP port 4789, which VXLAN needs, is used by another process")
	routes := a.run("ip route")
	require.Contains(t, routes, "10.244.2.0/24 via 10.9.0.102")
	require.NotContains(t, routes, "10.244.3.0/24")
	require.NoError(t, taken.Close())
	a.in(func() { err = a.net.Look() })
	require.NoError(t, err)
	require.Contains(t, a.run("ip route"), "10.244.3.0/24 via 10.244.3.0 dev timonel-vxlan")
	require.NoError(t, c.update(a, b))
	pa, ipa := a.pod("pod-a")
	pc, ipc := c.pod("pod-c")
	pc.answer(ipc[0])
	pa.reaches(ipc[0], 64, ipa[0])

	// Somebody's device of that name is not ours.
	b.run("ip link add timonel-vxlan type bridge")
	require.ErrorContains(t, b.update(a, c), "timonel-vxlan exists and is a bridge")
	require.Contains(t, b.run("ip -d link show timonel-vxlan"), "bridge")

	// Another range: pods of the old one have no routes.
	a.events = nil
	a.peer.CIDRs = []string{"10.244.9.0/24"}
	require.NoError(t, a.update(b, c))
	require.Len(t, a.events, 1)
	require.Contains(t, a.events[0], "PodRangeChanged: The pod range of this node was 10.244.1.0/24, fd00:244:0:1::/64 and is 10.244.9.0/24")
	require.Contains(t, a.run("ip addr show dev timonel-vxlan"), "10.244.9.0/32")
}
