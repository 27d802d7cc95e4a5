package network

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"timonel/network/feed"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
	"timonel/state"
)

func TestAnAgentIsToldOfAllAndOfChanges(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(many(1500)...)
	h.put(node("n1", "192.0.2.1", 1, "10.1.0.0/24"), node("n2", "192.0.2.2", 2, "10.1.1.0/24"))
	k := h.controller(nil)
	a := newAgent(t, "n1", "")
	defer a.stop()
	a.connect(k)
	h.eventually(a)
	require.Greater(t, k.feed.Figures().Batches, uint64(2), "one batch was enough, which says nothing of lists in parts")

	at := a.store.View().Revision()
	h.put(slice("a", "s5-x", "s5", "10.9.9.9"))
	h.remove(service("a", "s6", ""))
	h.put(node("n2", "192.0.2.3", 2, "10.1.1.0/24"))
	h.eventually(a)
	c, err := a.store.Changes(t.Context(), at)
	require.NoError(t, err)
	require.False(t, c.Reset)
	require.True(t, c.Nodes)
	require.Equal(t, map[feed.Name]struct{}{{Namespace: "a", Name: "s5"}: {}, {Namespace: "a", Name: "s6"}: {}}, c.Services)
	require.EqualValues(t, 1, k.feed.Figures().Lists)
}

// The first agent of a cluster comes before there is anything to tell.
func TestAnEmptyCluster(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	k := h.controller(nil)
	a := newAgent(t, "n1", "")
	defer a.stop()
	a.connect(k)
	h.eventually(a)
	h.put(service("a", "s1", "10.96.0.1"))
	h.eventually(a)
}

// Only what a node needs goes to it.
func TestNothingElseIsTold(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	n := node("n1", "192.0.2.1", 1, "10.1.0.0/24")
	n.Labels, n.Annotations = map[string]string{"team": "secret"}, map[string]string{"password": "secret"}
	h.put(service("a", "s1", "10.96.0.1"), slice("a", "s1-x", "s1", "10.1.0.1"), slice("a", "s2-x", ""), n)
	web, other := pod("a", "web", "n1", "secret", "10.1.0.7"), pod("a", "secret", "n2", "secret", "10.1.0.8")
	h.put(web, other, inNamespace("a", "secret"), allow("a", "p", "secret", "secret", "secret"), allow("a", "secret", "x", "x", "x"))
	k := h.controller(nil)
	a := newAgent(t, "n1", filepath.Join(t.TempDir(), "feed"))
	a.connect(k)
	h.eventually(a)
	a.stop()
	raw, err := os.ReadFile(a.path)
	require.NoError(t, err)
	require.Contains(t, string(raw), "10.96.0.1")
	require.Contains(t, string(raw), "\x0a\x01\x00\x08", "the peer's address")
	require.NotContains(t, string(raw), "secret")
	require.Empty(t, a.store.View().Slices(feed.Name{Namespace: "a"}))
}

