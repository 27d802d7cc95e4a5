package policy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/feed"
	"timonel/network/netlab"
	pb "timonel/proto/timonel/v1"
)

var networks = []string{"tcp", "udp"}

// sees says whether one gets an answer from the other, by all protocols and families alike.
func (l *lab) sees(a *netlab.Host, b int, port uint16) bool {
	l.t.Helper()
	var seen []bool
	for _, network := range networks {
		for _, ip := range []netip.Addr{addr(b), addr6(b)} {
			seen = append(seen, a.Silent(network, at(ip, port)) != "nothing")
		}
	}
	for _, s := range seen {
		require.Equal(l.t, seen[0], s, "%s to pod%d:%d by tcp, tcp6, udp, udp6: %v", a.Name, b, port, seen)
	}
	return seen[0]
}

func TestPodsOfOneNode(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.pod(2), l.pod(3), l.pod(4)
		a.Serve(8080)
		a.Serve(9090)
		b.Serve(8080)
		l.pass()
		require.True(t, l.sees(b, 2, 8080), "without a policy all is allowed")
		l.set(ingressPolicy("deny"), selected(a, "deny"))
		require.False(t, l.sees(b, 2, 8080))
		require.True(t, l.sees(a, 3, 8080), "answers come back")
		require.Equal(t, "pod2 10.244.1.2", a.Ask("tcp", "10.244.1.2:8080"), "a pod reaches itself")
		require.Equal(t, "pod2 10.244.1.1", netlab.Ask("tcp", "10.244.1.2:8080"), "the node reaches its pods")
		require.Equal(t, "pod2 fd00:1::1", netlab.Ask("udp", "[fd00:1::2]:8080"))

		l.set(group("g", 3), ingressPolicy("b", from("g")), selected(a, "deny", "b"))
		require.True(t, l.sees(b, 2, 8080))
		require.False(t, l.sees(c, 2, 8080))
		l.set(group("g", 4))
		require.False(t, l.sees(b, 2, 8080))
		require.True(t, l.sees(c, 2, 8080))

		l.set(ingressPolicy("b", onPorts(from("g"), port("TCP", 8080, 8080), port("UDP", 8000, 8085), port("UDP", 8081, 8090))))
		require.True(t, l.sees(c, 2, 8080))
		require.False(t, l.sees(c, 2, 9090))
		// ICMP is of any port alone.
		ping := func() (err error) {
			c.Do(func() { err = exec.Command("ping", "-c1", "-W1", "10.244.1.2").Run() })
			return err
		}
		if _, err := exec.LookPath("ping"); err == nil {
			require.Error(t, ping())
			l.set(ingressPolicy("b", from("g")))
			require.NoError(t, ping())
		}

		// Blocks.
		l.set(ingressPolicy("b", block("10.244.1.0/24", "10.244.1.3/32", "10.244.1.0/31"), block("fd00:1::/64", "fd00:1::3/128")))
		require.False(t, l.sees(b, 2, 8080))
		require.True(t, l.sees(c, 2, 8080))
		l.set(ingressPolicy("b", &pb.NetworkRule{AnyPort: true, Blocks: []*pb.NetworkBlock{
			{Cidr: "10.244.1.2/31"}, {Cidr: "10.244.1.3/32"}, {Cidr: "10.0.0.0/30"}, {Cidr: "fd00:1::3/128"}, {Cidr: "fd00:1::2/127"},
		}}))
		require.True(t, l.sees(b, 2, 8080))
		require.False(t, l.sees(c, 2, 8080))

		// Egress.
		l.set(egressPolicy("out"), selected(a), selected(b, "out"))
		require.False(t, l.sees(b, 2, 8080))
		require.True(t, l.sees(a, 3, 8080), "answers come back")
		l.set(group("g", 2), egressPolicy("out", onPorts(from("g"), port("TCP", 8080, 8080), port("UDP", 0, 0))))
		require.True(t, l.sees(b, 2, 8080))
		require.Equal(t, "nothing", b.Silent("tcp", "10.244.1.2:9090"))
		require.Equal(t, "pod2 10.244.1.3", b.Ask("udp", "10.244.1.2:9090"))
		// Both ends have a say.
		l.set(ingressPolicy("deny"), selected(a, "deny"))
		require.False(t, l.sees(b, 2, 8080))
	})
}

