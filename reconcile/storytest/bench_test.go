package storytest

import (
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/reconcile/cleanup"
	"timonel/reconcile/node"
	"timonel/reconcile/workload"
)

// big returns a story with a ReplicaSet of n ready pods on n/50 nodes.
func big(b *testing.B, n int) *Story {
	w := NewWorld(b)
	s := New(w, All(b)...)
	nodes := max(1, n/50)
	health := reconcile.Health{Since: w.Now.Add(-time.Hour), Nodes: map[string]reconcile.NodeHealth{}}
	for i := range nodes {
		name := fmt.Sprintf("n%04d", i)
		w.Add(Node(name))
		health.Nodes[name] = reconcile.NodeHealth{Stream: i%2 == 0, Gossip: reconcile.GossipDead}
	}
	s.Health = health
	replicas := int32(n)
	app := map[string]string{"app": "web"}
	rs := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "rs", Labels: app},
		Spec:       appsv1.ReplicaSetSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: app}, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: app}}},
	}
	w.Add(rs)
	for i := range n {
		w.Add(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("web-%05d", i), Labels: app, OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(rs, reconcile.ReplicaSetKind)}},
			Spec:       corev1.PodSpec{NodeName: fmt.Sprintf("n%04d", i%nodes)},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		})
	}
	return s
}

// BenchmarkPass measures one pass over one key in a cluster of 5,000 pods.
func BenchmarkPass(b *testing.B) {
	s := big(b, 5000)
	in := reconcile.Input{Now: s.Now, Snapshot: s.Snapshot(), Health: s.Health, Kinds: s.Kinds}
	for _, bc := range []struct {
		r   reconcile.Reconciler
		key reconcile.Key
	}{
		{workload.ReplicaSet{}, reconcile.NewKey(reconcile.ReplicaSetKind, "default", "web")},
		{node.NodeLifecycle{}, reconcile.NodeKey("n0001")}, // a lost one, which counts the others
		{node.TaintEviction{}, reconcile.NodeKey("n0001")},
		{cleanup.PodGC{}, reconcile.NodeKey("n0001")},
	} {
		b.Run(bc.r.Name(), func(b *testing.B) {
			for b.Loop() {
				if _, err := bc.r.Reconcile(in, bc.key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("garbage-collector all", func(b *testing.B) {
		for b.Loop() {
			if keys := (cleanup.GarbageCollector{}).All(in.Snapshot); len(keys) != 0 {
				b.Fatalf("%d keys", len(keys))
			}
		}
	})
}
