package reconcile_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"

	"timonel/reconcile"
	"timonel/reconcile/node"
	"timonel/reconcile/policy"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload"
	"timonel/state/objects"
)

// leader is a Runner on a world, with agents that run what is bound.
type leader struct {
	*storytest.World
	t      *testing.T
	cfg    reconcile.Config
	cancel context.CancelFunc
	done   chan error

	mu     sync.Mutex
	health reconcile.Health
}

func newLeader(t *testing.T, w *storytest.World, reconcilers ...reconcile.Reconciler) *leader {
	l := &leader{World: w, t: t, health: reconcile.Health{}}
	w.Now = time.Now().Truncate(time.Second)
	l.cfg = reconcile.Config{
		Cache: w.Cache, Revision: w.Revision, Writer: w,
		Kinds:       func(context.Context) (reconcile.Kinds, error) { return storytest.Serves(), nil },
		Reconcilers: reconcilers,
		Health: func() reconcile.Health {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.health
		},
		Log: slog.New(slog.DiscardHandler), Host: "c1", Seed: 1,
	}
	return l
}

func (l *leader) lead(term uint64) {
	l.t.Helper()
	r, err := reconcile.NewRunner(l.cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel, l.done = cancel, make(chan error, 1)
	go func() { l.done <- r.Run(ctx, term) }()
	l.t.Cleanup(l.stop)
}

func (l *leader) stop() {
	if l.cancel == nil {
		return
	}
	l.cancel()
	if err := <-l.done; !errors.Is(err, context.Canceled) {
		l.t.Errorf("Run returned %v, not that its context ended", err)
	}
	l.cancel = nil
}

// await waits until the snapshot is as wanted.
func (l *leader) await(what string, ok func(*objects.Snapshot) bool) time.Duration {
	l.t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var revision int64
	for {
		s := l.Cache.Snapshot()
		if ok(s) {
			return time.Since(start)
		}
		revision = s.Revision()
		if err := l.Cache.WaitRevision(ctx, revision+1); err != nil {
			l.t.Fatalf("waiting for %s: %v\n%s", what, err, strings.Join(l.List(""), "\n"))
		}
	}
}

func bound(s *objects.Snapshot) (n int) {
	for pod := range s.Pods().All() {
		if pod.Spec.NodeName != "" {
			n++
		}
	}
	return n
}

// TestRunnerConverges creates a Deployment under a running leader, kills the
// leader in the middle of a scaling, and expects the next one to complete it.
func TestRunnerConverges(t *testing.T) {
	t.Parallel()
	w := storytest.NewWorld(t)
	w.Add(storytest.Node("a1"))
	w.Add(storytest.Node("a2"))
	l := newLeader(t, w, storytest.All(t)...)
	l.health = reconcile.Health{Nodes: map[string]reconcile.NodeHealth{"a1": {Stream: true}, "a2": {Stream: true}}}
	l.lead(1)
	w.Add(storytest.Deployment("web", 3, 1, 0))
	l.await("three bound pods", func(s *objects.Snapshot) bool { return bound(s) == 3 })

	l.stop()
	w.Edit(reconcile.DeploymentsResource, "default", "web", func(obj map[string]any) { obj["spec"].(map[string]any)["replicas"] = int64(6) })
	if n := bound(w.Snapshot()); n != 3 {
		t.Fatalf("%d pods are bound while nobody leads", n)
	}
	l.cfg.Reconcilers = storytest.All(t)
	l.lead(2)
	if took := l.await("six bound pods", func(s *objects.Snapshot) bool { return bound(s) == 6 }); took > 3*time.Second {
		t.Errorf("the scaling took %s after the election", took)
	}
	for name := range map[string]bool{"a1": true, "a2": true} {
		node, _ := w.Snapshot().Nodes().Get("", name)
		if node.Spec.PodCIDR == "" {
			t.Errorf("node %s has no range of pod addresses", name)
		}
	}
}

// TestRunnerRests checks that a cluster in which nothing happens is not written to.
func TestRunnerRests(t *testing.T) {
	t.Parallel()
	w := storytest.NewWorld(t)
	w.Add(storytest.Node("a1"))
	w.Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	l := newLeader(t, w, storytest.All(t)...)
	l.health = reconcile.Health{Nodes: map[string]reconcile.NodeHealth{"a1": {Stream: true}}}
	var expired atomic.Int64
	l.cfg.Expire = func(context.Context, time.Time) (time.Time, error) { expired.Add(1); return time.Time{}, nil }
	l.lead(1)
	w.Add(storytest.Deployment("web", 3, 1, 0))
	l.await("a deployment with its pods", func(s *objects.Snapshot) bool {
		d, ok := s.Deployments().Get("default", "web")
		_, sa := s.ServiceAccounts().Get("default", "default")
		return ok && sa && d.Status.Replicas == 3 && bound(s) == 3
	})
	// Let what is under way come to its end, and then leave it alone for several beats.
	quiet := w.Revision()
	for last := int64(0); last != quiet; {
		last = quiet
		timer := time.NewTimer(2 * reconcile.Beat)
		<-timer.C
		quiet = w.Revision()
	}
	timer := time.NewTimer(4 * reconcile.Beat)
	<-timer.C
	if now := w.Revision(); now != quiet {
		t.Errorf("the state went from revision %d to %d at rest: %v", quiet, now, w.Writes())
	}
	if expired.Load() == 0 {
		t.Error("Expire was never called")
	}
}

// scripted is a Reconciler for the tests of the Runner.
type scripted struct {
	name string
	fn   func(reconcile.Input, reconcile.Key) (reconcile.Result, error)
}

func (s scripted) Name() string                        { return s.name }
func (scripted) All(*objects.Snapshot) []reconcile.Key { return []reconcile.Key{{Name: "k"}} }
func (scripted) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if c.Meta().GVK.Kind == "ConfigMap" {
		return []reconcile.Key{{Name: "k"}}
	}
	return nil
}
func (s scripted) Reconcile(in reconcile.Input, k reconcile.Key) (reconcile.Result, error) {
	return s.fn(in, k)
}

