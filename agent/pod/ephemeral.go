package pod

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
)

// Ephemeral containers are added to a pod that is there already, to look at it. They
// are started as soon as there is a sandbox, whatever init containers are up to, run
// once, and decide nothing about the pod.

// asContainer is an ephemeral container as what it is but for its target.
func asContainer(c *corev1.EphemeralContainer) *corev1.Container {
	return (*corev1.Container)(&c.EphemeralContainerCommon)
}

// planEphemeral starts those that never ran, by what CRI has and by what the pod's
// status says of those whose records CRI has lost.
func planEphemeral(pod *corev1.Pod, s *seen, a *actions) {
	for i := range pod.Spec.EphemeralContainers {
		spec := &pod.Spec.EphemeralContainers[i]
		_, refused := s.refused[spec.Name]
		last := s.latest(spec.Name)
		made := last != nil && last.state != runtimev1.ContainerState_CONTAINER_CREATED
		if !made && !refused && !ephemeralRan(ephemeralStatus(s.old, spec.Name)) {
			a.start = append(a.start, start{spec: asContainer(spec), ephemeral: spec})
		}
	}
}

func ephemeralStatus(st *corev1.PodStatus, name string) *corev1.ContainerStatus {
	for i := range st.EphemeralContainerStatuses {
		if cs := &st.EphemeralContainerStatuses[i]; cs.Name == name {
			return cs
		}
	}
	return nil
}

// ephemeralRan says whether a status tells of a container that ran, or never will.
func ephemeralRan(st *corev1.ContainerStatus) bool {
	return st != nil && (st.ContainerID != "" || st.State.Terminated != nil)
}

// targetOf is the container whose processes an ephemeral one is to see, by CRI's id;
// empty when it names none.
func targetOf(c *corev1.EphemeralContainer, obs *observed) (string, error) {
	if c.TargetContainerName == "" {
		return "", nil
	}
	target := obs.latest(c.TargetContainerName)
	if target == nil {
		return "", fmt.Errorf("unable to find target container %v", c.TargetContainerName)
	}
	return target.id, nil
}

// refusedEphemeral are the ephemeral containers that this node does not start, and why.
// The pod goes on without.
func (m *Manager) refusedEphemeral(pod *corev1.Pod) map[string]string {
	if len(pod.Spec.EphemeralContainers) == 0 {
		return nil
	}
	out, node := map[string]string{}, m.cfg.Node()
	for i := range pod.Spec.EphemeralContainers {
		c := asContainer(&pod.Spec.EphemeralContainers[i])
		if r := admission.RefuseEphemeral(pod, c, &node); r != nil {
			out[c.Name] = r.Message
		}
	}
	return out
}

// neverStarted is the exit code of a container that could not be started.
const neverStarted = 128

// ephemeralStatuses are those of ephemeral containers: never ready, and as upstream's
// they do not say whether they have started.
func ephemeralStatuses(in statusInput) []corev1.ContainerStatus {
	var out []corev1.ContainerStatus
	for i := range in.pod.Spec.EphemeralContainers {
		spec := asContainer(&in.pod.Spec.EphemeralContainers[i])
		old := ephemeralStatus(in.old, spec.Name)
		why, refused := in.refused[spec.Name]
		var st corev1.ContainerStatus
		switch {
		case in.latest(spec.Name) != nil:
			st = containerStatus(in, spec, false)
		case ephemeralRan(old): // what it left was removed
			st = *old
			if st.State.Terminated == nil {
				st.State = corev1.ContainerState{Terminated: unknownEnd(old)}
			}
		case refused:
			st = corev1.ContainerStatus{Name: spec.Name, Image: spec.Image, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
				ExitCode: neverStarted, Reason: admission.ReasonUnsupported, Message: why, StartedAt: stamp(in.now), FinishedAt: stamp(in.now),
			}}}
		default:
			st = containerStatus(in, spec, false)
		}
		st.Ready, st.Started = false, nil
		out = append(out, st)
	}
	return out
}
