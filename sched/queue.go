package sched

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/tidwall/btree"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/dynamic-resource-allocation/resourceclaim"

	"timonel/state/objects"
)

// flushAfter is when a pod is tried again that nothing has cured.
const flushAfter = 5 * time.Minute

// Queue says which pending pods to try, and in which order. It is a fold over the
// changes of the state and over what became of the pods that were tried:
//
//	        ┌───────────────── a change may have cured it ───────────────┐
//	        ▼                                                            │
//	ready ──tried──▶ placed           back-off ◀── (not yet due) ◀── parked
//	  ▲        └───▶ failed ─────────────────────────────────────────────▲
//	  └── by priority, then by when it was last tried ─ due ─ five minutes
//
// A pod that was tried goes to the end of those of its priority, so that many that
// fit nowhere hold up none that does. Tries are counted until the pod is placed.
// It starts no timer; [Queue.Next] says when to look again.
type Queue struct {
	cfg     *compiled
	cluster *Cluster
	state   State

	pods  map[string]*entry // by namespace/name
	ready *btree.BTreeG[*entry]
	// backoff is by when they are ready, parked by causes, flush holds the parked by age.
	backoff, flush *btree.BTreeG[*entry]
	parked         map[Causes]map[string]*entry
	// assumed are the pods that a plan has bound and the state does not show on their nodes yet.
	assumed map[types.UID]Binding
	// held are the allocations of held.go, by the UIDs of their claims.
	held  map[types.UID]*held
	asked []asked
}

// entry is a pending pod.
type entry struct {
	key   string
	info  *podInfo
	place place
	// since is when the pod came, or was tried last.
	since time.Time
	// until is when it may be tried again.
	until time.Time
	tries int
	why   Causes
	// evicts: room is being made for it. waits: its volumes or devices are.
	evicts, waits bool
}

type place int

const (
	isReady place = iota
	isBackingOff
	isParked
)

// newQueue returns an empty queue of the pods that name a profile.
func newQueue(cfg *compiled) *Queue {
	q := &Queue{cfg: cfg, held: map[types.UID]*held{}}
	q.clear()
	return q
}

func (q *Queue) clear() {
	by := func(less func(a, b *entry) int) *btree.BTreeG[*entry] {
		return btree.NewBTreeGOptions(func(a, b *entry) bool { return cmp.Or(less(a, b), cmp.Compare(a.key, b.key)) < 0 }, btree.Options{NoLocks: true})
	}
	q.pods = map[string]*entry{}
	q.ready = by(func(a, b *entry) int {
		return cmp.Or(cmp.Compare(b.info.priority, a.info.priority), a.since.Compare(b.since))
	})
	q.backoff = by(func(a, b *entry) int { return a.until.Compare(b.until) })
	q.flush = by(func(a, b *entry) int { return a.since.Compare(b.since) })
	q.parked = map[Causes]map[string]*entry{}
	q.assumed = map[types.UID]Binding{}
}

// Len is how many pods wait for a node.
func (q *Queue) Len() int { return len(q.pods) }

// follow moves on to the Cluster of later changes; see [Planner.Follow].
func (q *Queue) follow(changes objects.Changes, c *Cluster, s State, now time.Time) {
	q.cluster, q.state = c, s
	if changes.Reset {
		q.rebuild(now)
		q.settleHeld(now)
		return
	}
	for _, ch := range changes.Changed {
		if _, ok := ch.Meta().Object.(*corev1.Pod); ok {
			q.set(ch)
		}
	}
	for _, ch := range changes.Changed {
		for _, h := range hints(ch, c, s, q.cfg) {
			q.wake(h, now)
		}
	}
	q.settle(now)
	q.settleHeld(now)
}

