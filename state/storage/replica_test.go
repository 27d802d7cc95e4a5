package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"

	"timonel/state"
)

// replicas are two replicas of one log. The second applies entries when it is
// told to, when it commits and when it passes a read barrier.
type replicas struct {
	mu      sync.Mutex
	log     []state.Entry
	applied [2]int
	results [2][]state.Result
	stores  [2]*state.Store
	fail    error // of the next commits
}

func newReplicas() *replicas {
	return &replicas{stores: [2]*state.Store{state.New(state.Options{}), state.New(state.Options{})}}
}

// catchUp applies everything to a replica. The lock is held.
func (r *replicas) catchUp(i int) {
	r.results[i] = append(r.results[i], r.stores[i].ApplyBatch(r.log[r.applied[i]:])...)
	r.applied[i] = len(r.log)
}

type replica struct {
	r *replicas
	i int
}

func (r replica) Store() *state.Store { return r.r.stores[r.i] }

func (r replica) InTouch() (<-chan struct{}, error) { return nil, nil }

func (r replica) ReadBarrier(ctx context.Context) error {
	r.r.mu.Lock()
	defer r.r.mu.Unlock()
	r.r.catchUp(r.i)
	return ctx.Err()
}

func (r replica) Commit(_ context.Context, txn *state.Txn) (state.Result, error) {
	r.r.mu.Lock()
	defer r.r.mu.Unlock()
	r.r.log = append(r.r.log, state.Entry{Index: uint64(len(r.r.log) + 1), Term: 1, Command: txn.Marshal()})
	r.r.catchUp(0)
	if r.r.fail != nil {
		return state.Result{}, r.r.fail
	}
	r.r.catchUp(r.i)
	return r.r.results[r.i][len(r.r.log)-1], nil
}

// on returns the storages of pods on a leader and on a replica that lags.
func on(t *testing.T, r *replicas) (leader, lagging *Store) {
	_, leader, _ = setup(t)
	_, lagging, _ = setup(t, func(c *Config) { c.FreshTimeout = 10 * time.Second })
	leader.backend, lagging.backend = replica{r, 0}, replica{r, 1}
	return leader, lagging
}

func newPod(name string) *example.Pod {
	return &example.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}}
}

func create(t *testing.T, s *Store, name string) *example.Pod {
	t.Helper()
	out := &example.Pod{}
	if err := s.Create(t.Context(), "/pods/ns/"+name, newPod(name), out, 0); err != nil {
		t.Fatal(err)
	}
	return out
}

func label(t *testing.T, s *Store, name, value string) *example.Pod {
	t.Helper()
	out := &example.Pod{}
	err := s.GuaranteedUpdate(t.Context(), "/pods/ns/"+name, out, false, nil, storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
		obj.(*example.Pod).Labels = map[string]string{"l": value}
		return obj, nil
	}), nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestLaggingReplicaReads(t *testing.T) {
	t.Parallel()
	r := newReplicas()
	leader, lagging := on(t, r)
	pod := create(t, leader, "a")

	out := &example.Pod{}
	if err := lagging.Get(t.Context(), "/pods/ns/a", storage.GetOptions{ResourceVersion: "0"}, out); !storage.IsNotFound(err) {
		t.Errorf("get at 0 of what is not here yet: %v", err)
	}
	if err := lagging.Get(t.Context(), "/pods/ns/a", storage.GetOptions{}, out); err != nil || out.Name != "a" {
		t.Errorf("linearizable get: %v, %v", out, err)
	}

	// A read of a revision waits for the replica to reach it.
	pod = label(t, leader, "a", "1")
	done := make(chan error)
	go func() {
		done <- lagging.Get(context.Background(), "/pods/ns/a", storage.GetOptions{ResourceVersion: pod.ResourceVersion}, out)
	}()
	r.mu.Lock()
	r.catchUp(1)
	r.mu.Unlock()
	if err := <-done; err != nil || out.Labels["l"] != "1" {
		t.Errorf("get at %s: %v, %v", pod.ResourceVersion, out, err)
	}
	lagging.config.FreshTimeout = time.Millisecond
	err := lagging.Get(t.Context(), "/pods/ns/a", storage.GetOptions{ResourceVersion: "1000"}, out)
	if !storage.IsTooLargeResourceVersion(err) {
		t.Errorf("get at a revision that does not come: %v", err)
	}
}