// TestRunnerSeesItsWrites checks that a key runs again only with a snapshot that
// has what its last pass changed, and never twice at a time.
func TestRunnerSeesItsWrites(t *testing.T) {
	t.Parallel()
	w := storytest.NewWorld(t)
	const want = 50
	var running atomic.Int64
	done := make(chan struct{})
	l := newLeader(t, w, scripted{"counter", func(in reconcile.Input, _ reconcile.Key) (reconcile.Result, error) {
		if running.Add(1) > 1 {
			t.Error("the key runs twice at a time")
		}
		defer running.Add(-1)
		n := 0
		for range in.Snapshot.ConfigMaps().All() {
			n++
		}
		var result reconcile.Result
		if n < want { // a create under a name that is taken would be refused
			result.Add(reconcile.Create(reconcile.ConfigMapsResource, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("c%d", n)}}))
		} else {
			select {
			case <-done:
			default:
				close(done)
			}
		}
		return result, nil
	}})
	l.lead(1)
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the counter does not get there")
	}
	if writes := w.Writes(); len(writes) != want {
		t.Errorf("%d writes for %d objects: %v", len(writes), want, writes)
	}
}

// TestRunnerTriesAgain checks what the next pass gets to see of errors.
func TestRunnerTriesAgain(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		err    error
		failed bool // the next pass is told
	}{
		{"refused", apierrors.NewForbidden(reconcile.ConfigMapsResource.GroupResource(), "c", errors.New("exceeded quota")), true},
		{"conflict", apierrors.NewConflict(reconcile.ConfigMapsResource.GroupResource(), "c", errors.New("changed")), false},
		{"timeout", apierrors.NewServerTimeout(reconcile.ConfigMapsResource.GroupResource(), "create", 1), false},
		{"no answer", errors.New("connection refused"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := storytest.NewWorld(t)
			var refusals atomic.Int64
			w.Refuse = func(c reconcile.Request) error {
				if c.Resource == reconcile.ConfigMapsResource && refusals.Add(1) <= 2 {
					return tc.err
				}
				return nil
			}
			told := make(chan bool, 100)
			l := newLeader(t, w, scripted{"once", func(in reconcile.Input, _ reconcile.Key) (reconcile.Result, error) {
				told <- len(in.Failed) > 0
				if _, ok := in.Snapshot.ConfigMaps().Get("default", "c"); ok {
					return reconcile.Result{}, nil
				}
				return reconcile.Result{Requests: []reconcile.Request{reconcile.Create(reconcile.ConfigMapsResource, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "c"}})}}, nil
			}})
			l.lead(1)
			l.await("the object", func(s *objects.Snapshot) bool { _, ok := s.ConfigMaps().Get("default", "c"); return ok })
			if <-told {
				t.Error("the first pass is told of a failure")
			}
			if second := <-told; second != tc.failed {
				t.Errorf("the second pass is told of a failure: %v, want %v", second, tc.failed)
			}
		})
	}
}

