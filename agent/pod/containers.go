package pod

import (
	"fmt"
	"hash/fnv"
	"slices"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// actions are what a pod's containers need, given what is there, whatever has to be
// waited for.
type actions struct {
	// newSandbox: there is none that is ready; attempt numbers it.
	newSandbox bool
	attempt    uint32
	kill       []kill
	start      []start
}

func planContainers(pod *corev1.Pod, s *seen) actions {
	var a actions
	box := s.usable()
	if box == nil {
		// What still runs belongs to a sandbox that is gone: stop that first.
		for _, c := range s.running() {
			a.kill = append(a.kill, kill{container: c, spec: specOf(pod, c.name), message: "Pod sandbox changed, it will be killed and re-created."})
		}
		if len(a.kill) == 0 {
			a.newSandbox = true
			if len(s.sandboxes) > 0 {
				a.attempt = s.sandboxes[0].attempt + 1
			}
		}
		return a
	}
	for _, c := range s.running() {
		if c.sandbox != box.id {
			a.kill = append(a.kill, kill{container: c, spec: specOf(pod, c.name), message: "The container belongs to a sandbox that was replaced."})
		}
	}
	planEphemeral(pod, s, &a)
	if !planInit(pod, s, box, &a) {
		return a
	}
	for i := range pod.Spec.Containers {
		planContainer(pod, &pod.Spec.Containers[i], s, box, false, &a)
	}
	return a
}

// initialized says whether initialization is over in a sandbox: one of the pod's own
// containers has been made in it.
func initialized(pod *corev1.Pod, s *seen, box *sandbox) bool {
	return slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return s.in(box, c.Name) != nil })
}

// planInit handles init containers in order and says whether the pod's own
// containers may start.
func planInit(pod *corev1.Pod, s *seen, box *sandbox, a *actions) bool {
	over := initialized(pod, s, box) // only sidecars are looked after then
	for i := range pod.Spec.InitContainers {
		spec := &pod.Spec.InitContainers[i]
		c := s.in(box, spec.Name)
		if sidecar(spec) {
			planContainer(pod, spec, s, box, true, a)
			if !over && (!c.running() || !s.beside[c.id].started) {
				return false
			}
			continue
		}
		switch {
		case over:
		case c.exited() && c.exitCode == 0:
		case slices.ContainsFunc(pod.Spec.InitContainers[i+1:], func(later corev1.Container) bool { return s.in(box, later.Name) != nil }):
			// It was done, or no later one would have been made; its record was removed.
		case c.running():
			planFailed(pod, spec, s, c, true, a)
			return false
		default:
			a.start = append(a.start, start{spec: spec, init: true, restarts: restarts(s, spec.Name), previous: s.latest(spec.Name)})
			return false
		}
	}
	return true
}

// planContainer handles one container that is to run until it is done.
func planContainer(pod *corev1.Pod, spec *corev1.Container, s *seen, box *sandbox, init bool, a *actions) {
	c := s.in(box, spec.Name)
	if c.running() {
		if c.hash != "" && c.hash != hashContainer(spec) {
			message := fmt.Sprintf("Container %s definition changed, will be restarted", spec.Name)
			if init {
				message = fmt.Sprintf("Init container %s definition changed", spec.Name)
			}
			a.kill = append(a.kill, kill{container: c, spec: spec, message: message})
			return
		}
		planFailed(pod, spec, s, c, init, a)
		return
	}
	if last := s.latest(spec.Name); last.exited() && !restartable(pod, spec, last) {
		return
	}
	a.start = append(a.start, start{spec: spec, init: init, restarts: restarts(s, spec.Name), previous: s.latest(spec.Name)})
}

// planFailed ends a container whose probe or hook says that it failed.
func planFailed(pod *corev1.Pod, spec *corev1.Container, s *seen, c *container, init bool, a *actions) {
	failed := s.beside[c.id].failed
	if failed == "" {
		return
	}
	message := fmt.Sprintf("Container %s failed %s probe", spec.Name, failed)
	switch {
	case failed == failedPostStart:
		message = "FailedPostStartHook"
	case init:
		message = "Init c" + message[1:]
	case restartsOnFailure(pod, spec):
		message += ", will be restarted"
	}
	a.kill = append(a.kill, kill{container: c, spec: spec, message: message, probe: failed})
}

// restarts is the restart count of the next container of a name.
func restarts(s *seen, name string) int32 {
	last := s.latest(name)
	if last == nil {
		if old := oldStatus(s.old, name); old != nil && (old.ContainerID != "" || old.LastTerminationState.Terminated != nil) {
			return old.RestartCount + 1 // its record was lost: its log has that number
		}
		return 0
	}
	if last.state == runtimev1.ContainerState_CONTAINER_CREATED {
		return last.restarts // never ran
	}
	return last.restarts + 1
}

// sidecar says whether an init container keeps running beside the others.
func sidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// restartPolicy is a container's own, else its pod's.
func restartPolicy(pod *corev1.Pod, spec *corev1.Container) corev1.RestartPolicy {
	if spec.RestartPolicy != nil {
		return corev1.RestartPolicy(*spec.RestartPolicy)
	}
	return pod.Spec.RestartPolicy
}

// restartsOnFailure says whether a container that runs is started again when it is
// stopped for having failed. Its rules are about exit codes, and it has none yet.
func restartsOnFailure(pod *corev1.Pod, spec *corev1.Container) bool {
	return restartPolicy(pod, spec) != corev1.RestartPolicyNever
}

// restartable says whether a container that has exited is to be started again.
func restartable(pod *corev1.Pod, spec *corev1.Container, c *container) bool {
	switch actionOf(spec, c.exitCode) {
	case corev1.ContainerRestartRuleActionRestart, corev1.ContainerRestartRuleActionRestartAllContainers:
		return true
	}
	switch restartPolicy(pod, spec) {
	case corev1.RestartPolicyNever:
		return false
	case corev1.RestartPolicyOnFailure:
		return c.exitCode != 0
	}
	return true
}

// finished says whether nothing of the pod will run again: an init container
// failed for good, or all its own containers are done.
func finished(pod *corev1.Pod, obs *observed) bool {
	if len(resets(pod, obs)) > 0 {
		return false // what was killed for it has not failed
	}
	for i := range pod.Spec.InitContainers {
		spec := &pod.Spec.InitContainers[i]
		if sidecar(spec) {
			continue
		}
		if c := obs.latest(spec.Name); c.exited() && c.exitCode != 0 && !restartable(pod, spec, c) {
			return true
		}
	}
	for i := range pod.Spec.Containers {
		spec := &pod.Spec.Containers[i]
		c := obs.latest(spec.Name)
		if !c.exited() || restartable(pod, spec, c) {
			return false
		}
	}
	return true
}

func terminal(phase corev1.PodPhase) bool {
	return phase == corev1.PodSucceeded || phase == corev1.PodFailed
}

// specOf finds a container of the pod by name, or nil.
func specOf(pod *corev1.Pod, name string) *corev1.Container {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return asContainer(&pod.Spec.EphemeralContainers[i])
		}
	}
	return nil
}

// hashContainer changes with what cannot be changed in a running container.
func hashContainer(c *corev1.Container) string {
	h := fnv.New32a()
	fmt.Fprintf(h, "%s\x00%s", c.Name, c.Image)
	return fmt.Sprintf("%x", h.Sum32())
}
