package service

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/netlab"
	pb "timonel/proto/timonel/v1"
)

// TestOwnPacketsGoToNoService: a Service claims a controller's address and the node's own.
// It gets what others send there, and nothing of what nodes and controllers say to each
// other: neither its endpoints, nor that there are none, nor its source ranges.
func TestOwnPacketsGoToNoService(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		const clusterPort = 81
		evil, controller := l.Pod(2), l.Outside()
		evil.Serve(8080)
		controller.Serve(80)
		controller.Serve(clusterPort)
		node := l.Self()
		node.Serve(clusterPort)
		l.start(Config{ClusterPorts: []uint16{clusterPort}})

		own := func(address string) string {
			c, err := (&net.Dialer{Timeout: netlab.Patience, Control: pb.OwnPackets}).DialContext(context.Background(), "tcp", address)
			if err != nil {
				return netlab.Failure(err)
			}
			defer c.Close()
			return netlab.Talk(c, netlab.Patience)
		}
		steals := func(s *corev1.Service) {
			s.Spec.Ports[1].Port = clusterPort // UDP
			s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, nodeIP, nodeIP6)
		}
		theirs := []option{dual("fd96::10"), externalIPs(outsideIP, outsideIP6), steals}
		for name, set := range map[string]func(){
			"endpoints": func() {
				l.set(svc("evil", "10.96.0.10", theirs...), slice("evil", ep("10.244.1.2")), slice("evil", ep("fd00:1::2")))
				for _, ip := range []string{outsideIP, outsideIP6} { // what others send there is the Service's
					require.Contains(t, netlab.Ask("tcp", net.JoinHostPort(ip, "80")), "pod2 ")
				}
			},
			"none": func() { l.set(svc("evil", "10.96.0.10", theirs...)) },
			"source ranges": func() {
				l.set(svc("evil", "10.96.0.10", dual("fd96::10"), balancer(outsideIP, outsideIP6, nodeIP, nodeIP6), sourceRanges("203.0.113.0/30", "2001:db8:dead::/64"),
					func(s *corev1.Service) { s.Spec.Ports[1].Port = clusterPort }), slice("evil", ep("10.244.1.2")), slice("evil", ep("fd00:1::2")))
			},
		} {
			set()
			for _, ip := range []string{outsideIP, outsideIP6} {
				require.Contains(t, own(net.JoinHostPort(ip, "80")), "out ", "%s: a stream to %s", name, ip)
				require.Contains(t, netlab.Ask("udp", net.JoinHostPort(ip, fmt.Sprint(clusterPort))), "out ", "%s: gossip to %s", name, ip)
			}
			for _, ip := range []string{nodeIP, nodeIP6} {
				var got string
				controller.Do(func() { got = netlab.Ask("udp", net.JoinHostPort(ip, fmt.Sprint(clusterPort))) })
				require.Contains(t, got, "node ", "%s: gossip of %s", name, ip)
			}
		}
		l.same("at the end")
	})
}

// What this node answers itself answers pods and the node, and no stranger.
func TestStrangersAskNothing(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, out := l.Pod(2), l.Outside()
		l.Address("lo", "10.96.0.10/32", "fd96::a/128")
		l.Self().Serve(53, "10.96.0.10", "fd96::a")
		served := Networks{
			Pods:  []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/16")},
			Local: []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd96::a")},
		}
		at := []string{"10.96.0.10:53", "[fd96::a]:53"}
		ask := func(h *netlab.Host, expect string) {
			t.Helper()
			for _, network := range networks {
				for _, address := range at {
					if expect == "nothing" {
						require.Equal(t, expect, h.Silent(network, address), address)
					} else {
						require.Contains(t, h.Ask(network, address), expect, address)
					}
				}
			}
		}
		l.proxy.SetNetworks(served)
		l.pass()
		ask(a, "node ")
		ask(l.Self(), "node ")
		ask(out, "nothing")
		l.start(Config{NameClients: []netip.Prefix{netip.MustParsePrefix(outsideIP + "/32"), netip.MustParsePrefix(outsideIP6 + "/128")}})
		l.proxy.SetNetworks(served)
		l.pass()
		ask(out, "node ")
		served.Pods = nil // of a controller that does not say where pods are
		l.start(Config{})
		l.proxy.SetNetworks(served)
		l.pass()
		ask(out, "node ")
	})
}
