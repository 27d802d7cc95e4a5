package service

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
	"timonel/network/netlab"
)

var networks = []string{"tcp", "udp"}

func TestClusterIP(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.Pod(2), l.Pod(3), l.Pod(4)
		far, out := l.OtherNode(), l.Outside()
		a.Serve(8080)
		b.Serve(8080)
		far.Serve(8080, "10.244.2.2", "fd00:2::2")
		l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web", ep("10.244.1.2"), ep("10.244.1.3"), ep("10.244.2.2")),
			slice("web", ep("fd00:1::2"), ep("fd00:1::3"), ep("fd00:2::2")))
		for _, network := range networks {
			for _, at := range []string{"10.96.0.10:80", "[fd96::10]:80"} {
				got := c.Who(network, at)
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
			require.Equal(t, "pod2 10.244.1.4", c.Ask(network, "10.96.0.10:80"), "from a pod to another on its bridge")
			require.Equal(t, "pod2 fd00:1::4", c.Ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", a.Ask(network, "10.96.0.10:80"), "from a pod to itself")
			require.Equal(t, "pod2 fd00:1::1", a.Ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", netlab.Ask(network, "10.96.0.10:80"), "from the node")
			require.Equal(t, "pod2 fd00:1::1", netlab.Ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", out.Ask(network, "10.96.0.10:80"), "from outside by a route")
			require.Equal(t, "pod2 fd00:1::1", out.Ask(network, "[fd96::10]:80"))
		}
		one("10.244.2.2", "fd00:2::2")
		for _, network := range networks {
			require.Equal(t, "n2 10.244.1.4", c.Ask(network, "10.96.0.10:80"), "from a pod to one of another node")
			require.Equal(t, "n2 fd00:1::4", c.Ask(network, "[fd96::10]:80"))
			require.Equal(t, "n2 198.51.100.1", netlab.Ask(network, "10.96.0.10:80"))
		}
		require.Equal(t, "refused", c.Ask("tcp", "10.96.0.10:81"), "a port that the Service does not have")
		require.Equal(t, "refused", c.Ask("udp", "10.96.0.10:81"))
		require.Equal(t, "refused", c.Ask("tcp", "[fd96::10]:81"))
		require.Equal(t, "nothing", c.Silent("tcp", "10.96.0.77:80"), "an address that nobody has")

		// Without endpoints, and then without the Service.
		l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web"), slice("web", ep("fd00:1::2", notReady)))
		for _, network := range networks {
			require.Equal(t, "refused", c.Ask(network, "10.96.0.10:80"))
			require.Regexp(t, "refused|not permitted", netlab.Ask(network, "10.96.0.10:80"))
			require.Equal(t, "refused", c.Ask(network, "[fd96::10]:80"))
		}
		// A Service that has no addresses has nothing here.
		for _, s := range []*corev1.Service{
			svc("web", corev1.ClusterIPNone), svc("web", "10.96.0.10", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }),
		} {
			l.set(s, slice("web", ep("10.244.1.2")))
			require.Equal(t, "nothing", c.Silent("tcp", "10.96.0.10:80"))
		}
	})
}

// Without br_netfilter answers between two pods of one bridge would come from the
// wrong address; then the node stands between them.
func TestABridgeThatDoesNotAskConntrack(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b := l.Pod(2), l.Pod(3)
		a.Serve(8080)
		sysctl := func(value string) {
			l.Must(writeFile("/proc/sys/net/bridge/bridge-nf-call-iptables", value))
			l.Must(writeFile("/proc/sys/net/bridge/bridge-nf-call-ip6tables", value))
		}
		sysctl("0")
		l.set(svc("web", "10.96.0.10", dual("fd96::10")), slice("web", ep("10.244.1.2")), slice("web", ep("fd00:1::2")))
		require.NotEqual(t, "pod2 10.244.1.3", netlab.Asking("tcp", "10.96.0.10:80", netlab.Impatience))
		require.Equal(t, "nothing", b.Silent("tcp", "10.96.0.10:80"), "else this test shows nothing")
		l.proxy.filter = false
		l.pass()
		for _, network := range networks {
			require.Equal(t, "pod2 10.244.1.1", b.Ask(network, "10.96.0.10:80"))
			require.Equal(t, "pod2 fd00:1::1", b.Ask(network, "[fd96::10]:80"))
			require.Equal(t, "pod2 10.244.1.1", a.Ask(network, "10.96.0.10:80"))
		}
	})
}

