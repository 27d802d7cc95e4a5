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

// An ephemeral container is started once, whatever the others are up to, and nothing
// waits for it.
func TestPlanOfEphemeralContainers(t *testing.T) {
	t.Parallel()
	simple := withEphemeral(planPod(corev1.RestartPolicyAlways, "", "", "app"), "debug", "more")
	inits := withEphemeral(planPod(corev1.RestartPolicyAlways, "one", "", "app"), "debug")
	never := withEphemeral(planPod(corev1.RestartPolicyNever, "", "", "app"), "debug")
	lost := withEphemeral(planPod(corev1.RestartPolicyAlways, "", "", "app"), "debug", "refused", "fresh")
	lost.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{
		{Name: "debug", ContainerID: "containerd://x", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}},
		{Name: "refused", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: neverStarted}}},
		{Name: "fresh", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull"}}},
	}
	for _, tc := range []struct {
		name, world, want string
		pod               *corev1.Pod
	}{
		{"not before there is a sandbox", "", "sandbox(0)", simple},
		{"beside the pod's own", "sandbox s0 ready", "start app(0), start debug(0), start more(0)", simple},
		{"each once", "sandbox s0 ready\napp s0 running\ndebug s0 running", "start more(0)", simple},
		{"also when it has ended, well or not", "sandbox s0 ready\napp s0 running\ndebug s0 exited:0\nmore s0 exited:1", "", simple},
		{"one that was made and never started is in the way of none", "sandbox s0 ready\napp s0 running\ndebug s0 created\nmore s0 running", "start debug(0)", simple},
		{"while init containers run", "sandbox s0 ready\none s0 running", "start debug(0)", inits},
		{"and before they do", "sandbox s0 ready", "start debug(0), start one(0)", inits},
		{"it goes with its sandbox", "sandbox s0 stopped\napp s0 running\ndebug s0 running", "kill app, kill debug", inits},
		{"and does not come back", "sandbox s0 stopped\napp s0 exited:137\ndebug s0 exited:137\nmore s0 exited:137\nsandbox s1 ready", "start app(1)", simple},
		{"it does not keep a finished pod", "sandbox s0 ready\napp s0 exited:0\ndebug s0 running", "finished", never},
		{"nor is it started in one", "sandbox s0 ready\napp s0 exited:0", "finished", never},
		{"what ran by the status' word is not repeated when its record is lost", "sandbox s0 ready\napp s0 running", "start fresh(0)", lost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := parseWorld(t, tc.pod, tc.world)
			require.Equal(t, tc.want, plan(tc.pod, w.obs, w).text())
		})
	}
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
		in.obs.containers["debug"] = []*container{{id: "d1", name: "debug", state: runtimev1.ContainerState_CONTAINER_RUNNING, started: in.now}}
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