// TestRunnerOutlivesPanics checks that a reconciler that panics on one key does not stop the others.
func TestRunnerOutlivesPanics(t *testing.T) {
	t.Parallel()
	w := storytest.NewWorld(t)
	l := newLeader(t, w,
		scripted{"broken", func(reconcile.Input, reconcile.Key) (reconcile.Result, error) { panic("a nil map") }},
		policy.NamespaceDefaults{})
	l.lead(1)
	w.Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	l.await("a service account", func(s *objects.Snapshot) bool { _, ok := s.ServiceAccounts().Get("shop", "default"); return ok })
}

// jumpyClock is a clock that jumps: to a process that was stopped, time has passed all at once.
type jumpyClock struct {
	clock.RealClock
	ahead *atomic.Int64
}

func (c jumpyClock) Now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// TestRunnerNoticesPauses stops the leader for a minute, as SIGSTOP does, and
// expects the nodes' clocks to start again before anything is judged.
func TestRunnerNoticesPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := storytest.NewWorld(t)
		w.Add(storytest.Node("a1"))
		w.Add(storytest.Node("a2")) // which stays: were all lost, none would get a taint
		clk := jumpyClock{ahead: &atomic.Int64{}}
		l := newLeader(t, w, node.NodeLifecycle{}, node.TaintEviction{})
		l.cfg.Clock = clk
		// The stream is gone since long ago, by what this process remembers.
		old := clk.Now().Add(-time.Minute)
		l.health = reconcile.Health{Since: old, Nodes: map[string]reconcile.NodeHealth{"a2": {Stream: true}, "a1": {StreamSince: old, Gossip: reconcile.GossipDead, GossipSince: old}}}
		var resets atomic.Int64
		l.cfg.ResetHealth = func() { resets.Add(1) }
		l.lead(1)
		ready := func() bool {
			synctest.Wait()
			node, _ := w.Snapshot().Nodes().Get("", "a1")
			return objects.NodeReady(node)
		}

		time.Sleep(4 * time.Second) // a new term: less than Settle
		if resets.Load() != 0 || !ready() {
			t.Fatalf("after 4 s of a term the node is ready: %v, and pauses are %d", ready(), resets.Load())
		}
		clk.ahead.Add(int64(time.Minute))
		time.Sleep(4 * time.Second)
		if resets.Load() != 1 {
			t.Fatalf("%d pauses were noticed, not 1", resets.Load())
		}
		if !ready() {
			t.Fatal("the node was judged by what was known before the pause")
		}
		time.Sleep(4 * time.Second)
		if ready() {
			t.Fatal("the node is not judged, although its stream did not come back")
		}
		node, _ := w.Snapshot().Nodes().Get("", "a1")
		if !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Effect == corev1.TaintEffectNoExecute }) {
			t.Fatal("the node has no NoExecute taint")
		}
		l.stop()
	})
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	w := storytest.NewWorld(t)
	good := newLeader(t, w).cfg
	for _, tc := range []struct {
		name, want string
		change     func(*reconcile.Config)
	}{
		{"no cache", "Config.Cache", func(c *reconcile.Config) { c.Cache = nil }},
		{"no revision", "Config.Revision", func(c *reconcile.Config) { c.Revision = nil }},
		{"no client", "Config.Client", func(c *reconcile.Config) { c.Writer = nil }},
		{"workers", "Config.Workers", func(c *reconcile.Config) { c.Workers = -1 }},
		{"twice", "two of the name", func(c *reconcile.Config) {
			c.Reconcilers = []reconcile.Reconciler{workload.ReplicaSet{}, workload.ReplicaSet{}}
		}},
		{"no health", "Config.Health", func(c *reconcile.Config) { c.Reconcilers, c.Health = []reconcile.Reconciler{node.NodeLifecycle{}}, nil }},
		{"share", "HealthConfig.Share", func(c *reconcile.Config) {
			c.Reconcilers = []reconcile.Reconciler{node.NodeLifecycle{Health: node.HealthConfig{Share: 2}}}
		}},
		{"no range", "NodeIPAM.Pods", func(c *reconcile.Config) { c.Reconcilers = []reconcile.Reconciler{node.NodeIPAM{}} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := good
			tc.change(&c)
			if _, err := reconcile.NewRunner(c); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error that names %s", err, tc.want)
			}
		})
	}
	if _, err := reconcile.NewRunner(good); err != nil {
		t.Errorf("a good config is refused: %v", err)
	}
}