func TestFromOutside(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c := l.Pod(2), l.Pod(4)
		far, out := l.OtherNode(), l.Outside()
		a.Serve(8080)
		far.Serve(8080, "10.244.2.2", "fd00:2::2")
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
					for _, from := range []*netlab.Host{out, c} {
						got := from.Who(network, address)
						for _, name := range both {
							require.Positive(t, got[name], "%s %s from %s: %v", network, address, from.Name, got)
						}
						require.Len(t, got, 2)
					}
				}
			}
		}
		require.NotContains(t, out.Ask("tcp", nodeIP+":30080"), outsideIP, "the answer must come back this way")

		// Local: those of this node alone, which see who asks.
		set(externalLocal)
		for _, network := range networks {
			for _, address := range at["4"] {
				require.Equal(t, "pod2 "+outsideIP, out.Ask(network, address))
			}
			for _, address := range at["6"] {
				require.Equal(t, "pod2 "+outsideIP6, out.Ask(network, address))
			}
			require.Len(t, c.Who(network, "203.0.113.7:80"), 2, "a pod reaches all")
			require.Len(t, c.Who(network, nodeIP+":30080"), 2, "a pod reaches all")
			got := map[string]int{}
			for range 40 {
				name, _, _ := strings.Cut(netlab.Ask(network, nodeIP+":30080"), " ")
				got[name]++
			}
			require.Len(t, got, 2, "the node itself reaches all: %v", got)
		}
		// No endpoint here: a balancer must notice, pods need not.
		l.set(svc("web", "10.96.0.10", append(options, balanced, externalLocal)...), slice("web", ep("10.244.2.2")), slice("web", ep("fd00:2::2")))
		for _, network := range networks {
			for _, address := range at["4"] {
				require.Equal(t, "nothing", out.Silent(network, address))
			}
			require.Equal(t, "n2 10.244.1.4", c.Ask(network, "203.0.113.8:80"))
		}
		// No endpoint anywhere.
		l.set(svc("web", "10.96.0.10", append(options, balanced, externalLocal)...), slice("web", ep("10.244.2.2", notReady)), slice("web", ep("fd00:2::2", notReady)))
		for _, addresses := range at {
			for _, address := range addresses {
				for _, network := range networks {
					require.Equal(t, "refused", out.Ask(network, address), "%s %s", network, address)
				}
			}
		}
		// Node ports are at the node's own addresses alone.
		set()
		l.Address("v-out", "192.0.2.77/24")
		require.Equal(t, "refused", out.Ask("tcp", "192.0.2.77:30080"))
		l.start(Config{NodePortAddresses: []string{"192.0.2.64/26"}})
		l.pass()
		require.Contains(t, out.Ask("tcp", "192.0.2.77:30080"), " ")
		require.Equal(t, "refused", out.Ask("tcp", nodeIP+":30080"))
		l.start(Config{NodePortAddresses: []string{"0.0.0.0/0", "::/0"}})
		l.pass()
		for _, address := range []string{"192.0.2.77:30080", nodeIP + ":30080", "[" + nodeIP6 + "]:30080"} {
			require.Contains(t, out.Ask("tcp", address), " ", address)
		}
	})
}

