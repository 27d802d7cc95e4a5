package policy_test

import (
	"context"
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/policy"
	"timonel/reconcile/storytest"
	"timonel/state/objects"
)

var (
	budgets = policyv1.SchemeGroupVersion.WithResource("poddisruptionbudgets")
	theKey  = reconcile.Key{Group: "policy", Kind: "PodDisruptionBudget", Namespace: "default", Name: "b"}
)

// TestBudgetIsNeverExceeded lets evictions, the deletions that follow them, pods that
// replace those, edits of the budget and passes of the reconciler, on snapshots that are
// as old as they like, happen in any order. Evictions are granted as the API's eviction
// subresource grants them. Pods do not fail by themselves, so that no fewer than the
// budget asks for may ever be healthy.
func TestBudgetIsNeverExceeded(t *testing.T) {
	t.Parallel()
	granted := 0
	rapid.Check(t, func(t *rapid.T) {
		w := storytest.NewWorld(t)
		replicas := int32(rapid.IntRange(1, 8).Draw(t, "replicas"))
		w.Add(&appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "rs", UID: "rs"},
			Spec:       appsv1.ReplicaSetSpec{Replicas: &replicas},
		})
		made := 0
		add := func() {
			made++
			yes := true
			w.Add(&corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("p%d", made), Labels: map[string]string{"app": "x"},
					OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "rs", UID: "rs", Controller: &yes}}},
				Spec:   corev1.PodSpec{NodeName: "a1"},
				Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
			})
		}
		for range replicas {
			add()
		}
		limit := func() (spec policyv1.PodDisruptionBudgetSpec) {
			n := intstr.FromInt32(int32(rapid.IntRange(0, int(replicas)).Draw(t, "limit")))
			if rapid.Bool().Draw(t, "percent") {
				n = intstr.FromString(fmt.Sprintf("%d%%", rapid.IntRange(0, 100).Draw(t, "share")))
			}
			if spec.Selector = (&metav1.LabelSelector{MatchLabels: map[string]string{"app": "x"}}); rapid.Bool().Draw(t, "min") {
				spec.MinAvailable = &n
			} else {
				spec.MaxUnavailable = &n
			}
			return spec
		}
		spec := limit()
		w.Add(&policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "b"}, Spec: spec})

		desired := func() int {
			switch {
			case spec.MaxUnavailable != nil:
				n, _ := intstr.GetScaledValueFromIntOrPercent(spec.MaxUnavailable, int(replicas), true)
				return int(replicas) - n
			default:
				n, _ := intstr.GetScaledValueFromIntOrPercent(spec.MinAvailable, int(replicas), true)
				return n
			}
		}
		var promised []string // pods whose eviction was granted, to be deleted yet
		snapshots := []*objects.Snapshot{w.Snapshot()}
		t.Repeat(map[string]func(*rapid.T){
			"look": func(*rapid.T) { snapshots = append(snapshots, w.Snapshot()) },
			"reconcile": func(t *rapid.T) {
				at := rapid.SampledFrom(snapshots[max(0, len(snapshots)-3):]).Draw(t, "snapshot")
				result, err := policy.Disruption{}.Reconcile(reconcile.Input{Now: w.Now, Snapshot: at, Kinds: storytest.Serves()}, theKey)
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range result.Requests {
					if err := w.Write(context.Background(), c); err != nil && reconcile.Classify(err) != reconcile.Stale {
						t.Fatal(err)
					}
				}
			},
			"evict": func(t *rapid.T) {
				pdb, _ := w.Snapshot().PodDisruptionBudgets().Get("default", "b")
				var able []*corev1.Pod
				for pod := range w.Snapshot().Pods().All() {
					if pod.DeletionTimestamp == nil {
						able = append(able, pod)
					}
				}
				if len(able) == 0 || pdb.Status.ObservedGeneration < pdb.Generation || pdb.Status.DisruptionsAllowed < 1 {
					return
				}
				pod := rapid.SampledFrom(able).Draw(t, "pod")
				pdb = pdb.DeepCopy()
				pdb.Status.DisruptionsAllowed--
				if pdb.Status.DisruptedPods == nil {
					pdb.Status.DisruptedPods = map[string]metav1.Time{}
				}
				pdb.Status.DisruptedPods[pod.Name] = metav1.NewTime(w.Now)
				if err := w.Write(context.Background(), reconcile.UpdateStatus(budgets, pdb)); err != nil {
					t.Fatal(err)
				}
				promised = append(promised, pod.Name)
				granted++
				healthy := map[string]bool{}
				for _, p := range able {
					healthy[p.Name] = true
				}
				for _, name := range promised {
					delete(healthy, name)
				}
				if len(healthy) < desired() {
					t.Fatalf("the eviction of %s leaves %d healthy pods of %d that are needed", pod.Name, len(healthy), desired())
				}
			},
			"delete": func(t *rapid.T) {
				if len(promised) == 0 {
					return
				}
				name := promised[0]
				promised = promised[1:]
				if pod, ok := w.Snapshot().Pods().Get("default", name); ok && pod.DeletionTimestamp == nil {
					if err := w.Write(context.Background(), reconcile.Delete(reconcile.PodsResource, pod)); err != nil {
						t.Fatal(err)
					}
				}
			},
			"replace": func(t *rapid.T) {
				for pod := range w.Snapshot().Pods().All() {
					if pod.DeletionTimestamp != nil {
						w.EndPod("default", pod.Name)
						add()
						return
					}
				}
			},
			"edit": func(t *rapid.T) {
				if w.Snapshot().Pods().Len() < int(replicas) {
					return
				}
				for pod := range w.Snapshot().Pods().All() {
					if pod.DeletionTimestamp != nil {
						return // a new budget may ask for more than there are just now
					}
				}
				if len(promised) > 0 {
					return
				}
				pdb, _ := w.Snapshot().PodDisruptionBudgets().Get("default", "b")
				pdb = pdb.DeepCopy()
				spec = limit()
				pdb.Spec = spec
				if err := w.Write(context.Background(), reconcile.Update(budgets, pdb)); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
	if granted == 0 {
		t.Error("no eviction was ever granted")
	}
}
