package packets

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"timonel/network/feed"
	"timonel/network/hostport"
	"timonel/network/netlab"
	"timonel/network/policy"
	"timonel/network/service"
	"timonel/network/tables"
	pb "timonel/proto/timonel/v1"
)

const (
	services = 1000
	rounds   = 7 // of each way, in turns: what else the machine does hits all alike
	transfer = 400 * time.Millisecond
	asks     = 4000
)

// lane is a way from one pod to another.
type lane struct {
	name string
	from *netlab.Host
	to   string // host, of which the ports are 80, which takes all, and 81, which answers
}

// BenchmarkPackets is throughput and latency of TCP from pod to pod of one node.
func BenchmarkPackets(b *testing.B) {
	netlab.In(b, func(bare *netlab.Node) {
		for _, file := range []string{"iptables", "ip6tables"} {
			if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+file, []byte("0"), 0o644); !os.IsNotExist(err) {
				bare.Must(err)
			}
		}
		plain := bare.Pod(2)
		answer(b, bare.Pod(3))
		netlab.In(b, func(node *netlab.Node) {
			pod := node.Pod(2)
			answer(b, node.Pod(3))
			carry(b, node)
			lanes := []lane{{"bare", plain, "10.244.1.3"}, {"pod", pod, "10.244.1.3"}, {"service", pod, "10.96.0.1"}}
			bytes, times := map[string][]float64{}, map[string][]time.Duration{}
			for b.Loop() {
				for range rounds {
					for _, l := range lanes {
						bytes[l.name] = append(bytes[l.name], l.send(b))
						times[l.name] = append(times[l.name], l.ask(b)...)
					}
				}
			}
			for _, l := range lanes {
				slices.Sort(bytes[l.name])
				slices.Sort(times[l.name])
				b.ReportMetric(bytes[l.name][len(bytes[l.name])/2]/1e6, l.name+"-MB/s")
				b.ReportMetric(float64(times[l.name][len(times[l.name])/2].Nanoseconds())/1e3, l.name+"-p50-µs")
				b.ReportMetric(float64(times[l.name][len(times[l.name])*99/100].Nanoseconds())/1e3, l.name+"-p99-µs")
			}
		})
	})
}

// answer makes a pod take all at port 80, and answer each byte at port 81.
func answer(b *testing.B, h *netlab.Host) {
	listen := func(port string, do func(net.Conn)) {
		var l net.Listener
		var err error
		h.Do(func() { l, err = net.Listen("tcp", ":"+port) })
		require.NoError(b, err)
		b.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					do(c)
				}()
			}
		}()
	}
	listen("80", func(c net.Conn) {
		_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
	})
	listen("81", func(c net.Conn) { _, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) })
}

// carry makes the tables of a node with many Services, and policies for both pods.
func carry(b *testing.B, node *netlab.Node) {
	store, watcher, log := feed.NewStore("n1"), &tables.Watcher{}, slog.New(slog.DiscardHandler)
	s, err := service.New(service.Config{Node: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr(netlab.NodeIP)}, Table: "timonel-services", Store: store, Watcher: watcher, Logger: log})
	require.NoError(b, err)
	s.SetNetworks(service.Networks{Pods: prefixes("10.244.0.0/16"), Own: prefixes("10.244.1.0/24"), Services: prefixes("10.96.0.0/16")})
	r, err := policy.New(policy.Config{Table: "timonel-policy", Bridge: "br0", Store: store, Watcher: watcher, Logger: log})
	require.NoError(b, err)
	h, err := hostport.New(hostport.Config{Table: "timonel-hostports", Bridge: "br0", Watcher: watcher, Logger: log})
	require.NoError(b, err)
	for n := 2; n <= 3; n++ {
		dev, err := netlink.LinkByName(fmt.Sprint("v-pod", n))
		require.NoError(b, err)
		uid, ips := fmt.Sprint("pod", n), []netip.Addr{podIP(n)}
		r.SetPod(policy.Pod{UID: uid, Namespace: "default", Name: uid, Device: dev.Attrs().Name, Addresses: ips})
		h.SetPod(hostport.Pod{UID: uid, Addresses: ips, Ports: []corev1.ContainerPort{{ContainerPort: 80, HostPort: int32(8000 + n)}}})
	}
	store.Update(func(t *feed.Txn) {
		for i := range services {
			ip := fmt.Sprintf("10.96.%d.%d", i/250, 1+i%250)
			t.SetService(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprint("s", i)}, Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip},
				Ports: []corev1.ServicePort{{Name: "a", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "b", Protocol: corev1.ProtocolTCP, Port: 81}},
			}})
			t.SetSlice(&discoveryv1.EndpointSlice{
				ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprint("s", i), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprint("s", i)}},
				AddressType: discoveryv1.AddressTypeIPv4,
				Ports: []discoveryv1.EndpointPort{
					{Name: ptr.To("a"), Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To(int32(80))}, {Name: ptr.To("b"), Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To(int32(81))},
				},
				Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.244.1.3"}, NodeName: ptr.To("n1"), Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true)}}},
			})
		}
		t.SetPolicy(&pb.NetworkPolicyItem{Namespace: "default", Name: "p", IngressIsolated: true, EgressIsolated: true,
			Ingress: []*pb.NetworkRule{{Groups: []string{"g"}, AnyPort: true}}, Egress: []*pb.NetworkRule{{Groups: []string{"g"}, AnyPort: true}}})
		t.SetGroup(&pb.NetworkGroup{Of: "g", Name: "g.0", V4: slices.Concat(podIP(2).AsSlice(), podIP(3).AsSlice())})
		for n := 2; n <= 3; n++ {
			t.SetPod(&pb.NetworkPod{Namespace: "default", Name: fmt.Sprint("pod", n), Uid: fmt.Sprint("pod", n), Policies: []*pb.NetworkPolicyRef{{Namespace: "default", Name: "p"}}})
		}
		t.SetTold(1)
		t.SetSynced()
	})
	ctx, cancel := context.WithCancel(context.Background())
	b.Cleanup(cancel)
	for _, run := range []func(context.Context) error{s.Run, r.Run, h.Run} {
		ended := make(chan struct{})
		node.Go(func() { defer close(ended); _ = run(ctx) })
		b.Cleanup(func() { cancel(); <-ended })
	}
	for s.Revision() < store.View().Revision() || r.Ready("pod2", 1) != nil || r.Ready("pod3", 1) != nil || h.Ready("pod3") != nil {
		time.Sleep(time.Millisecond)
	}
}