// After any sequence of changes, cuts, changes of controllers and restarts of the agent,
// with and without what was on its disk, it knows what one knows that came last.
func TestWhateverHappensAnAgentKnowsAll(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 1))
			h := newHouse(t)
			few := func(f *Feed) { f.log.maxGone = 3 }
			ks := []*server{h.controller(few), h.controller(few), h.controller(nil)}
			a := newAgent(t, "n1", filepath.Join(t.TempDir(), "feed"))
			defer func() { a.stop() }()
			a.connect(ks[0])
			namespace := func() string { return []string{"a", "b"}[r.IntN(2)] }
			name := func() string { return fmt.Sprint("s", r.IntN(12)) }
			app := func() string { return []string{"web", "api", "db"}[r.IntN(3)] }
			for range 80 {
				switch r.IntN(17) {
				case 10:
					other := lease("2001:db8::9", "n1")
					other.Name = "of-somebody-else"
					h.put(lease(fmt.Sprintf("192.0.2.%d", r.IntN(4)), fmt.Sprint("n", r.IntN(3))), lease("2001:db8::1", "n1"), other)
				case 11:
					h.remove(lease(fmt.Sprintf("192.0.2.%d", r.IntN(4)), ""))
				case 12:
					h.put(inNamespace(namespace(), app()))
				case 13, 16:
					h.put(pod(namespace(), fmt.Sprint("p", r.IntN(6)), fmt.Sprint("n", 1+r.IntN(2)), app(), fmt.Sprintf("10.1.0.%d", r.IntN(250))))
				case 14:
					h.put(allow(namespace(), fmt.Sprint("np", r.IntN(3)), app(), app(), app()))
				case 15:
					h.remove([]runtime.Object{
						pod(namespace(), fmt.Sprint("p", r.IntN(6)), "", ""), allow(namespace(), fmt.Sprint("np", r.IntN(3)), "", "", ""), inNamespace(namespace(), ""),
					}[r.IntN(3)])
				case 0, 1:
					h.put(service(namespace(), name(), fmt.Sprintf("10.96.0.%d", r.IntN(250))))
				case 2, 3, 4:
					h.put(slice(namespace(), name()+"-x", name(), fmt.Sprintf("10.1.0.%d", r.IntN(250))))
				case 5:
					h.remove([]runtime.Object{service(namespace(), name(), ""), slice(namespace(), name()+"-x", "")}[r.IntN(2)])
				case 6:
					h.put(node(fmt.Sprint("n", r.IntN(4)), fmt.Sprintf("192.0.2.%d", r.IntN(3)), int64(r.IntN(3)), fmt.Sprintf("10.2.%d.0/24", r.IntN(3))))
				case 7:
					var gone []runtime.Object
					for i := range 12 {
						gone = append(gone, service("a", fmt.Sprint("s", i), ""))
					}
					for _, o := range gone {
						h.remove(o)
					}
				case 8:
					a.connect(ks[r.IntN(len(ks))])
				case 9:
					a.stop()
					if r.IntN(3) == 0 {
						require.NoError(t, os.RemoveAll(a.path))
					} else if r.IntN(3) == 0 {
						_ = os.WriteFile(a.path, []byte("damaged"), 0o600)
					}
					a.start()
					a.connect(ks[r.IntN(len(ks))])
				}
				if r.IntN(8) == 0 {
					h.eventually(a)
				}
			}
			h.eventually(a)
			fresh := newAgent(t, "n2", "")
			defer fresh.stop()
			fresh.connect(ks[1])
			h.eventually(fresh)
		})
	}
}

// An agent that has what another controller told it gets only what differs.
func TestAResumeCostsTheDifference(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(many(1500)...)
	k1, k2 := h.controller(nil), h.controller(nil)
	a := newAgent(t, "n1", filepath.Join(t.TempDir(), "feed"))
	a.connect(k1)
	h.eventually(a)
	a.stop()

	a.start()
	require.True(t, a.store.View().Synced(), "what is on the disk counts")
	require.True(t, h.want("n1") == dump(a.store.View()))
	before := a.store.View()
	a.connect(k2)
	require.Eventually(t, func() bool { return k2.feed.Figures().Batches == 1 }, patience, time.Millisecond)
	require.Zero(t, k2.feed.Figures().SentItems)
	require.Same(t, before, a.store.View())
	a.stop()

	h.put(service("a", "s7", "10.97.0.1"))
	a.start()
	a.connect(k1)
	h.eventually(a)
	sent := k1.feed.Figures().SentItems
	require.Less(t, sent, uint64(3000+200), "3000 were sent at first; then a bucket")
	a.stop()
}

// A node whose disk has the items of another cluster forgets them.
func TestAnotherCluster(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(service("a", "s1", "10.96.0.1"))
	k := h.controller(nil)
	a := newAgent(t, "n1", filepath.Join(t.TempDir(), "feed"))
	a.connect(k)
	h.eventually(a)
	a.stop()
	other := newHouse(t)
	other.put(service("b", "s2", "10.96.0.2"))
	k = other.controller(func(f *Feed) { f.cfg.ClusterID = "another" })
	a.start()
	defer a.stop()
	a.connect(k)
	other.eventually(a)
}