// TestLaggingReplicaWrites writes where the local data is old: the answer must
// be as if it were new.
func TestLaggingReplicaWrites(t *testing.T) {
	t.Parallel()
	remove := func(ctx context.Context, s *Store, name string, p *storage.Preconditions, suggestion runtime.Object) (*example.Pod, error) {
		out := &example.Pod{}
		return out, s.Delete(ctx, "/pods/ns/"+name, out, p, storage.ValidateAllObjectFunc, suggestion, storage.DeleteOptions{})
	}
	t.Run("update of an object that is not here yet", func(t *testing.T) {
		leader, lagging := on(t, newReplicas())
		create(t, leader, "a")
		if pod := label(t, lagging, "a", "1"); pod.Labels["l"] != "1" {
			t.Errorf("updated pod is %v", pod)
		}
	})
	t.Run("update of an object that has changed", func(t *testing.T) {
		leader, lagging := on(t, newReplicas())
		create(t, lagging, "a")
		label(t, leader, "a", "1")
		calls := 0
		out := &example.Pod{}
		err := lagging.GuaranteedUpdate(t.Context(), "/pods/ns/a", out, false, nil, storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
			calls++
			pod := obj.(*example.Pod)
			if pod.Labels["l"] != "1" {
				return nil, errors.New("not as it should be") // must not be the answer
			}
			pod.Labels["l"] = "2"
			return pod, nil
		}), nil)
		if err != nil || calls != 2 || out.Labels["l"] != "2" {
			t.Errorf("after %d calls the pod is %v, %v", calls, out, err)
		}
	})
	t.Run("update that changes nothing of what it sees", func(t *testing.T) {
		leader, lagging := on(t, newReplicas())
		create(t, lagging, "a")
		label(t, lagging, "a", "1")
		label(t, leader, "a", "2")
		if pod := label(t, lagging, "a", "1"); pod.Labels["l"] != "1" || pod.ResourceVersion != "5" {
			t.Errorf("updated pod is %v", pod)
		}
	})
	t.Run("delete of an object that is not here yet", func(t *testing.T) {
		leader, lagging := on(t, newReplicas())
		create(t, leader, "a")
		if pod, err := remove(t.Context(), lagging, "a", nil, nil); err != nil || pod.Name != "a" || pod.ResourceVersion != "3" {
			t.Errorf("deleted %v, %v", pod, err)
		}
		if _, err := remove(t.Context(), leader, "a", nil, nil); !storage.IsNotFound(err) {
			t.Errorf("deleted again: %v", err)
		}
	})
	t.Run("delete with a precondition that holds now", func(t *testing.T) {
		leader, lagging := on(t, newReplicas())
		old := create(t, lagging, "a")
		now := label(t, leader, "a", "1")
		if _, err := remove(t.Context(), lagging, "a", &storage.Preconditions{ResourceVersion: &old.ResourceVersion}, old); !storage.IsInvalidObj(err) {
			t.Errorf("deleted with an old precondition: %v", err)
		}
		if _, err := remove(t.Context(), lagging, "a", &storage.Preconditions{ResourceVersion: &now.ResourceVersion}, old); err != nil {
			t.Errorf("deleted with the right precondition: %v", err)
		}
	})
	t.Run("create of an object that is not here yet", func(t *testing.T) {
		leader, lagging := on(t, newReplicas())
		create(t, leader, "a")
		if err := lagging.Create(t.Context(), "/pods/ns/a", newPod("a"), nil, 0); !storage.IsExist(err) {
			t.Errorf("created again: %v", err)
		}
	})
}

