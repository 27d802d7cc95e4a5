package network

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"

	"timonel/dispatch/network/policy"
	"timonel/network/feed"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
	"timonel/state"
	"timonel/state/objects"
)

const (
	patience  = 30 * time.Second
	clusterID = "the-cluster"
)

var quiet = slog.New(slog.DiscardHandler)

// house is the state of a cluster, which its controllers follow.
type house struct {
	t     testing.TB
	store *state.Store
	mu    sync.Mutex
	index uint64
}

func newHouse(t testing.TB) *house { return &house{t: t, store: state.New(state.Options{})} }

func keyAndVersion(o runtime.Object) (string, schema.GroupVersion) {
	m := o.(metav1.Object)
	switch o.(type) {
	case *corev1.Node:
		return "/registry/minions/" + m.GetName(), corev1.SchemeGroupVersion
	case *corev1.Service:
		return "/registry/services/specs/" + m.GetNamespace() + "/" + m.GetName(), corev1.SchemeGroupVersion
	case *coordinationv1.Lease:
		return "/registry/leases/" + m.GetNamespace() + "/" + m.GetName(), coordinationv1.SchemeGroupVersion
	case *discoveryv1.EndpointSlice:
		return "/registry/endpointslices/" + m.GetNamespace() + "/" + m.GetName(), discoveryv1.SchemeGroupVersion
	}
	switch o.(type) {
	case *corev1.Pod:
		return "/registry/pods/" + m.GetNamespace() + "/" + m.GetName(), corev1.SchemeGroupVersion
	case *corev1.Namespace:
		return "/registry/namespaces/" + m.GetName(), corev1.SchemeGroupVersion
	case *networkingv1.NetworkPolicy:
		return "/registry/networkpolicies/" + m.GetNamespace() + "/" + m.GetName(), networkingv1.SchemeGroupVersion
	}
	panic(fmt.Sprintf("no key for %T", o))
}

var protobufs = protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)

func (h *house) apply(changes ...state.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.index++
	txn := state.Txn{Changes: changes}
	h.store.ApplyBatch([]state.Entry{{Index: h.index, Term: 1, Command: txn.Marshal()}})
}

func (h *house) put(all ...runtime.Object) {
	changes := make([]state.Change, len(all))
	for i, o := range all {
		key, version := keyAndVersion(o)
		var out bytes.Buffer
		require.NoError(h.t, scheme.Codecs.EncoderForVersion(protobufs, version).Encode(o, &out))
		changes[i] = state.Change{Key: key, Value: out.Bytes()}
	}
	h.apply(changes...)
}

func (h *house) remove(o runtime.Object) {
	key, _ := keyAndVersion(o)
	h.apply(state.Change{Key: key, Delete: true})
}

// server is one controller.
type server struct {
	pb.UnimplementedAgentsServer
	h      *house
	feed   *Feed
	cache  *objects.Cache
	listen *bufconn.Listener
	older  bool // knows no such call
	spawn  sync.WaitGroup
}

func (s *server) Network(stream grpc.BidiStreamingServer[pb.NetworkRequest, pb.NetworkBatch]) error {
	if s.older {
		return status.Error(codes.Unimplemented, "unknown method Network")
	}
	md, _ := metadata.FromIncomingContext(stream.Context())
	if err := s.cache.WaitRevision(stream.Context(), s.h.store.View().Revision()); err != nil {
		return err
	}
	if err := s.feed.Wait(stream.Context(), s.h.store.View().Revision()); err != nil {
		return err
	}
	return s.feed.Serve(stream.Context(), md.Get("node")[0], stream, s.spawn.Go)
}

func (h *house) controller(prepare func(*Feed)) *server {
	s := &server{h: h, cache: objects.NewCache(h.store, objects.WithLogger(quiet)), listen: bufconn.Listen(1 << 20)}
	s.feed = New(Config{ClusterID: clusterID, Objects: s.cache, Checks: &testChecks{}, Bytes: 64 << 20, Logger: quiet})
	s.feed.listEvery = time.Microsecond
	if prepare != nil {
		prepare(s.feed)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := grpc.NewServer()
	pb.RegisterAgentsServer(g, s)
	var work sync.WaitGroup
	work.Go(func() { _ = s.cache.Run(ctx) })
	work.Go(func() { _ = s.feed.Run(ctx) })
	work.Go(func() { _ = g.Serve(s.listen) })
	h.t.Cleanup(func() { cancel(); g.Stop(); work.Wait(); s.spawn.Wait() })
	return s
}

func (s *server) conn() *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///bufnet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listen.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(pb.MaxMessage)))
	require.NoError(s.h.t, err)
	return conn
}

