package pod

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/eviction"
)

const (
	// minGrace is the least time between SIGTERM and SIGKILL, as upstream's.
	minGrace = 2 * time.Second
	// evictGrace is for how long containers of an evicted pod may take to end, as
	// upstream's: what they hold is needed.
	evictGrace = time.Second
)

// kill stops a container. One that is being stopped already is only hurried.
func (p *pass) kill(s *seen, k kill, now time.Time) {
	k.grace = max(k.grace, 0)
	if old := s.beside[k.container.id].stopBy; !old.IsZero() {
		if !now.Add(k.grace).Before(old.Add(-time.Second)) {
			return
		}
		k.hurry = true
	}
	p.do(k)
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

// endGrace is what is left of the pod's grace period.
func endGrace(pod *corev1.Pod, v *verdict, now time.Time) time.Duration {
	grace := time.Duration(gracePeriod(pod)) * time.Second
	if pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil {
		// deletionTimestamp is when the grace period ends; a long absence of
		// this agent does not shorten it below the minimum.
		grace = min(grace, max(pod.DeletionTimestamp.Sub(now)+time.Second, minGrace))
		if *pod.DeletionGracePeriodSeconds == 0 {
			grace = 0
		}
	}
	if v != nil && v.grace > 0 { // it is evicted
		grace = min(grace, v.grace)
	}
	return grace
}

// planStop stops all that runs of a pod, the sidecars last and in reverse order, then
// its sandboxes. It says whether nothing is left to stop or to wait for.
func planStop(w want, s *seen, b waits, now time.Time, p *pass) bool {
	p.ending = true
	if running := s.running(); len(running) > 0 {
		for _, c := range lastToEnd(w.pod, running) {
			p.kill(s, kill{container: c, spec: specOf(w.pod, c.name), grace: endGrace(w.pod, s.verdict, now)}, now)
		}
		p.wakeAt(now.Add(stopPatience)) // a stop that failed is tried again
		if len(p.steps) == 0 {
			p.do(watch{})
			p.report(w, s)
		}
		return false
	}
	for _, box := range s.sandboxes {
		if s.stopped[box.id] {
			continue
		}
		if e, put := b.held(waitStop(box.id), now); put {
			p.wakeAt(e.until)
			p.report(w, s)
		} else {
			p.do(stopSandbox{box.id})
		}
		return false
	}
	p.stopped = true
	p.do(watch{}) // nothing
	if !s.over {
		p.do(giveBack{})
	}
	return true
}

// lastToEnd are the containers that are to end now: all but sidecars, or when none of
// those is left the last sidecar.
func lastToEnd(pod *corev1.Pod, running []*container) []*container {
	position := func(c *container) int {
		return slices.IndexFunc(pod.Spec.InitContainers, func(ic corev1.Container) bool { return ic.Name == c.name && sidecar(&ic) })
	}
	var others []*container
	last := running[0]
	for _, c := range running {
		if position(c) < 0 {
			others = append(others, c)
		}
		if position(c) > position(last) {
			last = c
		}
	}
	if len(others) > 0 {
		return others
	}
	return []*container{last}
}

// planGone ends a pod that is deleted, or that the cluster does not know, and removes
// all traces of it.
func planGone(w want, s *seen, b waits, now time.Time, p *pass) {
	if w.short { // all of it goes
		p.do(reclaimed{})
		return
	}
	if !planStop(w, s, b, now, p) {
		return
	}
	p.report(w, s)
	if e, put := b.held(waitClean, now); put {
		p.wakeAt(e.until)
	} else {
		p.do(clean{})
	}
}

// planEnded ends a pod of which nothing is to run again, and that is not deleted yet.
// What it has on the node goes, but for its containers and their logs.
func planEnded(w want, s *seen, b waits, now time.Time, p *pass) {
	if !planStop(w, s, b, now, p) {
		return
	}
	p.report(w, s)
	if !s.swept {
		e, put := b.held(waitSweep, now)
		if !put {
			p.do(sweep{whole: s.old.Reason == eviction.Reason || s.verdict != nil && s.verdict.reason == eviction.Reason})
			return
		}
		p.wakeAt(e.until)
	}
	if w.short {
		var r remove
		for _, name := range s.names() {
			r.containers = append(r.containers, s.containers[name]...)
		}
		for _, box := range s.sandboxes {
			r.sandboxes = append(r.sandboxes, box.id)
		}
		p.do(r, reclaimed{})
	}
}
