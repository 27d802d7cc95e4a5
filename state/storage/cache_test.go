package storage

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"

	"timonel/state"
)

// check fails the test unless the cache is within its bounds and its books agree
// with the memos of the values that views have.
func (c *objectCache) check(t *testing.T, views ...state.View) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := map[*decoded]bool{}
	biggest, young := 0, int64(0)
	for i, g := range []generation{c.old, c.young} {
		bytes := int64(0)
		for place, d := range g {
			kept[d] = true
			biggest = max(biggest, d.size)
			bytes += int64(d.size)
			if d.place != place || d.memo.Load() != &d.self {
				t.Errorf("%v at %d in generation %d says that it is at %d, or is not in its memo", d.obj, place, i, d.place)
			}
			if turn := c.turn.Load() - 1 + uint64(i); d.turn.Load() != turn {
				t.Errorf("%v has turn %d, want %d", d.obj, d.turn.Load(), turn)
			}
		}
		if bytes > c.limit/2+int64(biggest) {
			t.Errorf("generation %d has %d bytes, limit of both is %d", i, bytes, c.limit)
		}
		young = bytes
	}
	if c.bytes != young || young > c.limit/2 {
		t.Errorf("young has %d bytes, counted %d of at most %d", young, c.bytes, c.limit/2)
	}
	for _, v := range views {
		for kv := range v.Range("", "") {
			if d := inMemo(kv.Memo()); d != nil && d.store.caches.objects == c && !kept[d] {
				t.Errorf("%s is in a memo but in no generation", kv.Key)
			}
		}
	}
}

// has says whether an object is kept for a storage.
func has(s *Store, key string) bool {
	kv, ok := s.backend.Store().View().Get(key)
	if !ok {
		return false
	}
	d := inMemo(kv.Memo())
	return d != nil && d.store == s
}