func TestContinueOnAnotherReplica(t *testing.T) {
	t.Parallel()
	leader, lagging := on(t, newReplicas())
	for i := range 10 {
		create(t, leader, fmt.Sprintf("p%d", i))
	}
	page := func(s *Store, token string) *example.PodList {
		t.Helper()
		list := &example.PodList{}
		p := storage.Everything
		p.Limit, p.Continue = 4, token
		if err := s.GetList(t.Context(), "/pods/", storage.ListOptions{Predicate: p, Recursive: true}, list); err != nil {
			t.Fatal(err)
		}
		return list
	}
	first := page(leader, "")
	for i := range 10 { // what the next pages must not show
		label(t, leader, fmt.Sprintf("p%d", i), "new")
		create(t, leader, fmt.Sprintf("p%d-new", i))
	}
	if err := lagging.barrier(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	second := page(lagging, first.Continue)
	third := page(leader, second.Continue)
	if third.Continue != "" || *second.RemainingItemCount != 2 {
		t.Errorf("third page continues with %q, second says %d remain", third.Continue, *second.RemainingItemCount)
	}
	var got []string
	for _, list := range []*example.PodList{first, second, third} {
		if list.ResourceVersion != first.ResourceVersion {
			t.Errorf("page at %s, want %s", list.ResourceVersion, first.ResourceVersion)
		}
		for _, p := range list.Items {
			got = append(got, p.Name+p.Labels["l"])
		}
	}
	if want := "p0 p1 p2 p3 p4 p5 p6 p7 p8 p9"; strings.Join(got, " ") != want {
		t.Errorf("pages show %v, want %s", got, want)
	}
}

func TestWatchResumesOnAnotherReplica(t *testing.T) {
	t.Parallel()
	r := newReplicas()
	leader, lagging := on(t, r)
	create(t, leader, "a")
	seen := label(t, leader, "a", "1")
	label(t, leader, "a", "2")
	// The other replica has nothing yet, and must neither fail nor skip.
	w, err := lagging.Watch(t.Context(), "/pods/ns/", storage.ListOptions{ResourceVersion: seen.ResourceVersion, Recursive: true, Predicate: storage.Everything})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	r.mu.Lock()
	r.catchUp(1)
	r.mu.Unlock()
	e := <-w.ResultChan()
	pod := e.Object.(runtime.CacheableObject).GetObject().(*example.Pod)
	if e.Type != apiwatch.Modified || pod.Labels["l"] != "2" {
		t.Errorf("first event is %s %v", e.Type, pod)
	}
}

func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		fail  error
		check func(error) bool
	}{
		{"leader died", errors.New("leader lost while the entry was under way"), apierrors.IsTimeout},
		{"deadline", fmt.Errorf("apply: %w", context.DeadlineExceeded), apierrors.IsTimeout},
		{"status kept", apierrors.NewTooManyRequests("slow down", 1), apierrors.IsTooManyRequests},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newReplicas()
			leader, lagging := on(t, r)
			r.fail = tt.fail
			err := lagging.Create(t.Context(), "/pods/ns/a", newPod("a"), &example.Pod{}, 0)
			if !tt.check(err) {
				t.Fatalf("create: %v", err)
			}
			r.fail = nil
			// It had been committed: trying again is safe, and says so.
			if err := leader.Create(t.Context(), "/pods/ns/a", newPod("a"), nil, 0); !storage.IsExist(err) {
				t.Errorf("create again: %v", err)
			}
		})
	}
}

// countingCodec counts decodings.
type countingCodec struct {
	runtime.Codec
	decodes *atomic.Int64
}

func (c countingCodec) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	c.decodes.Add(1)
	return c.Codec.Decode(data, defaults, into)
}

