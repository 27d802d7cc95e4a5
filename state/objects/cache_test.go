package objects

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"

	"timonel/state"
)

// encode returns an object as the API server stores it, in protobuf.
func encode(t testing.TB, o runtime.Object) []byte {
	t.Helper()
	info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	if !ok {
		t.Fatal("no protobuf serializer")
	}
	b, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, schema.GroupVersions(scheme.Scheme.PrioritizedVersionsAllGroups())), o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func pod(namespace, name, node string, owners ...types.UID) *corev1.Pod {
	p := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, UID: types.UID(namespace + "-" + name),
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubectl", Operation: metav1.ManagedFieldsOperationApply}},
		},
		Spec: corev1.PodSpec{NodeName: node},
	}
	for _, uid := range owners {
		p.OwnerReferences = append(p.OwnerReferences, metav1.OwnerReference{UID: uid, Name: string(uid)})
	}
	return p
}

func node(name string) *corev1.Node {
	return &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name}}
}

// apply applies changes as one entry and returns the new revision.
func apply(t testing.TB, s *state.Store, changes ...state.Change) int64 {
	t.Helper()
	txn := state.Txn{Changes: changes}
	r := s.ApplyBatch([]state.Entry{{Command: txn.Marshal()}})[0]
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	return r.Revision
}

func podKey(namespace, name string) string { return "/registry/pods/" + namespace + "/" + name }

func putPod(t testing.TB, p *corev1.Pod) state.Change {
	return state.Change{Key: podKey(p.Namespace, p.Name), Value: encode(t, p)}
}

// start runs a cache until the test ends.
func start(t testing.TB, s *state.Store) *Cache {
	t.Helper()
	c := NewCache(s)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	return c
}

func names[T metav1.Object](objects func(func(T) bool)) (out []string) {
	for o := range objects {
		out = append(out, o.GetName())
	}
	return out
}

func wantNames(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s are %v, want %v", what, got, want)
	}
}

func snapshotAt(t testing.TB, c *Cache, revision int64) *Snapshot {
	t.Helper()
	if err := c.WaitRevision(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
	return c.Snapshot()
}

// Whoever waits for the state's revision waits for changes of keys that are no
// objects too: the cluster's version, join tokens, members.
func TestWaitRevisionAfterAChangeOfOtherKeys(t *testing.T) {
	t.Parallel()
	s := state.New(state.Options{})
	first := apply(t, s, putPod(t, pod("a", "p1", "n1")))
	c := start(t, s)
	snapshotAt(t, c, first) // what follows comes as events
	for i := range 3 {
		revision := apply(t, s, state.Change{Key: "trust/tokens/t1", Value: fmt.Append(nil, i)})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := c.WaitRevision(ctx, revision)
		cancel()
		if err != nil {
			t.Fatalf("wait for revision %d, of a key outside /registry: %v", revision, err)
		}
	}
	snap := c.Snapshot()
	if got := snap.Metas().Len(); got != 1 {
		t.Errorf("the cache has %d objects, want the pod alone", got)
	}
	wantNames(t, "pods", names(snap.Pods().All()), "p1")
}

func TestTablesAndIndexes(t *testing.T) {
	t.Parallel()
	s := state.New(state.Options{})
	apply(t, s,
		putPod(t, pod("a", "p1", "n1", "rs1")),
		putPod(t, pod("a", "p2", "n2", "rs1", "rs2")),
		putPod(t, pod("b", "p1", "")),
		state.Change{Key: "/registry/minions/n1", Value: encode(t, node("n1"))},
		state.Change{Key: "/registry/deployments/a/web", Value: encode(t, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "web", UID: "d1"}})},
		state.Change{Key: "/registry/services/specs/a/web", Value: encode(t, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "web"}})},
		state.Change{Key: "/registry/stable.example.com/tabs/a/c1", Value: []byte(`{"apiVersion":"stable.example.com/v1","kind":"Tab","metadata":{"namespace":"a","name":"c1","uid":"cr1","ownerReferences":[{"uid":"rs2"}]},"spec":{"x":1}}`)},
		state.Change{Key: "/registry/pods/b/broken", Value: []byte("k8s:enc:nonsense")},
	)
	c := start(t, s)
	snap := snapshotAt(t, c, s.View().Revision())

	wantNames(t, "pods", names(snap.Pods().All()), "p1", "p2", "p1")
	wantNames(t, "pods of a", names(snap.Pods().InNamespace("a")), "p1", "p2")
	wantNames(t, "pods on n1", names(snap.PodsOnNode("n1")), "p1")
	wantNames(t, "nodes", names(snap.Nodes().All()), "n1")
	wantNames(t, "services", names(snap.Services().All()), "web")
	wantNames(t, "owned by rs2", names(snap.OwnedBy("rs2")), "p2", "c1")
	wantNames(t, "all of namespace a", names(snap.Metas().InNamespace("a")), "web", "p1", "p2", "web", "c1")
	if n := snap.Pods().Len(); n != 3 {
		t.Errorf("%d pods, want 3", n)
	}
	if n := snap.Metas().Len(); n != 7 {
		t.Errorf("%d objects, want 7", n)
	}
	p, ok := snap.Pods().Get("a", "p1")
	if !ok || p.ResourceVersion != "2" || p.Kind != "Pod" || p.APIVersion != "v1" || p.ManagedFields != nil {
		t.Errorf("pod a/p1 is %+v, %v", p, ok)
	}
	if _, ok := snap.Nodes().Get("", "n1"); !ok {
		t.Error("node n1 is missing")
	}
	if _, ok := snap.Pods().Get("a", "p3"); ok {
		t.Error("pod a/p3 exists")
	}
	m, ok := snap.Metas().ByUID("cr1")
	if !ok || m.GVK.String() != "stable.example.com/v1, Kind=Tab" || m.Key != "/registry/stable.example.com/tabs/a/c1" || m.Object != nil {
		t.Errorf("custom resource is %+v, %v", m, ok)
	}

	// An older snapshot stays as it is.
	r := apply(t, s, putPod(t, pod("a", "p1", "n2")), state.Change{Key: podKey("a", "p2"), Delete: true})
	next := snapshotAt(t, c, r)
	wantNames(t, "pods on n1", names(next.PodsOnNode("n1")))
	wantNames(t, "pods on n2", names(next.PodsOnNode("n2")), "p1")
	wantNames(t, "owned by rs1", names(next.OwnedBy("rs1")))
	wantNames(t, "pods on n2 before", names(snap.PodsOnNode("n2")), "p2")
	wantNames(t, "owned by rs1 before", names(snap.OwnedBy("rs1")), "p1", "p2")
}

