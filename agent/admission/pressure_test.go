package admission

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"
)

// While a node is short of something it takes no new pods but those that it cannot
// do without; of memory alone, it takes those that say how much they need.
func TestPressure(t *testing.T) {
	t.Parallel()
	const memory, disk, pids = corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure
	nothing := func(*corev1.Pod) {}
	some := func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Mi")}
	}
	tolerates := func(key string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}}
		}
	}
	priority := func(n int32) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Spec.Priority = ptr.To(n) }
	}
	for _, tc := range []struct {
		name       string
		conditions []corev1.NodeConditionType
		change     func(*corev1.Pod)
		want       string
	}{
		{"none", nil, nothing, ""},
		{"memory, best effort", []corev1.NodeConditionType{memory}, nothing, "The node had condition: [MemoryPressure]. "},
		{"memory, burstable", []corev1.NodeConditionType{memory}, some, ""},
		{"memory, tolerated", []corev1.NodeConditionType{memory}, tolerates(corev1.TaintNodeMemoryPressure), ""},
		{"memory, something else tolerated", []corev1.NodeConditionType{memory}, tolerates(corev1.TaintNodeDiskPressure), "The node had condition: [MemoryPressure]. "},
		{"disk, burstable", []corev1.NodeConditionType{disk}, some, "The node had condition: [DiskPressure]. "},
		{"disk, tolerated", []corev1.NodeConditionType{disk}, tolerates(corev1.TaintNodeDiskPressure), "The node had condition: [DiskPressure]. "},
		{"process ids", []corev1.NodeConditionType{pids}, some, "The node had condition: [PIDPressure]. "},
		{"memory and disk, burstable", []corev1.NodeConditionType{memory, disk}, some, "The node had condition: [MemoryPressure DiskPressure]. "},
		{"critical", []corev1.NodeConditionType{memory, disk, pids}, priority(2_000_000_000), ""},
		{"nearly critical", []corev1.NodeConditionType{disk}, priority(1_999_999_999), "The node had condition: [DiskPressure]. "},
		{"critical by its own word", []corev1.NodeConditionType{disk}, func(p *corev1.Pod) {
			p.Annotations = map[string]string{"kubernetes.io/config.source": "file", corev1.MirrorPodAnnotationKey: "x"}
		}, "The node had condition: [DiskPressure]. "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod := testPod()
			pod.Spec.Containers[0].Resources = corev1.ResourceRequirements{}
			pod.Spec.InitContainers = nil
			tc.change(pod)
			node := Node{Name: pod.Spec.NodeName, Pressure: tc.conditions, Allocatable: corev1.ResourceList{
				corev1.ResourcePods: resource.MustParse("10"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourceCPU: resource.MustParse("4"),
			}}
			r := Admit(pod, &node)
			if tc.want == "" {
				require.Nil(t, r)
				return
			}
			require.Equal(t, &Rejection{Reason: "Evicted", Message: tc.want}, r)
		})
	}
}