func TestNamedPorts(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		web := func(n int32) []corev1.ContainerPort {
			return []corev1.ContainerPort{{Name: "web", ContainerPort: n}, {Name: "web", ContainerPort: n, Protocol: corev1.ProtocolUDP}, {Name: "admin", ContainerPort: 1}}
		}
		a, b, c := l.pod(2, web(8080)...), l.pod(3, web(9090)...), l.pod(4)
		for _, h := range []*netlab.Host{a, b} {
			h.Serve(8080)
			h.Serve(9090)
		}
		named := func(protocol string) *pb.NetworkPort { return &pb.NetworkPort{Protocol: protocol, Name: "web"} }
		l.set(ingressPolicy("named", onPorts(anyPeer(), named("TCP"), named("UDP"))), selected(a, "named"), selected(b, "named"))
		require.True(t, l.sees(c, 2, 8080))
		require.False(t, l.sees(c, 2, 9090))
		require.True(t, l.sees(c, 3, 9090))
		require.False(t, l.sees(c, 3, 8080))

		g := group("g", 2, 3)
		for _, x := range []struct {
			n    int
			port uint32
		}{{2, 8080}, {3, 9090}} {
			for _, ip := range []netip.Addr{addr(x.n), addr6(x.n)} {
				for _, protocol := range []string{"TCP", "UDP"} {
					g.Targets = append(g.Targets, &pb.NetworkTarget{Address: ip.AsSlice(), Protocol: protocol, Port: x.port})
				}
			}
		}
		l.set(g, egressPolicy("out", &pb.NetworkRule{Targets: []string{"g"}}), selected(a), selected(b), selected(c, "out"))
		require.True(t, l.sees(c, 2, 8080))
		require.False(t, l.sees(c, 2, 9090))
		require.True(t, l.sees(c, 3, 9090))
		require.False(t, l.sees(c, 3, 8080))
	})
}

func TestOtherNodesAndOutside(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, far, out := l.pod(2), l.OtherNode(), l.Outside()
		a.Serve(8080)
		far.Serve(8080, "10.244.2.2", "fd00:2::2")
		out.Serve(8080)
		remote := &pb.NetworkGroup{Of: "far", Name: "far.x", V4: netip.MustParseAddr("198.51.100.2").AsSlice(), V6: slices.Concat(netip.MustParseAddr("2001:db8:2::2").AsSlice(), netip.MustParseAddr("fd00:2::2").AsSlice())}
		l.set(ingressPolicy("in", from("far")), selected(a, "in"), remote)
		require.True(t, l.sees(far, 2, 8080))
		require.False(t, l.sees(out, 2, 8080))
		require.Equal(t, "out 10.244.1.2", a.Ask("tcp", netlab.OutsideIP+":8080"))
		l.set(ingressPolicy("in", block("192.0.2.0/24"), block("2001:db8::/64")))
		require.False(t, l.sees(far, 2, 8080))
		require.True(t, l.sees(out, 2, 8080))
		l.set(egressPolicy("out", block("0.0.0.0/0", "192.0.2.0/24", "169.254.0.0/16")), selected(a, "out"))
		require.Equal(t, "nothing", a.Silent("tcp", netlab.OutsideIP+":8080"))
		require.Equal(t, "n2 10.244.1.2", a.Ask("udp", "10.244.2.2:8080"))
		require.Equal(t, "nothing", a.Silent("udp", "[fd00:2::2]:8080"), "a block is of one family")

		// Ports of the cluster's own, from pods alone.
		l.set(selected(a))
		l.rules.SetGuarded([]Guarded{
			{corev1.ProtocolTCP, netip.MustParseAddrPort(netlab.OutsideIP + ":8080")}, {corev1.ProtocolTCP, netip.MustParseAddrPort("[2001:db8:2::2]:8080")},
			{corev1.ProtocolTCP, netip.MustParseAddrPort("10.244.1.1:7946")},
		})
		l.pass()
		require.NotContains(t, a.Silent("tcp", netlab.OutsideIP+":8080"), "out 10.")
		require.Equal(t, "out 10.244.1.2", a.Ask("udp", netlab.OutsideIP+":8080"))
		require.Contains(t, netlab.Ask("tcp", netlab.OutsideIP+":8080"), "out ")
		require.Contains(t, far.Ask("tcp", netlab.OutsideIP+":8080"), "out ")
		own, err := net.Listen("tcp", "10.244.1.1:7946")
		l.Must(err)
		defer own.Close()
		connects := func() (err error) {
			a.Do(func() {
				var c net.Conn
				if c, err = net.DialTimeout("tcp", "10.244.1.1:7946", netlab.Impatience); err == nil {
					c.Close()
				}
			})
			return err
		}
		require.Error(t, connects())
		l.rules.SetGuarded(nil)
		l.pass()
		require.NoError(t, connects())
	})
}

