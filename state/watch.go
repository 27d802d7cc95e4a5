package state

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
)

// watchBatch is the greatest number of events that one Poll returns, watchBatchBytes the
// greatest size of them but for the last one: who asked holds them, whatever leaves the
// history meanwhile.
const (
	watchBatch      = 512
	watchBatchBytes = 1 << 20
)

// Watchers that fell behind the history are looked for when sweepEvery revisions, or
// sweepBytes, have left it.
const (
	sweepEvery = 1024
	sweepBytes = 8 << 20
)

// sweepDue says whether it is time to look for them. mu is held.
func (s *Store) sweepDue(v *version) bool {
	if v.hist.floors.highest()-s.groups.swept < sweepEvery && s.dropped < sweepBytes {
		return false
	}
	s.groups.swept, s.dropped = v.hist.floors.highest(), 0
	return true
}

// errWatcherClosed ends a Next that waits in a watcher that was closed.
var errWatcherClosed = errors.New("watcher is closed")

// link is an element of a prefix's event list. A link that every watcher has
// passed is garbage.
type link struct {
	event *Event
	next  atomic.Pointer[link]
}

// watchGroup is the watchers of one prefix and the list of its events.
type watchGroup struct {
	prefix   string
	tail     *link
	watchers []*Watcher
	touched  bool // has events that its watchers were not woken for
}

// watchGroups finds the groups that an event belongs to. Store.mu guards it.
type watchGroups struct {
	byPrefix map[string]*watchGroup
	lengths  []int       // distinct lengths of the prefixes, ascending
	count    map[int]int // groups of each length
	touched  []*watchGroup
	swept    int64 // the highest floor at the last sweep

	delivered atomic.Int64 // every event up to this revision is in the lists
}

func (g *watchGroups) init() {
	g.byPrefix = map[string]*watchGroup{}
	g.count = map[int]int{}
}

// deliver links events into the lists of the prefixes they match and wakes
// their watchers.
func (g *watchGroups) deliver(events []*Event, v *version, sweep bool) {
	if len(g.byPrefix) > 0 {
		for _, e := range events {
			key := e.KV.Key
			for _, n := range g.lengths {
				if n > len(key) {
					break
				}
				group, ok := g.byPrefix[key[:n]]
				if !ok {
					continue
				}
				l := &link{event: e}
				group.tail.next.Store(l)
				group.tail = l
				if !group.touched {
					group.touched = true
					g.touched = append(g.touched, group)
				}
			}
		}
	}
	g.delivered.Store(v.revision)
	for i, group := range g.touched {
		for _, w := range group.watchers {
			w.wake()
		}
		group.touched = false
		g.touched[i] = nil
	}
	g.touched = g.touched[:0]
	if sweep {
		for _, group := range g.byPrefix {
			floor := v.hist.floors.of(group.prefix)
			for _, w := range group.watchers {
				w.expire(floor)
			}
		}
	}
}

// restored moves every watcher to a state that was installed, before the
// revisions delivered go up to it. back says that the state is an older one.
func (g *watchGroups) restored(v *version, back bool) {
	for _, group := range g.byPrefix {
		group.tail = &link{} // events of the former state are not to be followed
		for _, w := range group.watchers {
			w.restored(v, back)
		}
	}
	g.swept = v.hist.floors.highest()
	g.delivered.Store(v.revision)
}

func (g *watchGroups) join(prefix string, w *Watcher) *watchGroup {
	group, ok := g.byPrefix[prefix]
	if !ok {
		group = &watchGroup{prefix: prefix, tail: &link{}}
		g.byPrefix[prefix] = group
		if g.count[len(prefix)]++; g.count[len(prefix)] == 1 {
			i := sort.SearchInts(g.lengths, len(prefix))
			g.lengths = append(g.lengths, 0)
			copy(g.lengths[i+1:], g.lengths[i:])
			g.lengths[i] = len(prefix)
		}
	}
	w.slot = len(group.watchers)
	group.watchers = append(group.watchers, w)
	return group
}

func (g *watchGroups) leave(w *Watcher) {
	group := w.group
	last := len(group.watchers) - 1
	group.watchers[w.slot] = group.watchers[last]
	group.watchers[w.slot].slot = w.slot
	group.watchers[last] = nil
	group.watchers = group.watchers[:last]
	if last > 0 {
		return
	}
	delete(g.byPrefix, group.prefix)
	if g.count[len(group.prefix)]--; g.count[len(group.prefix)] == 0 {
		delete(g.count, len(group.prefix))
		i := sort.SearchInts(g.lengths, len(group.prefix))
		g.lengths = append(g.lengths[:i], g.lengths[i+1:]...)
	}
}

// Watcher yields the events of one prefix in order of their revisions, none
// lost and none twice. One goroutine at a time may call Next or Poll; Close may
// be called from any.
type Watcher struct {
	store  *Store
	prefix string
	group  *watchGroup // Store.mu guards it
	slot   int         // in group.watchers; Store.mu guards it
	closed bool        // Store.mu guards it
	ready  chan struct{}
	done   chan struct{}

	mu       sync.Mutex
	err      error   // why the watch ended
	position *link   // in the group's list: the last event passed
	backlog  history // events before position, still to be scanned
	scanned  int64   // revision up to which the backlog was scanned
	end      int64   // revision up to which the backlog goes
	progress int64
}