// print shows changes as "+name", "-name" and "~name".
func print(changes []Changed) (out []string) {
	for _, c := range changes {
		switch {
		case c.Old == nil:
			out = append(out, "+"+c.New.Name)
		case c.New == nil:
			out = append(out, "-"+c.Old.Name)
		default:
			out = append(out, "~"+c.New.Name)
		}
	}
	return out
}

func TestChanges(t *testing.T) {
	t.Parallel()
	s := state.New(state.Options{})
	apply(t, s, putPod(t, pod("a", "p1", "")))
	c := start(t, s)
	got, err := c.Changes(t.Context(), 0)
	if err != nil || !slices.Equal(print(got.Changed), []string{"+p1"}) || got.Reset {
		t.Fatalf("first changes are %v, %v", got, err)
	}
	after := got.Snapshot.Revision()
	r := apply(t, s, putPod(t, pod("a", "p1", "n1")), putPod(t, pod("a", "p2", "")), state.Change{Key: podKey("a", "p1"), Delete: true})
	snapshotAt(t, c, r)
	got, err = c.Changes(t.Context(), after)
	if err != nil || !slices.Equal(print(got.Changed), []string{"~p1", "+p2", "-p1"}) || got.Snapshot.Revision() != r {
		t.Fatalf("changes are %v at %d, %v", print(got.Changed), got.Snapshot.Revision(), err)
	}
	if old := got.Changed[0].Old.Object.(*corev1.Pod); old.Spec.NodeName != "" {
		t.Errorf("old pod is on %q", old.Spec.NodeName)
	}
	got, err = c.Changes(t.Context(), r+100)
	if err != nil || !got.Reset {
		t.Errorf("changes after a revision not reached are %+v, %v, want a reset", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Changes(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("changes with a cancelled context: %v", err)
	}
}

func TestChangesForgotten(t *testing.T) {
	t.Parallel()
	s := state.New(state.Options{})
	value := encode(t, pod("a", "p", ""))
	var changes []state.Change
	for i := range changesKept + 10 {
		changes = append(changes, state.Change{Key: podKey("a", fmt.Sprintf("p%d", i%100)), Value: value})
	}
	c := start(t, s)
	snapshotAt(t, c, 1)
	r := apply(t, s, changes...)
	snapshotAt(t, c, r)
	if got, err := c.Changes(t.Context(), 1); err != nil || !got.Reset || got.Snapshot.Revision() != r {
		t.Errorf("changes are reset=%v, %v, want a reset", got.Reset, err)
	}
	if got, err := c.Changes(t.Context(), r-5); err != nil || got.Reset || len(got.Changed) != 5 {
		t.Errorf("last changes are %d, reset=%v, %v, want 5", len(got.Changed), got.Reset, err)
	}
}

// TestChangesAreBoundedInBytes replaces objects of several sizes: what was replaced is
// held up to a bound, and beyond it who asks is told to read everything.
func TestChangesAreBoundedInBytes(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 10 << 10, 300 << 10, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			s := state.New(state.Options{HistoryBytes: 1 << 30, HistoryLargeBytes: 1 << 30})
			p := pod("a", "p", "")
			p.Annotations = map[string]string{"big": string(make([]byte, size))}
			value := encode(t, p)
			put := state.Change{Key: podKey("a", "p"), Value: value}
			c := start(t, s)
			first := apply(t, s, put)
			snapshotAt(t, c, first)
			const n = 200
			for range n / 10 {
				changes := make([]state.Change, 10)
				for i := range changes {
					changes[i] = put
				}
				snapshotAt(t, c, apply(t, s, changes...))
			}
			last := c.Snapshot().Revision()
			c.mu.Lock()
			kept, counted := len(c.changes), c.replaced
			var held int64
			for _, ch := range c.changes {
				held += ch.replaced()
			}
			c.mu.Unlock()
			if held != counted || held > changesBytes {
				t.Errorf("%d bytes of what was replaced are held, counted %d, at most %d", held, counted, changesBytes)
			}
			if want := min(n, changesBytes/len(value)); kept < want {
				t.Errorf("%d changes are kept, want %d at least", kept, want)
			}
			got, err := c.Changes(t.Context(), first)
			if fits := n*len(value) <= changesBytes; err != nil || got.Reset == fits {
				t.Errorf("all changes: reset=%v, %v; %d bytes of at most %d were replaced", got.Reset, err, n*len(value), changesBytes)
			}
			got, err = c.Changes(t.Context(), last-5)
			if err != nil || got.Reset || len(got.Changed) != 5 {
				t.Errorf("the last changes are %d, reset=%v, %v, want 5", len(got.Changed), got.Reset, err)
			}
			c.Trim(int64(2*len(value) + 100))
			for back, reset := range map[int64]bool{1: false, 2: false, 3: true, 5: true} {
				if got, err = c.Changes(t.Context(), last-back); err != nil || got.Reset != reset || !reset && len(got.Changed) != int(back) {
					t.Errorf("trimmed to two, the last %d changes are %d, reset=%v, %v", back, len(got.Changed), got.Reset, err)
				}
			}
			c.Trim(0)
			next := apply(t, s, put)
			snapshotAt(t, c, next)
			if got, err = c.Changes(t.Context(), last); err != nil || got.Reset || len(got.Changed) != 1 {
				t.Errorf("after all was forgotten the next change is %d, reset=%v, %v", len(got.Changed), got.Reset, err)
			}
		})
	}
	t.Run("of what is not decoded", func(t *testing.T) {
		t.Parallel()
		s := state.New(state.Options{HistoryBytes: 1 << 30, HistoryLargeBytes: 1 << 30})
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "m"}, BinaryData: map[string][]byte{"big": make([]byte, 1<<20)}}
		put := state.Change{Key: "/registry/things/a/m", Value: encode(t, m)}
		c := start(t, s)
		first := apply(t, s, put)
		snapshotAt(t, c, first)
		for range 40 { // more than changesBytes of values, of which the metadata alone is held
			snapshotAt(t, c, apply(t, s, put))
		}
		if got, err := c.Changes(t.Context(), first); err != nil || got.Reset || len(got.Changed) != 40 {
			t.Errorf("changes are %d, reset=%v, %v, want 40", len(got.Changed), got.Reset, err)
		}
	})
}

