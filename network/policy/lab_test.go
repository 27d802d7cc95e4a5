package policy

import (
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
	"timonel/network/netlab"
	"timonel/network/tables"
	pb "timonel/proto/timonel/v1"
)

// A lab is a node with the tables of policies.
type lab struct {
	*netlab.Node
	t     *testing.T
	store *feed.Store
	rules *Rules
	pods  map[string]Pod
}

func inLab(t *testing.T, body func(l *lab)) {
	t.Helper()
	netlab.In(t, func(n *netlab.Node) {
		l := &lab{Node: n, t: t, store: feed.NewStore("n1"), pods: map[string]Pod{}}
		l.store.Update(func(t *feed.Txn) { t.SetSynced() })
		l.start(Config{})
		body(l)
	})
}

// start makes a new agent's Rules in the place of those before.
func (l *lab) start(cfg Config) {
	cfg.Table, cfg.Bridge, cfg.Store, cfg.Logger = "timonel-policy-test", "br0", l.store, slog.New(slog.DiscardHandler)
	cfg.Look = time.Nanosecond
	var err error
	l.rules, err = New(cfg)
	l.Must(err)
	for _, p := range l.pods {
		l.rules.SetPod(p)
	}
}

func (l *lab) pass() {
	l.t.Helper()
	l.rules.pass(l.t.Context())
	require.NoError(l.t, l.rules.failed)
}

// pod makes pod N, which is known to the rules.
func (l *lab) pod(n int, ports ...corev1.ContainerPort) *netlab.Host {
	l.t.Helper()
	h := l.Pod(n)
	p := Pod{UID: "uid-" + h.Name, Namespace: "default", Name: h.Name, Device: "v-" + h.Name, MAC: l.mac(h), Ports: ports,
		Addresses: []netip.Addr{addr(n), addr6(n)}}
	l.pods[p.UID] = p
	l.rules.SetPod(p)
	return h
}

func (l *lab) mac(h *netlab.Host) (mac net.HardwareAddr) {
	h.Do(func() {
		link, err := netlink.LinkByName("p-" + h.Name)
		l.Must(err)
		mac = link.Attrs().HardwareAddr
	})
	return mac
}

func addr(n int) netip.Addr  { return netip.AddrFrom4([4]byte{10, 244, 1, byte(n)}) }
func addr6(n int) netip.Addr { return netip.AddrFrom16([16]byte{0: 0xfd, 3: 1, 15: hexish(n)}) }

// hexish reads a decimal number as the hexadecimal one that the lab makes of it.
func hexish(n int) byte { return byte(n/10*16 + n%10) }

func at(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

// Objects.

func from(groups ...string) *pb.NetworkRule { return &pb.NetworkRule{Groups: groups, AnyPort: true} }

func block(cidr string, except ...string) *pb.NetworkRule {
	return &pb.NetworkRule{Blocks: []*pb.NetworkBlock{{Cidr: cidr, Except: except}}, AnyPort: true}
}

func onPorts(r *pb.NetworkRule, ports ...*pb.NetworkPort) *pb.NetworkRule {
	r.AnyPort, r.Ports = false, ports
	return r
}

func anyPeer() *pb.NetworkRule { return &pb.NetworkRule{AnyPeer: true, AnyPort: true} }

func port(protocol string, first, last uint32) *pb.NetworkPort {
	return &pb.NetworkPort{Protocol: protocol, First: first, Last: last}
}

func ingressPolicy(name string, rules ...*pb.NetworkRule) *pb.NetworkPolicyItem {
	return &pb.NetworkPolicyItem{Namespace: "default", Name: name, IngressIsolated: true, Ingress: rules}
}

func egressPolicy(name string, rules ...*pb.NetworkRule) *pb.NetworkPolicyItem {
	return &pb.NetworkPolicyItem{Namespace: "default", Name: name, EgressIsolated: true, Egress: rules}
}

func group(name string, pods ...int) *pb.NetworkGroup {
	g := &pb.NetworkGroup{Of: name, Name: name + ".x"}
	for _, n := range pods {
		g.V4 = append(g.V4, addr(n).AsSlice()...)
		g.V6 = append(g.V6, addr6(n).AsSlice()...)
	}
	return g
}

// selected says which policies hold for a pod.
func selected(n *netlab.Host, policies ...string) *pb.NetworkPod {
	out := &pb.NetworkPod{Namespace: "default", Name: n.Name, Uid: "uid-" + n.Name}
	for _, p := range policies {
		namespace := "default"
		if strings.HasPrefix(p, "/") {
			namespace, p = "", p[1:]
		}
		out.Policies = append(out.Policies, &pb.NetworkPolicyRef{Namespace: namespace, Name: p})
	}
	return out
}

// set puts objects, and brings the tables there.
func (l *lab) set(objects ...any) {
	l.t.Helper()
	l.store.Update(func(t *feed.Txn) {
		for _, o := range objects {
			switch o := o.(type) {
			case *pb.NetworkPolicyItem:
				t.SetPolicy(o)
			case *pb.NetworkGroup:
				t.SetGroup(o)
			case *pb.NetworkPod:
				t.SetPod(o)
			default:
				l.t.Fatalf("%T", o)
			}
		}
	})
	l.pass()
}

func (l *lab) bridgeFilter() { require.True(l.t, tables.BridgeFilter()) }
