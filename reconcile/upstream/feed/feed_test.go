package feed

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"
	cachetesting "k8s.io/client-go/tools/cache/testing"

	"timonel/state"
	"timonel/state/objects"
)

// world is a store with a cache of its objects, fed to one controller.
type world struct {
	t       *testing.T
	store   *state.Store
	cache   *objects.Cache
	factory *Factory
	end     func()
}

func start(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, store: state.New(state.Options{})}
	w.cache = objects.NewCache(w.store)
	ctx, cancel := context.WithCancel(context.Background())
	feed := New(w.cache)
	w.factory = feed.NewFactory(ctx)
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{w.cache.Run, feed.Run} {
		wg.Go(func() {
			if err := run(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("ended early: %v", err)
			}
		})
	}
	w.end = sync.OnceFunc(func() { cancel(); wg.Wait(); w.factory.Shutdown() })
	t.Cleanup(w.end)
	return w
}

func encode(t testing.TB, o runtime.Object) []byte {
	t.Helper()
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	b, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, schema.GroupVersions(scheme.Scheme.PrioritizedVersionsAllGroups())), o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (w *world) put(key string, o runtime.Object) int64 {
	return w.apply(state.Change{Key: key, Value: encode(w.t, o)})
}

func (w *world) apply(changes ...state.Change) int64 {
	w.t.Helper()
	txn := state.Txn{Changes: changes}
	r := w.store.ApplyBatch([]state.Entry{{Command: txn.Marshal()}})[0]
	if r.Err != nil {
		w.t.Fatal(r.Err)
	}
	return r.Revision
}

func (w *world) wait(revision int64) {
	w.t.Helper()
	if err := w.cache.WaitRevision(w.t.Context(), revision); err != nil {
		w.t.Fatal(err)
	}
}

func podKey(namespace, name string) string { return "/registry/pods/" + namespace + "/" + name }

// pod is the nth of its name; what tells one state of it from another is the label.
func pod(namespace, name, node string, uid, change int) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, UID: types.UID(strconv.Itoa(uid)), Labels: map[string]string{"change": strconv.Itoa(change)},
		},
		Spec: corev1.PodSpec{NodeName: node},
	}
}

// byNode is an index as controllers have them.
var byNode = cache.Indexers{"node": func(o any) ([]string, error) { return []string{o.(*corev1.Pod).Spec.NodeName}, nil }}

// recorder is a handler that keeps what it was told of each object, and what it
// knows by that.
type recorder struct {
	mu     sync.Mutex
	told   map[string][]string
	knows  map[string]string
	wrong  []string
	signal chan struct{}
	slow   <-chan struct{} // each call takes one
}

func newRecorder() *recorder {
	return &recorder{told: map[string][]string{}, knows: map[string]string{}, signal: make(chan struct{}, 1)}
}

func stateOf(o any) string {
	m := o.(metav1.Object)
	return string(m.GetUID()) + "." + m.GetLabels()["change"]
}

func (r *recorder) note(key, what, before, after string) {
	if r.slow != nil {
		<-r.slow
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.knows[key] != before {
		r.wrong = append(r.wrong, fmt.Sprintf("%s of %s says it was %q, and it was %q", what, key, before, r.knows[key]))
	}
	r.told[key] = append(r.told[key], what+" "+before+">"+after)
	if r.knows[key] = after; after == "" {
		delete(r.knows, key)
	}
	select {
	case r.signal <- struct{}{}:
	default:
	}
}

func (r *recorder) OnAdd(o any, _ bool) { r.note(keyOf(o), "add", "", stateOf(o)) }
func (r *recorder) OnUpdate(before, after any) {
	r.note(keyOf(after), "update", stateOf(before), stateOf(after))
}
func (r *recorder) OnDelete(o any) {
	if unseen, ok := o.(cache.DeletedFinalStateUnknown); ok {
		if keyOf(unseen.Obj) != unseen.Key {
			r.wrong = append(r.wrong, fmt.Sprintf("a deletion of %s has the key %s", keyOf(unseen.Obj), unseen.Key))
		}
		o = unseen.Obj
	}
	r.note(keyOf(o), "delete", stateOf(o), "")
}

func keyOf(o any) string {
	key, err := cache.MetaNamespaceKeyFunc(o)
	if err != nil {
		panic(err)
	}
	return key
}

// until waits until the handler knows what it should.
func (r *recorder) until(t *testing.T, who string, want map[string]string) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		r.mu.Lock()
		done := fmt.Sprint(r.knows) == fmt.Sprint(want)
		wrong := r.wrong
		r.mu.Unlock()
		if len(wrong) > 0 {
			t.Fatalf("%s: %v", who, wrong)
		}
		if done {
			return
		}
		select {
		case <-r.signal:
		case <-deadline:
			t.Fatalf("%s knows %v, want %v", who, r.knows, want)
		}
	}
}

