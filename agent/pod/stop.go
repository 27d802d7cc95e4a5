package pod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/cgroup"
	"timonel/agent/hostile"
)

// minGrace is the least time between SIGTERM and SIGKILL, as upstream's.
const minGrace = 2 * time.Second

// killing is a container being stopped in the background.
type killing struct {
	deadline time.Time
}

// killGrace is for how long a container that is stopped by the node may take.
func killGrace(pod *corev1.Pod, k kill) time.Duration {
	var p *corev1.Probe
	if k.spec != nil {
		switch k.probe {
		case probeLiveness:
			p = k.spec.LivenessProbe
		case probeStartup:
			p = k.spec.StartupProbe
		}
	}
	if p != nil && p.TerminationGracePeriodSeconds != nil {
		return time.Duration(*p.TerminationGracePeriodSeconds) * time.Second
	}
	return time.Duration(gracePeriod(pod)) * time.Second
}

// kill stops a container in the background: preStop, SIGTERM, and SIGKILL at
// the end of grace. One that is being stopped already is only hurried.
func (w *worker) kill(pod *corev1.Pod, c *container, spec *corev1.Container, message string, grace time.Duration) {
	grace = max(grace, 0)
	deadline := w.m.cfg.Now().Add(grace)
	w.mu.Lock()
	old := w.kills[c.id]
	if old != nil && !deadline.Before(old.deadline.Add(-time.Second)) {
		w.mu.Unlock()
		return
	}
	k := &killing{deadline: deadline}
	w.kills[c.id] = k
	w.mu.Unlock()
	w.probes.stop(c.id)
	if old == nil {
		if message == "" {
			message = "Stopping container " + c.name
		}
		w.event(pod, corev1.EventTypeNormal, "Killing", message, c.name)
	}
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		err := w.stopContainer(pod, c, spec, deadline, old == nil && grace > 0)
		if err != nil && w.ctx.Err() == nil {
			w.log.Warn("stop container; trying again", "container", c.name, "id", c.id, "error", rpcText(err))
			select {
			case <-w.ctx.Done():
			case <-time.After(time.Second):
			}
		}
		w.stopHook(c.id)
		w.mu.Lock()
		if w.kills[c.id] == k {
			delete(w.kills, c.id)
		}
		w.mu.Unlock()
		w.wakeUp()
	}()
}

func (w *worker) stopContainer(pod *corev1.Pod, c *container, spec *corev1.Container, deadline time.Time, hook bool) error {
	if hook && spec != nil && spec.Lifecycle != nil && spec.Lifecycle.PreStop != nil {
		ctx, cancel := context.WithDeadline(w.ctx, deadline)
		if err := w.runHandler(ctx, pod, spec, spec.Lifecycle.PreStop, c.id); err != nil && w.ctx.Err() == nil {
			w.event(pod, corev1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed: "+err.Error(), c.name)
		}
		cancel()
	}
	left := max(deadline.Sub(w.m.cfg.Now()), 0)
	if hook && left < minGrace {
		left = minGrace
	}
	seconds := int64((left + time.Second - 1) / time.Second)
	ctx, cancel := context.WithTimeout(w.ctx, left+callTimeout)
	defer cancel()
	_, err := w.m.cfg.Runtime.StopContainer(ctx, &runtimev1.StopContainerRequest{ContainerId: c.id, Timeout: seconds})
	if notFound(err) {
		return nil
	}
	if err == nil {
		w.expectExit(c.id)
	}
	return err
}

// end stops all that runs of a pod, the sidecars last and in reverse order,
// then its sandboxes. It says whether nothing is left running.
func (w *worker) end(pod *corev1.Pod, obs *observed) bool {
	running := obs.running()
	if len(running) > 0 {
		var sidecars []*container
		others := false
		for _, c := range running {
			spec := specOf(pod, c.name)
			if spec != nil && sidecar(spec) && slices.ContainsFunc(pod.Spec.InitContainers, func(ic corev1.Container) bool { return ic.Name == c.name }) {
				sidecars = append(sidecars, c)
				continue
			}
			others = true
			w.kill(pod, c, spec, "", w.endGrace(pod))
		}
		if !others {
			last := sidecars[0]
			position := func(c *container) int {
				return slices.IndexFunc(pod.Spec.InitContainers, func(ic corev1.Container) bool { return ic.Name == c.name })
			}
			for _, c := range sidecars {
				if position(c) > position(last) {
					last = c
				}
			}
			w.kill(pod, last, specOf(pod, last.name), "", w.endGrace(pod))
		}
		w.again(w.m.cfg.Now().Add(5 * time.Second)) // a stop that failed is tried again
		return false
	}
	for _, s := range obs.sandboxes {
		if !w.stopSandbox(s.id) {
			return false
		}
	}
	return true
}

// endGrace is what is left of the pod's grace period.
func (w *worker) endGrace(pod *corev1.Pod) time.Duration {
	grace := time.Duration(gracePeriod(pod)) * time.Second
	if pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil {
		// deletionTimestamp is when the grace period ends; a long absence of
		// this agent does not shorten it below the minimum.
		grace = min(grace, max(pod.DeletionTimestamp.Sub(w.m.cfg.Now())+time.Second, minGrace))
		if *pod.DeletionGracePeriodSeconds == 0 {
			grace = 0
		}
	}
	if w.verdict != nil && w.verdict.grace > 0 { // it is evicted
		grace = min(grace, w.verdict.grace)
	}
	return grace
}

// stopSandbox takes down a sandbox and its network, once.
func (w *worker) stopSandbox(id string) bool {
	if w.stopped[id] {
		return true
	}
	if _, put := w.deferred("stop/" + id); put {
		return false
	}
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	_, err := w.m.cfg.Runtime.StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: id})
	if err != nil && !notFound(err) {
		if w.ctx.Err() == nil {
			w.log.Warn("stop sandbox", "sandbox", id, "error", rpcText(err))
			w.putOff("stop/"+id, waiting{})
		}
		return false
	}
	delete(w.retry, "stop/"+id)
	w.stopped[id] = true
	w.unpolice(id)
	return true
}