// Where packets go to is known after the address of a Service was translated.
func TestThroughServices(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.pod(2), l.pod(3), l.pod(4)
		a.Serve(8080)
		l.bridgeFilter()
		l.Must(exec.Command("nft", `table ip services {
			chain pre { type nat hook prerouting priority -100; ip daddr 10.96.0.10 tcp dport 80 dnat to 10.244.1.2:8080; ip daddr 10.96.0.10 udp dport 80 dnat to 10.244.1.2:8080; }
			chain post { type nat hook postrouting priority 100; ct status dnat ip saddr 10.244.1.2 ip daddr 10.244.1.2 masquerade; }
		}`).Run())
		l.set(ingressPolicy("in", onPorts(from("g"), port("TCP", 8080, 8080), port("UDP", 8080, 8080))), group("g", 3), selected(a, "in"),
			egressPolicy("out", onPorts(block("10.244.1.2/32"), port("TCP", 8080, 8080))), selected(b, "out"))
		require.Equal(t, "pod2 10.244.1.3", b.Ask("tcp", "10.96.0.10:80"))
		require.Equal(t, "nothing", b.Silent("udp", "10.96.0.10:80"))
		require.Equal(t, "nothing", c.Silent("tcp", "10.96.0.10:80"))
		require.Equal(t, "pod2 10.244.1.1", a.Ask("tcp", "10.96.0.10:80"), "a pod reaches itself through its Service")
		l.set(egressPolicy("none"), selected(a, "in", "none"))
		require.Equal(t, "pod2 10.244.1.1", a.Ask("tcp", "10.96.0.10:80"), "a pod reaches itself through its Service")
	})
}

// Whoever may make a Service and its endpoints leads nobody to the cluster's own ports: not a
// pod of another node, which comes by this node's node port and goes on with its address.
func TestNobodyReachesTheClustersPortsThroughAService(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, far, out := l.pod(2), l.OtherNode(), l.Outside()
		a.Serve(8080)
		out.Serve(8080)
		self := l.Self()
		self.Serve(7946, "10.244.1.1")
		l.Must(exec.Command("nft", `table inet services {
			chain pre { type nat hook prerouting priority -100;
				tcp dport 30080 dnat ip to 192.0.2.9:8080; udp dport 30080 dnat ip to 192.0.2.9:8080
				meta nfproto ipv6 tcp dport 30082 dnat ip6 to [2001:db8::9]:8080
				tcp dport 30081 dnat ip to 10.244.1.1:7946; udp dport 30081 dnat ip to 10.244.1.1:7946
				tcp dport 30083 dnat ip to 10.244.1.2:8080
			}
			chain post { type nat hook postrouting priority 100; ct status dnat masquerade; }
		}`).Run())
		ask := func(port string, networks ...string) (all []string) {
			for _, n := range networks {
				all = append(all, far.Ask(n, net.JoinHostPort(netlab.NodeIP, port)))
			}
			return all
		}
		l.pass()
		for _, got := range ask("30080", "tcp", "udp") {
			require.Contains(t, got, "out ")
		}
		for _, got := range ask("30081", "tcp", "udp") {
			require.Contains(t, got, "node ")
		}
		require.Contains(t, far.Ask("tcp", net.JoinHostPort(netlab.NodeIP6, "30082")), "out ")
		var guarded []Guarded
		for _, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
			for _, at := range []string{netlab.OutsideIP + ":8080", "[" + netlab.OutsideIP6 + "]:8080", "10.244.1.1:7946"} {
				guarded = append(guarded, Guarded{p, netip.MustParseAddrPort(at)})
			}
		}
		l.rules.SetGuarded(guarded)
		l.pass()
		for _, port := range []string{"30080", "30081"} {
			for _, network := range []string{"tcp", "udp"} {
				require.NotRegexp(t, "^(out|node) ", far.Silent(network, net.JoinHostPort(netlab.NodeIP, port)), "%s %s", network, port)
			}
		}
		require.NotContains(t, far.Silent("tcp", net.JoinHostPort(netlab.NodeIP6, "30082")), "out ")
		require.Contains(t, far.Ask("tcp", netlab.OutsideIP+":8080"), "out ", "other machines reach them as they are")
		require.Contains(t, far.Ask("tcp", net.JoinHostPort(netlab.NodeIP, "30083")), "pod2 ", "and Services what is not guarded")
	})
}

