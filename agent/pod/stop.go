package pod

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/cgroup"
	"timonel/agent/hostile"
)

// around is what goes on around one container: its postStart hook and its stop. The
// worker's lock guards it.
type around struct {
	hook *hook
	stop *stop
}

// stop is a container being stopped in the background, by deadline at the latest.
type stop struct{ deadline time.Time }

// aroundOf is what goes on around a container. w.mu is held.
func (w *worker) aroundOf(id string) *around {
	a := w.around[id]
	if a == nil {
		a = &around{}
		w.around[id] = a
	}
	return a
}

// kill stops a container in the background: preStop, SIGTERM, and SIGKILL at
// the end of grace.
func (w *worker) kill(pod *corev1.Pod, k kill) {
	c, mine := k.container, &stop{deadline: w.m.cfg.Now().Add(k.grace)}
	w.mu.Lock()
	w.aroundOf(c.id).stop = mine
	w.mu.Unlock()
	w.probes.spare(c.id)
	if !k.hurry {
		message := k.message
		if message == "" {
			message = "Stopping container " + c.name
		}
		w.event(pod, corev1.EventTypeNormal, "Killing", message, c.name)
	}
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		err := w.stopContainer(pod, c, k.spec, mine.deadline, !k.hurry && k.grace > 0)
		if err != nil && w.ctx.Err() == nil {
			w.log.Warn("stop container; trying again", "container", c.name, "id", c.id, "error", rpcText(err))
			select {
			case <-w.ctx.Done():
			case <-time.After(time.Second):
			}
		}
		w.stopHook(c.id)
		w.mu.Lock()
		if a := w.around[c.id]; a != nil && a.stop == mine {
			a.stop = nil
			if a.hook == nil {
				delete(w.around, c.id)
			}
		}
		w.mu.Unlock()
		w.wakeUp()
	}()
}

func (w *worker) stopContainer(pod *corev1.Pod, c *container, spec *corev1.Container, deadline time.Time, hook bool) error {
	if hook && spec != nil && spec.Lifecycle != nil && spec.Lifecycle.PreStop != nil {
		ctx, cancel := context.WithDeadline(w.ctx, deadline)
		if err := w.runHandler(ctx, pod, spec, spec.Lifecycle.PreStop, c.id); err != nil && w.ctx.Err() == nil {
			w.log.Warn("preStop hook", "container", c.name, "id", c.id, "error", err)
			w.event(pod, corev1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed", c.name)
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

// stopSandbox takes down a sandbox and its network, once.
func (w *worker) stopSandbox(s *seen, id string) {
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	_, err := w.m.cfg.Runtime.StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: id})
	if err != nil && !notFound(err) {
		if w.ctx.Err() == nil {
			w.log.Warn("stop sandbox", "sandbox", id, "error", rpcText(err))
			w.putOff(waitStop(id), "", "")
		}
		return
	}
	w.waits.done(waitStop(id))
	s.stopped[id] = true
	w.unpolice(s, id)
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
	delete(w.around, c.id)
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
func (w *worker) clean(pod *corev1.Pod, s *seen) bool {
	w.probes.stopAll()
	for _, list := range s.containers {
		for _, c := range list {
			if !w.removeContainer(c) {
				return false
			}
			s.forget(c)
		}
	}
	for _, box := range s.sandboxes {
		if !w.removeSandbox(box.id) {
			return false
		}
		s.forgetSandbox(box.id)
	}
	err := w.m.volumes.Teardown(w.ctx, w.uid)
	if err == nil && pod.Name != "" {
		err = hostile.RemoveAll(w.ctx, w.m.LogDir(pod))
	}
	if err == nil {
		err = w.removeCgroups(pod)
	}
	if err == nil && w.m.cfg.Users != nil { // last: nothing has these ids any more
		err = w.m.cfg.Users.Release(w.uid)
	}
	if err != nil {
		w.cannotRemove(pod, waitClean, err)
		return false
	}
	w.m.images.Forget(w.uid)
	return true
}

// cannotRemove says why something of the pod stays on the node, and the pod with it. It is
// tried again for as long as that takes; the cluster is told of what failed twice.
func (w *worker) cannotRemove(pod *corev1.Pod, what waitFor, err error) {
	if w.ctx.Err() != nil {
		return
	}
	w.log.Warn("clean up after the pod; trying again", "error", err)
	if _, before := w.waits[what]; before {
		w.eventOnce(pod, corev1.EventTypeWarning, reasonKill, "error killing pod: "+rpcText(err), "")
	}
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