// Watch returns a watcher of the keys with the prefix, that yields all events
// with a revision greater than after. 0 means from now; a revision that this
// replica has not reached yet is waited for. The error wraps [ErrCompacted]. The
// caller must Close the watcher.
func (s *Store) Watch(prefix string, after int64) (*Watcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.current.Load()
	if after == 0 {
		after = v.revision
	}
	if floor := v.hist.floors.of(prefix); after < floor {
		return nil, compacted(prefix, after, floor)
	}
	w := &Watcher{store: s, prefix: prefix, progress: after, ready: make(chan struct{}, 1), done: make(chan struct{})}
	w.group = s.groups.join(prefix, w)
	w.start(v)
	return w, nil
}

// start puts the watcher at the end of its list, with what happened between its
// progress and v as backlog.
func (w *Watcher) start(v *version) {
	w.position = w.group.tail
	w.scanned, w.end = w.progress, max(w.progress, v.revision)
	w.backlog = history{}
	if w.progress < v.revision {
		w.backlog = v.hist
		w.wake()
	}
}

// Ready is signalled when Poll may have something to return.
func (w *Watcher) Ready() <-chan struct{} { return w.ready }

func (w *Watcher) wake() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// Progress is the revision up to which all events were returned.
func (w *Watcher) Progress() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.progress
}

// Next returns the next events, at least one, waiting for them if need be. Its
// error is ctx's, or wraps [ErrCompacted] if the watcher fell behind the history
// window: the caller must list again. The events are shared; they must not be
// changed.
func (w *Watcher) Next(ctx context.Context) ([]*Event, error) {
	for {
		events, err := w.Poll()
		if err != nil || len(events) > 0 {
			return events, err
		}
		select {
		case <-w.ready:
		case <-w.done:
			return nil, errWatcherClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Poll is Next that returns nothing rather than wait. It returns a limited
// number of events: call it until it returns none before waiting for Ready.
func (w *Watcher) Poll() ([]*Event, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, w.err
	}
	var events []*Event
	var bytes int64
	full := func() bool { return len(events) == watchBatch || bytes >= watchBatchBytes }
	if from, holes := w.scanned, false; from < w.end {
		for w.scanned < w.end && !full() {
			next := w.backlog.skip(w.scanned+1, w.prefix)
			if next > w.scanned+1 {
				holes = true // it is not known whether something was dropped there
			}
			if w.scanned = min(next, w.end); next > w.end {
				break
			}
			if e := w.backlog.at(w.scanned); e == nil {
				holes = true
			} else if strings.HasPrefix(e.KV.Key, w.prefix) {
				events = append(events, e)
				bytes += e.Size()
			}
		}
		if holes {
			if floor := w.backlog.floors.of(w.prefix); floor > from {
				w.fail(compacted(w.prefix, from, floor))
				return nil, w.err
			}
		}
		if w.scanned < w.end {
			w.progress = w.scanned
			return events, nil
		}
	}
	w.backlog = history{}
	// Everything up to here is in the list before it is walked.
	delivered := w.store.groups.delivered.Load()
	for {
		next := w.position.next.Load()
		if next == nil {
			w.progress = max(w.progress, w.end, delivered)
			if n := len(events); n > 0 {
				w.progress = max(w.progress, events[n-1].Revision)
			}
			return events, nil
		}
		if full() {
			w.progress = max(w.progress, events[len(events)-1].Revision)
			return events, nil
		}
		w.position = next
		if next.event.Revision > w.end {
			events = append(events, next.event)
			bytes += next.event.Size()
		}
	}
}

// expire ends a watcher whose next event is older than the history window, so
// that one that nobody reads does not hold events for ever. Store.mu is held.
func (w *Watcher) expire(floor int64) {
	if !w.mu.TryLock() { // somebody reads it, maybe from a slow disk
		return
	}
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	var behind bool
	if w.scanned < w.end {
		behind = w.scanned < floor
	} else if next := w.position.next.Load(); next != nil {
		behind = next.event.Revision <= floor
	}
	if behind {
		w.fail(compacted(w.prefix, w.progress, floor))
	}
}

func compacted(prefix string, after, floor int64) error {
	return fmt.Errorf("watch %s after revision %d: %w (from %d on)", prefix, after, ErrCompacted, floor)
}

func (w *Watcher) fail(err error) {
	w.err = err
	w.position, w.backlog = nil, history{}
	w.wake()
}

// restored makes the watcher go on in a state that was installed. Store.mu is
// held.
func (w *Watcher) restored(v *version, back bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
	case back:
		w.fail(fmt.Errorf("watch %s after revision %d: %w (an older state was restored, at %d)", w.prefix, w.progress, ErrCompacted, v.revision))
	case w.progress < v.hist.floors.of(w.prefix):
		w.fail(compacted(w.prefix, w.progress, v.hist.floors.of(w.prefix)))
	default:
		w.start(v)
		w.wake()
	}
}

// Close ends the watch. It may be called more than once.
func (w *Watcher) Close() {
	w.store.mu.Lock()
	if !w.closed {
		w.closed = true
		w.store.groups.leave(w)
		close(w.done)
	}
	w.store.mu.Unlock()
	w.mu.Lock()
	if w.err == nil {
		w.fail(errWatcherClosed)
	}
	w.mu.Unlock()
}
