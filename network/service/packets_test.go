package service

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
)

var networks = []string{"tcp", "udp"}

func TestClusterIP(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.pod(2), l.pod(3), l.pod(4)
		far, out := l.otherNode(), l.outside()
		a.serve(8080)
		b.serve(8080)
		far.serve(8080, "10.244.2.2", "fd00:2::2")
		l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web", ep("10.244.1.2"), ep("10.244.1.3"), ep("10.244.2.2")),
			slice("web", ep("fd00:1::2"), ep("fd00:1::3"), ep("fd00:2::2")))
		for _, network := range networks {
			for _, at := range []string{"10.96.0.10:80", "[fd96::10]:80"} {
				got := c.who(network, at)
				require.Len(t, got, 3, "%s %s: %v", network, at, got)
				for _, name := range []string{"pod2", "pod3", "n2"} {
					require.Positive(t, got[name], "%s %s: %v", network, at, got)
				}
			}
		}
		// One endpoint, to see who the client is said to be.
		one := func(ip, ip6 string) {
			l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web", ep(ip)), slice("web", ep(ip6)))
		}
		one("10.244.1.2", "fd00:1::2")
		for _, network := range networks {
			require.Equal(t, "pod2 10.244.1.4", c.ask(network, "10.96.0.10:80"), "from a pod to another on its bridge")
			require.Equal(t, "pod2 fd00:1::4", c.ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", a.ask(network, "10.96.0.10:80"), "from a pod to itself")
			require.Equal(t, "pod2 fd00:1::1", a.ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", ask(network, "10.96.0.10:80"), "from the node")
			require.Equal(t, "pod2 fd00:1::1", ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", out.ask(network, "10.96.0.10:80"), "from outside by a route")
			require.Equal(t, "pod2 fd00:1::1", out.ask(network, "[fd96::10]:80"))
		}
		one("10.244.2.2", "fd00:2::2")
		for _, network := range networks {
			require.Equal(t, "n2 10.244.1.4", c.ask(network, "10.96.0.10:80"), "from a pod to one of another node")
			require.Equal(t, "n2 fd00:1::4", c.ask(network, "[fd96::10]:80"))
			require.Equal(t, "n2 198.51.100.1", ask(network, "10.96.0.10:80"))
		}
		require.Equal(t, "refused", c.ask("tcp", "10.96.0.10:81"), "a port that the Service does not have")
		require.Equal(t, "refused", c.ask("udp", "10.96.0.10:81"))
		require.Equal(t, "refused", c.ask("tcp", "[fd96::10]:81"))
		require.Equal(t, "nothing", c.silent("tcp", "10.96.0.77:80"), "an address that nobody has")

		// Without endpoints, and then without the Service.
		l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web"), slice("web", ep("fd00:1::2", notReady)))
		for _, network := range networks {
			require.Equal(t, "refused", c.ask(network, "10.96.0.10:80"))
			require.Regexp(t, "refused|not permitted", ask(network, "10.96.0.10:80"))
			require.Equal(t, "refused", c.ask(network, "[fd96::10]:80"))
		}
		// A Service that has no addresses has nothing here.
		for _, s := range []*corev1.Service{
			svc("web", corev1.ClusterIPNone), svc("web", "10.96.0.10", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }),
		} {
			l.set(s, slice("web", ep("10.244.1.2")))
			require.Equal(t, "nothing", c.silent("tcp", "10.96.0.10:80"))
		}
	})
}

// Without br_netfilter answers between two pods of one bridge would come from the
// wrong address; then the node stands between them.
func TestABridgeThatDoesNotAskConntrack(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b := l.pod(2), l.pod(3)
		a.serve(8080)
		sysctl := func(value string) {
			l.must(writeFile("/proc/sys/net/bridge/bridge-nf-call-iptables", value))
			l.must(writeFile("/proc/sys/net/bridge/bridge-nf-call-ip6tables", value))
		}
		sysctl("0")
		l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web", ep("10.244.1.2")), slice("web", ep("fd00:1::2")))
		require.NotEqual(t, "pod2 10.244.1.3", asking("tcp", "10.96.0.10:80", impatience))
		require.Equal(t, "nothing", b.silent("tcp", "10.96.0.10:80"), "else this test shows nothing")
		l.proxy.filter = false
		l.pass()
		for _, network := range networks {
			require.Equal(t, "pod2 10.244.1.1", b.ask(network, "10.96.0.10:80"))
			require.Equal(t, "pod2 fd00:1::1", b.ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", a.ask(network, "10.96.0.10:80"))
		}
	})
}

