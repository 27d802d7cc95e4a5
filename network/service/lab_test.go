package service

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"timonel/network/feed"
	"timonel/test/needs"
)

// A lab is a node in a network namespace of its own, with pods on a bridge and a client
// outside, each in one too. The test's goroutine is the node.
type lab struct {
	t     *testing.T
	node  netns.NsHandle
	store *feed.Store
	proxy *Proxy
	quiet bool // no warnings
}

const (
	nodeIP, nodeIP6       = "192.0.2.1", "2001:db8::1"
	outsideIP, outsideIP6 = "192.0.2.9", "2001:db8::9"
)

// inLab runs body as the node. Threads that were in a namespace end with it.
func inLab(t *testing.T, body func(l *lab)) {
	t.Helper()
	needs.Root(t, "makes network namespaces")
	if _, err := exec.LookPath("nft"); err != nil {
		needs.Skip(t, "nft is not installed")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		l := &lab{t: t}
		l.must(unix.Unshare(unix.CLONE_NEWNET))
		var err error
		l.node, err = netns.Get()
		l.must(err)
		defer l.node.Close()
		lo, err := netlink.LinkByName("lo")
		l.must(err)
		l.must(netlink.LinkSetUp(lo))
		for path, value := range map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/default/accept_dad": "0",
		} {
			l.must(exec.Command("sh", "-c", "echo "+value+" > /proc/sys/"+path).Run())
		}
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		l.must(netlink.LinkAdd(bridge))
		l.address("br0", "10.244.1.1/24", "fd00:1::1/64")
		l.must(netlink.LinkSetUp(bridge))
		// What is addressed to a Service and is not translated needs a route to be rejected.
		wan := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wan"}, PeerName: "wan-peer"}
		l.must(netlink.LinkAdd(wan))
		peer, err := netlink.LinkByName("wan-peer")
		l.must(err)
		l.must(netlink.LinkSetUp(peer))
		l.address("wan", "203.0.113.129/25", "2001:db8:ffff::1/64")
		l.must(netlink.LinkSetUp(wan))
		for _, gw := range []string{"203.0.113.130", "2001:db8:ffff::2"} {
			l.must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw), LinkIndex: wan.Attrs().Index}))
		}
		l.store = feed.NewStore("n1")
		l.store.Update(func(t *feed.Txn) { t.SetSynced() })
		l.start(Config{})
		body(l)
	}()
	<-done
}

func (l *lab) must(err error) {
	if err != nil {
		l.t.Helper()
		require.NoError(l.t, err)
	}
}

func (l *lab) address(link string, addresses ...string) {
	dev, err := netlink.LinkByName(link)
	l.must(err)
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		l.must(err)
		a.Flags = unix.IFA_F_NODAD
		l.must(netlink.AddrAdd(dev, a))
	}
}

// start makes a new agent's Proxy in the place of the one before.
func (l *lab) start(cfg Config) {
	cfg.Node, cfg.Table, cfg.Store, cfg.Logger = "n1", "timonel-services-test", l.store, slog.New(slog.NewTextHandler(testLog{l.t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if l.quiet {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.NodeIPs = []netip.Addr{netip.MustParseAddr(nodeIP), netip.MustParseAddr(nodeIP6)}
	var err error
	l.proxy, err = New(cfg)
	l.must(err)
	l.proxy.filter = bridgeFilter(l.proxy.log)
	l.proxy.SetNetworks(Networks{
		Pods:     []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/16")},
		Own:      []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd96::/112")},
	})
}

// pass brings the tables to what the store says.
func (l *lab) pass() {
	l.t.Helper()
	l.proxy.pass(l.t.Context())
	for _, s := range l.proxy.sides {
		require.False(l.t, s.table.broken)
		require.Empty(l.t, s.held)
	}
}

// host is somebody with a network namespace.
type host struct {
	l    *lab
	name string
	ns   netns.NsHandle
}

// attach makes a host on a link of the node; bridge: on which bridge, or none.
func (l *lab) attach(name, bridge string, addresses, gateways []string) *host {
	l.t.Helper()
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v-" + name}, PeerName: "p-" + name}
	l.must(netlink.LinkAdd(veth))
	ns, err := netns.New()
	l.must(err)
	l.must(netns.Set(l.node))
	l.t.Cleanup(func() { ns.Close() })
	peer, err := netlink.LinkByName("p-" + name)
	l.must(err)
	l.must(netlink.LinkSetNsFd(peer, int(ns)))
	if bridge != "" {
		br, err := netlink.LinkByName(bridge)
		l.must(err)
		l.must(netlink.LinkSetMaster(veth, br))
		l.must(netlink.LinkSetHairpin(veth, true))
	}
	l.must(netlink.LinkSetUp(veth))
	h := &host{l, name, ns}
	h.do(func() {
		lo, err := netlink.LinkByName("lo")
		l.must(err)
		l.must(netlink.LinkSetUp(lo))
		l.must(exec.Command("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad").Run())
		l.address("p-"+name, addresses...)
		dev, err := netlink.LinkByName("p-" + name)
		l.must(err)
		l.must(netlink.LinkSetUp(dev))
		for _, gw := range gateways {
			l.must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw), LinkIndex: dev.Attrs().Index}))
		}
	})
	return h
}

