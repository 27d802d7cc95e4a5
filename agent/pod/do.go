package pod

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/admission"
)

// outcome says what a step has led to. Of several steps the highest counts.
type outcome int

const (
	rest   outcome = iota // nothing else is to be done for it
	replan                // something is known, or was done, that was not
	look                  // CRI has something else now
	failed                // as replan, and the steps behind it are not to be done
)

// do does the steps of a plan in their order, and adds to s what they find. It is the
// one place where anything is done for a pod.
func (w *worker) do(want *want, s *seen, p *pass) outcome {
	out := rest
	for _, st := range p.steps {
		got := w.step(want, s, p, st)
		if w.ctx.Err() != nil {
			return rest
		}
		if got == failed {
			return max(out, replan)
		}
		out = max(out, got)
	}
	return out
}

func (w *worker) step(want *want, s *seen, p *pass, st step) outcome {
	pod := want.pod
	switch st := st.(type) {
	case admit:
		w.admit(pod, s, st.adopt)
		*want, _ = w.take()
	case judge:
		s.verdict = st.verdict
		var annotations map[string]string
		if st.eviction != nil {
			w.log.Warn("evicting the pod", "message", st.verdict.message)
			annotations = st.eviction.Annotations
		}
		w.annotatedEvent(pod, corev1.EventTypeWarning, st.verdict.reason, st.verdict.message, "", annotations)
	case grant:
		w.grant(want, s)
		*want, _ = w.take()
	case resize:
		return w.resize(want, s, st)
	case kill:
		if st.forgive {
			w.waits.forgive(st.container.name)
		}
		w.kill(pod, st)
	case makeVolumes:
		if w.makeVolumes(want, s); w.ends() && !want.ends() {
			return look
		}
	case makeSandbox:
		return w.makeSandbox(want, s, st.attempt)
	case guard:
		w.guard(pod, s, st.box)
	case start:
		if w.ends() { // there may be thousands to start
			return look
		}
		return w.start(pod, s, st)
	case tell:
		w.eventOnce(pod, st.kind, st.reason, st.message, st.container)
		return rest
	case watch:
		w.probes.update(pod, s, p.ending)
		return rest
	case report:
		w.report(*want, s, *p)
		return rest
	case stopSandbox:
		w.stopSandbox(s, st.id)
	case remove:
		w.remove(s, st)
		return rest
	case reset:
		return w.reset(s, st)
	case giveBack:
		w.giveBack(s)
		return rest
	case sweep:
		w.sweep(pod, s, st.whole)
	case clean:
		if s.cleaned = w.clean(pod, s); !s.cleaned {
			w.waits.putOff(waitClean, cleaning, waiting{}, w.m.cfg.Now())
		}
	case reclaimed:
		w.answer()
		want.short = false
	case farewell:
		w.farewell(pod, want.removed)
		return rest
	default:
		panic(fmt.Sprintf("agent/pod: nobody does %T", st))
	}
	return replan
}

// putOff delays a step that failed, and says why on whatever waits for it.
func (w *worker) putOff(what waitFor, reason, message string) {
	w.waits.putOff(what, failing, waiting{reason, message}, w.m.cfg.Now())
}

// admit asks, before anything of the pod is started, whether this node takes it. A pod
// that is not taken has failed for good. One that was started already, by this agent or
// one before it, is not asked about again; when it has a field that this agent refuses,
// an event says so and it goes on.
func (w *worker) admit(pod *corev1.Pod, s *seen, adopt bool) {
	s.asked = true
	if adopt {
		w.m.take(w, pod)
		node := w.m.cfg.Node()
		if r := admission.Refuse(pod, &node); r != nil {
			w.event(pod, corev1.EventTypeWarning, admission.ReasonUnsupported,
				"The pod was started by an agent that did not refuse this; it goes on without: "+r.Message, "")
		}
		return
	}
	if r := w.m.admit(w, pod); r != nil {
		s.verdict = &verdict{reason: r.Reason, message: "Pod was rejected: " + r.Message, rejected: true}
		w.event(pod, corev1.EventTypeWarning, r.Reason, r.Message, "")
	}
}

// grant gives the pod the other resources that it asks for, once the node has them. What
// the node cannot give yet, or ever, is said in a condition and an event, and the pod
// keeps what it has.
func (w *worker) grant(want *want, s *seen) {
	s.resizeAsked = true
	s.refusedResize = w.m.resize(w, want.pod, want.api)
	if r := s.refusedResize; r != nil {
		w.eventOnce(want.pod, corev1.EventTypeWarning, "Resize"+r.Reason, fmt.Sprintf("Pod resize %s: %s (generation %d)", r.Reason, r.Message, want.api.Generation), "")
		return
	}
	w.event(want.pod, corev1.EventTypeNormal, "ResizeStarted", fmt.Sprintf("Pod resize started (generation %d)", want.api.Generation), "")
}