func statesOf(list []any) (out []string) {
	for _, o := range list {
		out = append(out, keyOf(o)+" "+stateOf(o))
	}
	slices.Sort(out)
	return out
}

// The same changes are given to an informer of client-go and to one of these: their
// handlers are told the same of each object, in the same order, and their stores and
// indexes answer the same.
func TestToldAsByClientGo(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 0))
			w := start(t)
			source := cachetesting.NewFakeControllerSource()
			theirs := cache.NewSharedIndexInformer(source, &corev1.Pod{}, 0, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
			ours := w.factory.Core().V1().Pods().Informer()
			if _, ok := ours.GetIndexer().(*indexer); !ok {
				t.Fatalf("the factory's informer has a %T", ours.GetIndexer())
			}

			known := map[string]string{}
			there := map[string]*corev1.Pod{}
			uid, last := 0, int64(0)
			change := func(n int) {
				namespace, name, node := fmt.Sprint("ns", random.IntN(3)), fmt.Sprint("p", random.IntN(6)), fmt.Sprint("n", random.IntN(4))
				key := namespace + "/" + name
				was, exists := there[key]
				if exists && random.IntN(3) == 0 {
					source.Delete(was.DeepCopy())
					last = w.apply(state.Change{Key: podKey(namespace, name), Delete: true})
					delete(there, key)
					delete(known, key)
					return
				}
				uid++
				p := pod(namespace, name, node, uid, n)
				if exists {
					p.UID = was.UID
				}
				there[key] = p
				known[key] = stateOf(p)
				if exists {
					source.Modify(p.DeepCopy())
				} else {
					source.Add(p.DeepCopy())
				}
				last = w.put(podKey(namespace, name), p)
			}
			for n := range 10 {
				change(n)
			}
			w.wait(last)
			us, them := newRecorder(), newRecorder()
			for informer, handler := range map[cache.SharedIndexInformer]*recorder{ours: us, theirs: them} {
				if err := informer.AddIndexers(byNode); err != nil {
					t.Fatal(err)
				}
				if _, err := informer.AddEventHandler(handler); err != nil {
					t.Fatal(err)
				}
			}
			done := make(chan struct{})
			go func() { defer close(done); theirs.RunWithContext(w.factory.ctx) }()
			defer func() { w.end(); <-done }()
			w.factory.Start(nil)
			if !cache.WaitForCacheSync(t.Context().Done(), theirs.HasSynced, ours.HasSynced) {
				t.Fatal("not synced")
			}
			us.until(t, "ours", known)
			them.until(t, "client-go's", known)
			for n := range 300 {
				change(10 + n)
			}
			w.wait(last)
			us.until(t, "ours", known)
			them.until(t, "client-go's", known)

			for key, want := range them.told {
				got := us.told[key]
				if !slices.Equal(got, want) {
					t.Fatalf("of %s\n ours told %v\nclient-go's told %v", key, got, want)
				}
			}
			compareStores(t, ours.GetIndexer(), theirs.GetIndexer())
		})
	}
}

func compareStores(t *testing.T, ours, theirs cache.Indexer) {
	t.Helper()
	equal := func(what string, got, want []string) {
		t.Helper()
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: ours %v, client-go's %v", what, got, want)
		}
	}
	equal("List", statesOf(ours.List()), statesOf(theirs.List()))
	equal("ListKeys", ours.ListKeys(), theirs.ListKeys())
	for _, index := range []string{cache.NamespaceIndex, "node"} {
		equal("values of "+index, ours.ListIndexFuncValues(index), theirs.ListIndexFuncValues(index))
		for _, value := range append(theirs.ListIndexFuncValues(index), "none", "ns") {
			a, errA := ours.ByIndex(index, value)
			b, errB := theirs.ByIndex(index, value)
			if (errA == nil) != (errB == nil) {
				t.Errorf("ByIndex %s: %v, %v", index, errA, errB)
			}
			equal(index+"="+value, statesOf(a), statesOf(b))
			keysA, _ := ours.IndexKeys(index, value)
			keysB, _ := theirs.IndexKeys(index, value)
			equal("keys of "+index+"="+value, keysA, keysB)
		}
	}
	for _, key := range append(theirs.ListKeys(), "ns0/none", "none") {
		a, okA, _ := ours.GetByKey(key)
		b, okB, _ := theirs.GetByKey(key)
		if okA != okB || okA && stateOf(a) != stateOf(b) {
			t.Errorf("GetByKey %s: %v, %v", key, okA, okB)
		}
	}
	for _, o := range theirs.List() {
		for _, index := range []string{cache.NamespaceIndex, "node"} {
			a, errA := ours.Index(index, o)
			b, errB := theirs.Index(index, o)
			if errA != nil || errB != nil {
				t.Errorf("Index %s: %v, %v", index, errA, errB)
			}
			equal("like "+keyOf(o), statesOf(a), statesOf(b))
		}
	}
	if _, err := ours.ByIndex("none", ""); err == nil {
		t.Error("ByIndex of no index has no error")
	}
}

