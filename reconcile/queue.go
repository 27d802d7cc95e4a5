package reconcile

import (
	"container/heap"
	"time"
)

// item is one key of one reconciler that has something to do or to remember.
type item struct {
	key Key
	// queued says that it waits for its turn, running that it has it, dirty
	// that it must run again after that.
	queued, running, dirty bool
	// Next is when a timer makes it run, zero for none.
	next time.Time
	// notBefore is when it may run at the earliest: back-off and pace.
	notBefore time.Time
	// tries counts the passes in a row that did not come through.
	tries int
	// Refused is what the API refused in the last pass.
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
	items      map[Key]*item
	ready      []Key
}

// queue holds the lanes of all reconcilers and takes from them in turn, so that
// one with much to do does not hold up the others. One goroutine owns it.
type queue struct {
	lanes  []*lane
	turn   int
	alarms alarms
}

func newQueue(reconcilers []Reconciler) *queue {
	q := &queue{}
	for _, r := range reconcilers {
		q.lanes = append(q.lanes, &lane{reconciler: r, pace: traitsOf(r).Pace, items: map[Key]*item{}})
	}
	return q
}

// Add makes key run soon: at once, or when its back-off or pace allows.
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
	case it.notBefore.After(now):
		q.wake(l, it, it.notBefore)
	default:
		it.queued, it.next = true, time.Time{}
		l.ready = append(l.ready, key)
	}
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

// take returns the next item to run and its lane, or nil.
func (q *queue) take() (*lane, *item) {
	for range q.lanes {
		l := q.lanes[q.turn]
		q.turn = (q.turn + 1) % len(q.lanes)
		if len(l.ready) == 0 {
			continue
		}
		it := l.items[l.ready[0]]
		l.ready = l.ready[1:]
		it.queued, it.running, it.dirty = false, true, false
		return l, it
	}
	return nil, nil
}

// done ends an item's turn. failed and tries are already set by the caller.
func (q *queue) done(l *lane, it *item, next time.Time, again bool, now time.Time) {
	it.running = false
	if l.pace > 0 {
		it.notBefore = Latest(it.notBefore, now.Add(l.pace))
	}
	if it.dirty || again {
		q.add(l, it.key, now)
	}
	if !next.IsZero() && !it.queued {
		q.wake(l, it, Latest(next, it.notBefore))
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
	return !it.queued && !it.running && it.next.IsZero() && it.tries == 0 && len(it.failed) == 0 && !it.notBefore.After(now)
}