func TestTiers(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.pod(2), l.pod(3), l.pod(4)
		a.Serve(8080)
		rule := func(action pb.NetworkRule_Action, group string) *pb.NetworkRule {
			r := from(group)
			r.Action = action
			return r
		}
		wide := func(name string, tier pb.NetworkPolicyItem_Tier, priority int32, rules ...*pb.NetworkRule) *pb.NetworkPolicyItem {
			return &pb.NetworkPolicyItem{Name: name, Tier: tier, Priority: priority, Ingress: rules}
		}
		const admin, baseline = pb.NetworkPolicyItem_ADMIN, pb.NetworkPolicyItem_BASELINE
		l.set(group("b", 3), group("c", 4), wide("a1", admin, 5, rule(pb.NetworkRule_DENY, "b")), selected(a, "/a1"))
		require.False(t, l.sees(b, 2, 8080))
		require.True(t, l.sees(c, 2, 8080))
		l.set(wide("a0", admin, 4, rule(pb.NetworkRule_ALLOW, "b")), selected(a, "/a1", "/a0"))
		require.True(t, l.sees(b, 2, 8080), "the lower number is asked first")
		l.set(wide("a0", admin, 4, rule(pb.NetworkRule_PASS, "b")))
		require.True(t, l.sees(b, 2, 8080), "the rest of the tier is not asked")
		l.set(ingressPolicy("deny"), selected(a, "/a1", "/a0", "deny"))
		require.False(t, l.sees(b, 2, 8080), "but the namespace's policies are")
		l.set(ingressPolicy("deny", from("b")), wide("base", baseline, 0, rule(pb.NetworkRule_DENY, "b"), rule(pb.NetworkRule_ALLOW, "c")), selected(a, "/a1", "/a0", "deny", "/base"))
		require.True(t, l.sees(b, 2, 8080))
		require.False(t, l.sees(c, 2, 8080), "the baseline has no say where a policy isolates")
		l.set(selected(a, "/a1", "/a0", "/base"))
		require.False(t, l.sees(b, 2, 8080))
		require.True(t, l.sees(c, 2, 8080))
		l.set(wide("a0", admin, 4, rule(pb.NetworkRule_ALLOW, "b")), ingressPolicy("deny"), selected(a, "/a0", "deny"))
		require.True(t, l.sees(b, 2, 8080), "what an admin allows nobody denies")
		require.False(t, l.sees(c, 2, 8080))
	})
}

func TestConnectionsGoOn(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b := l.pod(2), l.pod(3)
		a.Serve(8080)
		l.pass()
		var conns []net.Conn
		b.Do(func() {
			for _, network := range networks {
				conn, err := net.Dial(network, "10.244.1.2:8080")
				l.Must(err)
				conns = append(conns, conn)
			}
		})
		for _, conn := range conns {
			defer conn.Close()
			require.Equal(t, "pod2 10.244.1.3", netlab.Talk(conn, netlab.Patience))
		}
		l.set(ingressPolicy("deny"), selected(a, "deny"))
		require.False(t, l.sees(b, 2, 8080))
		for _, conn := range conns {
			require.Equal(t, "pod2 10.244.1.3", netlab.Talk(conn, netlab.Patience))
		}
		// A pod that gets the address has none of them.
		old := l.pods["uid-pod2"]
		delete(l.pods, old.UID)
		l.rules.RemovePod(old.UID)
		old.UID = "another"
		l.rules.SetPod(old)
		item := selected(a, "deny")
		item.Uid = "another"
		l.set(item)
		l.Must(l.rules.Ready("another", 1))
		require.Equal(t, "nothing", netlab.Talk(conns[1], netlab.Impatience))
	})
}