func TestFromOutside(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c := l.pod(2), l.pod(4)
		far, out := l.otherNode(), l.outside()
		a.serve(8080)
		far.serve(8080, "10.244.2.2", "fd00:2::2")
		options := []option{dual("fd96::10"), balancer("203.0.113.7", "2001:db8:7::7"), nodePort(30080), externalIPs("203.0.113.8", "2001:db8:7::8")}
		balanced := func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeLoadBalancer }
		at := map[string][]string{
			"4": {nodeIP + ":30080", "203.0.113.7:80", "203.0.113.8:80"},
			"6": {"[" + nodeIP6 + "]:30080", "[2001:db8:7::7]:80", "[2001:db8:7::8]:80"},
		}
		both := []string{"pod2", "n2"}
		set := func(more ...option) {
			l.set(svc("web", "10.96.0.10", append(append(options[:len(options):len(options)], balanced), more...)...),
				slice("web", ep("10.244.1.2"), ep("10.244.2.2")), slice("web", ep("fd00:1::2"), ep("fd00:2::2")))
		}
		set()
		for _, addresses := range at {
			for _, address := range addresses {
				for _, network := range networks {
					for _, from := range []*host{out, c} {
						got := from.who(network, address)
						for _, name := range both {
							require.Positive(t, got[name], "%s %s from %s: %v", network, address, from.name, got)
						}
						require.Len(t, got, 2)
					}
				}
			}
		}
		require.NotContains(t, out.ask("tcp", nodeIP+":30080"), outsideIP, "the answer must come back this way")

		// Local: those of this node alone, which see who asks.
		set(externalLocal)
		for _, network := range networks {
			for _, address := range at["4"] {
				require.Equal(t, "pod2 "+outsideIP, out.ask(network, address))
			}
			for _, address := range at["6"] {
				require.Equal(t, "pod2 "+outsideIP6, out.ask(network, address))
			}
			require.Len(t, c.who(network, "203.0.113.7:80"), 2, "a pod reaches all")
			require.Len(t, c.who(network, nodeIP+":30080"), 2, "a pod reaches all")
			got := map[string]int{}
			for range 40 {
				name, _, _ := strings.Cut(ask(network, nodeIP+":30080"), " ")
				got[name]++
			}
			require.Len(t, got, 2, "the node itself reaches all: %v", got)
		}
		// No endpoint here: a balancer must notice, pods need not.
		l.set(svc("web", "10.96.0.10", append(options, balanced, externalLocal)...), slice("web", ep("10.244.2.2")), slice("web", ep("fd00:2::2")))
		for _, network := range networks {
			for _, address := range at["4"] {
				require.Equal(t, "nothing", out.silent(network, address))
			}
			require.Equal(t, "n2 10.244.1.4", c.ask(network, "203.0.113.8:80"))
		}
		// No endpoint anywhere.
		l.set(svc("web", "10.96.0.10", append(options, balanced, externalLocal)...), slice("web", ep("10.244.2.2", notReady)), slice("web", ep("fd00:2::2", notReady)))
		for _, addresses := range at {
			for _, address := range addresses {
				for _, network := range networks {
					require.Equal(t, "refused", out.ask(network, address), "%s %s", network, address)
				}
			}
		}
		// Node ports are at the node's own addresses alone.
		set()
		l.address("v-out", "192.0.2.77/24")
		require.Equal(t, "refused", out.ask("tcp", "192.0.2.77:30080"))
		l.start(Config{NodePortAddresses: []string{"192.0.2.64/26"}})
		l.pass()
		require.Contains(t, out.ask("tcp", "192.0.2.77:30080"), " ")
		require.Equal(t, "refused", out.ask("tcp", nodeIP+":30080"))
		l.start(Config{NodePortAddresses: []string{"0.0.0.0/0", "::/0"}})
		l.pass()
		for _, address := range []string{"192.0.2.77:30080", nodeIP + ":30080", "[" + nodeIP6 + "]:30080"} {
			require.Contains(t, out.ask("tcp", address), " ", address)
		}
	})
}