// TestChangesBeforeTheCache asks for what changed after revisions that the cache
// never had a snapshot of: what was deleted since is not known to it.
func TestChangesBeforeTheCache(t *testing.T) {
	t.Parallel()
	s := state.New(state.Options{HistoryChanges: 1})
	early := apply(t, s, putPod(t, pod("a", "p1", "n1")))
	r := apply(t, s, state.Change{Key: podKey("a", "p1"), Delete: true})
	c := start(t, s)
	snapshotAt(t, c, r)
	for _, after := range []int64{1, early} {
		if got, err := c.Changes(t.Context(), after); err != nil || !got.Reset {
			t.Errorf("changes after %d, before the cache was filled at %d: reset=%v, %v, want a reset", after, r, got.Reset, err)
		}
	}

	// It falls behind and reads everything again: in between, likewise.
	leader := state.New(state.Options{HistoryChanges: 1})
	install(t, s, leader)
	between := apply(t, leader, putPod(t, pod("a", "p2", "n1")))
	apply(t, leader, state.Change{Key: podKey("a", "p2"), Delete: true})
	last := apply(t, leader, putPod(t, pod("a", "p3", "n1")))
	install(t, leader, s)
	snapshotAt(t, c, last)
	if got, err := c.Changes(t.Context(), between); err != nil || !got.Reset {
		t.Errorf("changes after a revision that was jumped over: reset=%v, %v, want a reset", got.Reset, err)
	}
	if got, err := c.Changes(t.Context(), r); err != nil || got.Reset || !slices.Equal(print(got.Changed), []string{"+p3"}) {
		t.Errorf("changes after the snapshot before are %v, reset=%v, %v", print(got.Changed), got.Reset, err)
	}
	next := apply(t, s, putPod(t, pod("a", "p4", "n1")))
	snapshotAt(t, c, next)
	if got, err := c.Changes(t.Context(), last); err != nil || got.Reset || !slices.Equal(print(got.Changed), []string{"+p4"}) {
		t.Errorf("changes after the last snapshot are %v, reset=%v, %v", print(got.Changed), got.Reset, err)
	}
}

