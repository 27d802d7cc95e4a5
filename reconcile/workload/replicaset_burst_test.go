package workload_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
	"timonel/reconcile/workload"
)

// TestLargePodsAreMadeFewAtATime: a ReplicaSet of large pods, and there may be many
// such, does not take the leader's memory.
func TestLargePodsAreMadeFewAtATime(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name            string
		variables, most int
	}{
		{"small", 1, 500},
		{"a MiB of small fields", 100000, 4},
		{"larger than a pass", 1000000, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := newRefusing(t, 100000)
			rs := r.Snapshot()
			set, ok := rs.ReplicaSets().Get("default", "web")
			require.True(t, ok)
			set = set.DeepCopy()
			for i := range tc.variables {
				set.Spec.Template.Spec.Containers[0].Env = append(set.Spec.Template.Spec.Containers[0].Env, corev1.EnvVar{Name: fmt.Sprint(i)})
			}
			var result reconcile.Result
			workload.Manage(reconcile.Input{Snapshot: rs, Now: r.Now}, set, nil, &result)
			require.LessOrEqual(t, len(result.Requests), tc.most)
			require.NotEmpty(t, result.Requests)
			if tc.variables == 1 {
				require.Len(t, result.Requests, tc.most)
			}
		})
	}
}