func podIP(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 1, byte(n)}) }

func prefixes(list ...string) (out []netip.Prefix) {
	for _, text := range list {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func (l lane) dial(b *testing.B, port string) net.Conn {
	var c net.Conn
	var err error
	l.from.Do(func() { c, err = net.DialTimeout("tcp", net.JoinHostPort(l.to, port), netlab.Patience) })
	require.NoError(b, err)
	return c
}

// send sends for a while, and returns bytes per second.
func (l lane) send(b *testing.B) float64 {
	c := l.dial(b, "80")
	defer c.Close()
	data, sent := make([]byte, 256<<10), 0
	begun := time.Now()
	for time.Since(begun) < transfer {
		n, err := c.Write(data)
		require.NoError(b, err)
		sent += n
	}
	return float64(sent) / time.Since(begun).Seconds()
}

// ask sends a byte and waits for it to come back, again and again.
func (l lane) ask(b *testing.B) []time.Duration {
	c := l.dial(b, "81")
	defer c.Close()
	took := make([]time.Duration, asks)
	one := []byte{1}
	for i := range took {
		begun := time.Now()
		_, err := c.Write(one)
		require.NoError(b, err)
		_, err = io.ReadFull(c, one)
		require.NoError(b, err)
		took[i] = time.Since(begun)
	}
	return took
}

// BenchmarkPolicies is 1,000 policies of 10 rules for a node's 30 pods, with 10,000 addresses
// in 40 groups: the first time until all is in the kernel, one address more, and what the process
// keeps for it besides what it was told.
func BenchmarkPolicies(b *testing.B) {
	const policies, groups, addresses, pods = 1000, 40, 10_000, 30
	netlab.In(b, func(node *netlab.Node) {
		store := feed.NewStore("n1")
		group := func(g, more int) *pb.NetworkGroup {
			out := &pb.NetworkGroup{Of: fmt.Sprint("g", g), Name: fmt.Sprintf("g%d.0", g)}
			for i := range addresses/groups + more {
				n := g*addresses/groups + i
				if i >= addresses/groups {
					n = addresses + i
				}
				out.V4 = append(out.V4, 10, byte(128+n>>16), byte(n>>8), byte(n))
			}
			return out
		}
		r, err := policy.New(policy.Config{Table: "timonel-policy", Bridge: "br0", Store: store, Logger: slog.New(slog.DiscardHandler)})
		require.NoError(b, err)
		for n := range pods {
			uid := fmt.Sprint("pod", n)
			r.SetPod(policy.Pod{UID: uid, Namespace: "default", Name: uid, Addresses: []netip.Addr{podIP(2 + n)}})
		}
		store.Update(func(t *feed.Txn) {
			for i := range policies {
				p := &pb.NetworkPolicyItem{Namespace: "default", Name: fmt.Sprint("p", i), IngressIsolated: true}
				for j := range 10 {
					p.Ingress = append(p.Ingress, &pb.NetworkRule{Groups: []string{fmt.Sprint("g", (i+j)%groups)}, Ports: []*pb.NetworkPort{{Protocol: "TCP", First: uint32(1000 + j), Last: uint32(1000 + j)}}})
				}
				t.SetPolicy(p)
			}
			for g := range groups {
				t.SetGroup(group(g, 0))
			}
			for n := range pods {
				pod := &pb.NetworkPod{Namespace: "default", Name: fmt.Sprint("pod", n), Uid: fmt.Sprint("pod", n)}
				for i := n; i < policies; i += pods {
					pod.Policies = append(pod.Policies, &pb.NetworkPolicyRef{Namespace: "default", Name: fmt.Sprint("p", i)})
				}
				t.SetPod(pod)
			}
			t.SetTold(1)
			t.SetSynced()
		})
		live := func() float64 {
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return float64(m.HeapAlloc) / 1e6
		}
		before := live()
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		begun := time.Now()
		node.Go(func() { defer close(ended); _ = r.Run(ctx) })
		defer func() { cancel(); <-ended }()
		until := func(done func() bool) time.Duration {
			for !done() {
				time.Sleep(100 * time.Microsecond)
			}
			return time.Since(begun)
		}
		first := until(func() bool { return r.Ready("pod0", 1) == nil })
		kept := live() - before
		changes := 0
		for b.Loop() {
			changes = 1 - changes
			want := r.Stats().Elements + 2*changes - 1
			begun = time.Now()
			store.Update(func(t *feed.Txn) { t.SetGroup(group(0, changes)) })
			until(func() bool { return r.Stats().Elements == want })
		}
		b.ReportMetric(first.Seconds(), "first-s")
		b.ReportMetric(kept, "MB-kept")
	})
}