func (l *lab) pod(n int) *host {
	return l.attach(fmt.Sprintf("pod%d", n), "br0", []string{fmt.Sprintf("10.244.1.%d/24", n), fmt.Sprintf("fd00:1::%d/64", n)}, []string{"10.244.1.1", "fd00:1::1"})
}

// outside makes a client that is not of the cluster.
func (l *lab) outside() *host {
	l.t.Helper()
	h := l.attach("out", "", []string{outsideIP + "/24", outsideIP6 + "/64"}, []string{nodeIP, nodeIP6})
	l.address("v-out", nodeIP+"/24", nodeIP6+"/64")
	return h
}

// otherNode makes another node with a pod of its own.
func (l *lab) otherNode() *host {
	l.t.Helper()
	h := l.attach("n2", "", []string{"198.51.100.2/24", "2001:db8:2::2/64", "10.244.2.2/32", "fd00:2::2/128"}, []string{"198.51.100.1", "2001:db8:2::1"})
	l.address("v-n2", "198.51.100.1/24", "2001:db8:2::1/64")
	link, err := netlink.LinkByName("v-n2")
	l.must(err)
	for dst, gw := range map[string]string{"10.244.2.0/24": "198.51.100.2", "fd00:2::/64": "2001:db8:2::2"} {
		_, n, err := net.ParseCIDR(dst)
		l.must(err)
		l.must(netlink.RouteAdd(&netlink.Route{Dst: n, Gw: net.ParseIP(gw), LinkIndex: link.Attrs().Index}))
	}
	return h
}

// do runs f as the host.
func (h *host) do(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		h.l.must(netns.Set(h.ns))
		f()
	}()
	<-done
}

// serve answers on a port by TCP and UDP with the host's name and the client's address,
// at all addresses or those given.
func (h *host) serve(port int, at ...string) {
	h.l.t.Helper()
	if len(at) == 0 {
		at = []string{""}
	}
	for _, ip := range at {
		h.serveAt(net.JoinHostPort(ip, strconv.Itoa(port)))
	}
}

func (h *host) serveAt(address string) {
	h.do(func() {
		l, err := net.Listen("tcp", address)
		h.l.must(err)
		u, err := net.ListenPacket("udp", address)
		h.l.must(err)
		h.l.t.Cleanup(func() { l.Close(); u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					for r := bufio.NewReader(c); ; {
						if _, err := r.ReadString('\n'); err != nil {
							return
						}
						fmt.Fprintf(c, "%s %s\n", h.name, hostOf(c.RemoteAddr()))
					}
				}()
			}
		}()
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo(fmt.Appendf(nil, "%s %s\n", h.name, hostOf(from)), from)
			}
		}()
	})
}

func hostOf(a net.Addr) string {
	host, _, _ := net.SplitHostPort(a.String())
	ip, _ := netip.ParseAddr(host)
	return ip.Unmap().String()
}

// Patience is for answers that must come, and for those that must not.
const patience, impatience = 20 * time.Second, 400 * time.Millisecond

// ask returns "NAME CLIENT" as the server that answers says it, or what went wrong:
// refused or nothing.
func ask(network, address string) string { return asking(network, address, patience) }

func asking(network, address string, d time.Duration) string {
	c, err := (&net.Dialer{Timeout: d}).DialContext(context.Background(), network, address)
	if err != nil {
		return failure(err)
	}
	defer c.Close()
	return talk(c, d)
}

