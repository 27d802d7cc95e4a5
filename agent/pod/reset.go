package pod

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// What is said of containers that are removed to be started anew, as upstream's.
const (
	reasonRestartingAll  = "RestartingAllContainers"
	messageRestartingAll = "The container is removed because RestartAllContainers in place"
)

// actionOf is what the first of a container's rules that is about an exit code asks for, or
// empty.
func actionOf(spec *corev1.Container, exitCode int32) corev1.ContainerRestartRuleAction {
	for _, rule := range spec.RestartPolicyRules {
		if rule.ExitCodes == nil {
			continue
		}
		in := slices.Contains(rule.ExitCodes.Values, exitCode)
		if in == (rule.ExitCodes.Operator == corev1.ContainerRestartRuleOnExitCodesOpIn) {
			return rule.Action
		}
	}
	return ""
}

// mayRestartAll says whether a pod has a rule that restarts all of it.
func mayRestartAll(pod *corev1.Pod) bool {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			for _, rule := range list[i].RestartPolicyRules {
				if rule.Action == corev1.ContainerRestartRuleActionRestartAllContainers {
					return true
				}
			}
		}
	}
	return false
}

// restartsAll says whether a container has ended so that all of its pod are to be restarted.
func restartsAll(spec *corev1.Container, c *container) bool {
	return c.exited() && actionOf(spec, c.exitCode) == corev1.ContainerRestartRuleActionRestartAllContainers
}

// resets are the containers that have ended so that all are to be restarted.
func resets(pod *corev1.Pod, obs *observed) []*container {
	var out []*container
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if c := obs.latest(list[i].Name); restartsAll(&list[i], c) {
				out = append(out, c)
			}
		}
	}
	return out
}

// planReset restarts all containers of a pod when one has ended in a way that asks for it
// (upstream's RestartAllContainersOnContainerExits): those that run are killed, all are
// removed, and the pod starts with its init containers, in the sandbox and with the volumes
// that it has. Those that asked are removed last, so that an agent that dies in the middle
// goes on with it. One that asks again and again waits as one that fails does: upstream
// restarts such a pod without end.
func planReset(w want, s *seen, b waits, now time.Time, p *pass) bool {
	asked := resets(w.pod, &s.observed)
	due := slices.ContainsFunc(asked, func(c *container) bool {
		return !now.Before(c.finished.Add(b.restartDelay(c.name, c)))
	})
	if !due {
		return false
	}
	p.resetting = true
	running := false
	r := reset{asked: asked}
	for _, list := range [][]corev1.Container{w.pod.Spec.Containers, w.pod.Spec.InitContainers} {
		for i := range slices.Backward(list) {
			for _, c := range s.containers[list[i].Name] {
				if c.running() {
					running = true
					p.kill(s, kill{container: c, spec: &list[i], message: "Container " + c.name + " is restarted with all others of its pod"}, now)
				}
				if !slices.Contains(asked, c) {
					r.containers = append(r.containers, c)
				}
			}
		}
	}
	r.containers = append(r.containers, asked...)
	e, put := b.held(waitReset, now)
	switch {
	case running && len(p.steps) > 0:
	case running || put:
		p.wakeAt(now.Add(stopPatience))
		if put {
			p.wakeAt(e.until)
		}
		p.do(watch{})
		p.report(w, s)
	default:
		p.report(w, s) // what was there, before it is gone
		p.do(r)
	}
	return true
}

// reset removes containers that have ended, for all of them to be made anew.
func (w *worker) reset(s *seen, r reset) outcome {
	for _, c := range r.containers {
		if !w.removeContainer(c) {
			w.waits.putOff(waitReset, cleaning, waiting{}, w.m.cfg.Now())
			return failed
		}
		if slices.Contains(r.asked, c) {
			w.waits.restarted(c.name, c)
		}
		s.forget(c)
	}
	w.waits.done(waitReset)
	return look
}

// resetStatus is what a container's status says while it is being removed to be made anew,
// if it did not ask for that itself.
func resetStatus(in statusInput, spec *corev1.Container, c *container, st *corev1.ContainerStatus) bool {
	if !in.resetting || c.running() || restartsAll(spec, c) {
		return false
	}
	st.Ready = false
	st.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reasonRestartingAll, Message: messageRestartingAll}}
	st.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{Reason: reasonRestartingAll, Message: messageRestartingAll, ExitCode: 137}
	return true
}

// restartingCondition says whether a pod is on the way to start anew.
func restartingCondition(in statusInput) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.AllContainersRestarting, Status: corev1.ConditionFalse}
	if in.resetting {
		c.Status, c.Reason, c.Message = corev1.ConditionTrue, "RestartAllContainersStarted", "container exited with restart policy rule"
	}
	return c
}
