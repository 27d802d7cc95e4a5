package differential

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	_ "k8s.io/kubernetes/pkg/apis/apps/install"
	_ "k8s.io/kubernetes/pkg/apis/batch/install"
	_ "k8s.io/kubernetes/pkg/apis/core/install"

	"timonel/reconcile"
	"timonel/reconcile/cleanup"
	"timonel/reconcile/storytest"
	"timonel/reconcile/upstream/feed"
)

// ns is the namespace of everything that has one.
const ns = "default"

// controllers builds upstream's controllers and returns what runs them until the context ends.
type controllers func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error)

// side is one of the two clusters that are compared.
type side struct {
	t    *testing.T
	name string
	*storytest.World
	// story works on our side's objects; on the other it collects garbage.
	story       *storytest.Story
	reconcilers []reconcile.Reconciler
	upstream    controllers // nil on our side
	nodes       int         // how many nodes pods are on
	halt        func()      // ends upstream's controllers
	away        bool        // nothing works at the moment

	working chan struct{} // holds one while somebody works on the story: a mutex would stop the bubble's clock

	mu     sync.Mutex
	done   map[string]int  // what was done since the last step, and how often
	events map[string]bool // what was told since the last step
	tally  map[string]int  // how much was told of an object since the controllers started
	names  int             // how many names were made
	uids   map[string]int  // how many uids begin alike
	failed []string
}

// newSides returns both sides of a family, at work.
func newSides(t *testing.T, f family) (ours, theirs *side) {
	ours = &side{t: t, name: "ours", World: storytest.NewWorld(t), reconcilers: f.ours}
	theirs = &side{t: t, name: "upstream", World: storytest.NewWorld(t), upstream: f.upstream}
	for _, s := range []*side{ours, theirs} {
		s.done, s.events, s.uids = map[string]int{}, map[string]bool{}, map[string]int{}
		s.reconcilers = append(s.reconcilers[:len(s.reconcilers):len(s.reconcilers)], cleanup.GarbageCollector{})
		s.nodes, s.working = f.nodes, make(chan struct{}, 1)
		s.Now, s.UID = time.Now(), s.uid
		s.Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})
		s.Did = s.note
		s.start()
	}
	t.Cleanup(func() { theirs.stop() })
	return ours, theirs
}

// uid returns the uid of a new object. Controllers break ties by it, so those of the pods
// that an owner has at the same time are alike on both sides, and in the same order.
func (s *side) uid(obj map[string]any) types.UID {
	u := unstructured.Unstructured{Object: obj}
	prefix := u.GetKind() + "-" + u.GetName()
	if c := metav1.GetControllerOf(&u); c != nil {
		prefix = c.Name
	}
	prefix += fmt.Sprintf("-%07d", int(time.Since(begin).Seconds()))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.uids[prefix]++
	return types.UID(fmt.Sprintf("%s-%03d", prefix, s.uids[prefix]))
}

// start begins to work, as a leader does.
func (s *side) start() {
	s.away = false
	s.tick()
	s.story = storytest.New(s.World, s.reconcilers...)
	s.story.Told = func(e reconcile.Event) { s.told(e.Object, e.Type, e.Reason) }
	s.tally = map[string]int{}
	s.story.Start()
	if s.upstream == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.Snapshot() // the feed begins with what there is
	source := feed.New(s.Cache)
	factory := source.NewFactory(ctx)
	run, err := s.upstream(ctx, factory, s.client())
	if err != nil {
		s.t.Fatalf("build upstream's controllers: %v", err)
	}
	if foreign := factory.Foreign(); len(foreign) > 0 {
		s.t.Fatalf("upstream's controllers read %v, which objects.Cache does not decode", foreign)
	}
	factory.Start(nil)
	var wg sync.WaitGroup
	wg.Go(func() { _ = source.Run(ctx) }) // its error is ctx's
	wg.Go(func() { s.follow(ctx) })
	for _, f := range run {
		wg.Go(func() { f(ctx) })
	}
	s.halt = func() {
		cancel()
		wg.Wait()
		factory.Shutdown()
	}
}

// stop ends all work, as that of a leader which is none any more.
func (s *side) stop() {
	s.away = true
	if s.halt != nil {
		s.halt()
		s.halt = nil
	}
}

// permit ends that requests are refused. The controllers start anew, because when they try
// again is not compared.
func (s *side) permit() {
	if s.Refuse == nil {
		return
	}
	was := s.away
	s.stop()
	s.Refuse = nil
	if !was {
		s.start()
	}
}

// tick gives the world the bubble's time.
func (s *side) tick() { s.SetNow(time.Now()) }

// follow lets the garbage collector work whenever upstream's controllers have changed
// something.
func (s *side) follow(ctx context.Context) {
	for at := s.Cache.Snapshot().Revision(); ; {
		changes, err := s.Cache.Changes(ctx, at)
		if err != nil {
			return // the controllers are stopped
		}
		at = changes.Snapshot.Revision()
		s.work()
	}
}