// rebuild takes all pending pods from the Cluster. What was tried keeps its place in
// the order and its back-off.
func (q *Queue) rebuild(now time.Time) {
	old := q.pods
	q.clear()
	q.cluster.queue.Scan(func(p *podInfo) bool {
		if q.cfg.of(p.pod) == nil {
			return true
		}
		e := &entry{key: podKey(p.pod.Namespace, p.pod.Name), info: p, since: p.pod.CreationTimestamp.Time}
		if was := old[e.key]; was != nil && was.info.pod.UID == p.pod.UID {
			e.since, e.until, e.tries = was.since, was.until, was.tries
		}
		q.pods[e.key] = e
		q.release(e, now)
		return true
	})
}

// set makes the queue's entry of a pod what the Cluster says of it.
func (q *Queue) set(ch objects.Changed) {
	m := ch.Meta()
	key := podKey(m.Namespace, m.Name)
	p, ok := q.cluster.pods.Get(key)
	wanted := ok && pending(p.pod) && q.cfg.of(p.pod) != nil
	e := q.pods[key]
	if e != nil && (!wanted || e.info.pod.UID != p.pod.UID) {
		q.remove(e)
		e = nil
	}
	switch {
	case !wanted:
	case e == nil:
		e = &entry{key: key, info: p, since: p.pod.CreationTimestamp.Time}
		q.pods[key] = e
		q.ready.Set(e)
	default:
		// The priority never changes, so that the order stays as it is.
		changed := e.info.pod.Generation != p.pod.Generation || !maps.Equal(e.info.pod.Labels, p.pod.Labels) ||
			!resourceclaim.PodStatusEqual(e.info.pod.Status.ResourceClaimStatuses, p.pod.Status.ResourceClaimStatuses)
		e.info = p
		if changed && e.place != isReady {
			q.leave(e)
			q.ready.Set(e) // its user has changed it, and should see what comes of it
		}
	}
}

// remove forgets a pod.
func (q *Queue) remove(e *entry) {
	q.leave(e)
	q.ready.Delete(e)
	delete(q.pods, e.key)
}

// leave takes a pod out of where it waits; it is ready then, but for being put there.
func (q *Queue) leave(e *entry) {
	switch e.place {
	case isReady:
		q.ready.Delete(e)
	case isBackingOff:
		q.backoff.Delete(e)
	case isParked:
		q.flush.Delete(e)
		delete(q.parked[e.why], e.key)
		if len(q.parked[e.why]) == 0 {
			delete(q.parked, e.why)
		}
	}
	e.place = isReady
}

// release lets a pod be tried as soon as its back-off allows.
func (q *Queue) release(e *entry, now time.Time) {
	q.leave(e)
	if e.until.After(now) {
		e.place = isBackingOff
		q.backoff.Set(e)
		return
	}
	q.ready.Set(e)
}

// wake releases the parked pods that a change may have cured.
func (q *Queue) wake(h hint, now time.Time) {
	for causes, pods := range q.parked {
		if causes&h.concerns == 0 {
			continue
		}
		for _, e := range pods {
			if !h.cures(e.info, causes&h.concerns) {
				continue
			}
			if soon := e.since.Add(q.cfg.FirstBackoff); h.urgent && e.until.After(soon) {
				e.until = soon
			}
			q.release(e, now)
		}
	}
}

// settle looks at the pods that were bound: those that the state does not show where
// they were to be are tried again, and have left their room to others.
func (q *Queue) settle(now time.Time) {
	for uid, b := range q.assumed {
		delete(q.assumed, uid)
		key := podKey(b.Pod.Namespace, b.Pod.Name)
		if p, ok := q.cluster.pods.Get(key); ok && p.pod.UID == uid && p.pod.Spec.NodeName == b.Node {
			continue
		}
		if e := q.pods[key]; e != nil && e.place == isParked && e.info.pod.UID == uid {
			q.release(e, now)
		}
		bound := b.Pod.DeepCopy()
		bound.Spec.NodeName = b.Node
		q.wake(podLeft(bound, q.cluster, q.state, q.cfg), now)
	}
}

