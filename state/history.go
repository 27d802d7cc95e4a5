package state

import (
	"slices"
	"sync/atomic"
)

// EventType says what a change did to its key.
type EventType uint8

const (
	// Put is a key created or replaced.
	Put EventType = iota + 1
	// Delete is a key removed.
	Delete
)

// String returns "put" or "delete".
func (t EventType) String() string {
	switch t {
	case Put:
		return "put"
	case Delete:
		return "delete"
	}
	return "unknown"
}

// Event is one change, shared by all who watch it and never changed.
type Event struct {
	Type EventType
	// KV is the key after the change. After a delete it holds the key and, as
	// ModRevision, the delete's revision.
	KV KV
	// Prev is the key before the change, the zero KV if there was none.
	Prev KV
	// Revision is the change's, equal to KV.ModRevision.
	Revision int64
}

// Created reports whether the event made a key that did not exist.
func (e *Event) Created() bool { return e.Type == Put && e.Prev.ModRevision == 0 }

// Size is that of the values before and after the change.
func (e *Event) Size() int64 { return int64(len(e.KV.Value) + len(e.Prev.Value)) }

const (
	// eventOverhead is what an event costs beside its key and value, roughly.
	eventOverhead = 384
	// largeValue is from where on a value's bytes count against
	// Options.HistoryLargeBytes too.
	largeValue = 4 << 10
)

// cost is what the history alone holds of an event: the value before it. The value
// after it is the state's while it lives, and the next event's after that.
func (e *Event) cost() (bytes, large int64) {
	n := int64(len(e.Prev.Value))
	return eventOverhead + int64(len(e.KV.Key)) + n, max(0, n-largeValue)
}

// historyChunk is how many events lie together.
const historyChunk = 128

// chunk is a part of the history. An event that was dropped is nil; its hash and
// its time are there as long as the chunk is.
type chunk struct {
	events [historyChunk]atomic.Pointer[Event]
	hashes [historyChunk]uint64 // rolling, up to and including the event
	times  [historyChunk]int64  // of this replica's clock when it came, in Unix seconds
}

// history is the window of recent changes: what is left of the events of the
// revisions from first to next-1. A copy of the struct is a snapshot of where the
// window is: the writer only fills slots that no copy reads. It empties any slot,
// after it has said so in floors; who meets an empty one has to ask there whether
// it has missed something.
type history struct {
	chunks []*chunk
	base   int64 // revision of chunks[0]'s first
	first  int64 // no event before it is left
	next   int64 // revision that the next event gets
	read   int64 // the oldest revision at which the state may be asked for
	floors *floors
}

func newHistory(next int64) history {
	return history{base: next, first: next, next: next, read: next - 1, floors: &floors{watch: next - 1, read: next - 1}}
}

// at returns the event of a revision before next, nil if it was dropped.
func (h *history) at(revision int64) *Event {
	i := revision - h.base
	if i < 0 {
		return nil
	}
	return h.chunks[i/historyChunk].events[i%historyChunk].Load()
}

// hashAt returns the hash up to a revision before next, if it is still known.
func (h *history) hashAt(revision int64) (hash uint64, ok bool) {
	i := revision - h.base
	if i < 0 {
		return 0, false
	}
	hash = h.chunks[i/historyChunk].hashes[i%historyChunk]
	return hash, hash != 0 // 0 is that of a gap
}

// mustHash is hashAt of a revision from first on.
func (h *history) mustHash(revision int64) uint64 {
	hash, _ := h.hashAt(revision)
	return hash
}

// timeAt returns when the event of a revision from base to next-1 came.
func (h *history) timeAt(revision int64) int64 {
	i := revision - h.base
	return h.chunks[i/historyChunk].times[i%historyChunk]
}

func (h *history) append(e *Event, hash uint64, time int64) {
	if e.Revision != h.next {
		panic("state: event out of order") // would break every watch; never seen
	}
	i := h.next - h.base
	if i%historyChunk == 0 {
		h.chunks = append(h.chunks, new(chunk))
	}
	c := h.chunks[i/historyChunk]
	c.hashes[i%historyChunk], c.times[i%historyChunk] = hash, time
	c.events[i%historyChunk].Store(e)
	h.next++
}

// skip takes the place of an event that is not there.
func (h *history) skip() {
	i := h.next - h.base
	if i%historyChunk == 0 {
		h.chunks = append(h.chunks, new(chunk))
	}
	if i > 0 {
		h.chunks[i/historyChunk].times[i%historyChunk] = h.timeAt(h.next - 1)
	}
	h.next++
}

// shift moves the times of a history that nobody else has yet.
func (h *history) shift(by int64) {
	for r := h.base; r < h.next; r++ {
		i := r - h.base
		if t := &h.chunks[i/historyChunk].times[i%historyChunk]; *t != 0 {
			*t = max(1, *t+by)
		}
	}
}

// empty drops the event of a revision. floors has to say so before.
func (h *history) empty(revision int64) {
	i := revision - h.base
	h.chunks[i/historyChunk].events[i%historyChunk].Store(nil)
}

// shrink moves first past what was dropped, and lets go of chunks that tell nothing
// any more.
func (h *history) shrink() {
	for h.first < h.next && h.at(h.first) == nil {
		h.first++
	}
	if n := (min(h.first, h.read+1) - h.base) / historyChunk; n > 0 {
		h.chunks = slices.Clone(h.chunks[n:]) // copies read the former array
		h.base += n * historyChunk
	}
}