// agent is a node's end, as it runs there.
type agent struct {
	t      testing.TB
	name   string
	path   string
	store  *feed.Store
	client *feed.Client
	keeper func() // ends what writes to the disk
	cut    func()
}

func newAgent(t testing.TB, name, path string) *agent {
	a := &agent{t: t, name: name, path: path}
	a.start()
	return a
}

func (a *agent) start() {
	a.store = feed.NewStore(a.name)
	a.client = feed.NewClient(feed.Config{Store: a.store, Path: a.path, Logger: quiet})
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = a.client.Keep(ctx) })
	a.keeper, a.cut = func() { cancel(); done.Wait() }, func() {}
}

func (a *agent) stop() { a.cut(); a.keeper() }

// connect leaves the controller that it has for another.
func (a *agent) connect(s *server, options ...grpc.DialOption) {
	a.cut()
	conn := s.conn()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "node", a.name))
	var done sync.WaitGroup
	done.Go(func() { a.client.Follow(ctx, pb.NewAgentsClient(conn)) })
	a.cut = sync.OnceFunc(func() { cancel(); done.Wait(); conn.Close() })
}

// dump is all of a view, readable.
func dump(v *feed.View) string {
	out := dumpPolicies(v)
	for n := range v.Nodes() {
		out = append(out, fmt.Sprintf("node %s %v %s", n.NodeName, n.PodCidrs, n.NodeAddress))
	}
	for a := range v.Addresses() {
		out = append(out, fmt.Sprintf("address %s of %s by %d", a.Address, a.NodeName, a.Number))
	}
	for name, s := range v.Services() {
		out = append(out, fmt.Sprintf("service %s %s %v", name, s.Spec.ClusterIP, s.Labels))
	}
	for _, namespace := range []string{"a", "b"} {
		for i := range 12 {
			for _, s := range v.Slices(feed.Name{Namespace: namespace, Name: fmt.Sprint("s", i)}) {
				line := fmt.Sprintf("slice %s/%s of %s", s.Namespace, s.Name, s.Labels[discoveryv1.LabelServiceName])
				for _, e := range s.Endpoints {
					line += fmt.Sprintf(" %v ready %v on %v", e.Addresses, *e.Conditions.Ready, *e.NodeName)
				}
				out = append(out, line)
			}
		}
	}
	return strings.Join(out, "\n")
}

// dumpPolicies is what a view has of policies. What a pod or a policy names must be there.
func dumpPolicies(v *feed.View) (out []string) {
	line := func(m proto.Message) {
		raw, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		out = append(out, fmt.Sprintf("%T %x", m, raw))
	}
	for p := range v.Pods() {
		line(p)
		for _, r := range p.Policies {
			if v.Policy(r.Namespace, r.Name) == nil {
				out = append(out, fmt.Sprint("policy ", r.Name, " is not there"))
			}
		}
	}
	for p := range v.Policies() {
		line(p)
		for _, r := range slices.Concat(p.Ingress, p.Egress) {
			for _, name := range slices.Concat(r.Groups, r.Targets) {
				parts, ok := v.Group(name)
				if !ok {
					out = append(out, fmt.Sprint("group ", name, " is not there"))
				}
				for _, g := range parts {
					line(g)
				}
			}
		}
	}
	return out
}

// whole fails when a view has a pod without its policies, or a policy without its groups.
func whole(t testing.TB, v *feed.View) {
	for _, line := range dumpPolicies(v) {
		if strings.HasSuffix(line, "is not there") {
			t.Errorf("at revision %d: %s", v.Told(), line)
		}
	}
}