func TestInternalLocal(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c, far, out := l.pod(2), l.pod(4), l.otherNode(), l.outside()
		a.serve(8080)
		far.serve(8080, "10.244.2.2", "fd00:2::2")
		l.set(svc("web", "10.96.0.10", internalLocal), slice("web", ep("10.244.1.2"), ep("10.244.2.2")))
		require.Equal(t, map[string]int{"pod2": 40}, c.who("tcp", "10.96.0.10:80"))
		l.set(svc("web", "10.96.0.10", internalLocal, nodePort(30080)), slice("web", ep("10.244.1.2"), ep("10.244.2.2")))
		require.Equal(t, map[string]int{"pod2": 40}, c.who("tcp", "10.96.0.10:80"))
		require.Len(t, out.who("tcp", nodeIP+":30080"), 2, "the policy is for the cluster address")
		l.set(svc("web", "10.96.0.10", internalLocal), slice("web", ep("10.244.2.2")))
		require.Equal(t, "nothing", c.silent("tcp", "10.96.0.10:80"))
	})
}

func TestSourceRanges(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c, out := l.pod(2), l.pod(4), l.outside()
		a.serve(8080)
		set := func(ranges ...string) {
			l.set(svc("web", "10.96.0.10", dual("fd96::10"), balancer("203.0.113.7", "2001:db8:7::7"), sourceRanges(ranges...)), slice("web", ep("10.244.1.2")), slice("web", ep("fd00:1::2")))
		}
		set("198.18.0.0/15", "192.0.2.0/24", "192.0.2.8/30", "2001:db8::/64")
		require.Contains(t, out.ask("tcp", "203.0.113.7:80"), "pod2")
		require.Contains(t, out.ask("tcp", "[2001:db8:7::7]:80"), "pod2")
		require.Equal(t, "nothing", c.silent("tcp", "203.0.113.7:80"))
		require.Contains(t, c.ask("tcp", "10.96.0.10:80"), "pod2", "the ranges are for the balancer's address")
		set(" 198.18.0.0/15 ")
		require.Equal(t, "nothing", out.silent("udp", "203.0.113.7:80"))
		set("0.0.0.0/0", "198.18.0.0/15")
		require.Contains(t, out.ask("tcp", "203.0.113.7:80"), "pod2")
		// An address that is the balancer's own business.
		l.set(svc("web", "10.96.0.10", balancer("203.0.113.7"), func(s *corev1.Service) {
			mode := corev1.LoadBalancerIPModeProxy
			s.Status.LoadBalancer.Ingress[0].IPMode = &mode
		}), slice("web", ep("10.244.1.2")))
		require.NotContains(t, out.silent("tcp", "203.0.113.7:80"), "pod2")
	})
}

func TestSessionAffinity(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		clients := []*host{l.pod(20), l.pod(21), l.pod(22), l.pod(23), l.outside()}
		var list []string
		for n := 2; n < 7; n++ {
			l.pod(n).serve(8080)
			list = append(list, fmt.Sprintf("10.244.1.%d", n))
		}
		set := func(seconds int32, ips ...string) {
			s := slice("web")
			for _, ip := range ips {
				s.Endpoints = append(s.Endpoints, ep(ip))
			}
			l.set(svc("web", "10.96.0.10", nodePort(30080), sticky(seconds)), s)
		}
		set(10800, list...)
		used := map[string]string{}
		for _, c := range clients {
			got := c.who("tcp", "10.96.0.10:80")
			require.Len(t, got, 1, "%s: %v", c.name, got)
			for name := range got {
				used[c.name] = name
			}
		}
		require.Equal(t, used["out"], strings.Fields(clients[4].ask("tcp", nodeIP+":30080"))[0], "the same endpoint whatever the address")
		// Another agent changes nothing of it.
		l.start(Config{})
		l.pass()
		for _, c := range clients {
			require.Equal(t, map[string]int{used[c.name]: 40}, c.who("tcp", "10.96.0.10:80"))
		}
		// An endpoint that is gone is nobody's; the others' clients stay.
		gone := used["pod20"]
		var rest []string
		for _, ip := range list {
			if "pod"+strings.TrimPrefix(ip, "10.244.1.") != gone {
				rest = append(rest, ip)
			}
		}
		set(10800, rest...)
		for _, c := range clients {
			got := c.who("tcp", "10.96.0.10:80")
			require.Len(t, got, 1)
			require.Zero(t, got[gone])
			if used[c.name] != gone {
				require.Positive(t, got[used[c.name]], c.name)
			}
		}
		// The time is a Service's, and may change.
		set(1, rest...)
		require.Eventually(t, func() bool { return len(clients[0].who("udp", "10.96.0.10:80")) == 1 }, patience, impatience)
	})
}