func TestDecodedAndEncodedOnce(t *testing.T) {
	t.Parallel()
	var decodes atomic.Int64
	_, s, _ := setup(t, func(c *Config) {
		c.Codec = countingCodec{c.Codec, &decodes}
		c.GetAttrs = storage.DefaultNamespaceScopedAttr
	})
	const watchers = 20
	var watches []apiwatch.Interface
	for range watchers {
		w, err := s.Watch(t.Context(), "/pods/", storage.ListOptions{ResourceVersion: "1", Recursive: true, Predicate: storage.Everything})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
		watches = append(watches, w)
	}
	created := create(t, s, "a")
	encodes := 0
	encode := func(obj runtime.Object, w io.Writer) error {
		encodes++
		_, err := io.WriteString(w, obj.(*example.Pod).Name)
		return err
	}
	for i, w := range watches {
		obj := (<-w.ResultChan()).Object.(*watchObject)
		if i == 0 { // one that changes its object changes nobody else's
			obj.SetResourceVersion("changed")
			obj.SetLabels(map[string]string{"mine": "true"})
			if obj.GetObject().(*example.Pod).Labels["mine"] != "true" {
				t.Error("a change of the object is lost")
			}
			continue
		}
		if obj.GetResourceVersion() != created.ResourceVersion || len(obj.GetLabels()) != 0 {
			t.Errorf("object is at %s with labels %v", obj.GetResourceVersion(), obj.GetLabels())
		}
		var b strings.Builder
		if err := obj.CacheEncode("test", encode, &b); err != nil || b.String() != "a" {
			t.Errorf("encoded %q, %v", b.String(), err)
		}
	}
	if encodes != 1 {
		t.Errorf("encoded %d times, want once", encodes)
	}
	for range 5 {
		out, list := &example.Pod{}, &example.PodList{}
		if err := s.Get(t.Context(), "/pods/ns/a", storage.GetOptions{}, out); err != nil {
			t.Fatal(err)
		}
		out.Name = "changed" // it is ours
		if err := s.GetList(t.Context(), "/pods/", storage.ListOptions{Recursive: true, Predicate: storage.Everything}, list); err != nil {
			t.Fatal(err)
		}
		if list.Items[0].Name != "a" {
			t.Error("a caller's change reached the cache")
		}
	}
	if n := decodes.Load(); n != 1 {
		t.Errorf("decoded %d times, want once", n)
	}
}

func TestUpdateKeepsTimeToLive(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	_, s, b := setup(t, func(c *Config) { c.Now = func() time.Time { return now } })
	if err := s.Create(t.Context(), "/pods/ns/a", newPod("a"), nil, 60); err != nil {
		t.Fatal(err)
	}
	label(t, s, "a", "1")
	if kv, _ := b.Store().View().Get("/pods/ns/a"); kv.ExpiresAt != 1060 {
		t.Errorf("expires at %d, want 1060", kv.ExpiresAt)
	}
	for _, now := range []int64{1059, 1060} {
		if err := expire(t.Context(), b, now); err != nil {
			t.Fatal(err)
		}
		if _, ok := b.Store().View().Get("/pods/ns/a"); ok != (now < 1060) {
			t.Errorf("at %d the key exists: %v", now, ok)
		}
	}
}

func TestDecorator(t *testing.T) {
	t.Parallel()
	_, _, b := setup(t)
	config := storagebackend.NewDefaultConfig("/registry", exampleCodec()).ForResource(schema.GroupResource{Resource: "pods"})
	s, destroy, err := Decorator(b, NewCaches(0))(config, "/pods", nil,
		func() runtime.Object { return &example.Pod{} }, func() runtime.Object { return &example.PodList{} },
		storage.DefaultNamespaceScopedAttr, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Watch(t.Context(), "/pods/", storage.ListOptions{Recursive: true, Predicate: storage.Everything})
	if err != nil {
		t.Fatal(err)
	}
	create(t, s.(*Store), "a")
	if _, ok := b.Store().View().Get("/registry/pods/ns/a"); !ok {
		t.Error("nothing is stored under /registry/pods/")
	}
	if e := <-w.ResultChan(); e.Type != apiwatch.Added {
		t.Errorf("event is %v", e)
	}
	destroy()
	destroy()
	if _, ok := <-w.ResultChan(); ok {
		t.Error("the watch goes on after the storage was destroyed")
	}
	for _, bad := range []string{"", "/", "pods"} {
		if _, _, err := Decorator(b, NewCaches(0))(config, bad, nil, nil, nil, nil, nil, nil); err == nil {
			t.Errorf("prefix %q was accepted", bad)
		}
	}
}
