package services

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
	kubeproxyconfig "k8s.io/kubernetes/pkg/proxy/apis/config"
	"k8s.io/kubernetes/pkg/proxy/nftables"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
	"k8s.io/utils/ptr"

	"timonel/network/feed"
	"timonel/network/service"
	"timonel/test/needs"
)

const (
	services  = 10_000
	endpoints = 10
	inside    = "TIMONEL_BENCH_NAMESPACE"
	nodeIP    = "192.0.2.1"
)

// TestMain runs the whole program once more in a network namespace of its own.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), inside+"=1")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// cluster is what both sides are told of, and share.
type cluster struct {
	services []*corev1.Service
	slices   []*discoveryv1.EndpointSlice
}

func newCluster() *cluster {
	c := &cluster{}
	for i := range services {
		name := fmt.Sprintf("service-%d", i)
		ip := fmt.Sprintf("10.96.%d.%d", i/250, 1+i%250)
		c.services = append(c.services, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
				Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
			},
		})
		c.slices = append(c.slices, slice(i, 0))
	}
	return c
}

// slice is that of a Service; with another version one of its endpoints is another.
func slice(i, version int) *discoveryv1.EndpointSlice {
	name := fmt.Sprintf("service-%d", i)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name + "-abcde", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To(int32(8080))}},
	}
	for j := range endpoints {
		n := i*endpoints + j
		ip := fmt.Sprintf("10.%d.%d.%d", 128+n/62500, n/250%250, 1+n%250)
		if j == endpoints-1 && version > 0 {
			ip = fmt.Sprintf("10.200.%d.%d", version/250%250, 1+version%250)
		}
		if i == 0 {
			ip = nodeIP // where the bench itself listens
		}
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{ip}, NodeName: ptr.To(fmt.Sprintf("node-%d", n%1000)),
			Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
		})
	}
	return s
}

// side is one of the two.
type side interface {
	// start makes the table of a cluster from nothing, and returns when it is there.
	start(b *testing.B, c *cluster)
	// change gives one Service another slice.
	change(b *testing.B, old, new *discoveryv1.EndpointSlice)
	stop(b *testing.B)
}

type timonel struct {
	store *feed.Store
	proxy *service.Proxy
	end   context.CancelFunc
	ended chan error
}

const table = "timonel-services"

