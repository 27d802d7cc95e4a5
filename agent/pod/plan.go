package pod

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/admission"
	"timonel/agent/eviction"
	"timonel/agent/image"
)

// pass is what a plan says: the next steps, and what the pod's status says meanwhile.
type pass struct {
	steps   []step
	waiting map[string]waiting // why containers that are wanted do not run, by name
	wake    time.Time          // when to look again, if nothing happens before; zero: never
	ending  bool               // the pod is being stopped, or has been
	stopped bool               // nothing of the pod runs any more, and nothing will
	// resizing: what it was given is not in force yet, resizeError why it cannot be.
	resizing    bool
	resizeError string
	resetting   bool // all containers are being removed to be started anew
}

func (p *pass) do(steps ...step)   { p.steps = append(p.steps, steps...) }
func (p *pass) wakeAt(t time.Time) { p.wake = sooner(p.wake, t) }

// plan says what to do next for a pod that should be as w says, given what is seen of
// it and what is put off at this time. It is a pure function, and changes none of them.
// When a step has found or changed something, what is next is planned anew.
func plan(w want, s *seen, b waits, now time.Time) pass {
	p := pass{waiting: map[string]waiting{}, resizing: resizing(w, s), resizeError: b[waitResize].why.message}
	switch {
	case s.cleaned:
		p.do(farewell{})
	case planVerdict(w, s, now, &p):
	case w.gone():
		planGone(w, s, b, now, &p)
	case s.verdict != nil || terminal(s.old.Phase) || terminal(w.pod.Status.Phase) || finished(w.pod, &s.observed):
		planEnded(w, s, b, now, &p)
	case !s.asked:
		p.do(admit{adopt: s.accepted || len(s.sandboxes) > 0 || s.any()})
	case w.resized && s.accepted && !s.resizeAsked:
		p.do(grant{})
	default:
		planRun(w, s, b, now, &p)
	}
	return p
}

// planVerdict ends a pod that is evicted, or that has been active for longer than it may.
func planVerdict(w want, s *seen, now time.Time, p *pass) bool {
	if s.verdict != nil || terminal(w.pod.Status.Phase) || terminal(s.old.Phase) {
		return false
	}
	if limit := w.pod.Spec.ActiveDeadlineSeconds; limit != nil {
		began := now // as its first status will say
		if s.old.StartTime != nil {
			began = s.old.StartTime.Time
		}
		end := began.Add(time.Duration(*limit) * time.Second)
		if !now.Before(end) {
			p.do(judge{verdict: &verdict{reason: "DeadlineExceeded", message: "Pod was active on the node longer than the specified deadline"}})
			return true
		}
		p.wakeAt(end)
	}
	if e := w.evicted; e != nil {
		p.do(judge{eviction: e, verdict: &verdict{reason: eviction.Reason, message: e.Message, disruption: e.Disruption, grace: evictGrace}})
		return true
	}
	return false
}

// planRun makes a pod run, or go on running.
func planRun(w want, s *seen, b waits, now time.Time, p *pass) {
	if planResize(w, s, b, now, p) {
		return
	}
	if planReset(w, s, b, now, p) {
		return
	}
	a := planContainers(w.pod, s)
	for _, k := range a.kill {
		k.grace = killGrace(w.pod, k)
		p.kill(s, k, now)
	}
	mounted := planVolumes(w, s, b, now, p)
	if len(p.steps) > 0 {
		return
	}
	box, starting := s.usable(), false
	switch {
	case !mounted:
		p.hold(w.pod, s, b[waitVolumes].why)
	case a.newSandbox:
		if e, put := b.held(waitSandbox, now); put {
			p.wakeAt(e.until)
			p.hold(w.pod, s, e.why)
			break
		}
		p.do(makeSandbox{attempt: a.attempt})
		return
	case box != nil && !box.hostNet && (s.policed != box.id || len(a.start) > 0):
		e, put := b.held(waitPolicies, now)
		switch {
		case put:
			p.wakeAt(e.until)
			p.hold(w.pod, s, e.why)
		case s.unguarded != "":
			p.hold(w.pod, s, waiting{reasonCreating, s.unguarded})
		case !s.guarded:
			p.do(guard{box: box})
			return
		default:
			starting = planStarts(w, s, b, now, a.start, p)
		}
	default:
		starting = planStarts(w, s, b, now, a.start, p)
	}
	if starting {
		return
	}
	p.do(watch{})
	p.report(w, s)
	planTidy(w, s, b, now, p)
}

