package names

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	"timonel/network/dns"
	"timonel/network/feed"
)

const (
	services  = 10_000
	endpoints = 10
	clients   = 16
	// ours is the environment of the process that is our server: its port, and who answers for others.
	ours = "TIMONEL_BENCH_NAMES"
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(ours); spec != "" {
		if err := serve(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// objects are the Services that both sides know. Every tenth is headless.
func objects() (out []*corev1.Service, of []*discoveryv1.EndpointSlice) {
	for i := range services {
		name := fmt.Sprintf("service-%d", i)
		ip := fmt.Sprintf("10.96.%d.%d", i/250, 1+i%250)
		if i%10 == 0 {
			ip = corev1.ClusterIPNone
		}
		out = append(out, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, ResourceVersion: "1"},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
				Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
			},
		})
		s := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: name + "-1", ResourceVersion: "1", Labels: map[string]string{discoveryv1.LabelServiceName: name},
			},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Port: ptr.To[int32](8080), Protocol: ptr.To(corev1.ProtocolTCP)}},
		}
		for e := range endpoints {
			n := i*endpoints + e
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{fmt.Sprintf("10.%d.%d.%d", 128+n>>16, n>>8&255, n&255)},
				Hostname:  ptr.To(fmt.Sprintf("pod-%d", e)), Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)},
			})
		}
		of = append(of, s)
	}
	return out, of
}

// serve is our server, as an agent has it.
func serve(spec string) error {
	port, upstream, _ := strings.Cut(spec, ",")
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return err
	}
	stub, err := netip.ParseAddrPort(upstream)
	if err != nil {
		return err
	}
	store := feed.NewStore("node-1")
	store.Update(func(t *feed.Txn) {
		all, of := objects()
		for i := range all {
			t.SetService(all[i])
			t.SetSlice(of[i])
		}
		t.SetSynced()
	})
	s, err := dns.New(dns.Config{
		Domain: "cluster.local", Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Port: uint16(n), Store: store,
		Stubs: map[string][]netip.AddrPort{"example.org": {stub}}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	return s.Run(context.Background())
}

// api serves what CoreDNS lists, and watches in which nothing happens.
func api(b *testing.B) string {
	all, of := objects()
	list := func(kind, version string, items ...runtime.Object) []byte {
		raw, err := json.Marshal(map[string]any{
			"kind": kind, "apiVersion": version, "metadata": map[string]string{"resourceVersion": "1"}, "items": items,
		})
		require.NoError(b, err)
		return raw
	}
	var names, ends []runtime.Object
	for i := range all {
		names, ends = append(names, all[i]), append(ends, of[i])
	}
	lists := map[string][]byte{
		"/api/v1/services":                         list("ServiceList", "v1", names...),
		"/apis/discovery.k8s.io/v1/endpointslices": list("EndpointSliceList", "discovery.k8s.io/v1", ends...),
		"/api/v1/namespaces":                       list("NamespaceList", "v1", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default", ResourceVersion: "1"}}),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		q := r.URL.Query()
		switch raw := lists[r.URL.Path]; {
		case q.Get("sendInitialEvents") != "": // a list, then
			w.WriteHeader(http.StatusUnprocessableEntity)
			_ = json.NewEncoder(w).Encode(metav1.Status{
				TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonInvalid, Code: http.StatusUnprocessableEntity,
			})
		case q.Get("watch") != "":
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case raw != nil:
			_, _ = w.Write(raw)
		case r.URL.Path == "/version":
			_, _ = w.Write([]byte(`{"major":"1","minor":"37","gitVersion":"v1.37.2"}`))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	b.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	return server.URL
}

// others answers for names that are not the cluster's, after a millisecond.
func others(b *testing.B) string {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(b, err)
	s := &mdns.Server{PacketConn: conn, Handler: mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		time.Sleep(time.Millisecond)
		m := new(mdns.Msg)
		m.SetReply(q)
		if q.Question[0].Qtype == mdns.TypeA {
			rr, _ := mdns.NewRR(q.Question[0].Name + " 60 IN A 192.0.2.7")
			m.Answer = append(m.Answer, rr)
		}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = s.ActivateAndServe() }()
	b.Cleanup(func() { _ = s.Shutdown() })
	return conn.LocalAddr().String()
}

func freePort(b *testing.B) int {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(b, err)
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).Port
}

func start(b *testing.B, c *exec.Cmd, addr string) *exec.Cmd {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(b, c.Start())
	b.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	client := mdns.Client{Timeout: 100 * time.Millisecond}
	q := new(mdns.Msg).SetQuestion("service-9999.default.svc.cluster.local.", mdns.TypeA)
	require.Eventually(b, func() bool {
		r, _, err := client.Exchange(q, addr)
		return err == nil && r.Rcode == mdns.RcodeSuccess && len(r.Answer) == 1
	}, time.Minute, 50*time.Millisecond, "does not answer: %s", &out)
	return c
}

func timonel(b *testing.B, upstream string) (pid int, addr string) {
	port := freePort(b)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%d,%s", ours, port, upstream))
	addr = fmt.Sprintf("127.0.0.1:%d", port)
	return start(b, c, addr).Process.Pid, addr
}

func coreDNS(b *testing.B, upstream string) (pid int, addr string) {
	program := os.Getenv("TIMONEL_COREDNS")
	if program == "" {
		program = "../../../bin/bench/coredns"
	}
	if _, err := os.Stat(program); err != nil {
		b.Skipf("%v: make bench-network builds it", err)
	}
	port := freePort(b)
	file := filepath.Join(b.TempDir(), "Corefile")
	require.NoError(b, os.WriteFile(file, fmt.Appendf(nil, `.:%d {
    bind 127.0.0.1
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       endpoint %s
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    forward . %s {
       max_concurrent 1000
    }
    cache 30
    loadbalance
}
`, port, api(b), upstream), 0o644))
	addr = fmt.Sprintf("127.0.0.1:%d", port)
	return start(b, exec.Command(program, "-conf", file), addr).Process.Pid, addr
}

// used is the processor time of a process, and its resident memory in bytes.
func used(b *testing.B, pid int) (cpu time.Duration, rss int) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(b, err)
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+2:]))
	number := func(i int) int {
		n, err := strconv.Atoi(fields[i])
		require.NoError(b, err)
		return n
	}
	const tick = time.Second / 100 // USER_HZ
	return time.Duration(number(11)+number(12)) * tick, number(21) * os.Getpagesize()
}

