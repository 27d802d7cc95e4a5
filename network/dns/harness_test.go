package dns

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/network/feed"
)

func ptr[T any](v T) *T { return &v }

func tcpPort(name string, port int32) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Port: port, Protocol: corev1.ProtocolTCP}
}

func service(namespace, name string, ips []string, ports ...corev1.ServicePort) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: ips[0], ClusterIPs: ips, Ports: ports}
	return s
}

func external(namespace, name, target string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: target},
	}
}

func ready(host string, ips ...string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: ips, Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}}
	if host != "" {
		e.Hostname = &host
	}
	return e
}

func notReady(host string, ips ...string) discoveryv1.Endpoint {
	e := ready(host, ips...)
	e.Conditions.Ready = ptr(false)
	return e
}

func slice(namespace, name, of string, family discoveryv1.AddressType, ports []discoveryv1.EndpointPort, list ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: of}},
		AddressType: family, Ports: ports, Endpoints: list,
	}
}

func httpPort() []discoveryv1.EndpointPort {
	return []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(80)), Protocol: ptr(corev1.ProtocolTCP)}}
}

// fill is a cluster with one Service of each kind.
func fill(t *feed.Txn) {
	t.SetService(service("default", "kubernetes", []string{"10.96.0.1"}, tcpPort("https", 443)))
	t.SetService(service("testns", "svc1", []string{"10.0.0.1"}, tcpPort("http", 80)))
	t.SetSlice(slice("testns", "svc1-a", "svc1", discoveryv1.AddressTypeIPv4, httpPort(), ready("", "172.0.0.1")))
	t.SetService(service("testns", "dual", []string{"10.0.0.3", "fd00::3"}, tcpPort("http", 80), corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, tcpPort("", 9)))
	t.SetService(service("testns", "empty", []string{"None"}, tcpPort("http", 80)))
	t.SetService(service("testns", "hdls", []string{"None"}, tcpPort("http", 80)))
	t.SetSlice(slice("testns", "hdls-4", "hdls", discoveryv1.AddressTypeIPv4, httpPort(),
		ready("", "172.0.0.2"), ready("pet-0", "172.0.0.3"), ready("dup", "172.0.0.4"), ready("dup", "172.0.0.5"), notReady("late", "172.0.0.6"),
		discoveryv1.Endpoint{Addresses: []string{"172.0.0.7"}}))
	t.SetSlice(slice("testns", "hdls-4b", "hdls", discoveryv1.AddressTypeIPv4,
		[]discoveryv1.EndpointPort{{Name: ptr("metrics"), Port: ptr(int32(9100)), Protocol: ptr(corev1.ProtocolTCP)}}, ready("", "172.0.0.2")))
	t.SetSlice(slice("testns", "hdls-6", "hdls", discoveryv1.AddressTypeIPv6, httpPort(), ready("", "5678:abcd::1")))
	t.SetSlice(slice("testns", "hdls-f", "hdls", discoveryv1.AddressTypeFQDN, httpPort(), ready("", "a.example")))
	early := service("testns", "early", []string{"None"})
	early.Spec.PublishNotReadyAddresses = true
	t.SetService(early)
	t.SetSlice(slice("testns", "early-4", "early", discoveryv1.AddressTypeIPv4, nil, notReady("pet-0", "172.0.0.20")))
	t.SetService(external("testns", "ext", "WWW.example.net"))
	t.SetService(external("testns", "ext-in", "svc1.testns.svc.cluster.local"))
	t.SetService(external("testns", "ext-chain", "ext.testns.svc.cluster.local."))
	t.SetService(external("testns", "ext-loop", "ext-loop.testns.svc.cluster.local"))
	t.SetService(external("testns", "ext-none", "none.testns.svc.cluster.local"))
	t.SetService(external("testns", "ext-gone", "gone.example.net"))
	t.SetService(external("testns", "ext-ip", "1.2.3.4"))
}

func cluster() *feed.Store {
	s := feed.NewStore("a1")
	s.Update(func(t *feed.Txn) { fill(t); t.SetSynced() })
	return s
}

