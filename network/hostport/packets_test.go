package hostport

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/netlab"
)

const name = "timonel-hostports-test"

// lab is a node with host ports.
type lab struct {
	*netlab.Node
	t      *testing.T
	ports  *Ports
	refuse string // what the kernel does not take
}

func inLab(t *testing.T, body func(l *lab)) {
	t.Helper()
	netlab.In(t, func(n *netlab.Node) {
		l := &lab{Node: n, t: t}
		l.start()
		body(l)
	})
}

// start makes a new agent's Ports in the place of those before.
func (l *lab) start(pods ...Pod) {
	var err error
	l.ports, err = New(Config{
		Table: name, Bridge: "br0", ClusterPorts: []uint16{7946}, Look: time.Hour, Logger: slog.New(slog.DiscardHandler),
		nft: func() (knftables.Interface, error) {
			nft, err := knftables.New(knftables.InetFamily, name, knftables.UseNetlink)
			return refusing{nft, l}, err
		},
	})
	l.Must(err)
	for _, p := range pods {
		l.ports.SetPod(p)
	}
	l.ports.SetNetworks(Networks{
		Own:      []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	})
	l.ports.pass(l.t.Context())
}

type refusing struct {
	knftables.Interface
	l *lab
}

func (n refusing) Run(ctx context.Context, tx *knftables.Transaction) error {
	if n.l.refuse != "" && strings.Contains(tx.String(), n.l.refuse) {
		return errors.New("Error: Could not process rule: Cannot allocate memory")
	}
	return n.Interface.Run(ctx, tx)
}

func (l *lab) set(pods ...Pod) {
	l.t.Helper()
	for _, p := range pods {
		l.ports.SetPod(p)
	}
	l.ports.pass(l.t.Context())
}

// pod is pod N with host ports.
func pod(n byte, ports ...corev1.ContainerPort) Pod {
	return Pod{UID: string('a' + rune(n)), Ports: ports, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 1, n}), netip.AddrFrom16([16]byte{0: 0xfd, 3: 1, 15: n})}}
}

func hostPort(protocol corev1.Protocol, port int32, ip string) corev1.ContainerPort {
	return corev1.ContainerPort{Protocol: protocol, HostPort: port, ContainerPort: 8080, HostIP: ip}
}

// A port is reached from everywhere, and the source stays where it can.
func TestFromEverywhere(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, out, other := l.Pod(2), l.Pod(3), l.Outside(), l.OtherNode()
		a.Serve(8080)
		l.set(pod(2, hostPort("TCP", 80, ""), hostPort("UDP", 80, ""), hostPort("SCTP", 80, "")), pod(3))
		require.NoError(t, l.ports.Ready(pod(2).UID))
		for _, network := range []string{"tcp", "udp"} {
			for _, c := range []struct {
				from     *netlab.Host
				at, seen string
			}{
				{out, netlab.NodeIP, netlab.OutsideIP}, {out, netlab.NodeIP6, netlab.OutsideIP6},
				{b, netlab.NodeIP, "10.244.1.3"}, {b, "10.244.1.1", "10.244.1.3"}, {b, netlab.NodeIP6, "fd00:1::3"},
				{l.Self(), "127.0.0.1", "10.244.1.1"}, {l.Self(), netlab.NodeIP, netlab.NodeIP},
				{a, netlab.NodeIP, "10.244.1.1"}, {a, netlab.NodeIP6, "fd00:1::1"}, // itself
				{other, netlab.NodeIP, "198.51.100.2"},
			} {
				require.Equal(t, "pod2 "+c.seen, c.from.Ask(network, net.JoinHostPort(c.at, "80")), "%s to %s by %s", c.from.Name, c.at, network)
			}
		}
		rules, err := exec.Command("nft", "list", "table", "inet", name).Output()
		l.Must(err)
		require.Contains(t, string(rules), "meta l4proto sctp dnat ip to 10.244.1.2:8080")
		// Other ports, others' addresses and the cluster's own ports are as they were.
		require.Equal(t, "refused", out.Ask("tcp", netlab.NodeIP+":81"))
		l.set(pod(2, hostPort("TCP", 7946, ""), hostPort("TCP", 53, "")))
		require.Equal(t, "refused", out.Ask("tcp", netlab.NodeIP+":7946"))
		require.Equal(t, "refused", out.Ask("tcp", netlab.NodeIP+":80"))
		l.Address("lo", "10.96.0.10/32")
		l.Self().Serve(53, "10.96.0.10")
		require.Equal(t, "node 10.244.1.3", b.Ask("tcp", "10.96.0.10:53"))
		require.Contains(t, b.Ask("tcp", netlab.NodeIP+":53"), "pod2 ")

		// What the node has at 127.0.0.1 is its own.
		l.Self().Serve(9999, "127.0.0.1")
		b.Do(func() {
			l.Must(exec.Command("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/p-pod3/route_localnet; ip route add 127.0.0.1/32 via 10.244.1.1 table 99; ip rule add to 127.0.0.1 lookup 99 pref 0 dport 9999; ip rule del pref 0 lookup local; ip rule add pref 100 lookup local").Run())
		})
		require.Equal(t, "nothing", b.Silent("tcp", "127.0.0.1:9999"))
		l.Must(exec.Command("nft", "flush", "chain", "inet", name, "guard").Run())
		require.Contains(t, b.Ask("tcp", "127.0.0.1:9999"), "node ", "it is the guard that keeps pods out")
	})
}

