package sched

import (
	"fmt"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

// TestAnswersHold: what a round remembers of nodes' answers is what they would answer
// now, whatever it has placed, evicted and nominated in the meantime.
func TestAnswersHold(t *testing.T) {
	t.Parallel()
	compared, victims := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		for i := range rapid.IntRange(1, 3).Draw(t, "kinds") {
			p := w.pod(t, fmt.Sprintf("k%d", i))
			p.Spec.Affinity, p.Spec.TopologySpreadConstraints, p.Spec.NodeSelector = nil, nil, nil
			priority := int32(rapid.IntRange(2, 4).Draw(t, "important"))
			p.Spec.Priority = &priority
			p.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = *resource.NewQuantity(int64(rapid.IntRange(1, 2).Draw(t, "cores")), resource.DecimalSI)
			for j := range rapid.IntRange(2, 5).Draw(t, "equal") {
				q := p.DeepCopy()
				q.Name = fmt.Sprintf("k%d-%d", i, j)
				q.UID = types.UID(q.Namespace + q.Name)
				if rapid.IntRange(0, 5).Draw(t, "nominated") == 0 {
					q.Status.NominatedNodeName = fmt.Sprintf("n%d", rapid.IntRange(0, 5).Draw(t, "nominee"))
				}
				w.state.put(q)
			}
		}
		for i := range rapid.IntRange(5, 15).Draw(t, "more") {
			p := w.pod(t, fmt.Sprintf("m%d", i))
			p.Spec.NodeName, p.Spec.Affinity, p.Spec.TopologySpreadConstraints = fmt.Sprintf("n%d", i%5), nil, nil
			w.state.put(p)
		}
		if rapid.Bool().Draw(t, "budget") {
			w.state.put(&policyv1.PodDisruptionBudget{
				ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "b"}, Spec: policyv1.PodDisruptionBudgetSpec{Selector: w.selector(t)},
				Status: policyv1.PodDisruptionBudgetStatus{DisruptionsAllowed: int32(rapid.IntRange(0, 1).Draw(t, "allowed"))},
			})
		}
		cfg := DefaultConfig()
		in := Input{Now: epoch, Seed: rapid.Uint64().Draw(t, "seed"), State: w.state}
		if err := in.complete(); err != nil {
			t.Fatal(err)
		}
		r := newRound(mustCompile(t, cfg), in)
		kinds := map[string]*podInfo{}
		in.Cluster.queue.Scan(func(p *podInfo) bool {
			r.schedule(p)
			kinds[r.signature(p)] = p
			for signature, a := range r.equal {
				c, rejected := r.prepare(kinds[signature])
				if rejected != nil || !c.plain() {
					continue // nobody would ask for the answers
				}
				for _, slot := range in.Cluster.order {
					if f := a.fits[slot]; f.version == r.versions[slot]+1 {
						compared++
						if s := r.filter(c, r.nodes[slot]); !reflect.DeepEqual(s, f.status) {
							t.Fatalf("node %s answered %s %+v before, and %+v now", r.nodes[slot].name, c.p.pod.Name, f.status, s)
						}
					}
					v := a.victims[slot]
					if v.version != r.versions[slot]+1 {
						continue
					}
					now, s := r.victimsOn(c, slot)
					if !reflect.DeepEqual(s, v.status) || (now == nil) != (v.victims == nil) {
						t.Fatalf("victims on %s for %s: %+v before, %+v now", r.nodes[slot].name, c.p.pod.Name, v.status, s)
					}
					if now != nil {
						victims++
						if !slices.Equal(now.pods, v.victims.pods) || now.violations != v.victims.violations || now.sum != v.victims.sum {
							t.Fatalf("victims on %s for %s: %d with %d violations before, %d with %d now", r.nodes[slot].name, c.p.pod.Name,
								len(v.victims.pods), v.victims.violations, len(now.pods), now.violations)
						}
					}
				}
			}
			return true
		})
	})
	if compared == 0 || victims == 0 {
		t.Errorf("%d answers and %d victims were compared: nothing was tried", compared, victims)
	}
	t.Logf("%d answers and %d victims were compared", compared, victims)
}
