package workload_test

import (
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload"
	"timonel/state/objects"
)

// TestDaemonSetInvariants changes nodes, pods and the template at random while the
// reconciler works in small steps. No node has more pods at a time than it may, an
// update leaves no fewer than it may available, and in the end every node that is to
// have one has one available pod of the newest template, and no other has any.
func TestDaemonSetInvariants(t *testing.T) {
	t.Parallel()
	creates, deletes := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		w := storytest.NewWorld(t)
		s := storytest.New(w, workload.DaemonSet{})
		nodes := rapid.IntRange(1, 6).Draw(t, "nodes")
		for i := range nodes {
			w.Add(storytest.Node(fmt.Sprintf("n%d", i)))
		}
		surge := int32(rapid.IntRange(0, 2).Draw(t, "surge"))
		unavailable := int32(0)
		if surge == 0 {
			unavailable = int32(rapid.IntRange(1, 3).Draw(t, "unavailable"))
		}
		x, y := intstr.FromInt32(unavailable), intstr.FromInt32(surge)
		keep := int32(2)
		ds := &appsv1.DaemonSet{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "log"},
			Spec: appsv1.DaemonSetSpec{
				Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "log"}}, RevisionHistoryLimit: &keep,
				MinReadySeconds: int32(rapid.SampledFrom([]int{0, 5}).Draw(t, "minReadySeconds")),
				UpdateStrategy: appsv1.DaemonSetUpdateStrategy{
					Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxUnavailable: &x, MaxSurge: &y},
				},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "log"}},
					Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "v0"}}},
				},
			},
		}
		w.Add(ds)
		perNode := 1
		if surge > 0 {
			perNode = 2
		}
		available := func(pod *corev1.Pod) bool {
			due, ok := reconcile.AvailableAt(pod, ds.Spec.MinReadySeconds)
			return ok && !due.After(w.Now) && pod.DeletionTimestamp == nil
		}
		target := func(pod *corev1.Pod) string {
			return pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchFields[0].Values[0]
		}
		calm := true // no pod or node has failed or changed by itself since the last rest
		check := func(c reconcile.Request) {
			switch {
			case c.Resource != reconcile.PodsResource:
			case c.Verb == reconcile.VerbCreate:
				creates++
				on := target(c.Object.(*corev1.Pod))
				n := 0
				for pod := range w.Snapshot().Pods().All() {
					if target(pod) == on && pod.DeletionTimestamp == nil && !objects.PodEnded(pod) {
						n++
					}
				}
				if n+1 > perNode {
					t.Fatalf("%s would be pod %d on %s", c.Name, n+1, on)
				}
			case c.Verb == reconcile.VerbDelete:
				deletes++
				victim, _ := w.Snapshot().Pods().Get("default", c.Name)
				if !calm || !available(victim) {
					return
				}
				covered := map[string]bool{} // nodes with an available pod once it is gone
				for pod := range w.Snapshot().Pods().All() {
					if pod.Name != c.Name && available(pod) {
						covered[target(pod)] = true
					}
				}
				if without := w.Snapshot().Nodes().Len() - len(covered); without > int(unavailable) {
					t.Fatalf("without %s, %d nodes have no available pod, where %d may have none", c.Name, without, unavailable)
				}
			}
		}
		s.Before = check
		s.Start()
		pods := func(want func(*corev1.Pod) bool) (out []*corev1.Pod) {
			for pod := range w.Snapshot().Pods().All() {
				if want(pod) {
					out = append(out, pod)
				}
			}
			return out
		}
		alive := func(p *corev1.Pod) bool { return p.DeletionTimestamp == nil && !objects.PodEnded(p) }
		// agents bind, run and end what they are told to.
		agents := func(n int) {
			for _, pod := range pods(func(*corev1.Pod) bool { return true }) {
				switch _, there := w.Snapshot().Nodes().Get("", target(pod)); {
				case n == 0:
					return
				case pod.DeletionTimestamp != nil || pod.Spec.NodeName != "" && !there:
					w.EndPod("default", pod.Name)
				case pod.Spec.NodeName == "" && there:
					w.Edit(reconcile.PodsResource, "default", pod.Name, func(o map[string]any) {
						storytest.MergeJSON(o, map[string]any{"spec": map[string]any{"nodeName": target(pod)}})
					})
				case pod.Status.Phase == corev1.PodPending || alive(pod) && reconcile.ReadyCondition(pod) == nil && there:
					w.RunPod("default", pod.Name)
				default:
					continue
				}
				n--
			}
		}
		rest := func() {
			for range 400 {
				steps := 0
				for s.Step() {
					if steps++; steps > 1000 {
						t.Fatalf("the reconciler does not come to rest")
					}
				}
				before := w.Revision()
				agents(-1)
				if w.Revision() == before && steps == 0 {
					break
				}
				w.Now = w.Now.Add(7 * time.Second)
			}
			got, _ := w.Snapshot().DaemonSets().Get("default", "log")
			n := w.Snapshot().Nodes().Len()
			image := got.Spec.Template.Spec.Containers[0].Image
			on := map[string]int{}
			for _, pod := range pods(func(*corev1.Pod) bool { return true }) {
				on[target(pod)]++
				if pod.Spec.Containers[0].Image != image || !available(pod) {
					t.Fatalf("at rest %s runs %s, not %s, phase %s, ready %v", pod.Name, pod.Spec.Containers[0].Image, image, pod.Status.Phase, reconcile.ReadyCondition(pod))
				}
			}
			for node := range w.Snapshot().Nodes().All() {
				if on[node.Name] != 1 {
					t.Fatalf("at rest %s has %d pods", node.Name, on[node.Name])
				}
			}
			if st := got.Status; len(on) != n || int(st.DesiredNumberScheduled) != n || int(st.NumberAvailable) != n || int(st.UpdatedNumberScheduled) != n ||
				st.NumberMisscheduled != 0 || st.NumberUnavailable != 0 || st.ObservedGeneration != got.Generation {
				t.Fatalf("at rest with %d nodes: pods on %v, status %+v", n, on, st)
			}
			if revisions := w.Snapshot().ControllerRevisions().Len(); revisions > int(keep)+1 {
				t.Fatalf("%d revisions are kept", revisions)
			}
			calm = true
		}
		rest()
		some := func(t *rapid.T, want func(*corev1.Pod) bool) *corev1.Pod {
			all := pods(want)
			if len(all) == 0 {
				return nil
			}
			return rapid.SampledFrom(all).Draw(t, "pod")
		}
		t.Repeat(map[string]func(*rapid.T){
			"step":   func(t *rapid.T) { _ = s.Step() },
			"agent":  func(t *rapid.T) { agents(1) },
			"agents": func(t *rapid.T) { agents(-1) },
			"wait": func(t *rapid.T) {
				w.Now = w.Now.Add(time.Duration(rapid.IntRange(1, 4).Draw(t, "seconds")) * time.Second)
			},
			"rest": func(t *rapid.T) { rest() },
			"template": func(t *rapid.T) {
				image := fmt.Sprintf("v%d", rapid.IntRange(0, 4).Draw(t, "image"))
				w.Edit(reconcile.DaemonSetsResource, "default", "log", func(o map[string]any) {
					storytest.MergeJSON(o, map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{
						"containers": []any{map[string]any{"name": "c", "image": image}}}}}})
				})
			},
			"fail": func(t *rapid.T) {
				if pod := some(t, func(p *corev1.Pod) bool { return p.Spec.NodeName != "" && alive(p) }); pod != nil {
					calm = false
					w.SetStatus(reconcile.PodsResource, "default", pod.Name, map[string]any{"phase": "Failed", "conditions": nil})
				}
			},
			"unready": func(t *rapid.T) {
				if pod := some(t, func(p *corev1.Pod) bool { return reconcile.ReadyCondition(p) != nil }); pod != nil {
					calm = false
					w.SetStatus(reconcile.PodsResource, "default", pod.Name, map[string]any{"conditions": nil})
				}
			},
			"taint": func(t *rapid.T) {
				calm = false
				name := fmt.Sprintf("n%d", rapid.IntRange(0, nodes-1).Draw(t, "node"))
				if node, ok := w.Snapshot().Nodes().Get("", name); ok && node.Spec.Taints == nil {
					w.Edit(reconcile.NodesResource, "", name, func(o map[string]any) {
						storytest.MergeJSON(o, map[string]any{"spec": map[string]any{"taints": []any{map[string]any{"key": "k", "effect": "NoExecute"}}}})
					})
					for s.Step() { // its pod is on its way out
					}
					w.Edit(reconcile.NodesResource, "", name, func(o map[string]any) {
						storytest.MergeJSON(o, map[string]any{"spec": map[string]any{"taints": nil}})
					})
				}
			},
			"node": func(t *rapid.T) {
				calm = false
				name := fmt.Sprintf("n%d", nodes)
				nodes++
				w.Add(storytest.Node(name))
			},
		})
		rest()
	})
	if creates == 0 || deletes == 0 {
		t.Errorf("%d pods were created and %d deleted", creates, deletes)
	}
}