// A handler that hangs while more changes than the cache keeps is told the difference,
// of objects that were replaced too, and nothing is kept for it in between.
func TestSlowHandlerIsToldTheDifference(t *testing.T) {
	t.Parallel()
	w := start(t)
	pods := w.factory.Core().V1().Pods()
	if err := pods.Informer().AddIndexers(byNode); err != nil {
		t.Fatal(err)
	}
	slow, fast, pace := newRecorder(), newRecorder(), make(chan struct{})
	slow.slow = pace
	for _, handler := range []*recorder{slow, fast} {
		if _, err := pods.Informer().AddEventHandler(handler); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]string{}
	for i := range 10 {
		name := fmt.Sprint("p", i)
		w.wait(w.put(podKey("a", name), pod("a", name, "n1", i, 0)))
		want["a/"+name] = fmt.Sprint(i, ".0")
	}
	w.factory.Start(nil)
	pace <- struct{}{} // it is in its first call
	fast.until(t, "the fast one", want)

	// While the slow one is in its first call: one goes, one is replaced, one changes,
	// one comes, and the rest changes again and again until the cache forgets.
	last := w.apply(state.Change{Key: podKey("a", "p0"), Delete: true}, state.Change{Key: podKey("a", "p1"), Delete: true})
	delete(want, "a/p0")
	w.put(podKey("a", "p1"), pod("a", "p1", "n2", 100, 0))
	want["a/p1"] = "100.0"
	w.put(podKey("b", "new"), pod("b", "new", "n3", 101, 0))
	want["b/new"] = "101.0"
	w.wait(last)
	for n := range 3 {
		last = w.put(podKey("a", "p2"), pod("a", "p2", "n4", 2, n+1))
		w.wait(last)
	}
	want["a/p2"] = "2.3"
	w.cache.Trim(0)
	fast.until(t, "the fast one", want)
	close(pace)
	slow.until(t, "the slow one", want)
	for key, told := range map[string][]string{
		"a/p0": {"add >0.0", "delete 0.0>"}, "a/p1": {"add >1.0", "delete 1.0>", "add >100.0"},
		"a/p2": {"add >2.0", "update 2.0>2.3"}, "b/new": {"add >101.0"}, "a/p3": {"add >3.0"},
	} {
		if !slices.Equal(slow.told[key], told) {
			t.Errorf("the slow one was told %v of %s, want %v", slow.told[key], key, told)
		}
	}
	for node, want := range map[string][]string{"n2": {"a/p1 100.0"}, "n3": {"b/new 101.0"}, "n4": {"a/p2 2.3"}} {
		got, err := pods.Informer().GetIndexer().ByIndex("node", node)
		if err != nil || !slices.Equal(statesOf(got), want) {
			t.Errorf("on %s are %v (%v), want %v", node, statesOf(got), err, want)
		}
	}
}

// Who has nothing to be told keeps no old snapshot: the feed moves it on.
func TestQuietHandlerMovesOn(t *testing.T) {
	t.Parallel()
	w := start(t)
	quiet, busy := newRecorder(), newRecorder()
	registration, err := w.factory.Core().V1().Nodes().Informer().AddEventHandler(quiet)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.factory.Core().V1().Pods().Informer().AddEventHandler(busy); err != nil {
		t.Fatal(err)
	}
	w.put("/registry/minions/n", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", UID: "1"}})
	w.factory.Start(nil)
	quiet.until(t, "the quiet one", map[string]string{"n": "1."})
	l := registration.(*listener)
	for n := range 50 {
		w.put(podKey("a", "p"), pod("a", "p", "n", 7, n))
		busy.until(t, "the busy one", map[string]string{"a/p": fmt.Sprint("7.", n)})
	}
	revision := w.cache.Snapshot().Revision()
	for deadline := time.Now().Add(time.Minute); ; {
		l.mu.Lock()
		at := l.told.Revision()
		l.mu.Unlock()
		if at == revision {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the quiet one is at revision %d of %d", at, revision)
		}
		time.Sleep(time.Millisecond)
	}
	if got := len(quiet.told["n"]); got != 1 {
		t.Errorf("the quiet one was told %d times of a node that did not change", got)
	}
}

// What changes after a handler was told and before the feed runs is told when it does.
func TestChangeBeforeItRuns(t *testing.T) {
	t.Parallel()
	w := start(t)
	feed := New(w.cache)
	factory := feed.NewFactory(t.Context())
	handler := newRecorder()
	registration, err := factory.Core().V1().Pods().Informer().AddEventHandler(handler)
	if err != nil {
		t.Fatal(err)
	}
	w.wait(w.put(podKey("a", "p"), pod("a", "p", "n", 1, 0)))
	factory.Start(nil)
	handler.until(t, "the handler", map[string]string{"a/p": "1.0"})
	<-registration.HasSyncedChecker().Done()
	l := registration.(*listener)
	for atRest := false; !atRest; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		atRest = !l.busy
		l.mu.Unlock()
	}
	w.wait(w.put(podKey("a", "p"), pod("a", "p", "n", 1, 1)))
	go feed.Run(t.Context())
	handler.until(t, "the handler", map[string]string{"a/p": "1.1"})
}