// report computes the status and sends it when it has changed.
func (w *worker) report(want want, s *seen, p pass) {
	if w.orphan {
		return
	}
	st := *s.old
	if !terminal(st.Phase) || len(st.ContainerStatuses) == 0 || len(s.sandboxes) > 0 || s.any() {
		st = makeStatus(statusInput{want: want, seen: s, pass: p, now: w.m.cfg.Now()})
	} // else what ended was removed: its last status tells more than is left
	s.old = &st
	w.mu.Lock()
	w.status = &st
	w.mu.Unlock()
	raw, err := st.Marshal()
	if err != nil {
		w.log.Error("encode the pod's status", "error", err)
		return
	}
	if w.reported != nil && string(raw) == string(w.reported) {
		return
	}
	w.reported = raw
	w.m.cfg.Statuses.SetStatus(w.uid, &st)
	w.m.cfg.Reporter.SetPodStatus(want.pod, &st)
}

// giveBack gives back what the pod had of the node.
func (w *worker) giveBack(s *seen) {
	w.mu.Lock()
	s.over = true
	w.mu.Unlock()
	w.m.ended()
}

// farewell says that the pod is gone from this node.
func (w *worker) farewell(pod *corev1.Pod, removed bool) {
	w.m.cfg.Statuses.ForgetStatus(w.uid)
	if removed {
		w.m.cfg.Reporter.ForgetPod(pod)
		return
	}
	w.m.cfg.Reporter.PodTerminated(pod)
}

// resize does what can be done now of a resize. Its containers that have to be started
// anew are stopped by steps of their own.
func (w *worker) resize(want *want, s *seen, r resize) outcome {
	pod := want.pod
	if err := w.applyResize(pod, s, r); err != nil {
		if w.ctx.Err() == nil {
			w.eventOnce(pod, corev1.EventTypeWarning, "ResizeError", "Pod resize error: "+rpcText(err), "")
			w.putOff(waitResize, "", rpcText(err))
		}
		return failed
	}
	w.waits.done(waitResize)
	if r.last {
		s.applied = want.given
		w.event(pod, corev1.EventTypeNormal, "ResizeCompleted", fmt.Sprintf("Pod resize completed (generation %d)", pod.Generation), "")
	}
	return replan
}

func (w *worker) applyResize(pod *corev1.Pod, s *seen, r resize) error {
	before, _ := s.applied.apply(pod)
	now, was := podResources(pod), podResources(before)
	cgroupPath := cgroupParent(w.m.cfg.CgroupRoot, pod)
	if err := checkMemory("pod", cgroupPath, was.MemoryLimitInBytes, now.MemoryLimitInBytes); err != nil {
		return err
	}
	// While its containers change, the pod's own cgroup is as wide as before and after.
	if err := w.limitPod(cgroupPath, widest(was, now)); err != nil {
		return err
	}
	for _, c := range r.containers {
		spec := specOf(pod, c.name)
		if err := w.updateContainer(pod, before, spec, specOf(before, c.name), c); err != nil {
			return fmt.Errorf("container %s: %w", c.name, err)
		}
		s.applied = s.applied.with(c.name, spec.Resources)
	}
	if !r.last {
		return nil
	}
	return w.limitPod(cgroupPath, now)
}

// remove removes containers, then sandboxes, for as long as that succeeds.
func (w *worker) remove(s *seen, r remove) {
	for _, c := range r.containers {
		if !w.removeContainer(c) {
			return
		}
		s.forget(c)
	}
	for _, id := range r.sandboxes {
		if !w.removeSandbox(id) {
			return
		}
		s.forgetSandbox(id)
	}
}

// sweep frees what a pod that has ended, and is not deleted yet, has on the node: its
// volumes, and of one that was evicted, which is to free room, its containers and their
// logs too.
func (w *worker) sweep(pod *corev1.Pod, s *seen, whole bool) {
	again := releasing
	if whole {
		again = cleaning
		if !w.clean(pod, s) {
			w.waits.putOff(waitSweep, again, waiting{}, w.m.cfg.Now())
			return
		}
	} else if err := w.m.volumes.Release(w.ctx, w.uid); err != nil {
		w.cannotRemove(pod, waitSweep, err)
		w.waits.putOff(waitSweep, again, waiting{}, w.m.cfg.Now())
		return
	}
	w.mu.Lock()
	s.swept = true
	w.mu.Unlock()
}

// answer tells who asked that containers that have ended be removed that they are.
func (w *worker) answer() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.reclaim != nil {
		close(w.reclaim)
		w.reclaim = nil
	}
}
