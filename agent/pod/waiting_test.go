package pod

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// TestWhoCannotStart: while nothing of a pod can start, all say what is missing, and wait for
// its init containers if it has some.
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
	why.reason = reasonInitializing
	require.Equal(t, map[string]waiting{"app": why, "side": why, "first": why, "second": why}, w.waiting)
}