// Ready yields the pods to try, in order. The queue must not be changed meanwhile.
func (q *Queue) Ready(now time.Time) iter.Seq[*corev1.Pod] {
	for {
		e, ok := q.backoff.Min()
		if !ok || e.until.After(now) {
			break
		}
		q.release(e, now)
	}
	for {
		e, ok := q.flush.Min()
		if !ok || e.since.Add(flushAfter).After(now) {
			break
		}
		q.release(e, now)
	}
	return func(yield func(*corev1.Pod) bool) {
		q.ready.Scan(func(e *entry) bool { return yield(e.info.pod) })
	}
}

// Tried notes what became of the pods that a plan tried.
func (q *Queue) Tried(plan Plan, now time.Time) {
	for _, b := range plan.Bindings {
		q.hold(b.Pod, b.ResourceClaims)
		q.assumed[b.Pod.UID] = b
		q.park(b.Pod, 0, now) // until the state shows it on its node
	}
	for _, w := range plan.Waiting {
		q.hold(w.Pod, w.ResourceClaims)
		why := causeVolumeBinding
		if len(w.Pod.Spec.ResourceClaims) > 0 {
			why |= causeDevices
		}
		if e := q.park(w.Pod, why, now); e != nil {
			e.waits = true
		}
	}
	for _, w := range plan.Releases {
		q.hold(w.Pod, []ClaimWrite{w.ClaimWrite})
	}
	for _, f := range plan.Gated {
		q.park(f.Pod, f.Causes, now)
	}
	for _, f := range plan.Failures {
		e := q.park(f.Pod, f.Causes, now)
		if e == nil {
			continue
		}
		q.putOff(e, now)
		e.evicts = f.NominatedNode != ""
		if f.Causes == 0 || f.Causes&causeError != 0 {
			q.release(e, now)
		}
	}
}

// park puts a pod that was tried aside.
func (q *Queue) park(pod *corev1.Pod, why Causes, now time.Time) *entry {
	e := q.pods[podKey(pod.Namespace, pod.Name)]
	if e == nil || e.info.pod.UID != pod.UID {
		return nil
	}
	q.leave(e)
	e.place, e.why, e.since, e.evicts, e.waits = isParked, why, now, false, false
	if q.parked[why] == nil {
		q.parked[why] = map[string]*entry{}
	}
	q.parked[why][e.key] = e
	q.flush.Set(e)
	return e
}

// putOff keeps a pod from being tried for a while, twice as long each time.
func (q *Queue) putOff(e *entry, now time.Time) {
	if e.place == isBackingOff { // which is in order of the time that changes
		q.backoff.Delete(e)
		defer func() { q.backoff.Set(e) }()
	}
	e.until = now.Add(min(q.cfg.LastBackoff, q.cfg.FirstBackoff<<min(e.tries, 8)))
	e.tries++
}

// Refused notes that something which the plan asked for a pod was refused: it is tried
// again after its back-off.
func (q *Queue) Refused(uid types.UID, now time.Time) {
	for _, e := range q.pods {
		if e.info.pod.UID == uid {
			q.putOff(e, now)
			q.release(e, now)
			return
		}
	}
}

// RefusedOthers notes that an eviction or a claim of a volume was refused: those for
// which room is being made, or whose volumes are, are tried again.
func (q *Queue) RefusedOthers(now time.Time) {
	for _, e := range slices.Collect(maps.Values(q.pods)) {
		if e.place == isParked && (e.evicts || e.waits) {
			q.putOff(e, now)
			q.release(e, now)
		}
	}
}

// Next is when a pod is to be tried though nothing changes, zero for never.
func (q *Queue) Next(now time.Time) time.Time {
	if q.ready.Len() > 0 {
		return now
	}
	var next time.Time
	if e, ok := q.backoff.Min(); ok {
		next = e.until
	}
	if e, ok := q.flush.Min(); ok {
		if due := e.since.Add(flushAfter); next.IsZero() || due.Before(next) {
			next = due
		}
	}
	return next
}