func (s *timonel) start(b *testing.B, c *cluster) {
	s.store = feed.NewStore("node-1")
	var err error
	s.proxy, err = service.New(service.Config{
		Node: "node-1", NodeIPs: []netip.Addr{netip.MustParseAddr(nodeIP)}, Table: table, Store: s.store, Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(b, err)
	s.proxy.SetNetworks(service.Networks{Pods: []netip.Prefix{netip.MustParsePrefix("10.128.0.0/9")}})
	ctx, cancel := context.WithCancel(b.Context())
	s.end, s.ended = cancel, make(chan error, 1)
	s.store.Update(func(t *feed.Txn) {
		for i := range c.services {
			t.SetService(c.services[i])
			t.SetSlice(c.slices[i])
		}
		t.SetSynced()
	})
	go func() { s.ended <- s.proxy.Run(ctx) }()
	s.wait()
}

func (s *timonel) wait() {
	for want := s.store.View().Revision(); s.proxy.Revision() < want; {
		time.Sleep(100 * time.Microsecond)
	}
}

func (s *timonel) change(_ *testing.B, _, new *discoveryv1.EndpointSlice) {
	s.store.Update(func(t *feed.Txn) { t.SetSlice(new) })
	s.wait()
}

func (s *timonel) stop(b *testing.B) {
	s.end()
	require.NoError(b, <-s.ended)
	s.store, s.proxy = nil, nil
	require.NoError(b, service.Remove(b.Context(), table))
}

type kubeProxy struct{ proxier *nftables.Proxier }

func (s *kubeProxy) start(b *testing.B, c *cluster) {
	detector := proxyutil.NewDetectLocalByCIDR("10.128.0.0/9")
	config := &kubeproxyconfig.KubeProxyConfiguration{SyncPeriod: metav1.Duration{Duration: 30 * time.Second}, MinSyncPeriod: metav1.Duration{Duration: time.Second}}
	config.NFTables.MasqueradeBit = ptr.To(int32(14))
	var err error
	s.proxier, err = nftables.NewProxier(b.Context(), config, corev1.IPv4Protocol, detector, "node-1", net.ParseIP(nodeIP), nil, nil, false)
	require.NoError(b, err)
	for i := range c.services {
		s.proxier.OnServiceAdd(c.services[i])
		s.proxier.OnEndpointSliceAdd(c.slices[i])
	}
	s.proxier.OnServiceSynced()
	s.proxier.OnEndpointSlicesSynced() // makes the table before it returns
}

func (s *kubeProxy) change(_ *testing.B, old, new *discoveryv1.EndpointSlice) {
	s.proxier.OnEndpointSliceUpdate(old, new)
	s.proxier.OnEndpointSlicesSynced()
}

func (s *kubeProxy) stop(b *testing.B) {
	s.proxier = nil
	require.NoError(b, exec.Command("nft", "delete", "table", "ip", "kube-proxy").Run())
}

func both(b *testing.B, run func(b *testing.B, s side)) {
	needs.Root(b, "makes a network namespace")
	klog.SetOutput(discard{})
	klog.LogToStderr(false)
	for _, s := range []struct {
		name string
		side side
	}{{"timonel", &timonel{}}, {"kube-proxy", &kubeProxy{}}} {
		b.Run(s.name, func(b *testing.B) { run(b, s.side) })
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// BenchmarkFirst is from knowing the cluster to a whole table, and what the process
// keeps in memory for it besides the cluster's objects, which both sides share.
func BenchmarkFirst(b *testing.B) {
	c := newCluster()
	both(b, func(b *testing.B, s side) {
		var before, after runtime.MemStats
		for b.Loop() {
			b.StopTimer()
			runtime.GC()
			runtime.GC()
			runtime.ReadMemStats(&before)
			b.StartTimer()
			s.start(b, c)
			b.StopTimer()
			runtime.GC()
			runtime.GC()
			runtime.ReadMemStats(&after)
			s.stop(b)
			b.StartTimer()
		}
		b.ReportMetric((float64(after.HeapAlloc)-float64(before.HeapAlloc))/1e6, "MB-kept")
	})
}

// BenchmarkChange is one endpoint of one Service.
func BenchmarkChange(b *testing.B) {
	c := newCluster()
	both(b, func(b *testing.B, s side) {
		s.start(b, c)
		old := c.slices[7000]
		n := 0
		for b.Loop() {
			n++
			next := slice(7000, n)
			s.change(b, old, next)
			old = next
		}
		b.StopTimer()
		s.stop(b)
	})
}

// BenchmarkConnect opens a connection through a Service, and one without.
func BenchmarkConnect(b *testing.B) {
	needs.Root(b, "makes a network namespace")
	for _, name := range []string{"lo"} {
		link, err := netlink.LinkByName(name)
		require.NoError(b, err)
		require.NoError(b, netlink.LinkSetUp(link))
		addr, err := netlink.ParseAddr(nodeIP + "/32")
		require.NoError(b, err)
		if err := netlink.AddrAdd(link, addr); !errors.Is(err, syscall.EEXIST) {
			require.NoError(b, err)
		}
		_, all, _ := net.ParseCIDR("10.96.0.0/16")
		require.NoError(b, netlink.RouteReplace(&netlink.Route{Dst: all, LinkIndex: link.Attrs().Index, Src: net.ParseIP(nodeIP)}))
	}
	l, err := net.Listen("tcp", nodeIP+":8080")
	require.NoError(b, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(io.Discard, c) // until the client has gone
				_ = c.Close()
			}()
		}
	}()
	connect := func(b *testing.B, at string) {
		for b.Loop() {
			c, err := net.DialTimeout("tcp", at, 5*time.Second)
			require.NoError(b, err)
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
	}
	b.Run("direct", func(b *testing.B) { connect(b, nodeIP+":8080") })
	c := newCluster()
	both(b, func(b *testing.B, s side) {
		s.start(b, c)
		b.ResetTimer()
		connect(b, "10.96.0.1:80")
		b.StopTimer()
		s.stop(b)
	})
}
