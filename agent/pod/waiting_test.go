package pod

import (
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// TestWhoCannotStart: while nothing of a pod can start, its containers are said to wait for
// its init containers, and these for what is missing.
func TestWhoCannotStart(t *testing.T) {
	t.Parallel()
	why := waiting{reasonCreating, "the rules are not in the kernel yet"}
	pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}, {Name: "side"}}}}
	w := &worker{waiting: map[string]waiting{}}
	w.everyContainer(pod, why)
	require.Equal(t, map[string]waiting{"app": why, "side": why}, w.waiting)

	pod.Spec.InitContainers = []corev1.Container{{Name: "first"}, {Name: "second"}}
	w.waiting = map[string]waiting{}
	w.everyContainer(pod, why)
	require.Equal(t, []string{"first", "second"}, slices.Sorted(maps.Keys(w.waiting)))
}