func (w *worker) removeContainer(c *container) bool {
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	if _, err := w.m.cfg.Runtime.RemoveContainer(ctx, &runtimev1.RemoveContainerRequest{ContainerId: c.id}); err != nil && !notFound(err) {
		w.log.Warn("remove container", "container", c.name, "id", c.id, "error", rpcText(err))
		return false
	}
	w.m.disown(c.id)
	w.probes.stop(c.id)
	w.stopHook(c.id)
	w.mu.Lock()
	delete(w.hooks, c.id)
	w.mu.Unlock()
	if err := errors.Join(removeLog(w.ctx, c.logPath), removeFile(c.messageFile, messageDepth)); err != nil {
		w.log.Warn("remove the files of a container; they go with the pod", "container", c.name, "id", c.id, "error", err)
	}
	return true
}

func (w *worker) removeSandbox(id string) bool {
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	if _, err := w.m.cfg.Runtime.RemovePodSandbox(ctx, &runtimev1.RemovePodSandboxRequest{PodSandboxId: id}); err != nil && !notFound(err) {
		w.log.Warn("remove sandbox", "sandbox", id, "error", rpcText(err))
		return false
	}
	w.m.disown(id)
	return true
}

// clean removes all traces of a pod of which nothing runs any more. It is
// repeated until nothing is left.
func (w *worker) clean(pod *corev1.Pod, obs *observed) bool {
	w.probes.stopAll()
	for _, c := range flatten(obs) {
		if !w.removeContainer(c) {
			w.again(w.m.cfg.Now().Add(time.Second))
			return false
		}
	}
	for _, s := range obs.sandboxes {
		if !w.removeSandbox(s.id) {
			w.again(w.m.cfg.Now().Add(time.Second))
			return false
		}
	}
	err := w.m.volumes.Teardown(w.ctx, w.uid)
	if err == nil && pod.Name != "" {
		err = hostile.RemoveAll(w.ctx, w.m.LogDir(pod))
	}
	if err == nil {
		err = w.removeCgroups(pod)
	}
	if err != nil {
		w.log.Warn("clean up after the pod", "error", err)
		w.again(w.m.cfg.Now().Add(time.Second))
		return false
	}
	w.m.images.Forget(w.uid)
	return true
}

func (w *worker) removeCgroups(pod *corev1.Pod) error {
	if !w.orphan {
		return cgroup.Remove(cgroupParent(w.m.cfg.CgroupRoot, pod))
	}
	// An orphan's class is not known.
	for _, class := range []string{"", "burstable/", "besteffort/"} {
		if err := cgroup.Remove(fmt.Sprintf("%s/%spod%s", w.m.cfg.CgroupRoot, class, w.uid)); err != nil {
			return err
		}
	}
	return nil
}