// An agent that has lost an item, by whatever bug, is told of it again.
func TestADigestThatDiffersHeals(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(many(20)...)
	k := h.controller(nil)
	a := newAgent(t, "n1", "")
	defer a.stop()
	stream := k.raw(t, "n1")
	require.NoError(t, stream.Send(have(nil)))
	for synced := false; !synced; {
		b, err := stream.Recv()
		require.NoError(t, err)
		synced = b.GetSynced()
	}
	// The controller believes that this stream's agent knows all; it says otherwise.
	bucket, sum := wire.SumOf(wire.Key{Kind: serviceKind, Namespace: "x", Name: "ghost"}, nil)
	d := &wire.Digest{}
	d.Toggle(bucket, sum)
	require.NoError(t, stream.Send(have(d)))
	items, synced := 0, false
	for !synced {
		b, err := stream.Recv()
		require.NoError(t, err)
		items += len(b.Set)
		synced = b.Synced
		if b.Ack {
			require.NoError(t, stream.Send(&pb.NetworkRequest{Message: &pb.NetworkRequest_Taken{Taken: &pb.NetworkTaken{Sequence: b.Sequence}}}))
		}
	}
	require.Equal(t, 40, items)
}

func have(d *wire.Digest) *pb.NetworkRequest {
	h := &pb.NetworkHave{Epoch: clusterID, Kinds: []pb.NetworkKind{nodeKind, serviceKind, sliceKind}}
	if d != nil {
		h.Buckets = d.Marshal()
	}
	return &pb.NetworkRequest{Message: &pb.NetworkRequest_Have{Have: h}}
}

// raw is a stream that a test speaks by itself.
func (s *server) raw(t *testing.T, name string) pb.Agents_NetworkClient {
	conn := s.conn()
	t.Cleanup(func() { conn.Close() })
	stream, err := pb.NewAgentsClient(conn).Network(metadata.AppendToOutgoingContext(t.Context(), "node", name))
	require.NoError(t, err)
	return stream
}

func TestWhatAnAgentMayNotSay(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	k := h.controller(nil)
	for name, m := range map[string]*pb.NetworkRequest{
		"taken first": {Message: &pb.NetworkRequest_Taken{Taken: &pb.NetworkTaken{}}},
		"nothing":     {},
		"few buckets": {Message: &pb.NetworkRequest_Have{Have: &pb.NetworkHave{Buckets: []byte("rubbish")}}},
		"many kinds":  {Message: &pb.NetworkRequest_Have{Have: &pb.NetworkHave{Kinds: make([]pb.NetworkKind, 17)}}},
	} {
		stream := k.raw(t, "n-"+strings.ReplaceAll(name, " ", "-"))
		require.NoError(t, stream.Send(m))
		_, err := stream.Recv()
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%s: %v", name, err)
	}
}

// An agent that asks for ever waits between lists, over streams too, and one that takes
// nothing is sent no more than some batches.
func TestAnAgentThatAsksForEver(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(many(100)...)
	k := h.controller(func(f *Feed) { f.listEvery = time.Hour })
	for range listBurst {
		stream := k.raw(t, "n1")
		require.NoError(t, stream.Send(have(nil)))
		_, err := stream.Recv()
		require.NoError(t, err)
	}
	stream := k.raw(t, "n1")
	for range 3 {
		require.NoError(t, stream.Send(have(nil)))
	}
	other := newAgent(t, "n2", "")
	defer other.stop()
	other.connect(k)
	h.eventually(other)
	require.EqualValues(t, listBurst+1, k.feed.Figures().Lists)
}

func TestAnAgentThatTakesNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(many(4000)...)
	k := h.controller(nil)
	stream := k.raw(t, "n1")
	require.NoError(t, stream.Send(have(nil)))
	for range maxUntaken {
		b, err := stream.Recv()
		require.NoError(t, err)
		require.False(t, b.Synced)
		require.True(t, b.Ack)
	}
	other := newAgent(t, "n2", "")
	defer other.stop()
	other.connect(k)
	other.eventuallySynced()
	require.EqualValues(t, 4000*2, func() (n int) {
		for range other.store.View().Services() {
			n++
		}
		return 2 * n
	}())
	got := make(chan error, 1)
	go func() { _, err := stream.Recv(); got <- err }()
	select {
	case err := <-got:
		t.Fatalf("a batch beyond those that were not taken: %v", err)
	default:
	}
}