func TestReady(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		l.store = feed.NewStore("n1")
		l.start(Config{})
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 0), "no address")
		a := l.pod(2)
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 0), "not in the kernel")
		l.pass()
		require.NoError(t, l.rules.Ready("uid-pod2", 0), "a pod without policies waits for no controller")
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 7), "not told yet")
		l.store.Update(func(t *feed.Txn) { t.SetSynced(); t.SetTold(6) })
		l.pass()
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 7), "not told yet")
		l.store.Update(func(t *feed.Txn) { t.SetPod(selected(a, "in")) })
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 7), "not in the kernel", "before the pass")
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 0), "not in the kernel", "whoever says that there is none")
		l.pass()
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 7), "policy default/in is not known")
		l.set(ingressPolicy("in", from("g")))
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 7), "group g of policy default/in is not known")
		require.Equal(t, "nothing", l.pod(3).Silent("tcp", "10.244.1.2:8080"), "closed meanwhile")
		l.set(group("g"))
		require.NoError(t, l.rules.Ready("uid-pod2", 7))
		l.store.Update(func(t *feed.Txn) { t.RemovePod(feed.Name{Namespace: "default", Name: "pod2"}); t.SetTold(7) })
		require.NoError(t, l.rules.Ready("uid-pod2", 7), "there is none any more")
		require.ErrorContains(t, l.rules.Ready("uid-pod2", 8), "not told yet")
	})
}

// Who waits is told; a new agent takes the tables over without letting anything through.
func TestRulesStayWithoutAnAgent(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b := l.pod(2), l.pod(3)
		a.Serve(8080)
		b.Serve(8080)
		l.set(ingressPolicy("deny"), selected(a, "deny"))
		require.False(t, l.sees(b, 2, 8080))
		full := l.store
		l.store = feed.NewStore("n1")
		l.start(Config{})
		l.pass()
		require.False(t, l.sees(b, 2, 8080), "who knows nothing changes nothing")
		require.True(t, l.sees(a, 3, 8080))
		l.store = full

		// Packets all the time, while agents come and go.
		stop, through := make(chan struct{}), make(chan string, 1)
		go func() {
			defer close(through)
			b.Do(func() {
				for {
					select {
					case <-stop:
						return
					default:
						if answer := netlab.Asking("udp", "10.244.1.2:8080", time.Millisecond); answer != "nothing" {
							through <- answer
							return
						}
					}
				}
			})
		}()
		for range 30 {
			l.start(Config{})
			l.pass()
		}
		close(stop)
		require.Empty(t, <-through)
		l.Must(Remove(t.Context(), l.rules.cfg.Table))
		l.Must(Remove(t.Context(), l.rules.cfg.Table))
		require.True(t, l.sees(b, 2, 8080))
		l.pass()
		require.False(t, l.sees(b, 2, 8080), "what somebody took away comes back")
		l.Must(exec.Command("nft", "flush", "chain", "inet", l.rules.cfg.Table, "ingress").Run())
		require.True(t, l.sees(b, 2, 8080))
		l.pass()
		require.False(t, l.sees(b, 2, 8080))
	})
}

