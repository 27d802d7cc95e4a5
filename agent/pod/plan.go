package pod

import (
	"fmt"
	"hash/fnv"
	"slices"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// facts is what the worker knows about running containers beyond CRI, by
// container id.
type facts interface {
	// started: its postStart hook and startup probe have passed.
	started(c *container) bool
	// failed gives the probe that demands a restart ("liveness", "startup") or
	// the failed postStart hook, and "" when all is well.
	failed(c *container) (kind, message string)
}

// start is a container to start.
type start struct {
	spec     *corev1.Container
	init     bool
	restarts int32
	// ephemeral is the whole of an ephemeral container, else nil.
	ephemeral *corev1.EphemeralContainer
	target    string     // container that an ephemeral one shares processes with, if any
	previous  *container // the one before, in any sandbox; nil at first
}

// kill is a container to stop, because it is not as it should be.
type kill struct {
	container *container
	spec      *corev1.Container
	message   string
	probe     string // the probe whose grace period counts, if any
}

// actions are the next steps for one pod that is to run.
type actions struct {
	// newSandbox: there is none that is ready; attempt numbers it.
	newSandbox bool
	attempt    uint32
	kill       []kill
	start      []start
	// finished: nothing will run again; the rest of the pod is to be stopped.
	finished bool
}

// plan says what to do next so that pod runs, given what is there. It does not
// look at back-offs or images: those only delay a start.
func plan(pod *corev1.Pod, obs *observed, f facts) actions {
	var a actions
	if finished(pod, obs) {
		a.finished = true
		return a
	}
	box := obs.current()
	if box != nil && len(box.ips) == 0 && !box.hostNet {
		box = nil
	}
	if box == nil {
		// What still runs belongs to a sandbox that is gone: stop that first.
		for _, c := range obs.running() {
			a.kill = append(a.kill, kill{container: c, spec: specOf(pod, c.name), message: "Pod sandbox changed, it will be killed and re-created."})
		}
		if len(a.kill) == 0 {
			a.newSandbox = true
			if len(obs.sandboxes) > 0 {
				a.attempt = obs.sandboxes[0].attempt + 1
			}
		}
		return a
	}
	for _, c := range obs.running() {
		if c.sandbox != box.id {
			a.kill = append(a.kill, kill{container: c, spec: specOf(pod, c.name), message: "The container belongs to a sandbox that was replaced."})
		}
	}
	planEphemeral(pod, obs, &a)
	initialized := planInit(pod, obs, box, f, &a)
	if !initialized {
		return a
	}
	for i := range pod.Spec.Containers {
		planContainer(pod, &pod.Spec.Containers[i], obs, box, f, false, &a)
	}
	return a
}

// planInit handles init containers in order and says whether the pod's own
// containers may start.
func planInit(pod *corev1.Pod, obs *observed, box *sandbox, f facts, a *actions) bool {
	// Once one of the pod's own containers has been made in this sandbox,
	// initialization is over; only sidecars are looked after.
	over := slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return obs.in(box, c.Name) != nil })
	for i := range pod.Spec.InitContainers {
		spec := &pod.Spec.InitContainers[i]
		c := obs.in(box, spec.Name)
		if sidecar(spec) {
			planContainer(pod, spec, obs, box, f, true, a)
			if !over && (!c.running() || !f.started(c)) {
				return false
			}
			continue
		}
		switch {
		case over:
		case c.exited() && c.exitCode == 0:
		case c.running():
			if kind, message := f.failed(c); kind != "" {
				a.kill = append(a.kill, kill{container: c, spec: spec, message: message, probe: kind})
			}
			return false
		default:
			a.start = append(a.start, start{spec: spec, init: true, restarts: restarts(obs, spec.Name), previous: obs.latest(spec.Name)})
			return false
		}
	}
	return true
}

// planContainer handles one container that is to run until it is done.
func planContainer(pod *corev1.Pod, spec *corev1.Container, obs *observed, box *sandbox, f facts, init bool, a *actions) {
	c := obs.in(box, spec.Name)
	if c.running() {
		if c.hash != "" && c.hash != hashContainer(spec) {
			a.kill = append(a.kill, kill{container: c, spec: spec, message: fmt.Sprintf("Container %s definition changed", spec.Name)})
			return
		}
		if kind, message := f.failed(c); kind != "" {
			a.kill = append(a.kill, kill{container: c, spec: spec, message: message, probe: kind})
		}
		return
	}
	if last := obs.latest(spec.Name); last.exited() && !restartable(pod, spec, last) {
		return
	}
	a.start = append(a.start, start{spec: spec, init: init, restarts: restarts(obs, spec.Name), previous: obs.latest(spec.Name)})
}

// restarts is the restart count of the next container of a name.
func restarts(obs *observed, name string) int32 {
	last := obs.latest(name)
	if last == nil {
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

// restartable says whether a container that has exited is to be started again.
func restartable(pod *corev1.Pod, spec *corev1.Container, c *container) bool {
	for _, rule := range spec.RestartPolicyRules {
		if rule.ExitCodes == nil {
			continue
		}
		in := slices.Contains(rule.ExitCodes.Values, c.exitCode)
		if in == (rule.ExitCodes.Operator == corev1.ContainerRestartRuleOnExitCodesOpIn) {
			return rule.Action == corev1.ContainerRestartRuleActionRestart
		}
	}
	policy := pod.Spec.RestartPolicy
	if spec.RestartPolicy != nil {
		policy = corev1.RestartPolicy(*spec.RestartPolicy)
	}
	switch policy {
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
	if terminal(pod.Status.Phase) {
		return true
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
