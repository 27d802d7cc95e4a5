package agent_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
)

// A container that asks for it has its whole pod start anew in place: same sandbox, same
// volumes, init containers again; the policy Never does not keep it from that.
func TestRestartAllContainers(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	mounts := []corev1.VolumeMount{{Name: "d", MountPath: "/d"}}
	init := shell("init", "echo init >> /d/log")
	app := shell("app", "echo app >> /d/log"+forever)
	watcher := shell("watcher", "sleep 1; [ $(grep -c app /d/log) -gt 1 ] || exit 88; cat /d/log"+forever)
	watcher.RestartPolicy = ptr.To(corev1.ContainerRestartPolicyNever)
	watcher.RestartPolicyRules = []corev1.ContainerRestartRule{{
		Action:    corev1.ContainerRestartRuleActionRestartAllContainers,
		ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{88}},
	}}
	p := newPod("anew", init, app, watcher)
	p.Spec.InitContainers, p.Spec.Containers = p.Spec.Containers[:1], p.Spec.Containers[1:]
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	p.Spec.Volumes = []corev1.Volume{{Name: "d", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	p.Spec.InitContainers[0].VolumeMounts, p.Spec.Containers[0].VolumeMounts, p.Spec.Containers[1].VolumeMounts = mounts, mounts, mounts
	c.set(p)
	before := c.ready(p)
	after := c.until(p, "started anew", 30*time.Second, func(st *corev1.PodStatus) bool {
		return isReady(st) && len(st.ContainerStatuses) == 2 && st.ContainerStatuses[0].RestartCount == 1 && st.ContainerStatuses[1].RestartCount == 1
	})
	require.Equal(t, before.PodIP, after.PodIP, "another sandbox")
	require.EqualValues(t, 1, after.InitContainerStatuses[0].RestartCount)
	require.EqualValues(t, 88, after.ContainerStatuses[1].LastTerminationState.Terminated.ExitCode)
	require.Equal(t, "RestartingAllContainers", after.ContainerStatuses[0].LastTerminationState.Terminated.Reason)
	var seen []corev1.ConditionStatus
	c.mu.Lock()
	for _, st := range c.history[string(p.UID)] {
		require.Contains(t, []corev1.PodPhase{corev1.PodPending, corev1.PodRunning}, st.Phase)
		for _, cond := range st.Conditions {
			if cond.Type == corev1.AllContainersRestarting && (len(seen) == 0 || seen[len(seen)-1] != cond.Status) {
				seen = append(seen, cond.Status)
			}
		}
	}
	c.mu.Unlock()
	require.Equal(t, []corev1.ConditionStatus{corev1.ConditionFalse, corev1.ConditionTrue, corev1.ConditionFalse}, seen)
	c.delete(p, 2)
}