func TestRunTellsWhoWaits(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		told := make(chan struct{}, 100)
		l.start(Config{Changed: func() { told <- struct{}{} }})
		ctx, cancel := context.WithCancel(t.Context())
		h := l.pod(2)
		ran := make(chan struct{})
		l.Go(func() { defer close(ran); _ = l.rules.Run(ctx) })
		wait := func(policies int64) {
			for l.rules.Ready("uid-pod2", policies) != nil {
				<-told
			}
		}
		wait(0)
		require.Error(t, l.rules.Ready("uid-pod2", 9))
		l.store.Update(func(t *feed.Txn) { t.SetPolicy(ingressPolicy("in")); t.SetPod(selected(h, "in")) })
		wait(9)
		l.store.Update(func(t *feed.Txn) { t.RemovePod(feed.Name{Namespace: "default", Name: "pod2"}) })
		require.Error(t, l.rules.Ready("uid-pod2", 10))
		l.store.Update(func(t *feed.Txn) { t.SetTold(10) })
		wait(10)
		cancel()
		<-ran
	})
}

// A policy that the kernel refuses is closed; all else is in force.
func TestRefused(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c, d := l.pod(2), l.pod(3), l.pod(4), l.pod(5)
		a.Serve(8080)
		b.Serve(8080)
		var events []string
		l.start(Config{
			Event: func(p Pod, reason, message string) { events = append(events, p.Name+" "+reason+" "+message) },
			nft: func(family knftables.Family, table string) (knftables.Interface, error) {
				nft, err := knftables.New(family, table, knftables.UseNetlink)
				return refusing{nft, "203.0.113.99"}, err
			},
		})
		l.set(ingressPolicy("good", from("g")), group("g", 4), ingressPolicy("bad", block("203.0.113.99/32"), anyPeer()), selected(a, "good"), selected(b, "good", "bad"))
		require.True(t, l.sees(c, 2, 8080))
		require.False(t, l.sees(b, 2, 8080))
		require.False(t, l.sees(c, 3, 8080), "closed")
		require.Len(t, events, 1)
		require.Contains(t, events[0], "pod3 NetworkPolicyRefused")
		require.Contains(t, events[0], "Cannot allocate memory")
		require.ErrorContains(t, l.rules.Ready("uid-pod3", 1), "Cannot allocate memory")
		require.NoError(t, l.rules.Ready("uid-pod2", 1))
		require.Equal(t, 1, l.rules.Stats().Refused)
		l.pass()
		require.Len(t, events, 1, "it is said once")
		l.set(group("g", 5))
		require.True(t, l.sees(d, 2, 8080), "others change")
		require.False(t, l.sees(c, 2, 8080), "others change")
		l.set(ingressPolicy("bad", anyPeer()))
		require.True(t, l.sees(c, 3, 8080))
		require.NoError(t, l.rules.Ready("uid-pod3", 1))
	})
}

// refusing is an nft that does not take a text.
type refusing struct {
	knftables.Interface
	text string
}

func (n refusing) refuse(tx *knftables.Transaction) error {
	if text := tx.String(); strings.Contains(text, n.text) {
		return fmt.Errorf("Error: Could not process rule: Cannot allocate memory\n%s", text)
	}
	return nil
}

func (n refusing) Run(ctx context.Context, tx *knftables.Transaction) error {
	if err := n.refuse(tx); err != nil {
		return err
	}
	return n.Interface.Run(ctx, tx)
}

func (n refusing) Check(ctx context.Context, tx *knftables.Transaction) error {
	if err := n.refuse(tx); err != nil {
		return err
	}
	return n.Interface.Check(ctx, tx)
}

// TestWhatNobodyChangedIsLeftAlone: tables that are as they were left are not written again,
// whatever other tables of this agent are; one that somebody else changed is.
func TestWhatNobodyChangedIsLeftAlone(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b := l.pod(2), l.pod(3)
		l.set(ingressPolicy("deny"), selected(a, "deny"), ingressPolicy("from", from("g")), selected(b, "from"), group("g", 2))
		for range 3 {
			l.pass()
		}
		written := func() uint64 { return l.rules.Stats().Syncs }
		before := written()
		for range 5 {
			l.pass()
		}
		require.Equal(t, before, written(), "they were written again")
		l.Must(exec.Command("nft", "add", "rule", "inet", "timonel-policy-test", chainClosed, "accept").Run())
		l.pass()
		require.Equal(t, before+1, written(), "somebody else's rule stays")
		out, err := exec.Command("nft", "list", "chain", "inet", "timonel-policy-test", chainClosed).Output()
		l.Must(err)
		require.NotContains(t, string(out), "accept")
	})
}
