package reconcile

import (
	"container/heap"
	"maps"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"

	"timonel/state/objects"
)

// item is one key of one reconciler that has something to do or to remember.
type item struct {
	key Key
	// queued says that it waits for its turn, running that it has it, dirty
	// that it must run again after that.
	queued, running, dirty bool
	// next is when a timer makes it run, zero for none.
	next time.Time
	// notBefore and paced are when it may run at the earliest, by its back-off and by
	// its lane's pace.
	notBefore, paced time.Time
	// edited says that its own object was changed while it ran.
	edited bool
	// started is when it had its last turn.
	started time.Time
	// since is when the passes began that all asked for another.
	since time.Time
	// tries counts the passes in a row that did not come through.
	tries int
	// failed is what the API refused in the last pass.
	failed []Failure
}

// alarm is a timer of an item. It is void when the item's next has moved on.
type alarm struct {
	at   time.Time
	lane *lane
	key  Key
}

// alarms is a heap of alarms, the earliest first.
type alarms []alarm

func (a alarms) Len() int           { return len(a) }
func (a alarms) Less(i, j int) bool { return a[i].at.Before(a[j].at) }
func (a alarms) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *alarms) Push(x any)        { *a = append(*a, x.(alarm)) }
func (a *alarms) Pop() any {
	old := *a
	last := old[len(old)-1]
	old[len(old)-1] = alarm{}
	*a = old[:len(old)-1]
	return last
}

// lane is the queue of one reconciler. Each key is in it once at most.
type lane struct {
	reconciler Reconciler
	pace       time.Duration
	// urgent lanes are those that judge the nodes' health: nothing holds them up.
	urgent bool
	// running is how many of its keys run, slots how many may.
	running, slots int
	items          map[Key]*item
	ready          []Key
}

// laneShare is which part of all slots one lane may have: a fourth.
const laneShare = 4

// queue holds the lanes of all reconcilers and takes from them in turn, so that
// one with much to do does not hold up the others. One goroutine owns it.
type queue struct {
	lanes []*lane
	turn  int
	// running is how many keys of lanes that are not urgent run, slots how many may.
	running, slots int
	alarms         alarms
}

func newQueue(reconcilers []Reconciler, slots int) *queue {
	q := &queue{slots: slots}
	for _, r := range reconcilers {
		_, urgent := r.(HealthReconciler)
		q.lanes = append(q.lanes, &lane{
			reconciler: r, pace: traitsOf(r).Pace, urgent: urgent, slots: max(1, slots/laneShare), items: map[Key]*item{},
		})
	}
	return q
}

// add makes key run soon: at once, or when its back-off or pace allows.
func (q *queue) add(l *lane, key Key, now time.Time) {
	it := l.items[key]
	if it == nil {
		it = &item{key: key}
		l.items[key] = it
	}
	switch {
	case it.queued:
	case it.running:
		it.dirty = true
	case it.earliest().After(now):
		q.wake(l, it, it.earliest())
	default:
		it.queued, it.next = true, time.Time{}
		l.ready = append(l.ready, key)
	}
}

// earliest is when an item may run.
func (it *item) earliest() time.Time { return Latest(it.notBefore, it.paced) }

// edited ends the wait of a key whose own object was changed: what was refused may
// not be any more, and whoever changed it waits for what comes of it. How often it was
// tried is not forgotten, as long as it goes on being refused.
func (q *queue) edited(l *lane, key Key) {
	it := l.items[key]
	if it == nil {
		return
	}
	it.notBefore = time.Time{}
	it.edited = it.running
}

// edits says whether a change is one of the key's own object, and not only of what
// its status says, which the reconciler itself writes.
func edits(c objects.Changed, key Key) bool {
	m := c.Meta()
	if m.GVK.Kind != key.Kind || m.Name != key.Name || m.Namespace != key.Namespace || m.GVK.Group != key.Group {
		return false
	}
	before, after := c.Old, c.New
	if before == nil || after == nil || after.Generation == 0 || before.Generation != after.Generation {
		return true
	}
	return !maps.Equal(before.Labels, after.Labels) || !maps.Equal(before.Annotations, after.Annotations) ||
		!slices.Equal(before.Finalizers, after.Finalizers) || !equality.Semantic.DeepEqual(before.OwnerReferences, after.OwnerReferences) ||
		(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil)
}

// wake sets an alarm for an item, unless an earlier one is set.
func (q *queue) wake(l *lane, it *item, at time.Time) {
	if !it.next.IsZero() && !at.Before(it.next) {
		return
	}
	it.next = at
	heap.Push(&q.alarms, alarm{at: at, lane: l, key: it.key})
}

// ring queues what is due and returns when the next alarm is, zero for never.
func (q *queue) ring(now time.Time) time.Time {
	for len(q.alarms) > 0 {
		a := q.alarms[0]
		it := a.lane.items[a.key]
		if it == nil || !it.next.Equal(a.at) {
			heap.Pop(&q.alarms)
			continue
		}
		if a.at.After(now) {
			return a.at
		}
		heap.Pop(&q.alarms)
		it.next = time.Time{}
		q.add(a.lane, a.key, now)
	}
	return time.Time{}
}

// take returns the next item to run and its lane, or nil when there is none or no
// slot for it. Urgent lanes come first, and have slots of their own.
func (q *queue) take() (*lane, *item) {
	for _, l := range q.lanes {
		if l.urgent && len(l.ready) > 0 && l.running < l.slots {
			return l, l.take()
		}
	}
	for range q.lanes {
		l := q.lanes[q.turn]
		q.turn = (q.turn + 1) % len(q.lanes)
		if !l.urgent && len(l.ready) > 0 && l.running < l.slots && q.running < q.slots {
			q.running++
			return l, l.take()
		}
	}
	return nil, nil
}

// take gives the lane's next item its turn.
func (l *lane) take() *item {
	it := l.items[l.ready[0]]
	l.ready = l.ready[1:]
	l.running++
	it.queued, it.running, it.dirty, it.edited = false, true, false, false
	return it
}

// done ends an item's turn. failed and tries are already set by the caller.
func (q *queue) done(l *lane, it *item, next time.Time, again bool, now time.Time) {
	it.running, it.edited = false, false
	l.running--
	if !l.urgent {
		q.running--
	}
	if l.pace > 0 {
		it.paced = now.Add(l.pace)
	}
	switch {
	case next.IsZero() && !again:
		it.since = time.Time{}
	case it.since.IsZero():
		it.since = it.started
	}
	if it.dirty || again {
		q.add(l, it.key, now)
	}
	if !next.IsZero() && !it.queued {
		q.wake(l, it, Latest(next, it.earliest()))
	}
	if l.idle(it, now) {
		delete(l.items, it.key)
	}
	if l.pace > 0 && len(l.items) > sweepAbove {
		for key, other := range l.items {
			if l.idle(other, now) {
				delete(l.items, key)
			}
		}
	}
}

// sweepAbove is how many keys a paced lane may remember before idle ones are dropped.
const sweepAbove = 1024

// idle says whether an item has nothing to do and nothing to remember.
func (l *lane) idle(it *item, now time.Time) bool {
	return !it.queued && !it.running && it.next.IsZero() && it.tries == 0 && len(it.failed) == 0 && !it.earliest().After(now)
}