// work does what our reconcilers have to do now and returns when they have more to do.
func (s *side) work() time.Time {
	s.working <- struct{}{}
	defer func() { <-s.working }()
	s.tick()
	if s.away {
		return time.Time{}
	}
	out := s.story.Run(2000)
	if *verbose && s.upstream == nil && out != "nothing\n" {
		s.t.Logf("at %s\n%s", since(time.Now()), out)
	}
	if strings.HasSuffix(out, storytest.Unending) {
		s.fail("it never ends: %s", out[max(0, len(out)-1500):])
	} else if at := strings.Index(out, ": error: "); at >= 0 {
		s.fail("%s", out[at:min(len(out), at+400)])
	}
	return s.story.Due()
}

func (s *side) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = append(s.failed, s.name+": "+fmt.Sprintf(format, args...))
}

// settle lets both sides work for a time.
func settle(a, b *side, d time.Duration) {
	end := time.Now().Add(d)
	for {
		next := end
		for _, s := range []*side{a, b} {
			if due := s.work(); !due.IsZero() && due.Before(next) {
				next = due
			}
		}
		synctest.Wait()
		if !time.Now().Before(end) {
			return
		}
		time.Sleep(max(time.Until(next), time.Millisecond))
	}
}

// nudged is the label that changes when upstream's controllers are to look again.
const nudged = "example.org/nudged"

// nudgeAt returns a family's nudge, for controllers that look at all objects of a resource
// that change.
func nudgeAt(r schema.GroupVersionResource) func(s *side) {
	return func(s *side) {
		for _, obj := range s.All(r, ns) {
			u := unstructured.Unstructured{Object: obj}
			s.Edit(r, ns, u.GetName(), func(m map[string]any) {
				u := unstructured.Unstructured{Object: m}
				l := u.GetLabels()
				if l == nil {
					l = map[string]string{}
				}
				l[nudged] = time.Now().Format("20060102150405.000")
				u.SetLabels(l)
			})
		}
	}
}

// note counts what a controller did.
func (s *side) note(c reconcile.Request, obj map[string]any) {
	if c.Subresource != "" || c.Verb != reconcile.VerbCreate && c.Verb != reconcile.VerbDelete {
		return
	}
	if c.Verb == reconcile.VerbCreate {
		obj = encode(c.Object)
	}
	if u := (unstructured.Unstructured{Object: obj}); c.Verb == reconcile.VerbDelete && s.upstream != nil && u.GetDeletionTimestamp() != nil {
		return // upstream deletes what it has just deleted, for another reason
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done[string(c.Verb)+" "+c.Resource.Resource+" "+s.identity(obj)]++
}

// told notes an event and returns how it reads.
func (s *side) told(ref corev1.ObjectReference, kind, reason string) string {
	who := ref.Name
	if r, ok := resources[ref.Kind]; ok {
		if obj := s.Find(r, ref.Namespace, ref.Name); obj != nil {
			who = s.identity(obj)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	who = ref.Kind + " " + who
	what := fmt.Sprintf("%s: %s %s", who, kind, reason)
	s.events[what] = true
	s.tally[who]++
	return what
}

func encode(o any) map[string]any {
	raw, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	var out map[string]any
	if err := utiljson.Unmarshal(raw, &out); err != nil { // numbers as the world has them
		panic(err)
	}
	return out
}

func decode(m map[string]any, into any) {
	raw, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		panic(err)
	}
}

// create makes an object as a user does, with the API's defaults.
func (s *side) create(o runtime.Object) {
	o = o.DeepCopyObject()
	legacyscheme.Scheme.Default(o)
	s.Add(o)
}

// edit changes an object as a user or an agent does, if it is there.
func edit[T any](s *side, r schema.GroupVersionResource, name string, change func(*T)) {
	editIn(s, r, ns, name, change)
}

func editIn[T any](s *side, r schema.GroupVersionResource, namespace, name string, change func(*T)) {
	if s.Find(r, namespace, name) == nil {
		return
	}
	s.Edit(r, namespace, name, func(m map[string]any) {
		var o T
		decode(m, &o)
		change(&o)
		next := encode(&o)
		clear(m)
		for k, v := range next {
			m[k] = v
		}
	})
}

// remove deletes an object as a user does, if it is there.
func (s *side) remove(r schema.GroupVersionResource, name string, p metav1.DeletionPropagation) {
	if s.Find(r, ns, name) == nil {
		return
	}
	c := reconcile.Request{Verb: reconcile.VerbDelete, Resource: r, Namespace: ns, Name: name}
	if p != "" {
		c.Propagation = &p
	}
	s.must(c)
}

// must makes a request that is never refused.
func (s *side) must(c reconcile.Request) {
	refuse := s.Refuse
	s.Refuse, s.Did = nil, nil
	defer func() { s.Refuse, s.Did = refuse, s.note }()
	if err := s.Write(context.Background(), c); err != nil {
		s.t.Fatalf("%s: %v", c, err)
	}
}
