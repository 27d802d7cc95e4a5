package reconcile

import (
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// big returns a story with a ReplicaSet of n ready pods on n/50 nodes.
func big(b *testing.B, n int) *story {
	w := newWorld(b)
	s := newStory(w, allReconcilers(b)...)
	nodes := max(1, n/50)
	health := Health{Since: w.now.Add(-time.Hour), Nodes: map[string]NodeHealth{}}
	for i := range nodes {
		name := fmt.Sprintf("n%04d", i)
		w.add(testNode(name))
		health.Nodes[name] = NodeHealth{Stream: i%2 == 0, Gossip: GossipDead}
	}
	s.health = health
	replicas := int32(n)
	app := map[string]string{"app": "web"}
	rs := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "rs", Labels: app},
		Spec:       appsv1.ReplicaSetSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: app}, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: app}}},
	}
	w.add(rs)
	for i := range n {
		w.add(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("web-%05d", i), Labels: app, OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(rs, replicaSetKind)}},
			Spec:       corev1.PodSpec{NodeName: fmt.Sprintf("n%04d", i%nodes)},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		})
	}
	return s
}

// BenchmarkPass measures one pass over one key in a cluster of 5,000 pods.
func BenchmarkPass(b *testing.B) {
	s := big(b, 5000)
	in := Input{Now: s.now, Snapshot: s.snapshot(), Health: s.health, Kinds: s.kinds}
	for _, bc := range []struct {
		r   Reconciler
		key Key
	}{
		{ReplicaSet{}, replicaSetKey("default", "web")},
		{NodeLifecycle{}, nodeKey("n0001")}, // a lost one, which counts the others
		{TaintEviction{}, nodeKey("n0001")},
		{PodGC{}, nodeKey("n0001")},
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
			if keys := (GarbageCollector{}).All(in.Snapshot); len(keys) != 0 {
				b.Fatalf("%d keys", len(keys))
			}
		}
	})
}