// Two pods have one port at different addresses and by different protocols.
func TestHostIP(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c, out := l.Pod(2), l.Pod(3), l.Pod(4), l.Outside()
		for _, h := range []*netlab.Host{a, b, c} {
			h.Serve(8080)
		}
		l.set(pod(2, hostPort("TCP", 80, "127.0.0.1")), pod(3, hostPort("TCP", 80, netlab.NodeIP)), pod(4, hostPort("UDP", 80, netlab.NodeIP), hostPort("TCP", 80, netlab.NodeIP6)))
		require.Contains(t, l.Self().Ask("tcp", "127.0.0.1:80"), "pod2 ")
		require.Contains(t, l.Self().Ask("tcp", netlab.NodeIP+":80"), "pod3 ")
		require.Contains(t, out.Ask("tcp", netlab.NodeIP+":80"), "pod3 ")
		require.Contains(t, out.Ask("udp", netlab.NodeIP+":80"), "pod4 ")
		require.Contains(t, out.Ask("tcp", net.JoinHostPort(netlab.NodeIP6, "80")), "pod4 ")
		require.Equal(t, "refused", out.Ask("tcp", "10.244.1.1:80"), "nobody has that")
		l.ports.RemovePod(pod(3).UID)
		l.set()
		require.Equal(t, "refused", out.Ask("tcp", netlab.NodeIP+":80"))
	})
}

// A client by UDP that goes on sending gets to the pod that has the port now.
func TestFlowsFollow(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, out := l.Pod(2), l.Pod(3), l.Outside()
		a.Serve(8080)
		b.Serve(8080)
		l.set(pod(2)) // the table is known
		var c net.Conn
		out.Do(func() {
			var err error
			c, err = net.Dial("udp", netlab.NodeIP+":80")
			l.Must(err)
		})
		defer c.Close()
		talk := func() string {
			for end := time.Now().Add(netlab.Patience); ; {
				answer := netlab.Talk(c, netlab.Impatience)
				if answer != "refused" && answer != "nothing" || time.Now().After(end) {
					return answer
				}
			}
		}
		require.Equal(t, "refused", netlab.Talk(c, netlab.Patience), "there is an entry to nobody")
		l.set(pod(2, hostPort("UDP", 80, "")))
		require.Contains(t, talk(), "pod2 ")
		l.ports.RemovePod(pod(2).UID)
		l.set(pod(3, hostPort("UDP", 80, "")))
		require.Contains(t, talk(), "pod3 ")
	})
}

// Rules stay while no agent is there, a new one makes the same, others' changes are undone, and
// what the kernel refuses is one pod's alone.
func TestAgentsAndOthers(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, out := l.Pod(2), l.Pod(3), l.Outside()
		a.Serve(8080)
		b.Serve(8080)
		one, two := pod(2, hostPort("TCP", 80, "")), pod(3, hostPort("TCP", 81, ""))
		l.set(one, two)
		is := netlab.Listing(t, "inet", name)
		l.start(one, two)
		require.Equal(t, is, netlab.Listing(t, "inet", name))
		for _, command := range []string{"flush ruleset", "delete table inet " + name, "flush chain inet " + name + " ports", "add chain inet " + name + " mine"} {
			l.Must(exec.Command("nft", command).Run())
			l.set()
			require.Equal(t, is, netlab.Listing(t, "inet", name), command)
		}
		l.refuse = "10.244.1.3"
		l.start(one, two)
		require.NoError(t, l.ports.Ready(one.UID))
		require.ErrorContains(t, l.ports.Ready(two.UID), "Cannot allocate memory")
		require.Contains(t, out.Ask("tcp", netlab.NodeIP+":80"), "pod2 ")
		told := make(chan struct{}, 1)
		l.ports.cfg.Changed = func() { told <- struct{}{} }
		l.refuse = ""
		l.set()
		<-told
		require.NoError(t, l.ports.Ready(two.UID))
		require.Contains(t, out.Ask("tcp", netlab.NodeIP+":81"), "pod3 ")
		require.Equal(t, is, netlab.Listing(t, "inet", name))
		l.Must(Remove(t.Context(), name))
		require.Equal(t, []string{"no table inet " + name}, netlab.Listing(t, "inet", name))
	})
}

// Run brings the table there without being asked.
func TestRun(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		told := make(chan struct{}, 8)
		l.ports.cfg.Changed = func() { told <- struct{}{} }
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		l.Go(func() { defer close(ended); _ = l.ports.Run(ctx) })
		p := pod(2, hostPort("TCP", 80, ""))
		l.ports.SetPod(p)
		for l.ports.Ready(p.UID) != nil {
			<-told
		}
		cancel()
		<-ended
	})
}
