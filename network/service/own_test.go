package service

import (
	"context"
	"fmt"
	"net"
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