// A handler that was added late is told what is there, one that was removed nothing
// more, and one that panics of what comes after.
func TestHandlersComeAndGo(t *testing.T) {
	t.Parallel()
	w := start(t)
	informer := w.factory.Core().V1().Pods().Informer()
	first := newRecorder()
	registration, err := informer.AddEventHandler(first)
	if err != nil {
		t.Fatal(err)
	}
	if registration.HasSynced() || informer.HasSynced() {
		t.Error("synced before it was started")
	}
	w.wait(w.put(podKey("a", "p"), pod("a", "p", "n", 1, 0)))
	w.factory.Start(nil)
	first.until(t, "the first", map[string]string{"a/p": "1.0"})
	<-registration.HasSyncedChecker().Done()
	<-informer.HasSyncedChecker().Done()
	late := newRecorder()
	if _, err := informer.AddEventHandler(late); err != nil {
		t.Fatal(err)
	}
	late.until(t, "the late one", map[string]string{"a/p": "1.0"})
	if err := informer.RemoveEventHandler(registration); err != nil {
		t.Fatal(err)
	}
	w.put(podKey("a", "p"), pod("a", "p", "n", 1, 1))
	late.until(t, "the late one", map[string]string{"a/p": "1.1"})
	<-registration.(*listener).ctx.Done()
	if err := informer.RemoveEventHandler(registration); err != nil {
		t.Errorf("removing it again: %v", err)
	}
	w.end()
	if _, err := informer.AddEventHandler(newRecorder()); err == nil {
		t.Error("a stopped informer takes a handler")
	}
	if len(first.told["a/p"]) != 1 {
		t.Errorf("the first was told %v", first.told["a/p"])
	}
}

// Of a resource that the cache does not decode whole there is the metadata, of custom
// resources too, in the version that was asked for.
func TestMetadata(t *testing.T) {
	t.Parallel()
	w := start(t)
	crontabs := schema.GroupVersionResource{Group: "stable.example.com", Version: "v2", Resource: "crontabs"}
	informer, err := w.factory.ForResource(crontabs)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.factory.ForResource(crontabs)
	if err != nil || again.Informer() != informer.Informer() {
		t.Errorf("asked again, another informer (%v)", err)
	}
	handler := newRecorder()
	if _, err := informer.Informer().AddEventHandler(handler); err != nil {
		t.Fatal(err)
	}
	w.factory.Start(nil)
	w.apply(
		state.Change{Key: "/registry/stable.example.com/crontabs/a/one", Value: []byte(`{"apiVersion":"stable.example.com/v1","kind":"CronTab","metadata":{"namespace":"a","name":"one","uid":"1","labels":{"change":"x"}},"spec":{"a":1}}`)},
		state.Change{Key: "/registry/stable.example.com/crontabs/b/two", Value: []byte(`{"apiVersion":"stable.example.com/v1","kind":"CronTab","metadata":{"namespace":"b","name":"two","uid":"2"}}`)},
	)
	handler.until(t, "the handler", map[string]string{"a/one": "1.x", "b/two": "2."})
	got, err := informer.Lister().ByNamespace("a").List(labels.Everything())
	if err != nil || len(got) != 1 {
		t.Fatalf("in namespace a are %v (%v)", got, err)
	}
	one := got[0].(*metav1.PartialObjectMetadata)
	if one.APIVersion != "stable.example.com/v2" || one.Kind != "CronTab" || one.Name != "one" || one.ResourceVersion == "" {
		t.Errorf("got %+v", one)
	}
	secrets, err := w.factory.ForResource(corev1.SchemeGroupVersion.WithResource("secrets"))
	if err != nil || secrets.Informer().GetIndexer() != w.factory.Core().V1().Secrets().Informer().GetIndexer() {
		t.Errorf("secrets have two informers (%v)", err)
	}
	if foreign := w.factory.Foreign(); len(foreign) > 0 {
		t.Errorf("informers that are not fed: %v", foreign)
	}
	w.factory.Networking().V1().Ingresses().Informer()
	if foreign := w.factory.Foreign(); !slices.Equal(foreign, []string{"*v1.Ingress"}) {
		t.Errorf("informers that are not fed: %v, want that of Ingresses", foreign)
	}
}