func (a *agent) eventuallySynced() {
	a.t.Helper()
	require.Eventually(a.t, func() bool { return a.store.View().Synced() }, patience, time.Millisecond)
}

// A slice that a client made too large is left out, and what was known of it goes; what
// a namespace has beyond its part waits until there is room.
func TestWhatIsTooLarge(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	huge := slice("a", "s1-x", "s1")
	for i := range 100 {
		huge.Endpoints = append(huge.Endpoints, slice("", "", "", strings.Repeat("x", 12<<10)+fmt.Sprint(i)).Endpoints...)
	}
	h.put(service("a", "s1", "10.96.0.1"), slice("a", "s1-x", "s1", "10.1.0.1"))
	k := h.controller(nil)
	a := newAgent(t, "n1", "")
	defer a.stop()
	a.connect(k)
	h.eventually(a)
	h.put(huge)
	require.Eventually(t, func() bool {
		return len(a.store.View().Slices(feed.Name{Namespace: "a", Name: "s1"})) == 0
	}, patience, time.Millisecond)
	require.Equal(t, 1, k.feed.Figures().Withheld)
	require.NotNil(t, a.store.View().Service(feed.Name{Namespace: "a", Name: "s1"}))
	h.put(slice("a", "s1-x", "s1", "10.1.0.2"))
	h.eventually(a)
	require.Zero(t, k.feed.Figures().Withheld)
}

func TestOneNamespaceDoesNotTakeAll(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	big := func(i int) *corev1.Service {
		s := service("a", fmt.Sprint("big", i), "")
		s.Spec.ExternalName = strings.Repeat("x", 1000<<10)
		return s
	}
	const n = (16<<20)/(1000<<10) + 3
	for i := range n {
		h.put(big(i))
	}
	h.put(service("b", "s1", "10.96.0.1"))
	k := h.controller(nil)
	require.Eventually(t, func() bool { return k.feed.Figures().Withheld > 1 }, patience, time.Millisecond)
	f := k.feed.Figures()
	require.LessOrEqual(t, f.Bytes, int64(16<<20+wire.MaxItem))
	require.Equal(t, n+1, f.Items+f.Withheld)
	for i := range 10 {
		h.remove(big(i))
	}
	require.Eventually(t, func() bool { return k.feed.Figures().Withheld == 0 }, patience, time.Millisecond)
}

func TestAnOlderController(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(service("a", "s1", "10.96.0.1"))
	k, older := h.controller(nil), h.controller(nil)
	older.older = true
	a := newAgent(t, "n1", "")
	defer a.stop()
	a.connect(k)
	h.eventually(a)
	a.cut()
	conn := older.conn()
	defer conn.Close()
	a.client.Follow(metadata.AppendToOutgoingContext(context.Background(), "node", "n1"), pb.NewAgentsClient(conn)) // returns
	require.True(t, h.want("n1") == dump(a.store.View()))
}

// An agent of an earlier version asks for no policies, and is told of none.
func TestAnOlderAgent(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.put(inNamespace("a", "x"), pod("a", "web", "n1", "web", "10.1.0.7"), allow("a", "p", "web", "web", "x"), service("a", "s1", "10.96.0.1"))
	k := h.controller(nil)
	stream := k.raw(t, "n1")
	require.NoError(t, stream.Send(have(nil)))
	items := 0
	for synced := false; !synced; {
		b, err := stream.Recv()
		require.NoError(t, err)
		require.Zero(t, b.Revision)
		items, synced = items+len(b.Set), b.Synced
	}
	require.Equal(t, 1, items)
	h.put(allow("a", "q", "web", "web", "x"), service("a", "s1", "10.96.0.2"))
	b, err := stream.Recv()
	require.NoError(t, err)
	require.Len(t, b.Set, 1)
	require.Zero(t, b.Revision)
}

