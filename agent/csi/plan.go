package csi

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// deedKind is something that a driver is asked for.
type deedKind string

const (
	nothing   deedKind = ""
	stage     deedKind = "stage"
	publish   deedKind = "publish"
	expand    deedKind = "expand"
	unpublish deedKind = "unpublish"
	unstage   deedKind = "unstage"
)

// deed is what is to be done next of a volume, and for which pod.
type deed struct {
	kind deedKind
	user user
}

// use is one pod's volume: what it should be, and what it is.
type use struct {
	want  *Request   // nil: it is to go
	rec   *published // nil: the driver was not asked for it
	left  bool       // by the agent before: its pod has not asked for it yet, nor is to go
	again bool       // it is there, and is to be published once more
	grow  int64      // bytes that it is to have, beyond rec.Size; 0: as it has
}

// state is all that is known of one volume.
type state struct {
	staged *staged // nil: the driver was not asked to stage it
	uses   map[user]use
}

// facts are what a volume's deeds depend on beside it.
type facts struct {
	// absent says why the driver cannot be called; empty: it can.
	absent string
	stages bool // it has STAGE_UNSTAGE_VOLUME
	// blocked says why a pod's volume cannot be mounted yet, by user.
	blocked map[user]string
}

// backOff is a deed that failed.
type backOff struct {
	delay time.Duration
	until time.Time
}

const (
	firstDelay = 500 * time.Millisecond
	lastDelay  = 2*time.Minute + 2*time.Second
)

// after is the delay of a deed that failed once more, as the kubelet's
// (pkg/util/goroutinemap/exponentialbackoff).
func (b backOff) after(now time.Time) backOff {
	d := min(max(firstDelay, b.delay*2), lastDelay)
	return backOff{delay: d, until: now.Add(d)}
}

// plan says what is to be done next of a volume, or when to look again if nothing is and
// something is put off. It is a pure function. What is to go goes first, a pod's before
// what it was staged for; nothing is published before it is staged.
func plan(s *state, f facts, put map[deed]backOff, now time.Time) (next deed, wake time.Time) {
	if f.absent != "" {
		return deed{}, time.Time{}
	}
	due := func(d deed) bool {
		if e, ok := put[d]; ok && now.Before(e.until) {
			if wake.IsZero() || e.until.Before(wake) {
				wake = e.until
			}
			return false
		}
		return true
	}
	users := slices.SortedFunc(maps.Keys(s.uses), func(a, b user) int {
		return cmp.Or(cmp.Compare(a.UID, b.UID), cmp.Compare(a.Volume, b.Volume))
	})
	held := false // by a pod that has it, or may have it
	for _, u := range users {
		e := s.uses[u]
		held = held || e.rec != nil || e.want != nil
		if e.want == nil && e.rec != nil && !e.left && due(deed{unpublish, u}) {
			return deed{unpublish, u}, time.Time{}
		}
	}
	for _, u := range users {
		e := s.uses[u]
		if e.want == nil || f.blocked[u] != "" {
			continue
		}
		if !e.want.Inline && f.stages && (s.staged == nil || !s.staged.Done) {
			if due(deed{stage, user{}}) {
				return deed{stage, u}, time.Time{}
			}
			continue
		}
		if (e.rec == nil || !e.rec.Done || e.again) && due(deed{publish, u}) {
			return deed{publish, u}, time.Time{}
		}
		if e.rec != nil && e.rec.Done && e.grow > 0 && due(deed{expand, u}) {
			return deed{expand, u}, time.Time{}
		}
	}
	if !held && s.staged != nil && due(deed{unstage, user{}}) {
		return deed{unstage, user{}}, time.Time{}
	}
	return deed{}, wake
}

// putOff is the name under which a deed is put off: what concerns all pods of a volume is
// put off for all.
func (d deed) putOff() deed {
	if d.kind == stage || d.kind == unstage {
		return deed{d.kind, user{}}
	}
	return d
}