func TestInternalLocal(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c, far, out := l.Pod(2), l.Pod(4), l.OtherNode(), l.Outside()
		a.Serve(8080)
		far.Serve(8080, "10.244.2.2", "fd00:2::2")
		l.set(svc("web", "10.96.0.10", internalLocal), slice("web", ep("10.244.1.2"), ep("10.244.2.2")))
		require.Equal(t, map[string]int{"pod2": 40}, c.Who("tcp", "10.96.0.10:80"))
		l.set(svc("web", "10.96.0.10", internalLocal, nodePort(30080)), slice("web", ep("10.244.1.2"), ep("10.244.2.2")))
		require.Equal(t, map[string]int{"pod2": 40}, c.Who("tcp", "10.96.0.10:80"))
		require.Len(t, out.Who("tcp", nodeIP+":30080"), 2, "the policy is for the cluster address")
		l.set(svc("web", "10.96.0.10", internalLocal), slice("web", ep("10.244.2.2")))
		require.Equal(t, "nothing", c.Silent("tcp", "10.96.0.10:80"))
	})
}

func TestSourceRanges(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c, out := l.Pod(2), l.Pod(4), l.Outside()
		a.Serve(8080)
		set := func(ranges ...string) {
			l.set(svc("web", "10.96.0.10", dual("fd96::10"), balancer("203.0.113.7", "2001:db8:7::7"), sourceRanges(ranges...)), slice("web", ep("10.244.1.2")), slice("web", ep("fd00:1::2")))
		}
		set("198.18.0.0/15", "192.0.2.0/24", "192.0.2.8/30", "2001:db8::/64")
		require.Contains(t, out.Ask("tcp", "203.0.113.7:80"), "pod2")
		require.Contains(t, out.Ask("tcp", "[2001:db8:7::7]:80"), "pod2")
		require.Equal(t, "nothing", c.Silent("tcp", "203.0.113.7:80"))
		require.Contains(t, c.Ask("tcp", "10.96.0.10:80"), "pod2", "the ranges are for the balancer's address")
		set(" 198.18.0.0/15 ")
		require.Equal(t, "nothing", out.Silent("udp", "203.0.113.7:80"))
		set("0.0.0.0/0", "198.18.0.0/15")
		require.Contains(t, out.Ask("tcp", "203.0.113.7:80"), "pod2")
		// An address that is the balancer's own business.
		l.set(svc("web", "10.96.0.10", balancer("203.0.113.7"), func(s *corev1.Service) {
			mode := corev1.LoadBalancerIPModeProxy
			s.Status.LoadBalancer.Ingress[0].IPMode = &mode
		}), slice("web", ep("10.244.1.2")))
		require.NotContains(t, out.Silent("tcp", "203.0.113.7:80"), "pod2")
	})
}

func TestSessionAffinity(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		clients := []*netlab.Host{l.Pod(20), l.Pod(21), l.Pod(22), l.Pod(23), l.Outside()}
		var list []string
		for n := 2; n < 7; n++ {
			l.Pod(n).Serve(8080)
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
			got := c.Who("tcp", "10.96.0.10:80")
			require.Len(t, got, 1, "%s: %v", c.Name, got)
			for name := range got {
				used[c.Name] = name
			}
		}
		require.Equal(t, used["out"], strings.Fields(clients[4].Ask("tcp", nodeIP+":30080"))[0], "the same endpoint whatever the address")
		// Another agent changes nothing of it.
		l.start(Config{})
		l.pass()
		for _, c := range clients {
			require.Equal(t, map[string]int{used[c.Name]: 40}, c.Who("tcp", "10.96.0.10:80"))
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
			got := c.Who("tcp", "10.96.0.10:80")
			require.Len(t, got, 1)
			require.Zero(t, got[gone])
			if used[c.Name] != gone {
				require.Positive(t, got[used[c.Name]], c.Name)
			}
		}
		// The time is a Service's, and may change.
		set(1, rest...)
		require.Eventually(t, func() bool { return len(clients[0].Who("udp", "10.96.0.10:80")) == 1 }, netlab.Patience, netlab.Impatience)
	})
}