// A pod that waits for its policies is told when there are none any more, though nothing of
// it is ever told.
func TestWhoWaitsForARevisionIsTold(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	k := h.controller(nil)
	a := newAgent(t, "n1", "")
	defer a.stop()
	a.connect(k)
	a.eventuallySynced()
	h.put(pod("a", "web", "n1", "web"), allow("a", "p", "web", "web", "x"))
	require.NoError(t, k.cache.WaitRevision(t.Context(), h.store.View().Revision()))
	s := k.cache.Snapshot()
	web, _ := s.Pods().Get("a", "web")
	since := NewHolding(s).Since(web)
	require.Equal(t, h.store.View().Revision(), since)
	other := web.DeepCopy()
	other.Labels = nil
	require.Zero(t, NewHolding(s).Since(other))
	other.Spec.HostNetwork, other.Labels = true, web.Labels
	require.Zero(t, NewHolding(s).Since(other))
	for i := range fewPolicies + 1 {
		h.put(allow("a", fmt.Sprint("more", i), "db", "db", "x"))
	}
	require.NoError(t, k.cache.WaitRevision(t.Context(), h.store.View().Revision()))
	other.Spec.HostNetwork, other.Labels = false, nil
	since = NewHolding(k.cache.Snapshot()).Since(other)
	require.Equal(t, h.store.View().Revision(), since, "with so many, the feed says whether one holds")
	k.feed.Want("n1", since)
	h.eventually(a)
	require.Eventually(t, func() bool { return a.store.View().Told() >= since }, patience, time.Millisecond)

	// Nothing of the node changes here.
	h.put(allow("b", "p", "web", "web", "x"))
	k.feed.Want("n1", h.store.View().Revision())
	require.Eventually(t, func() bool { return a.store.View().Told() == h.store.View().Revision() }, patience, time.Millisecond)
}

// A policy of the cluster is told to the nodes of its subjects, and pods wait for it.
func TestAPolicyOfTheCluster(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const key = "/registry/policy.networking.k8s.io/clusternetworkpolicies/c"
	spec := func(action string) state.Change {
		return state.Change{Key: key, Value: []byte(`{"apiVersion":"policy.networking.k8s.io/v1beta1","kind":"ClusterNetworkPolicy","metadata":{"name":"c","uid":"u"},
			"spec":{"tier":"Admin","priority":1,"subject":{"namespaces":{"matchLabels":{"team":"x"}}},"egress":[{"action":"` + action + `","to":[{"nodes":{}}]}]}}`)}
	}
	h.put(inNamespace("a", "x"), inNamespace("b", "y"), pod("a", "web", "n1", "web"), pod("b", "web", "n2", "web"), node("n1", "192.0.2.1", 1, "10.1.0.0/24"))
	h.apply(spec("Deny"))
	k := h.controller(nil)
	n1, n2 := newAgent(t, "n1", ""), newAgent(t, "n2", "")
	defer n1.stop()
	defer n2.stop()
	n1.connect(k)
	n2.connect(k)
	n1.eventuallySynced()
	n2.eventuallySynced()
	require.Nil(t, n2.store.View().Policy("", "c"))
	c := n1.store.View().Policy("", "c")
	require.Equal(t, pb.NetworkRule_DENY, c.GetEgress()[0].Action)
	parts, ok := n1.store.View().Group(c.Egress[0].Groups[0])
	require.True(t, ok)
	require.Equal(t, []byte{192, 0, 2, 1}, parts[0].V4)
	s := k.cache.Snapshot()
	web, _ := s.Pods().Get("a", "web")
	require.Equal(t, s.Revision(), NewHolding(s).Since(web))

	h.apply(spec("Accept"))
	require.Eventually(t, func() bool {
		return n1.store.View().Policy("", "c").GetEgress()[0].Action == pb.NetworkRule_ALLOW
	}, patience, time.Millisecond)
	h.apply(spec("Unknown\",\"x\":\""))
	require.Eventually(t, func() bool {
		r := n1.store.View().Policy("", "c").GetEgress()[0]
		return r.Action == pb.NetworkRule_DENY && r.AnyPeer
	}, patience, time.Millisecond)
	h.apply(state.Change{Key: key, Delete: true})
	require.Eventually(t, func() bool { return n1.store.View().Pod(feed.Name{Namespace: "a", Name: "web"}) == nil }, patience, time.Millisecond)
}
