package admission

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestResize(t *testing.T) {
	t.Parallel()
	cpu := func(pod *corev1.Pod, q string) *corev1.Pod {
		pod = pod.DeepCopy()
		pod.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(q)}
		return pod
	}
	node := testNode()
	node.Allocatable = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("10")}
	have := cpu(testPod(), "1")
	have.Spec.RestartPolicy = corev1.RestartPolicyAlways
	require.Nil(t, Resize(have, cpu(have, "4"), node), "what it has itself is not in its way")

	r := Resize(have, cpu(have, "5"), node)
	require.Equal(t, &Rejection{Reason: "Infeasible", Message: "Node didn't have enough capacity: cpu, requested: 5000, capacity: 4000"}, r)

	node.Pods = []*corev1.Pod{cpu(testPod(), "2")}
	r = Resize(have, cpu(have, "3"), node)
	require.Equal(t, &Rejection{Reason: "Deferred", Message: "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000"}, r)
	require.Nil(t, Resize(have, cpu(have, "2"), node))

	whole := cpu(have, "1")
	whole.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2")}}
	require.Equal(t, "Infeasible", Resize(have, whole, node).Reason)

	again := cpu(have, "2")
	again.Spec.Containers[0].ResizePolicy = []corev1.ContainerResizePolicy{{ResourceName: corev1.ResourceCPU, RestartPolicy: corev1.RestartContainer}}
	require.Nil(t, Resize(have, again, node))
	again.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
	require.Equal(t, "Infeasible", Resize(have, again, node).Reason, "a container that ends well when it is told to end would be done")
}