// server is one on a loopback address that this test has alone.
func server(t testing.TB, store *feed.Store, change func(*Config), prepare ...func(*Server)) (*Server, string) {
	t.Helper()
	cfg := Config{
		Domain: "cluster.local", Store: store, Logger: slog.New(slog.DiscardHandler),
	}
	own := ownAddr()
	cfg.Addresses, cfg.Port = []netip.Addr{own.Addr()}, own.Port()
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	require.NoError(t, err)
	for _, p := range prepare {
		p(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	wait.Go(func() { _ = s.Run(ctx) })
	t.Cleanup(func() { cancel(); wait.Wait() })
	addr := netip.AddrPortFrom(cfg.Addresses[0], cfg.Port).String()
	require.Eventually(t, func() bool { // listens, and has the view that is there
		c := dns.Client{Timeout: time.Second, Net: "tcp"}
		_, _, err := c.Exchange(ask("dns-version.cluster.local.", dns.TypeTXT), addr)
		return err == nil && s.zone.view.Load().Revision() == store.View().Revision()
	}, 30*time.Second, time.Millisecond)
	return s, addr
}

var addrs atomic.Uint32

// ownAddr is an address of loopback that no other server of this process has, and of
// other processes' only one whose number ends like ours. Ports that were free a moment
// ago are not: who asks for one next is given the same.
func ownAddr() netip.AddrPort {
	n := addrs.Add(1)
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, byte(1 + os.Getpid()%250), byte(n >> 8), byte(n)}), 5353)
}

func ask(name string, kind uint16) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, kind)
	return m
}

func exchange(t testing.TB, network, addr string, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: 20 * time.Second, UDPSize: maxUDP}
	r, _, err := c.Exchange(m, addr)
	require.NoError(t, err)
	return r
}

// lines are an answer's records, each as text with single spaces.
func lines(list []dns.RR) (out []string) {
	for _, rr := range list {
		out = append(out, strings.Join(strings.Fields(rr.String()), " "))
	}
	return out
}

// fake is another server. It answers by what a function says; nil: nothing.
type fake struct {
	addr netip.AddrPort
	mu   sync.Mutex
	say  func(network string, q *dns.Msg) []byte
	seen []string
}

func (f *fake) set(say func(network string, q *dns.Msg) []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.say = say
}

func (f *fake) asked(name string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.seen {
		if s == name {
			n++
		}
	}
	return n
}

func (f *fake) answer(network string, raw []byte) []byte {
	q := new(dns.Msg)
	if q.Unpack(raw) != nil || len(q.Question) != 1 {
		return nil
	}
	f.mu.Lock()
	say := f.say
	f.seen = append(f.seen, q.Question[0].Name)
	f.mu.Unlock()
	return say(network, q)
}

func newFake(t testing.TB, say func(network string, q *dns.Msg) []byte) *fake {
	t.Helper()
	f := &fake{addr: ownAddr(), say: say}
	p, err := net.ListenPacket("udp", f.addr.String())
	require.NoError(t, err)
	l, err := net.Listen("tcp", f.addr.String())
	require.NoError(t, err)
	var wait sync.WaitGroup
	wait.Go(func() {
		buf := make([]byte, 65535)
		for {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			if b := f.answer("udp", buf[:n]); b != nil {
				_, _ = p.WriteTo(b, from)
			}
		}
	})
	wait.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wait.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
				var size [2]byte
				if _, err := io.ReadFull(conn, size[:]); err != nil {
					return
				}
				raw := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(conn, raw); err != nil {
					return
				}
				if b := f.answer("tcp", raw); b != nil {
					binary.BigEndian.PutUint16(size[:], uint16(len(b)))
					_, _ = conn.Write(append(size[:], b...))
				}
			})
		}
	})
	t.Cleanup(func() { p.Close(); l.Close(); wait.Wait() })
	return f
}

// says answers every question with the records given, whose names are as asked when
// they are "@".
func says(t testing.TB, rcode int, records ...string) func(string, *dns.Msg) []byte {
	return func(_ string, q *dns.Msg) []byte {
		m := new(dns.Msg)
		m.SetRcode(q, rcode)
		for _, text := range records {
			rr, err := dns.NewRR(strings.Replace(text, "@", q.Question[0].Name, 1))
			require.NoError(t, err)
			if rr.Header().Rrtype == dns.TypeSOA {
				m.Ns = append(m.Ns, rr)
			} else {
				m.Answer = append(m.Answer, rr)
			}
		}
		m.SetEdns0(1232, false)
		raw, err := m.Pack()
		require.NoError(t, err)
		return raw
	}
}

// asks makes a server ask fakes for all names that are not the cluster's.
func (s *Server) asks(list ...*fake) {
	var addrs []netip.AddrPort
	for _, f := range list {
		addrs = append(addrs, f.addr)
	}
	s.forward.set(addrs)
}
