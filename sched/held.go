package sched

import (
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
)

// What a plan allocates is held from then on until nobody can write it any more: the state
// shows the claim in another version, or not at all, or the API has refused it. A request
// without an answer may be carried out at any time; until it is known not to, its devices
// are no other claim's. A claim for which an allocation is held gets that one and no other.
// A new leader need hold nothing: what an old one asked for is refused, for it is of an
// earlier term.

// held is an allocation that was asked for, so often in this version of the claim.
type held struct {
	claim *resourcev1.ResourceClaim
	asked int
}

// hold notes the allocations among what a plan writes.
func (q *Queue) hold(pod *corev1.Pod, writes []ClaimWrite) {
	if len(writes) == 0 {
		return
	}
	if pod != nil {
		q.asked = append(q.asked, asked{podKey(pod.Namespace, pod.Name), writes})
	}
	for _, w := range writes {
		if !w.Status || w.Claim.Status.Allocation == nil {
			continue
		}
		if now, ok := q.state.ResourceClaim(w.Claim.Namespace, w.Claim.Name); ok && now.Status.Allocation == nil {
			asked := 1
			if before := q.held[w.Claim.UID]; before != nil && before.claim.ResourceVersion == w.Claim.ResourceVersion {
				asked += before.asked
			}
			q.held[w.Claim.UID] = &held{w.Claim, asked}
		}
	}
}

// asked is what a plan asked for, before the state of after it was seen.
type asked struct {
	key    string // of the pod
	writes []ClaimWrite
}

// settleHeld gives up what cannot be written any more, and has pods tried again whose
// claims were not written.
func (q *Queue) settleHeld(now time.Time) {
	for _, a := range q.asked {
		unwritten := slices.ContainsFunc(a.writes, func(w ClaimWrite) bool {
			is, ok := q.state.ResourceClaim(w.Claim.Namespace, w.Claim.Name)
			return ok && is.UID == w.Claim.UID && is.ResourceVersion == w.Claim.ResourceVersion
		})
		if !unwritten {
			continue
		}
		if e := q.pods[a.key]; e != nil && e.place == isParked {
			q.putOff(e, now)
			q.release(e, now)
		}
		q.wake(always(causeDevices)[0], now)
	}
	q.asked = nil
	for uid, h := range q.held {
		claim := h.claim
		is, ok := q.state.ResourceClaim(claim.Namespace, claim.Name)
		if ok && is.UID == uid && is.ResourceVersion == claim.ResourceVersion {
			continue
		}
		delete(q.held, uid)
		if !ok || is.UID != uid || is.Status.Allocation == nil {
			q.wake(always(causeDevices)[0], now)
		}
	}
}

// RefusedClaim notes that a ResourceClaim was not written as a plan asked, for good: its
// pods are tried again after a while. What was asked for before, and had no answer, may
// still come.
func (q *Queue) RefusedClaim(claim *resourcev1.ResourceClaim, now time.Time) {
	if h := q.held[claim.UID]; h != nil && h.asked == 1 && h.claim.ResourceVersion == claim.ResourceVersion {
		delete(q.held, claim.UID)
		q.wake(always(causeDevices)[0], now)
	}
	for _, e := range slices.Collect(maps.Values(q.pods)) {
		if namesClaim(e.info.pod, claim) {
			q.putOff(e, now)
			q.release(e, now)
		}
	}
}

// heldClaims are the claims whose allocations are held, in the order of their UIDs.
func (q *Queue) heldClaims() []*resourcev1.ResourceClaim {
	out := make([]*resourcev1.ResourceClaim, 0, len(q.held))
	for _, uid := range slices.Sorted(maps.Keys(q.held)) {
		out = append(out, q.held[uid].claim)
	}
	return out
}