func TestEndpointsThatEnd(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.Pod(2), l.Pod(3), l.Pod(4)
		a.Serve(8080)
		b.Serve(8080)
		s := svc("web", "10.96.0.10")
		l.set(s, slice("web", ep("10.244.1.2")))
		var conns []net.Conn
		c.Do(func() {
			for _, network := range networks {
				conn, err := net.Dial(network, "10.96.0.10:80")
				l.Must(err)
				conns = append(conns, conn)
			}
		})
		for _, conn := range conns {
			defer conn.Close()
			require.Equal(t, "pod2 10.244.1.4", netlab.Talk(conn, netlab.Patience))
		}
		// Who has a connection keeps it; who comes gets another endpoint.
		l.set(s, slice("web", ep("10.244.1.2", terminating), ep("10.244.1.3")))
		require.Equal(t, map[string]int{"pod3": 40}, c.Who("tcp", "10.96.0.10:80"))
		for _, conn := range conns {
			require.Equal(t, "pod2 10.244.1.4", netlab.Talk(conn, netlab.Patience))
		}
		// If there is no other, it is still used.
		l.set(s, slice("web", ep("10.244.1.2", terminating), ep("10.244.1.3", notReady)))
		require.Equal(t, map[string]int{"pod2": 40}, c.Who("tcp", "10.96.0.10:80"))
		// One that is gone has no UDP clients any more, even if they never stop asking.
		l.set(s, slice("web", ep("10.244.1.3")))
		require.Equal(t, "pod3 10.244.1.4", netlab.Talk(conns[1], netlab.Patience))
		require.Equal(t, "pod2 10.244.1.4", netlab.Talk(conns[0], netlab.Patience))
		// None left: told at once. And back.
		l.set(s, slice("web"))
		require.Equal(t, "refused", netlab.Talk(conns[1], netlab.Patience))
		l.set(s, slice("web", ep("10.244.1.2")))
		require.Equal(t, "pod2 10.244.1.4", netlab.Talk(conns[1], netlab.Patience))
		// Node ports of UDP likewise.
		l.Outside()
		l.set(svc("web", "10.96.0.10", nodePort(30080)), slice("web", ep("10.244.1.2")))
		var flow net.Conn
		c.Do(func() {
			var err error
			flow, err = net.Dial("udp", nodeIP+":30080")
			l.Must(err)
		})
		defer flow.Close()
		require.Contains(t, netlab.Talk(flow, netlab.Patience), "pod2 ")
		l.set(svc("web", "10.96.0.10", nodePort(30080)), slice("web", ep("10.244.1.3")))
		require.Contains(t, netlab.Talk(flow, netlab.Patience), "pod3 ")
	})
}

// What is on the table stays while no agent runs, and while a new one has heard nothing.
func TestRulesStayWithoutAnAgent(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, c := l.Pod(2), l.Pod(4)
		a.Serve(8080)
		l.set(svc("web", "10.96.0.10"), slice("web", ep("10.244.1.2")))
		l.store = feed.NewStore("n1")
		l.start(Config{})
		l.proxy.pass(t.Context())
		require.Equal(t, "pod2 10.244.1.4", c.Ask("tcp", "10.96.0.10:80"))
		l.store.Update(func(t *feed.Txn) { t.SetService(svc("web", "10.96.0.10")) })
		l.proxy.pass(t.Context())
		require.Equal(t, "pod2 10.244.1.4", c.Ask("tcp", "10.96.0.10:80"), "a part is not the whole")
		l.store.Update(func(t *feed.Txn) { t.SetSynced() })
		l.pass()
		require.Equal(t, "refused", c.Ask("tcp", "10.96.0.10:80"))
		require.NoError(t, Remove(t.Context(), l.proxy.cfg.Table))
		require.NoError(t, Remove(t.Context(), l.proxy.cfg.Table))
	})
}