func get(t *testing.T, s *Store, name string) *example.Pod {
	t.Helper()
	out := &example.Pod{}
	if err := s.Get(t.Context(), "/pods/ns/"+name, storage.GetOptions{}, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func list(t *testing.T, s *Store, p storage.SelectionPredicate) []example.Pod {
	t.Helper()
	out := &example.PodList{}
	if err := s.GetList(t.Context(), "/pods/", storage.ListOptions{Recursive: true, Predicate: p}, out); err != nil {
		t.Fatal(err)
	}
	return out.Items
}

// fill creates pods p000 to p(n-1) without decoding any, and returns the size of
// one's encoding.
func fill(t *testing.T, s *Store, n int) int64 {
	t.Helper()
	for i := range n {
		if err := s.Create(t.Context(), fmt.Sprintf("/pods/ns/p%03d", i), newPod(fmt.Sprintf("p%03d", i)), nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	kv, _ := s.backend.Store().View().Get("/pods/ns/p000")
	return int64(len(kv.Value))
}

func TestEvictionEmptiesMemos(t *testing.T) {
	t.Parallel()
	var decodes atomic.Int64
	_, s, b := setup(t, func(c *Config) { c.Codec = countingCodec{c.Codec, &decodes} })
	size := fill(t, s, 200)
	c := newObjectCache(20 * size) // ten in a generation, and one more in the old
	s.caches.objects = c
	kept := func() (n int) {
		c.check(t, b.Store().View())
		for kv := range b.Store().View().Range("", "") {
			if inMemo(kv.Memo()) != nil {
				n++
			}
		}
		return n
	}
	for i := range 200 {
		get(t, s, fmt.Sprintf("p%03d", i))
		get(t, s, "p000") // used all the time
		if decodes.Load() != int64(i+1) {
			t.Fatalf("an object that is in use was dropped before get %d", i)
		}
		if n := kept(); n > 21 {
			t.Fatalf("%d objects are kept after %d gets, want at most 21", n, i+1)
		}
	}
	if has(s, "/pods/ns/p100") {
		t.Error("an object that was not used for long is kept")
	}
	if n := kept(); n < 10 {
		t.Errorf("only %d objects are kept", n)
	}
	// Versions that are gone leave too, and so does all that a storage read.
	for range 50 {
		label(t, s, "p000", "x")
		kept()
		label(t, s, "p000", "y")
	}
	s.Destroy()
	if n := kept(); n != 0 || c.bytes != 0 {
		t.Errorf("%d objects of %d bytes are kept for a storage that was destroyed", n, c.bytes)
	}
}

// TestAge drops what was not used since the last call but one, and keeps what was.
func TestAge(t *testing.T) {
	t.Parallel()
	var decodes atomic.Int64
	_, s, b := setup(t, func(c *Config) { c.Codec = countingCodec{c.Codec, &decodes} })
	size := fill(t, s, 50)
	c := NewCaches(100 * size)
	s.caches = c
	list(t, s, storage.Everything)
	c.events.get(eventKey{s, &state.Event{KV: state.KV{Value: make([]byte, 1000)}}})
	if n := c.Bytes(); n != 50*size+1000 {
		t.Fatalf("%d bytes are held after a list of %d and an event of 1000", n, 50*size)
	}
	c.Age()
	if n := c.Bytes(); n != 50*size {
		t.Errorf("%d bytes are held after the first time, want %d", n, 50*size)
	}
	get(t, s, "p007")
	c.Age()
	c.objects.check(t, b.Store().View())
	if n := c.Bytes(); n != size || !has(s, "/pods/ns/p007") || has(s, "/pods/ns/p008") {
		t.Errorf("%d bytes are held after the second, want those of the one that was used: %d", n, size)
	}
	c.Age()
	c.Age()
	if n := c.Bytes(); n != 0 {
		t.Errorf("%d bytes are held at the end", n)
	}
	decodes.Store(0)
	list(t, s, storage.Everything)
	if n := decodes.Load(); n != 50 {
		t.Errorf("the next list decodes %d objects of 50", n)
	}
	c.objects.check(t, b.Store().View())
}

// TestListBiggerThanCache keeps the first half of what the cache may, so that the
// next list finds that much, and drops nothing for the rest.
func TestListBiggerThanCache(t *testing.T) {
	t.Parallel()
	var decodes atomic.Int64
	_, s, b := setup(t, func(c *Config) { c.Codec = countingCodec{c.Codec, &decodes} })
	size := fill(t, s, 100)
	s.caches.objects = newObjectCache(60 * size)
	for i, want := range []int64{100, 70, 70, 70} {
		decodes.Store(0)
		if n := len(list(t, s, storage.Everything)); n != 100 {
			t.Fatalf("list has %d objects", n)
		}
		if n := decodes.Load(); n != want {
			t.Errorf("list %d decoded %d objects, want %d", i, n, want)
		}
		s.caches.objects.check(t, b.Store().View())
	}
	// What it finds beyond that does not count as used.
	c := newObjectCache(60 * size)
	s.caches.objects.forgetStore(s)
	s.caches.objects = c
	for i := range 31 {
		get(t, s, fmt.Sprintf("p%03d", 50+i))
	}
	list(t, s, storage.Everything)
	if len(c.young) != 30 || len(c.old) != 31 || !has(s, "/pods/ns/p000") || !has(s, "/pods/ns/p080") {
		t.Errorf("%d young and %d old objects are kept, want 30 and 31", len(c.young), len(c.old))
	}
}

// markingCodec says in each object which codec decoded it.
type markingCodec struct {
	countingCodec
	mark string
}

func (c markingCodec) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	obj, kind, err := c.countingCodec.Decode(data, defaults, into)
	if err == nil {
		obj.(*example.Pod).Spec.Hostname = c.mark
	}
	return obj, kind, err
}

// TestMemoOfAnotherStorage reads the same keys through two storages, which make
// different objects of them, as those of a custom resource's versions do.
func TestMemoOfAnotherStorage(t *testing.T) {
	t.Parallel()
	for _, shared := range []bool{true, false} {
		t.Run(fmt.Sprintf("cache is shared: %v", shared), func(t *testing.T) {
			t.Parallel()
			var decodes atomic.Int64
			marked := func(mark string) *Store {
				_, s, _ := setup(t, func(c *Config) { c.Codec = markingCodec{countingCodec{c.Codec, &decodes}, mark} })
				return s
			}
			v1, v2 := marked("v1"), marked("v2")
			v2.backend = v1.backend
			if shared {
				v2.caches = v1.caches
			}
			size := fill(t, v1, 50)
			check := func() {
				t.Helper()
				v1.caches.objects.check(t, v1.backend.Store().View())
				v2.caches.objects.check(t, v1.backend.Store().View())
			}
			want := func(s *Store, mark string, decoded int64) {
				t.Helper()
				decodes.Store(0)
				for _, pod := range append(list(t, s, storage.Everything), *get(t, s, "p007")) {
					if pod.Spec.Hostname != mark {
						t.Fatalf("pod %s is that of %s, want %s", pod.Name, pod.Spec.Hostname, mark)
					}
				}
				if n := decodes.Load(); n != decoded {
					t.Errorf("%s decoded %d objects, want %d", mark, n, decoded)
				}
				check()
			}
			want(v1, "v1", 50)
			want(v1, "v1", 0)
			want(v2, "v2", 50) // the last that reads a value has its memo
			want(v2, "v2", 0)
			want(v1, "v1", 50)
			v2.caches.objects.forgetStore(v2) // has none
			want(v1, "v1", 0)
			v1.caches.objects.forgetStore(v1)
			want(v2, "v2", 50)
			for range 100 { // however often they take turns, nothing piles up
				get(t, v1, "p007")
				get(t, v2, "p007")
			}
			check()
			if c := v2.caches.objects; c.bytes != 50*size || len(c.young) != 50 {
				t.Errorf("%d objects of %d bytes are kept, want 50 of %d", len(c.young), c.bytes, 50*size)
			}

			// One write, watched in both versions.
			for _, s := range []*Store{v1, v2} {
				w, err := s.Watch(t.Context(), "/pods/", storage.ListOptions{
					ResourceVersion: get(t, s, "p049").ResourceVersion, Recursive: true, Predicate: storage.Everything,
				})
				if err != nil {
					t.Fatal(err)
				}
				defer w.Stop()
				label(t, v1, "p007", "watched")
				e := <-w.ResultChan()
				mark := map[*Store]string{v1: "v1", v2: "v2"}[s]
				if got := e.Object.(*watchObject).GetObject().(*example.Pod); got.Spec.Hostname != mark {
					t.Errorf("a watch of %s got the object of %s", mark, got.Spec.Hostname)
				}
			}
		})
	}
}

// TestKeepTwice keeps entries of values that another reader was the first to keep.
func TestKeepTwice(t *testing.T) {
	t.Parallel()
	_, s, b := setup(t)
	_, other, _ := setup(t)
	other.caches, other.backend = s.caches, s.backend
	fill(t, s, 1)
	kv, _ := b.Store().View().Get("/pods/ns/p000")
	c := s.caches.objects
	entry := func(s *Store) *decoded { return &decoded{store: s, memo: kv.Memo(), size: len(kv.Value)} }
	first := entry(s)
	if c.keep(first) != first {
		t.Error("the first is not kept")
	}
	if c.keep(entry(s)) != first {
		t.Error("two readers of one storage have two objects")
	}
	if late := entry(other); c.keep(late) != late || inMemo(kv.Memo()) != first {
		t.Error("a reader of another storage was given the first's object, or took its place")
	}
	c.check(t, b.Store().View())
}

// TestSharedEventsAreBounded varies how large the events' values are.
func TestSharedEventsAreBounded(t *testing.T) {
	t.Parallel()
	_, s, _ := setup(t)
	_, other, _ := setup(t)
	for _, size := range []int{0, 100, 4 << 10, 100 << 10, 1 << 20, 3 << 20, sharedEventBytes + 1} {
		c := NewCaches(0).events
		for i := range 3 * sharedEvents {
			store := s
			if i%5 == 0 {
				store = other
			}
			var value []byte
			if i%2 == 0 || size > 1<<20 { // sizes alternate, as large objects are among small ones
				value = bigValue(size)
			}
			key := eventKey{store, &state.Event{KV: state.KV{Value: value}, Prev: state.KV{Value: value}}}
			e := c.get(key)
			if c.get(key) != e {
				t.Fatalf("with values of %d bytes, the newest event is not kept", size)
			}
			if i == 2*sharedEvents {
				c.forgetStore(other)
			}
			var bytes int64
			kept := 0
			if i%100 == 0 {
				for _, e := range c.ring {
					if e != nil {
						kept++
						bytes += e.key.size()
					}
				}
				if bytes != c.bytes || kept != len(c.byEvent) {
					t.Fatalf("with values of %d bytes, %d events of %d bytes are kept, counted %d of %d", size, kept, bytes, len(c.byEvent), c.bytes)
				}
			}
			if c.bytes > sharedEventBytes && len(c.byEvent) > 1 {
				t.Fatalf("%d events of %d bytes are kept, at most %d", len(c.byEvent), c.bytes, sharedEventBytes)
			}
		}
		if size <= 100 && len(c.byEvent) != sharedEvents {
			t.Errorf("with values of %d bytes, %d events are kept, want %d", size, len(c.byEvent), sharedEvents)
		}
		c.forgetStore(s)
		c.forgetStore(other)
		if c.bytes != 0 || len(c.byEvent) != 0 {
			t.Errorf("%d events of %d bytes are kept for storages that were destroyed", len(c.byEvent), c.bytes)
		}
	}
}

// bigValue is a value of that size, the same memory for all.
func bigValue(size int) []byte { return bigBytes[:size] }

var bigBytes [sharedEventBytes + 1]byte

// TestFailureIsNotKept reads what could not be read before.
func TestFailureIsNotKept(t *testing.T) {
	t.Parallel()
	var fail failing
	_, s, b := setup(t, func(c *Config) { c.Codec = failingCodec{c.Codec, &fail} })
	fill(t, s, 3)
	for range 3 {
		fail.Store(true)
		for range 3 {
			if err := s.Get(t.Context(), "/pods/ns/p001", storage.GetOptions{}, &example.Pod{}); !errors.Is(err, errSynthetic) {
				t.Fatalf("get: %v", err)
			}
			s.caches.objects.check(t, b.Store().View())
			if len(s.caches.objects.young) != 0 || has(s, "/pods/ns/p001") {
				t.Fatal("a failure is kept")
			}
		}
		fail.Store(false)
		if get(t, s, "p001").Name != "p001" || !has(s, "/pods/ns/p001") {
			t.Error("an object that can be read again is not kept")
		}
		s.setTransformer(s.transformer())
		if has(s, "/pods/ns/p001") {
			t.Error("what another transformer read is kept")
		}
	}
}

// TestCacheUnderLoad lists, gets, watches and writes through two storages of the
// same keys with a cache that keeps a few of them, and changes how values are read.
func TestCacheUnderLoad(t *testing.T) {
	t.Parallel()
	const objects, rounds = 60, 60
	var decodes atomic.Int64
	storages := make([]*Store, 2)
	for i := range storages {
		_, s, _ := setup(t, func(c *Config) {
			c.Codec = markingCodec{countingCodec{c.Codec, &decodes}, fmt.Sprint("v", i)}
			c.GetAttrs = storage.DefaultNamespaceScopedAttr
		})
		storages[i] = s
	}
	size := fill(t, storages[0], objects)
	storages[0].caches.objects = newObjectCache(40 * size)
	storages[1].caches, storages[1].backend = storages[0].caches, storages[0].backend
	odd := storage.SelectionPredicate{Label: labels.SelectorFromSet(labels.Set{"l": "odd"}), GetAttrs: storage.DefaultNamespaceScopedAttr}

	// What readers and writers find wrong; t.Fatal is not theirs to call.
	var work sync.WaitGroup
	each := func(what string, do func(s *Store, mark string, i int) error) {
		for n, s := range storages {
			work.Go(func() {
				for i := range rounds {
					if err := do(s, fmt.Sprint("v", n), i); err != nil {
						t.Errorf("%s v%d: %v", what, n, err)
						return
					}
				}
			})
		}
	}
	each("list", func(s *Store, mark string, i int) error {
		l := &example.PodList{}
		p := odd
		if i%3 == 0 {
			p = storage.Everything
		}
		if err := s.GetList(t.Context(), "/pods/", storage.ListOptions{Recursive: true, Predicate: p}, l); err != nil {
			return err
		}
		for _, pod := range l.Items {
			if pod.Spec.Hostname != mark || (i%3 != 0 && pod.Labels["l"] != "odd") {
				return fmt.Errorf("lists pod %s of %s with labels %v", pod.Name, pod.Spec.Hostname, pod.Labels)
			}
		}
		return nil
	})
	each("get", func(s *Store, mark string, i int) error {
		pod := &example.Pod{}
		if err := s.Get(t.Context(), fmt.Sprintf("/pods/ns/p%03d", i*7%objects), storage.GetOptions{}, pod); err != nil {
			return err
		}
		if pod.Spec.Hostname != mark {
			return fmt.Errorf("pod %s is of %s", pod.Name, pod.Spec.Hostname)
		}
		return nil
	})
	each("write", func(s *Store, _ string, i int) error {
		return s.GuaranteedUpdate(t.Context(), fmt.Sprintf("/pods/ns/p%03d", i*11%objects), &example.Pod{}, false, nil,
			storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
				obj.(*example.Pod).Labels = map[string]string{"l": []string{"even", "odd"}[i%2]}
				return obj, nil
			}), nil)
	})
	each("forget", func(s *Store, _ string, i int) error {
		if i%10 == 0 {
			s.setTransformer(s.transformer())
		}
		return nil
	})
	each("watch", func(s *Store, mark string, i int) error {
		if i%10 != 0 {
			return nil
		}
		w, err := s.Watch(t.Context(), "/pods/", storage.ListOptions{ResourceVersion: "1", Recursive: true, Predicate: odd})
		if err != nil {
			return err
		}
		defer w.Stop()
		// A last write of its own ends the wait.
		label(t, s, "p000", "even")
		label(t, s, "p000", "odd")
		e := <-w.ResultChan()
		if e.Type == apiwatch.Error {
			return fmt.Errorf("event %v", e.Object)
		}
		if pod := e.Object.(*watchObject).GetObject().(*example.Pod); pod.Spec.Hostname != mark {
			return fmt.Errorf("watches pod %s of %s", pod.Name, pod.Spec.Hostname)
		}
		return nil
	})
	work.Wait()
	storages[0].caches.objects.check(t, storages[0].backend.Store().View())
	for i, s := range storages {
		for _, pod := range list(t, s, storage.Everything) {
			if want := fmt.Sprint("v", i); pod.Spec.Hostname != want || !strings.HasPrefix(pod.Name, "p") {
				t.Errorf("pod %s is of %s, want %s", pod.Name, pod.Spec.Hostname, want)
			}
		}
		s.caches.objects.check(t, s.backend.Store().View())
	}
}
