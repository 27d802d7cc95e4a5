package pod

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func withEphemeral(pod *corev1.Pod, names ...string) *corev1.Pod {
	for _, n := range names {
		pod.Spec.EphemeralContainers = append(pod.Spec.EphemeralContainers, corev1.EphemeralContainer{
			EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: n, Image: "busybox"}})
	}
	return pod
}

func TestTargetOfAnEphemeralContainer(t *testing.T) {
	t.Parallel()
	obs := &observed{containers: map[string][]*container{"app": {{id: "new"}, {id: "old"}}}}
	c := &corev1.EphemeralContainer{}
	id, err := targetOf(c, obs)
	require.NoError(t, err)
	require.Empty(t, id)
	c.TargetContainerName = "app"
	id, err = targetOf(c, obs)
	require.NoError(t, err)
	require.Equal(t, "new", id)
	c.TargetContainerName = "other"
	_, err = targetOf(c, obs)
	require.EqualError(t, err, "unable to find target container other")
}

// The status of an ephemeral container says what became of it, for ever, and changes
// nothing of the pod's.
func TestStatusOfEphemeralContainers(t *testing.T) {
	t.Parallel()
	pod := withEphemeral(fieldPod(), "debug", "refused")
	refused := func(in *statusInput) { in.refused = map[string]string{"refused": "volumeDevices"} }
	st := statusOf(pod, &pod.Status, refused)
	require.Len(t, st.EphemeralContainerStatuses, 2)
	require.NotNil(t, st.EphemeralContainerStatuses[0].State.Waiting)
	end := st.EphemeralContainerStatuses[1].State.Terminated
	require.NotNil(t, end)
	require.Equal(t, []any{"PodFeatureUnsupported", "volumeDevices", int32(128)}, []any{end.Reason, end.Message, end.ExitCode})
	require.Equal(t, corev1.PodPending, st.Phase, "the pod goes on without")

	running := statusOf(pod, st, func(in *statusInput) {
		refused(in)
		in.now = in.now.Add(time.Hour)
		in.containers["debug"] = []*container{{id: "d1", name: "debug", state: runtimev1.ContainerState_CONTAINER_RUNNING, started: in.now}}
	})
	debug := running.EphemeralContainerStatuses[0]
	require.NotNil(t, debug.State.Running)
	require.Equal(t, "containerd://d1", debug.ContainerID)
	require.False(t, debug.Ready)
	require.Nil(t, debug.Started)
	require.Equal(t, end, running.EphemeralContainerStatuses[1].State.Terminated, "in the same words for ever")
	require.Equal(t, st.Phase, running.Phase)

	// Its record is lost: it has ended, somehow, and does not wait to begin.
	lost := statusOf(pod, running, refused)
	require.NotNil(t, lost.EphemeralContainerStatuses[0].State.Terminated)
	require.Equal(t, "ContainerStatusUnknown", lost.EphemeralContainerStatuses[0].State.Terminated.Reason)
	require.Equal(t, "containerd://d1", lost.EphemeralContainerStatuses[0].ContainerID)
}