// planVolumes makes the pod's volumes if they are not, or if what they show has
// changed, and says whether containers can be started with what there is.
func planVolumes(w want, s *seen, b waits, now time.Time, p *pass) (mounted bool) {
	changed := w.shown != s.volumesOf
	due := changed || s.volumes == nil || !s.refreshAt.IsZero() && !now.Before(s.refreshAt)
	e, put := b.held(waitVolumes, now)
	switch {
	case due && (changed || !put):
		p.do(makeVolumes{})
	case due:
		p.wakeAt(e.until)
	case !s.refreshAt.IsZero():
		p.wakeAt(s.refreshAt)
	}
	return s.volumes != nil
}

// planStarts starts containers, but for those that have to wait. It says whether there
// are any.
func planStarts(w want, s *seen, b waits, now time.Time, starts []start, p *pass) bool {
	var said []step
	for _, st := range starts {
		name := st.spec.Name
		if s.stopping(name) {
			continue
		}
		if st.previous.exited() {
			delay := b.restartDelay(name, st.previous)
			if due := st.previous.finished.Add(delay); now.Before(due) {
				p.wakeAt(due)
				short, long := backOffMessages(w.pod, name, delay)
				p.waiting[name] = waiting{reasonCrashLoop, long}
				said = append(said, tell{corev1.EventTypeWarning, "BackOff", short, name})
				continue
			}
		}
		if e, put := b.held(waitStart(name), now); put {
			p.wakeAt(e.until)
			p.waiting[name] = e.why
			continue
		}
		switch res, asked := s.images[name]; {
		case !asked:
			p.do(st)
		case res.State == image.Failed:
			p.wakeAt(res.Retry)
			p.waiting[name] = waiting{res.Reason, res.Message}
		case st.previous != nil:
			p.waiting[name] = waiting{reasonCreating, ""}
		}
	}
	if len(p.steps) > 0 {
		return true // what waits is told of by the plan after that
	}
	p.do(said...)
	return false
}

// hold says of all containers that are wanted why none can start. Where there are init
// containers all wait for them, as upstream says; what has done its part has not to wait.
func (p *pass) hold(pod *corev1.Pod, s *seen, why waiting) {
	if len(pod.Spec.InitContainers) > 0 && why.reason == reasonCreating {
		why.reason = reasonInitializing
	}
	box := s.usable()
	over := initialized(pod, s, box)
	for i := range pod.Spec.InitContainers {
		spec := &pod.Spec.InitContainers[i]
		c := s.in(box, spec.Name)
		if !c.running() && (sidecar(spec) || !over && !(c.exited() && c.exitCode == 0)) {
			p.waiting[spec.Name] = why
		}
	}
	for i := range pod.Spec.Containers {
		spec := &pod.Spec.Containers[i]
		if c := s.latest(spec.Name); !c.running() && !(c.exited() && !restartable(pod, spec, c)) {
			p.waiting[spec.Name] = why
		}
	}
}

// report reports, and tells of ephemeral containers that are refused.
func (p *pass) report(w want, s *seen) {
	for i := range w.pod.Spec.EphemeralContainers {
		name := w.pod.Spec.EphemeralContainers[i].Name
		if why, refused := s.refused[name]; refused && !ephemeralRan(ephemeralStatus(s.old, name)) {
			p.do(tell{corev1.EventTypeWarning, admission.ReasonUnsupported, "Error: " + why, name})
		}
	}
	p.do(report{})
}

// planTidy removes containers that nobody will ask for any more: of each name the
// newest and the one before it stay, or the newest alone when room is short. A sandbox
// that was replaced is stopped when nothing runs in it any more, and goes when its last
// container has gone.
func planTidy(w want, s *seen, b waits, now time.Time, p *pass) {
	keep := 2
	if w.short {
		keep = 1
	}
	var r remove
	for _, name := range s.names() {
		list := s.containers[name]
		for _, c := range list[min(keep, len(list)):] {
			if c.exited() {
				r.containers = append(r.containers, c)
			}
		}
	}
	for _, box := range s.sandboxes[min(1, len(s.sandboxes)):] {
		inside := s.inside(box.id)
		switch e, put := b.held(waitStop(box.id), now); {
		case slices.ContainsFunc(inside, (*container).running):
		case put:
			p.wakeAt(e.until)
		case !s.stopped[box.id]:
			p.do(stopSandbox{box.id})
		case len(inside) == 0:
			r.sandboxes = append(r.sandboxes, box.id)
		}
	}
	if len(r.containers)+len(r.sandboxes) > 0 {
		p.do(r)
	}
	if w.short {
		p.do(reclaimed{})
	}
}
