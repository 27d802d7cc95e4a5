package dispatch

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "timonel/proto/timonel/v1"
)

func runtimeClass(name, handler string) *nodev1.RuntimeClass {
	return &nodev1.RuntimeClass{
		TypeMeta:   metav1.TypeMeta{APIVersion: "node.k8s.io/v1", Kind: "RuntimeClass"},
		ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler,
	}
}

func ofClass(name string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.RuntimeClassName = &name }
}

// TestRuntimeClassesOfANode: an agent that knows RuntimeClasses is sent those that its pods
// name, also when they come after the pods; others are not, or their streams would end.
func TestRuntimeClassesOfANode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	c.put(runtimeClass("fast", "crun"))
	c.put(runtimeClass("other", "crun"))
	c.put(podOn("a1", "p", "u1", ofClass("fast")))
	c.put(podOn("a1", "q", "u2", ofClass("late")))
	c.put(podOn("a1", "r", "u3", ofClass("")))
	c.put(nodeObject("a2"))
	c.put(podOn("a2", "s", "u4", ofClass("fast")))

	a := c.connect("c1", &pb.Hello{NodeName: "a1", Kinds: []string{"Unheard", "RuntimeClass"}})
	first := a.batch()
	require.Len(t, first, 6, "welcome, a class, three pods, synced: %q", first)
	require.Contains(t, first, "RuntimeClass /fast rev=3")
	rev := c.put(runtimeClass("late", "runsc"))
	require.Equal(t, []string{fmt.Sprintf("RuntimeClass /late rev=%d", rev), "synced"}, a.batch())
	c.remove(runtimeClass("fast", "crun"))
	require.Equal(t, []string{"remove RuntimeClass /fast", "synced"}, a.batch())

	older := c.connect("c1", &pb.Hello{NodeName: "a2"})
	require.Len(t, older.batch(), 3, "welcome, pod, synced")
}
