package storytest

import (
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/reconcile/cleanup"
	"timonel/reconcile/node"
	"timonel/reconcile/policy"
	"timonel/reconcile/service"
	"timonel/reconcile/workload"
	"timonel/state/objects"
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

// BenchmarkChange measures what one change and one pass cost with more and more pods in
// one namespace, of which a Service, a budget and a revision's owner have ten.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1000, 10000, 50000, 150000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := big(b, n)
			few := map[string]string{"app": "few"}
			controller := metav1.OwnerReference{APIVersion: "apps/v1", Kind: "DaemonSet", Name: "few", UID: "few", Controller: ptr.To(true)}
			for i := range 10 {
				s.Add(&corev1.Pod{
					ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("few-%d", i), Labels: few, OwnerReferences: []metav1.OwnerReference{controller}},
					Spec:       corev1.PodSpec{NodeName: "n0000"},
					Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.0.0.%d", i+1)}}},
				})
			}
			for i := range 200 { // other Services and budgets
				set := map[string]string{"app": fmt.Sprintf("other-%d", i)}
				s.Add(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("other-%d", i)}, Spec: corev1.ServiceSpec{Selector: set}})
				s.Add(&policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("other-%d", i)}, Spec: policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: set}}})
			}
			least := intstr.FromInt32(5)
			s.Add(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "few"}, Spec: corev1.ServiceSpec{Selector: few, Ports: []corev1.ServicePort{{Port: 80}}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}}})
			s.Add(&policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "few"}, Spec: policyv1.PodDisruptionBudgetSpec{MinAvailable: &least, Selector: &metav1.LabelSelector{MatchLabels: few}}})
			in := reconcile.Input{Now: s.Now, Snapshot: s.Snapshot(), Health: s.Health, Kinds: s.Kinds, Changes: s.changes}
			pod, _ := in.Snapshot.Metas().Get("/registry/pods/default/web-00007")
			if pod == nil {
				b.Fatal("no pod has changed")
			}
			for _, r := range []reconcile.Reconciler{service.EndpointSlice{}, policy.Disruption{}, workload.ReplicaSet{}, workload.DaemonSet{}, cleanup.GarbageCollector{}} {
				b.Run("keys/"+r.Name(), func(b *testing.B) {
					for b.Loop() {
						r.Keys(objects.Changed{New: pod}, in.Snapshot)
					}
				})
			}
			for _, bc := range []struct {
				r   reconcile.Reconciler
				key reconcile.Key
			}{
				{service.EndpointSlice{}, reconcile.Key{Kind: "Service", Namespace: "default", Name: "few"}},
				{policy.Disruption{}, reconcile.Key{Group: "policy", Kind: "PodDisruptionBudget", Namespace: "default", Name: "few"}},
			} {
				b.Run("pass/"+bc.r.Name(), func(b *testing.B) {
					for b.Loop() {
						if _, err := bc.r.Reconcile(in, bc.key); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
	}
}
