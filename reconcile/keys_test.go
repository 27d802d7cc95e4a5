package reconcile_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// A changed object concerns its owner, before and after, and those who could adopt it.
func TestOwnerKeys(t *testing.T) {
	t.Parallel()
	meta := func(owner string) *objects.Meta {
		m := &objects.Meta{ObjectMeta: &metav1.ObjectMeta{Namespace: "default", Name: "rev"}}
		if owner != "" {
			o := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: owner}}
			m.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(o, reconcile.StatefulSetKind)}
		}
		return m
	}
	adopters := func(*objects.Meta) []reconcile.Key { return []reconcile.Key{{Name: "adopter"}} }
	keys := func(old, now *objects.Meta) (out []string) {
		for _, k := range reconcile.OwnerKeys(objects.Changed{Old: old, New: now}, reconcile.StatefulSetKind, adopters) {
			out = append(out, k.Name)
		}
		return out
	}
	require.Equal(t, []string{"web"}, keys(meta("web"), nil))
	require.Equal(t, []string{"web", "adopter"}, keys(meta("web"), meta("")))
	require.Equal(t, []string{"web"}, keys(meta(""), meta("web")))
	require.Nil(t, reconcile.OwnerKeys(objects.Changed{New: meta("web")}, reconcile.DeploymentKind, adopters))
}
