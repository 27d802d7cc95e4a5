package pod

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
)

func cpuOf(q string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(q)}
}

func statusOf(pod *corev1.Pod, old *corev1.PodStatus, change func(*statusInput)) *corev1.PodStatus {
	in := statusInput{
		want: want{pod: pod}, now: time.Unix(1000, 0),
		seen: &seen{known: &known{}, old: old, observed: observed{containers: map[string][]*container{}}},
	}
	if change != nil {
		change(&in)
	}
	st := makeStatus(in)
	return &st
}

// A pod that asks for other resources has those that it was accepted with until it is
// given the others, over restarts of its agent.
func TestAllocation(t *testing.T) {
	t.Parallel()
	pod := fieldPod()
	pod.Generation = 1
	pod.Spec.Containers[0].Resources.Requests = cpuOf("1")
	given := allocate(pod, nil)
	first := statusOf(pod, &pod.Status, nil)
	require.Equal(t, cpuOf("1"), first.ContainerStatuses[0].AllocatedResources)

	asked := pod.DeepCopy()
	asked.Generation = 2
	asked.Spec.Containers[0].Resources.Requests = cpuOf("2")
	asked.Spec.InitContainers[0].Resources.Limits = cpuOf("3")
	raw, err := first.Marshal()
	require.NoError(t, err)
	kept := &corev1.PodStatus{}
	require.NoError(t, kept.Unmarshal(raw))
	for name, a := range map[string]*allocation{"the same agent": given, "the next agent": allocate(asked, kept)} {
		got, resized := a.apply(asked)
		require.True(t, resized, name)
		require.Equal(t, "1", got.Spec.Containers[0].Resources.Requests.Cpu().String(), name)
		require.Empty(t, got.Spec.InitContainers[0].Resources.Limits, name)
		require.Equal(t, "2", asked.Spec.Containers[0].Resources.Requests.Cpu().String(), "the pod as it came is not changed")
		require.Equal(t, cgroupParent("/r", pod), cgroupParent("/r", got))

		back := pod.DeepCopy()
		back.Generation = 3
		_, resized = a.apply(back)
		require.False(t, resized, name)
	}
	// A status of an agent that kept no resources.
	for i := range kept.ContainerStatuses {
		kept.ContainerStatuses[i].Resources = nil
	}
	kept.InitContainerStatuses[0].Resources = nil
	_, resized := allocate(asked, kept).apply(asked)
	require.False(t, resized)

	whole := pod.DeepCopy()
	whole.Spec.Resources = &corev1.ResourceRequirements{Requests: cpuOf("5")}
	got, resized := given.apply(whole)
	require.True(t, resized, "the pod's own resources are resized like its containers'")
	require.Nil(t, got.Spec.Resources)
}

// The status says what a pod was given, what is in force of that, and what is in the way.
func TestStatusOfAResize(t *testing.T) {
	t.Parallel()
	pod := fieldPod()
	pod.Spec.Containers[0].Resources.Requests = cpuOf("1")
	before := allocate(pod, nil)
	first := statusOf(pod, &pod.Status, nil)
	pod.Generation = 2
	pod.Spec.Containers[0].Resources.Requests = cpuOf("2")

	late := statusOf(pod, first, func(in *statusInput) {
		in.resized, in.refusedResize = true, &admission.Rejection{Reason: "Deferred", Message: "m"}
	})
	c := findCondition(late.Conditions, corev1.PodResizePending)
	require.NotNil(t, c)
	require.Equal(t, []any{corev1.ConditionTrue, "Deferred", "m", int64(2)}, []any{c.Status, c.Reason, c.Message, c.ObservedGeneration})

	under := statusOf(pod, late, func(in *statusInput) { in.resizing, in.applied = true, before })
	require.Nil(t, findCondition(under.Conditions, corev1.PodResizePending))
	c = findCondition(under.Conditions, corev1.PodResizeInProgress)
	require.NotNil(t, c)
	require.Equal(t, []any{corev1.ConditionTrue, "", ""}, []any{c.Status, c.Reason, c.Message})
	require.Equal(t, cpuOf("2"), under.ContainerStatuses[0].AllocatedResources)
	require.Equal(t, cpuOf("1"), under.ContainerStatuses[0].Resources.Requests, "what is in force: the next agent begins there")

	bad := statusOf(pod, under, func(in *statusInput) { in.resizing, in.resizeError, in.applied = true, "no", before })
	c = findCondition(bad.Conditions, corev1.PodResizeInProgress)
	require.Equal(t, []any{"Error", "no"}, []any{c.Reason, c.Message})

	pod.Status = *bad
	done := statusOf(pod, bad, func(in *statusInput) { in.applied = allocate(pod, nil) })
	require.Nil(t, findCondition(done.Conditions, corev1.PodResizeInProgress), "it goes, though the API still has it")
	require.Equal(t, cpuOf("2"), done.ContainerStatuses[0].Resources.Requests)
}

func TestRestartsToResize(t *testing.T) {
	t.Parallel()
	old := &corev1.Container{Resources: corev1.ResourceRequirements{Requests: cpuOf("1"), Limits: cpuOf("2")}}
	spec := old.DeepCopy()
	spec.Resources.Limits = cpuOf("3")
	spec.ResizePolicy = []corev1.ContainerResizePolicy{{ResourceName: corev1.ResourceCPU, RestartPolicy: corev1.NotRequired}, {ResourceName: corev1.ResourceMemory, RestartPolicy: corev1.RestartContainer}}
	require.False(t, restartsToResize(spec, old), "its memory stays as it is")
	spec.ResizePolicy[0].RestartPolicy = corev1.RestartContainer
	require.True(t, restartsToResize(spec, old))
	spec.Resources.Limits = cpuOf("2000m")
	require.False(t, restartsToResize(spec, old), "the same in other words")
}

func TestWidestLimits(t *testing.T) {
	t.Parallel()
	type r = runtimev1.LinuxContainerResources
	require.Equal(t, &r{CpuShares: 5, CpuPeriod: cpuPeriod, CpuQuota: 9, MemoryLimitInBytes: 0},
		widest(&r{CpuShares: 5, CpuQuota: 7, MemoryLimitInBytes: 3}, &r{CpuShares: 2, CpuQuota: 9}))
}

// A pod that was not taken says nothing of containers, and the same to whoever
// asks later, after restarts of its agent too.
func TestRejectedStatus(t *testing.T) {
	t.Parallel()
	pod := fieldPod()
	st := statusOf(pod, &pod.Status, func(in *statusInput) {
		in.verdict = &verdict{reason: "OutOfcpu", message: "Pod was rejected: none left", rejected: true}
		in.ending, in.stopped = true, true
	})
	require.Equal(t, []any{corev1.PodFailed, "OutOfcpu", "Pod was rejected: none left"}, []any{st.Phase, st.Reason, st.Message})
	require.Empty(t, st.ContainerStatuses)
	require.Empty(t, st.InitContainerStatuses)
	ready := findCondition(st.Conditions, corev1.PodReady)
	require.Equal(t, []any{corev1.ConditionFalse, "PodFailed"}, []any{ready.Status, ready.Reason})
	require.False(t, wasStarted(st))
	again := statusOf(pod, st, func(in *statusInput) {
		in.ending, in.stopped, in.now = true, true, in.now.Add(time.Hour)
	})
	require.Equal(t, st, again)
}
