package objects

import (
	"fmt"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"timonel/state"
)

// drawLabels draws labels of which a pod's own name may be one.
func drawLabels(t *rapid.T, what string) map[string]string {
	out := map[string]string{}
	for _, k := range []string{"app", "a.example/tier", appsv1.StatefulSetPodNameLabel} {
		if v := rapid.SampledFrom([]string{"none", "", "x", "xy"}).Draw(t, what+" "+k); v != "none" {
			out[k] = v
		}
	}
	return out
}

func drawSelector(t *rapid.T) *metav1.LabelSelector {
	if rapid.IntRange(0, 5).Draw(t, "no selector") == 0 {
		return nil
	}
	s := &metav1.LabelSelector{MatchLabels: drawLabels(t, "selector")}
	if rapid.IntRange(0, 2).Draw(t, "expressions") == 0 {
		op := rapid.SampledFrom([]metav1.LabelSelectorOperator{metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist}).Draw(t, "operator")
		s.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: rapid.SampledFrom([]string{"app", appsv1.StatefulSetPodNameLabel}).Draw(t, "key"), Operator: op}}
	}
	return s
}

// TestSelectionEqualsLookingAtEverything checks that pods are found by any selector, and
// Services and PodDisruptionBudgets by any labels, as by looking at all of a namespace,
// whatever came before.
func TestSelectionEqualsLookingAtEverything(t *testing.T) {
	t.Parallel()
	tb := t
	found := 0
	rapid.Check(t, func(t *rapid.T) {
		c := NewCache(state.New(state.Options{}))
		for i := range rapid.IntRange(1, 40).Draw(t, "changes") {
			meta := metav1.ObjectMeta{
				Namespace: rapid.SampledFrom([]string{"a", "ab"}).Draw(t, "namespace"), Name: fmt.Sprintf("o%d", rapid.IntRange(0, 5).Draw(t, "name")),
			}
			var o runtime.Object
			var directory string
			owned := func(m metav1.ObjectMeta) metav1.ObjectMeta {
				if controller := true; rapid.Bool().Draw(t, "owned") {
					m.OwnerReferences = []metav1.OwnerReference{{UID: "d", Controller: &controller}}
				}
				return m
			}
			switch rapid.IntRange(0, 5).Draw(t, "kind") {
			case 0:
				directory, o = "services/specs/", &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: meta, Spec: corev1.ServiceSpec{Selector: drawLabels(t, "service")}}
			case 1:
				directory, o = "poddisruptionbudgets/", &policyv1.PodDisruptionBudget{TypeMeta: metav1.TypeMeta{APIVersion: "policy/v1", Kind: "PodDisruptionBudget"}, ObjectMeta: meta, Spec: policyv1.PodDisruptionBudgetSpec{Selector: drawSelector(t)}}
			case 2:
				directory, o = "replicasets/", &appsv1.ReplicaSet{TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "ReplicaSet"}, ObjectMeta: owned(meta)}
			case 3:
				directory, o = "controllerrevisions/", &appsv1.ControllerRevision{TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "ControllerRevision"}, ObjectMeta: owned(meta)}
			default:
				meta.Labels, meta.UID = drawLabels(t, "pod"), types.UID(meta.Name)
				directory, o = "pods/", &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: meta}
			}
			key := DefaultPrefix + directory + meta.Namespace + "/" + meta.Name
			kv := &state.KV{Key: key, ModRevision: int64(i + 1), Value: encode(tb, o)}
			c.apply(key, kv, rapid.IntRange(0, 4).Draw(t, "deleted") == 0)
		}
		s := c.freeze(100)
		equal := func(what string, got, want []string) {
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Fatalf("%s: found %v, and looking at everything %v", what, got, want)
			}
			found += len(got)
		}
		for _, ns := range []string{"a", "ab"} {
			selector, err := metav1.LabelSelectorAsSelector(drawSelector(t))
			if err != nil {
				t.Fatalf("selector: %v", err)
			}
			var got, want []string
			for p := range s.PodsSelected(ns, selector) {
				got = append(got, p.Name)
			}
			for p := range s.Pods().InNamespace(ns) {
				if selector.Matches(labels.Set(p.Labels)) {
					want = append(want, p.Name)
				}
			}
			equal("pods of "+selector.String(), got, want)

			set := drawLabels(t, "labels")
			got, want = nil, nil
			for svc := range s.ServicesSelecting(ns, set) {
				got = append(got, svc.Name)
			}
			for svc := range s.Services().InNamespace(ns) {
				if len(svc.Spec.Selector) > 0 && labels.SelectorFromSet(svc.Spec.Selector).Matches(labels.Set(set)) {
					want = append(want, svc.Name)
				}
			}
			equal(fmt.Sprintf("services of %v", set), got, want)

			selects := func(b *policyv1.PodDisruptionBudget) bool {
				selector, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
				return err == nil && selector.Matches(labels.Set(set))
			}
			got, want = nil, nil
			for b := range s.BudgetsNear(ns, set) {
				if selects(b) {
					got = append(got, b.Name)
				}
			}
			for b := range s.PodDisruptionBudgets().InNamespace(ns) {
				if selects(b) {
					want = append(want, b.Name)
				}
			}
			equal(fmt.Sprintf("budgets of %v", set), got, want)

			got, want = nil, nil
			for rs := range s.OrphanReplicaSets(ns) {
				got = append(got, rs.Name)
			}
			for rev := range s.OrphanRevisions(ns) {
				got = append(got, rev.Name)
			}
			for rs := range s.ReplicaSets().InNamespace(ns) {
				if metav1.GetControllerOf(rs) == nil {
					want = append(want, rs.Name)
				}
			}
			for rev := range s.ControllerRevisions().InNamespace(ns) {
				if metav1.GetControllerOf(rev) == nil {
					want = append(want, rev.Name)
				}
			}
			equal("orphans", got, want)
		}
	})
	if found < 20 {
		t.Errorf("%d objects were found: nothing was tried", found)
	}
}