func TestEndpointsThatEnd(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.pod(2), l.pod(3), l.pod(4)
		a.serve(8080)
		b.serve(8080)
		s := svc("web", "10.96.0.10")
		l.set(s, slice("web", ep("10.244.1.2")))
		var conns []net.Conn
		c.do(func() {
			for _, network := range networks {
				conn, err := net.Dial(network, "10.96.0.10:80")
				l.must(err)
				conns = append(conns, conn)
			}
		})
		for _, conn := range conns {
			defer conn.Close()
			require.Equal(t, "pod2 10.244.1.4", talk(conn, patience))
		}
		// Who has a connection keeps it; who comes gets another endpoint.
		l.set(s, slice("web", ep("10.244.1.2", terminating), ep("10.244.1.3")))
		require.Equal(t, map[string]int{"pod3": 40}, c.who("tcp", "10.96.0.10:80"))
		for _, conn := range conns {
			require.Equal(t, "pod2 10.244.1.4", talk(conn, patience))
		}
		// If there is no other, it is still used.
		l.set(s, slice("web", ep("10.244.1.2", terminating), ep("10.244.1.3", notReady)))
		require.Equal(t, map[string]int{"pod2": 40}, c.who("tcp", "10.96.0.10:80"))
		// One that is gone has no UDP clients any more, even if they never stop asking.
		l.set(s, slice("web", ep("10.244.1.3")))
		require.Equal(t, "pod3 10.244.1.4", talk(conns[1], patience))
		require.Equal(t, "pod2 10.244.1.4", talk(conns[0], patience))
		// None left: told at once. And back.
		l.set(s, slice("web"))
		require.Equal(t, "refused", talk(conns[1], patience))
		l.set(s, slice("web", ep("10.244.1.2")))
		require.Equal(t, "pod2 10.244.1.4", talk(conns[1], patience))
		// Node ports of UDP likewise.
		l.outside()
		l.set(svc("web", "10.96.0.10", nodePort(30080)), slice("web", ep("10.244.1.2")))
		var flow net.Conn
		c.do(func() {
			var err error
			flow, err = net.Dial("udp", nodeIP+":30080")
			l.must(err)
		})
		defer flow.Close()
		require.Contains(t, talk(flow, patience), "pod2 ")
		l.set(svc("web", "10.96.0.10", nodePort(30080)), slice("web", ep("10.244.1.3")))
		require.Contains(t, talk(flow, patience), "pod3 ")
	})
}

// What is on the table stays while no agent runs, and while a new one has heard nothing.
func TestRulesStayWithoutAnAgent(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c := l.pod(2), l.pod(4)
		a.serve(8080)
		l.set(svc("web", "10.96.0.10"), slice("web", ep("10.244.1.2")))
		l.store = feed.NewStore("n1")
		l.start(Config{})
		l.proxy.pass(t.Context())
		require.Equal(t, "pod2 10.244.1.4", c.ask("tcp", "10.96.0.10:80"))
		l.store.Update(func(t *feed.Txn) { t.SetService(svc("web", "10.96.0.10")) })
		l.proxy.pass(t.Context())
		require.Equal(t, "pod2 10.244.1.4", c.ask("tcp", "10.96.0.10:80"), "a part is not the whole")
		l.store.Update(func(t *feed.Txn) { t.SetSynced() })
		l.pass()
		require.Equal(t, "refused", c.ask("tcp", "10.96.0.10:80"))
		require.NoError(t, Remove(t.Context(), l.proxy.cfg.Table))
		require.NoError(t, Remove(t.Context(), l.proxy.cfg.Table))
	})
}
