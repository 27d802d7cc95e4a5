package reconcile_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/reconcile/node"
	"timonel/reconcile/storytest"
	"timonel/state/objects"
)

// perObject is a reconciler with a key for each object of a kind.
type perObject struct {
	kind string
	keys func() // called for each change
	pass func(in reconcile.Input, key reconcile.Key) (reconcile.Result, error)
}

func (p perObject) Name() string { return "per-" + p.kind }

func ownKey(m *objects.Meta) reconcile.Key {
	return reconcile.NewKey(m.GVK, m.Namespace, m.Name)
}

func (p perObject) All(s *objects.Snapshot) (keys []reconcile.Key) {
	for m := range s.Metas().All() {
		if m.GVK.Kind == p.kind {
			keys = append(keys, ownKey(m))
		}
	}
	return keys
}

func (p perObject) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if c.Meta().GVK.Kind != p.kind {
		return nil
	}
	if p.keys != nil {
		p.keys()
	}
	return []reconcile.Key{ownKey(c.Meta())}
}

func (p perObject) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	if p.pass == nil {
		return reconcile.Result{}, nil
	}
	return p.pass(in, key)
}

func configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
}

// askForPod is a pass that asks for a pod of the key's name.
func askForPod(_ reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	return reconcile.Result{Requests: []reconcile.Request{reconcile.Create(reconcile.PodsResource,
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}})}}, nil
}

// A key that has been refused many times waits for up to a minute, but not once its own
// object is edited: between passes, and while one runs.
func TestAnEditEndsTheWait(t *testing.T) {
	t.Parallel()
	for name, during := range map[string]bool{"between passes": false, "during a pass": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := storytest.NewWorld(t)
				w.Add(configMap("c"))
				edit := func() {
					w.Edit(reconcile.ConfigMapsResource, "default", "c", func(o map[string]any) {
						o["metadata"].(map[string]any)["labels"] = map[string]any{"allowed": "yes"}
					})
				}
				var passes atomic.Int64
				var allowedAt time.Time
				l := newLeader(t, w, perObject{kind: "ConfigMap", pass: func(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
					if passes.Add(1) == 10 && during {
						time.Sleep(time.Millisecond)
						edit()
						allowedAt = time.Now()
						time.Sleep(time.Millisecond)
					}
					return askForPod(in, key)
				}})
				l.cfg.Writer = writerFunc(func(ctx context.Context, c reconcile.Request) error {
					if c.Resource != reconcile.PodsResource {
						return w.Write(ctx, c)
					}
					if cm, _ := w.Snapshot().ConfigMaps().Get("default", "c"); cm.Labels["allowed"] == "" || during && passes.Load() == 10 {
						return apierrors.NewForbidden(c.Resource.GroupResource(), c.Name, errors.New("exceeded quota"))
					}
					return w.Write(ctx, c)
				})
				l.lead(1)
				for passes.Load() < 10 {
					time.Sleep(time.Second)
				}
				if !during {
					synctest.Wait()
					edit()
					allowedAt = time.Now()
				}
				for {
					synctest.Wait()
					if _, ok := w.Snapshot().Pods().Get("default", "c"); ok {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				if took := time.Since(allowedAt); took > time.Second {
					t.Errorf("the edit was looked at after %s", took)
				}
				l.stop()
			})
		})
	}
}

// A status that a reconciler itself writes does not end the wait.
func TestAStatusDoesNotEndTheWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := storytest.NewWorld(t)
		w.Add(storytest.Deployment("d", 1, 1, 0))
		var passes atomic.Int64
		l := newLeader(t, w, perObject{kind: "Deployment", pass: func(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
			d, _ := in.Snapshot.Deployments().Get("default", "d")
			d = d.DeepCopy()
			d.Status.ObservedGeneration = passes.Add(1)
			r, _ := askForPod(in, reconcile.Key{Namespace: "default", Name: "p"})
			r.Add(reconcile.UpdateStatus(reconcile.DeploymentsResource, d))
			return r, nil
		}})
		w.Refuse = func(c reconcile.Request) error {
			if c.Resource == reconcile.PodsResource {
				return apierrors.NewForbidden(c.Resource.GroupResource(), c.Name, errors.New("exceeded quota"))
			}
			return nil
		}
		l.lead(1)
		time.Sleep(time.Minute)
		if n := passes.Load(); n > 15 {
			t.Errorf("%d passes in a minute", n)
		}
		l.stop()
	})
}

// writerFunc is a Writer.
type writerFunc func(context.Context, reconcile.Request) error

func (f writerFunc) Write(ctx context.Context, c reconcile.Request) error { return f(ctx, c) }

// A node is judged while a thousand keys of another reconciler wait for the API.
func TestBulkWorkDoesNotDelayTheJudgementOfNodes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := storytest.NewWorld(t)
		w.Add(storytest.Node("a1"))
		for i := range 1000 {
			w.Add(configMap(fmt.Sprintf("c%d", i)))
		}
		l := newLeader(t, w, perObject{kind: "ConfigMap", pass: askForPod}, node.NodeLifecycle{})
		l.cfg.RequestTimeout = time.Hour
		blocked := make(chan struct{})
		l.cfg.Writer = writerFunc(func(ctx context.Context, c reconcile.Request) error {
			if c.Resource == reconcile.PodsResource {
				select {
				case <-blocked:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return w.Write(ctx, c)
		})
		l.health = reconcile.Health{Nodes: map[string]reconcile.NodeHealth{"a1": {Gossip: reconcile.GossipDead}}}
		l.lead(1)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if a1, _ := w.Snapshot().Nodes().Get("", "a1"); objects.NodeReady(a1) {
			t.Error("a node that is gone is not judged while the API holds up others' requests")
		}
		close(blocked)
		l.stop()
	})
}

// What keeps the loop busy for long is no pause of the process.
func TestWorkIsNoPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := storytest.NewWorld(t)
		w.Add(storytest.Node("a1"))
		l := newLeader(t, w, perObject{kind: "ConfigMap", keys: func() { time.Sleep(10 * time.Second) }}, node.NodeLifecycle{})
		var resets atomic.Int64
		l.cfg.ResetHealth = func() { resets.Add(1) }
		l.lead(1)
		time.Sleep(time.Second)
		w.Add(configMap("c"))
		time.Sleep(time.Minute)
		if n := resets.Load(); n != 0 {
			t.Errorf("work was taken for %d pauses", n)
		}
		l.stop()
	})
}
