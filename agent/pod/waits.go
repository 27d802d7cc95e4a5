package pod

import (
	"strings"
	"time"
)

const (
	firstRestart = 10 * time.Second
	maxRestart   = 300 * time.Second
	// stable is how long a container has to run for its back-off to be forgotten.
	stable = 10 * time.Minute
	// exitPatience is for how long CRI is asked again about a container that has
	// ended by containerd's word and still runs by CRI's.
	exitPatience = 5 * time.Second
	// stopPatience is when a stop that nothing was heard of is looked at again.
	stopPatience = 5 * time.Second
)

// waitFor is something that is put off: a kind of step, and whose it is.
type waitFor string

const (
	waitVolumes  waitFor = "volumes"
	waitSandbox  waitFor = "sandbox"
	waitPolicies waitFor = "policies"
	waitResize   waitFor = "resize"
	waitReset    waitFor = "reset"
	waitSweep    waitFor = "sweep"
	waitClean    waitFor = "clean"
)

func waitStart(container string) waitFor   { return waitFor("start " + container) }
func waitRestart(container string) waitFor { return waitFor("restart " + container) }
func waitStop(sandbox string) waitFor      { return waitFor("stop " + sandbox) }

// pace is how a delay grows: doubled from the first to the most.
type pace struct{ first, most time.Duration }

func (p pace) after(delay time.Duration) time.Duration { return min(max(p.first, delay*2), p.most) }

var (
	failing    = pace{time.Second, 30 * time.Second} // steps that fail
	restarting = pace{firstRestart, maxRestart}      // containers that end
	cleaning   = pace{time.Second, 8 * time.Second}  // what is to be removed and is not
	releasing  = pace{10 * time.Second, 10 * time.Second}
)

// backOff is one thing that is put off.
type backOff struct {
	delay time.Duration // by which it is, or for a restart by which the next is
	until time.Time     // zero for restarts, which count from the container's end
	why   waiting
}

// waits is all that one pod waits for by the clock.
type waits map[waitFor]backOff

// putOff delays something that failed, longer each time, and says until when.
func (b waits) putOff(what waitFor, p pace, why waiting, now time.Time) time.Time {
	delay := p.after(b[what].delay)
	b[what] = backOff{delay: delay, until: now.Add(delay), why: why}
	return b[what].until
}

// done forgets that something has failed.
func (b waits) done(what waitFor) { delete(b, what) }

// held says whether something is put off: until when, and why.
func (b waits) held(what waitFor, now time.Time) (backOff, bool) {
	e, ok := b[what]
	return e, ok && now.Before(e.until)
}

// hurry lets all that is put off be tried at once, but for containers that end, and
// for what is being taken down.
func (b waits) hurry() {
	for what := range b {
		if what != waitSweep && what != waitClean && !strings.HasPrefix(string(what), "stop ") && !strings.HasPrefix(string(what), "restart ") {
			delete(b, what)
		}
	}
}

// restartDelay is the wait after the end of previous. The first restart is at
// once, the next after 10 s, and each one twice that, up to 5 minutes.
func (b waits) restartDelay(name string, previous *container) time.Duration {
	if previous.finished.Sub(previous.started) >= stable {
		return 0
	}
	if e, ok := b[waitRestart(name)]; ok {
		return e.delay
	}
	// A new agent goes on from what the container's record says.
	if n := previous.restarts; n > 0 {
		return min(firstRestart<<min(n-1, 5), maxRestart)
	}
	return 0
}

// restarted notes that a container was started once more.
func (b waits) restarted(name string, previous *container) {
	b[waitRestart(name)] = backOff{delay: restarting.after(b.restartDelay(name, previous))}
}

// forgive lets a container that did not fail be started at once.
func (b waits) forgive(name string) { b[waitRestart(name)] = backOff{} }

// exits are ends of containers and sandboxes that CRI has not confirmed yet.
type exits struct {
	made uint64 // so far
	by   map[string]*exit
}

type exit struct {
	number uint64
	until  time.Time
	delay  time.Duration
}

// expect notes that CRI should soon say that id has ended.
func (x *exits) expect(id string, now time.Time) {
	x.made++
	x.by[id] = &exit{number: x.made, until: now.Add(exitPatience), delay: 2 * time.Millisecond}
}

// settle ends or repeats the wait for exits, given what runs by CRI's word, and says
// when CRI is to be asked again; zero: not for that.
//
// Those beyond the given number were expected after CRI was asked: it says nothing of
// them.
func (x *exits) settle(running map[string]bool, number uint64, now time.Time) (wake time.Time) {
	for id, e := range x.by {
		if e.number <= number && !running[id] || now.After(e.until) {
			delete(x.by, id)
			continue
		}
		wake = sooner(wake, now.Add(e.delay))
		e.delay = min(e.delay*2, 250*time.Millisecond)
	}
	return wake
}

// sooner is the earlier of two times, of which zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