// want is what dump is of a node that knows all.
func (h *house) want(node string) string {
	cache := objects.NewCache(h.store, objects.WithLogger(quiet))
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = cache.Run(ctx) })
	defer done.Wait()
	defer cancel()
	require.NoError(h.t, cache.WaitRevision(ctx, h.store.View().Revision()))
	s := cache.Snapshot()
	store := feed.NewStore("")
	fold := policy.New(policy.Config{Bytes: 64 << 20, Logger: quiet})
	fold.Update(s.Revision(), func(t *policy.Txn) {
		for o := range s.Pods().All() {
			t.SetPod(o)
		}
		for o := range s.NetworkPolicies().All() {
			t.Set(policy.Compile(o))
		}
		for o := range s.Namespaces().All() {
			t.SetNamespace(o)
		}
	})
	told := fold.Follow(node).List(func(*wire.Digest) wire.Set { return wire.All() })
	store.Update(func(t *feed.Txn) {
		for _, item := range told.Items {
			o, err := wire.Decode(item)
			require.NoError(h.t, err)
			switch {
			case o.Pod != nil:
				t.SetPod(o.Pod)
			case o.Policy != nil:
				t.SetPolicy(o.Policy)
			case o.Group != nil:
				t.SetGroup(o.Group)
			}
		}
		routes, _ := AllRoutes(&testChecks{}, s.Nodes().All())
		for _, r := range routes {
			t.SetNode(r)
		}
		for o := range s.Leases().All() {
			if ip := o.Annotations[pb.AddressAnnotation]; strings.HasPrefix(o.Name, pb.AddressLease) && o.Namespace == pb.AddressNamespace && ip != "" {
				number, err := strconv.ParseUint(o.ResourceVersion, 10, 64)
				require.NoError(h.t, err)
				t.SetAddress(&pb.AddressHolder{Address: ip, NodeName: *o.Spec.HolderIdentity, Number: number})
			}
		}
		for o := range s.Services().All() {
			t.SetService(stripService(o))
		}
		for o := range s.EndpointSlices().All() {
			if stripped := stripSlice(o); stripped != nil {
				t.SetSlice(stripped)
			}
		}
	})
	return dump(store.View())
}

// eventually waits until an agent knows all, by its own word and by dump.
func (h *house) eventually(a *agent) {
	h.t.Helper()
	want := h.want(a.name)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for after := uint64(0); ; {
		v := a.store.View()
		whole(h.t, v)
		if v.Synced() && dump(v) == want {
			return
		}
		c, err := a.store.Changes(ctx, after)
		if err != nil {
			h.t.Fatalf("synced: %v; the first difference: %s", v.Synced(), firstDifference(want, dump(a.store.View())))
		}
		after = c.View.Revision()
	}
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(w), len(g)) {
		if w[i] != g[i] {
			return "want " + w[i] + ", got " + g[i]
		}
	}
	return fmt.Sprintf("%d lines, want %d", len(g), len(w))
}

func service(namespace, name, ip string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, UID: "u", Labels: map[string]string{"team": "secret", corev1.IsHeadlessService: ""},
			Annotations: map[string]string{"password": "secret"},
		},
		Spec: corev1.ServiceSpec{ClusterIP: ip, Selector: map[string]string{"app": "secret"}},
	}
}

func slice(namespace, name, of string, addresses ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: of, "team": "secret"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, ip := range addresses {
		yes, node := true, "n1"
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{ip}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}, NodeName: &node,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: "secret-" + ip},
		})
	}
	return s
}

// names are those of many objects, so that a batch is not enough.
// lease is that of an address of Services, which a node announces.
func lease(ip, node string) *coordinationv1.Lease {
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: pb.AddressNamespace, Name: pb.AddressLeaseName(netip.MustParseAddr(ip)), Annotations: map[string]string{pb.AddressAnnotation: ip}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &node},
	}
}

func many(n int) (out []runtime.Object) {
	for i := range n {
		name := fmt.Sprint("s", i)
		var ips []string
		for j := range 10 {
			ips = append(ips, fmt.Sprintf("10.%d.%d.%d", j, i/250, i%250))
		}
		out = append(out, service("a", name, fmt.Sprintf("10.96.%d.%d", i/250, i%250)), slice("a", name+"-x", name, ips...))
	}
	return slices.Clip(out)
}

func inNamespace(name, team string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"team": team}}}
}

func pod(namespace, name, node, app string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u", Labels: map[string]string{"app": app}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Env: []corev1.EnvVar{{Name: "PASSWORD", Value: "secret"}}}}},
	}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

// allow lets pods of an app be talked to by those of another, of namespaces of a team.
func allow(namespace, name, app, from, team string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
				NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": team}},
				PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"app": from}},
			}}}},
		},
	}
}
