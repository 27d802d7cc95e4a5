package service

import (
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"timonel/network/feed"
	"timonel/network/netlab"
	"timonel/network/tables"
)

// A lab is a node with the tables of Services.
type lab struct {
	*netlab.Node
	t     *testing.T
	store *feed.Store
	proxy *Proxy
	quiet bool // no warnings
}

const nodeIP, nodeIP6, outsideIP, outsideIP6 = netlab.NodeIP, netlab.NodeIP6, netlab.OutsideIP, netlab.OutsideIP6

func inLab(t *testing.T, body func(l *lab)) {
	t.Helper()
	netlab.In(t, func(n *netlab.Node) {
		l := &lab{Node: n, t: t, store: feed.NewStore("n1")}
		l.store.Update(func(t *feed.Txn) { t.SetSynced() })
		l.start(Config{})
		body(l)
	})
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
	l.Must(err)
	l.proxy.filter = tables.BridgeFilter()
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