// TestRestore installs a snapshot under a running cache: of the same history,
// of one that went on without it, and of an older one.
func TestRestore(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		options state.Options
	}{
		{"history reaches back", state.Options{}},
		{"history does not reach back", state.Options{HistoryChanges: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			leader, follower := state.New(tt.options), state.New(tt.options)
			for _, s := range []*state.Store{leader, follower} {
				apply(t, s, putPod(t, pod("a", "p1", "n1")), putPod(t, pod("a", "p2", "n1")))
			}
			c := start(t, follower)
			before := snapshotAt(t, c, 3).Revision()
			apply(t, leader, putPod(t, pod("a", "p1", "n2")))
			apply(t, leader, state.Change{Key: podKey("a", "p2"), Delete: true})
			r := apply(t, leader, putPod(t, pod("a", "p3", "n2")))
			install(t, leader, follower)
			snap := snapshotAt(t, c, r)
			wantNames(t, "pods", names(snap.Pods().All()), "p1", "p3")
			wantNames(t, "pods on n2", names(snap.PodsOnNode("n2")), "p1", "p3")
			wantNames(t, "pods on n1", names(snap.PodsOnNode("n1")))
			got, err := c.Changes(t.Context(), before)
			changed := print(got.Changed)
			slices.Sort(changed)
			if err != nil || got.Reset || !slices.Equal(changed, []string{"+p3", "-p2", "~p1"}) {
				t.Errorf("changes are %v, %v", changed, err)
			}
		})
	}
	t.Run("an older state", func(t *testing.T) {
		t.Parallel()
		old, s := state.New(state.Options{}), state.New(state.Options{})
		apply(t, old, putPod(t, pod("a", "old", "n1")))
		r := apply(t, s, putPod(t, pod("a", "p1", "n1")), putPod(t, pod("a", "p2", "n1")))
		c := start(t, s)
		snapshotAt(t, c, r)
		install(t, old, s)
		got, err := c.Changes(t.Context(), r)
		if err != nil || !got.Reset || got.Snapshot.Revision() != 2 {
			t.Fatalf("changes are reset=%v, %v, want a reset", got.Reset, err)
		}
		wantNames(t, "pods", names(got.Snapshot.Pods().All()), "old")
	})
}

func install(t *testing.T, from, to *state.Store) {
	t.Helper()
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(from.Save(pw)) }()
	if err := to.Restore(pr); err != nil {
		t.Fatal(err)
	}
}
