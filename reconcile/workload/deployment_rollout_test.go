package workload

import (
	"fmt"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
)

// TestSpreadSizes checks the proportions of a scaling in the middle of a rollout
// for any sizes: they add up to what is allowed.
func TestSpreadSizes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		was := int32(rapid.IntRange(1, 50).Draw(t, "was"))
		now := int32(rapid.IntRange(0, 50).Draw(t, "now"))
		surge := int32(rapid.IntRange(0, 10).Draw(t, "surge"))
		d := sized(was, surge)
		r := &rollout{d: d}
		if was+surge < 2 {
			t.Skip("no room for two sets")
		}
		left := was + surge
		for i := range rapid.IntRange(2, 4).Draw(t, "sets") {
			n := int32(rapid.IntRange(1, max(1, int(left)/2)).Draw(t, "size"))
			if left -= n; left < 0 {
				break
			}
			rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(i)}, Spec: appsv1.ReplicaSetSpec{Replicas: &n}}
			r.markReplicas(rs)
			r.old = append(r.old, rs)
		}
		r.current, r.old = r.old[0], r.old[1:]
		if len(active(r.all())) < 2 {
			t.Skip("one set is no proportion")
		}
		r.d = sized(now, surge)
		r.scale()
		var want int32
		if now > 0 {
			want = now + surge
		}
		if sum := total(r.all(), specReplicas); sum != want {
			t.Fatalf("the sizes %v add up to %d, not %d", slices.Collect(func(yield func(int32) bool) {
				for _, rs := range r.all() {
					if !yield(*rs.Spec.Replicas) {
						return
					}
				}
			}), sum, want)
		}
	})
}

// sized is a Deployment of so many replicas and so many more while it rolls out.
func sized(replicas, surge int32) *appsv1.Deployment {
	more, none := intstr.FromInt32(surge), intstr.FromInt32(1)
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}}
	d.Spec.Replicas = &replicas
	d.Spec.Strategy.Type = appsv1.RollingUpdateDeploymentStrategyType
	d.Spec.Strategy.RollingUpdate = &appsv1.RollingUpdateDeployment{MaxSurge: &more, MaxUnavailable: &none}
	return d
}