// question is what a client asks next.
type question struct {
	name string
	kind uint16
}

var rows = []struct {
	name  string
	ask   func(r *rand.Rand) question
	rcode int
}{
	{"service", func(r *rand.Rand) question {
		return question{fmt.Sprintf("service-%d.default.svc.cluster.local.", 1+10*r.IntN(services/10)), mdns.TypeA}
	}, mdns.RcodeSuccess},
	{"headless", func(r *rand.Rand) question {
		return question{fmt.Sprintf("service-%d.default.svc.cluster.local.", 10*r.IntN(services/10)), mdns.TypeA}
	}, mdns.RcodeSuccess},
	{"pod of a headless", func(r *rand.Rand) question {
		return question{fmt.Sprintf("pod-%d.service-%d.default.svc.cluster.local.", r.IntN(endpoints), 10*r.IntN(services/10)), mdns.TypeA}
	}, mdns.RcodeSuccess},
	{"search path", func(r *rand.Rand) question {
		return question{fmt.Sprintf("www%d.example.org.default.svc.cluster.local.", r.IntN(1000)), mdns.TypeA}
	}, mdns.RcodeNameError},
	{"SRV", func(r *rand.Rand) question {
		return question{fmt.Sprintf("_http._tcp.service-%d.default.svc.cluster.local.", 1+10*r.IntN(services/10)), mdns.TypeSRV}
	}, mdns.RcodeSuccess},
	{"others' name, cached", func(r *rand.Rand) question {
		return question{fmt.Sprintf("www%d.example.org.", r.IntN(100)), mdns.TypeA}
	}, mdns.RcodeSuccess},
}

func BenchmarkNames(b *testing.B) {
	upstream := others(b)
	for _, side := range []struct {
		name  string
		start func(*testing.B, string) (int, string)
	}{{"timonel", timonel}, {"coredns", coreDNS}} {
		b.Run(side.name, func(b *testing.B) {
			pid, addr := side.start(b, upstream)
			for _, row := range rows {
				b.Run(row.name, func(b *testing.B) {
					load(b, addr, 2000, row.ask, row.rcode) // not counted
					before, _ := used(b, pid)
					b.ResetTimer()
					took := load(b, addr, b.N, row.ask, row.rcode)
					b.StopTimer()
					after, rss := used(b, pid)
					slices.Sort(took)
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "queries/s")
					b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
					b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
					b.ReportMetric(float64((after-before).Microseconds())/float64(b.N), "cpu-µs/query")
					b.ReportMetric(float64(rss)/1e6, "MB")
				})
			}
		})
	}
}

// load asks n questions, of several clients that each wait for an answer, and returns how
// long each took.
func load(b *testing.B, addr string, n int, ask func(*rand.Rand) question, rcode int) []time.Duration {
	var next, lost atomic.Int64
	var wait sync.WaitGroup
	took := make([][]time.Duration, clients)
	for client := range clients {
		wait.Go(func() {
			// Each has an address of its own, as pods have: ours bounds what one may ask.
			from := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 1, byte(1+client))}}
			conn, err := from.Dial("udp", addr)
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			r := rand.New(rand.NewPCG(1, uint64(client)))
			answer := make([]byte, 4096)
			for id := uint16(1); next.Add(1) <= int64(n); id++ {
				q := ask(r)
				m := new(mdns.Msg).SetQuestion(q.name, q.kind)
				m.Id = id
				m.SetEdns0(1232, false)
				raw, err := m.Pack()
				if err != nil {
					b.Error(err)
					return
				}
				start := time.Now()
				for {
					_ = conn.SetDeadline(time.Now().Add(time.Second))
					if _, err := conn.Write(raw); err != nil {
						b.Error(err)
						return
					}
					got, err := conn.Read(answer)
					if err == nil && got >= 12 && binary.BigEndian.Uint16(answer) == id {
						if code := int(answer[3] & 15); code != rcode {
							b.Errorf("%s: answered %s", q.name, mdns.RcodeToString[code])
							return
						}
						break
					}
					if lost.Add(1) > 100 {
						b.Errorf("%s: %d questions were not answered: %v", q.name, lost.Load(), err)
						return
					}
				}
				took[client] = append(took[client], time.Since(start))
			}
		})
	}
	wait.Wait()
	if b.Failed() {
		b.FailNow()
	}
	if lost.Load() > 0 {
		b.Logf("%d questions were asked again after a second", lost.Load())
	}
	return slices.Concat(took...)
}
