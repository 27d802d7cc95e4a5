package pod

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"timonel/agent/admission"
)

type noFacts struct{}

func (noFacts) started(*container) bool            { return true }
func (noFacts) failed(*container) (string, string) { return "", "" }

func cpuOf(q string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(q)}
}

func statusOf(pod *corev1.Pod, old *corev1.PodStatus, change func(*statusInput)) *corev1.PodStatus {
	in := statusInput{pod: pod, obs: &observed{containers: map[string][]*container{}}, old: old, facts: noFacts{}, now: time.Unix(1000, 0)}
	if change != nil {
		change(&in)
	}
	st := makeStatus(in)
	return &st
}

// A pod that asks for other resources keeps those it was accepted with, over
// restarts of its agent, says that this will not be, and takes that back when it
// asks for the old ones again.
func TestResizeIsInfeasible(t *testing.T) {
	t.Parallel()
	pod := fieldPod()
	pod.Generation = 1
	pod.Spec.Containers[0].Resources.Requests = cpuOf("1")
	given := allocate(pod, nil)
	first := statusOf(pod, &pod.Status, nil)
	require.Nil(t, findCondition(first.Conditions, corev1.PodResizePending))
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

		st := statusOf(got, kept, func(in *statusInput) { in.resized = true })
		c := findCondition(st.Conditions, corev1.PodResizePending)
		require.NotNil(t, c, name)
		require.Equal(t, []any{corev1.ConditionTrue, "Infeasible", admission.ResizeMessage, int64(2)}, []any{c.Status, c.Reason, c.Message, c.ObservedGeneration})
		require.Equal(t, "1", st.ContainerStatuses[0].Resources.Requests.Cpu().String())

		back := pod.DeepCopy()
		back.Generation, back.Status = 3, *st
		got, resized = a.apply(back)
		require.False(t, resized, name)
		require.Nil(t, findCondition(statusOf(got, st, nil).Conditions, corev1.PodResizePending), "the condition goes, though the API still has it")
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