func talk(c net.Conn, d time.Duration) string {
	_ = c.SetDeadline(time.Now().Add(d))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return failure(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return failure(err)
	}
	return strings.TrimSpace(line)
}

func failure(err error) string {
	switch text := err.Error(); {
	case strings.Contains(text, "refused"):
		return "refused"
	case strings.Contains(text, "timeout"):
		return "nothing"
	default:
		return text
	}
}

func (h *host) ask(network, address string) (out string) {
	h.do(func() { out = ask(network, address) })
	return out
}

// silent is for what must get no answer.
func (h *host) silent(network, address string) (out string) {
	h.do(func() { out = asking(network, address, impatience) })
	return out
}

// who asks many times and says which servers answered.
func (h *host) who(network, address string) map[string]int {
	out := map[string]int{}
	h.do(func() {
		for range 40 {
			name, _, _ := strings.Cut(ask(network, address), " ")
			out[name]++
		}
	})
	return out
}

// Objects.

type option func(*corev1.Service)

func svc(name, ip string, options ...option) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, Ports: []corev1.ServicePort{
			{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80},
		}},
	}
	for _, o := range options {
		o(s)
	}
	return s
}

func dual(ip6 string) option {
	return func(s *corev1.Service) { s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, ip6) }
}

func nodePort(port int32) option {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeNodePort
		for i := range s.Spec.Ports {
			s.Spec.Ports[i].NodePort = port
		}
	}
}

func externalIPs(ips ...string) option {
	return func(s *corev1.Service) { s.Spec.ExternalIPs = ips }
}

func balancer(ips ...string) option {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		for _, ip := range ips {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
	}
}

func sourceRanges(ranges ...string) option {
	return func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = ranges }
}

func externalLocal(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func internalLocal(s *corev1.Service) {
	s.Spec.InternalTrafficPolicy = ptr.To(corev1.ServiceInternalTrafficPolicyLocal)
}

func sticky(seconds int32) option {
	return func(s *corev1.Service) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
}

// ep says where an endpoint is: n1's pods are 10.244.1.N, n2's 10.244.2.N.
func ep(ip string, options ...func(*discoveryv1.Endpoint)) discoveryv1.Endpoint {
	node := "n2"
	if strings.HasPrefix(ip, "10.244.1.") || strings.HasPrefix(ip, "fd00:1:") {
		node = "n1"
	}
	e := discoveryv1.Endpoint{Addresses: []string{ip}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)}}
	for _, o := range options {
		o(&e)
	}
	return e
}

func notReady(e *discoveryv1.Endpoint) {
	e.Conditions.Ready, e.Conditions.Serving = ptr.To(false), ptr.To(false)
}

func terminating(e *discoveryv1.Endpoint) {
	e.Conditions.Ready, e.Conditions.Terminating = ptr.To(false), ptr.To(true)
}

func zones(names ...string) func(*discoveryv1.Endpoint) {
	return func(e *discoveryv1.Endpoint) {
		e.Hints = &discoveryv1.EndpointHints{}
		for _, n := range names {
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: n})
		}
	}
}

func nodes(names ...string) func(*discoveryv1.Endpoint) {
	return func(e *discoveryv1.Endpoint) {
		e.Hints = &discoveryv1.EndpointHints{}
		for _, n := range names {
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: n})
		}
	}
}

// slice has the endpoints of one family of a Service, on port 8080.
func slice(service string, list ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	kind, suffix := discoveryv1.AddressTypeIPv4, "-4"
	if len(list) > 0 && strings.Contains(list[0].Addresses[0], ":") {
		kind, suffix = discoveryv1.AddressTypeIPv6, "-6"
	}
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: service + suffix, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: kind, Endpoints: list,
		Ports: []discoveryv1.EndpointPort{
			{Name: ptr.To("tcp"), Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To(int32(8080))},
			{Name: ptr.To("udp"), Protocol: ptr.To(corev1.ProtocolUDP), Port: ptr.To(int32(8080))},
		},
	}
}

// set puts a Service and its slices, and brings the table there.
func (l *lab) set(s *corev1.Service, of ...*discoveryv1.EndpointSlice) {
	l.t.Helper()
	l.store.Update(func(t *feed.Txn) {
		t.SetService(s)
		for _, o := range of {
			t.SetSlice(o)
		}
	})
	l.pass()
}

func writeFile(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }

type testLog struct{ t *testing.T }

func (w testLog) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}
