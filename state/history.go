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

// historyChunk is how many events lie together, no more than a coldChunk has bits for.
// The newest ones, less than a chunk, stay in memory at rest whatever their size.
const historyChunk = 16

// chunk is a part of the history: in memory, or in a file. What it has in a file it
// has got before it lets go of what it has in memory.
type chunk struct {
	hot  atomic.Pointer[hotChunk]
	cold atomic.Pointer[coldChunk]
}

// hotChunk is a chunk in memory. An event that was dropped is nil; its hash and its
// time are there as long as the chunk is.
type hotChunk struct {
	events [historyChunk]atomic.Pointer[Event]
	hashes [historyChunk]uint64 // rolling, up to and including the event
	times  [historyChunk]int64  // of this replica's clock when it came, in Unix seconds
}

func newChunk() *chunk {
	c := new(chunk)
	c.hot.Store(new(hotChunk))
	return c
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

// slot returns where the event of a revision from base to next-1 lies.
func (h *history) slot(revision int64) (c *chunk, i int64) {
	i = revision - h.base
	return h.chunks[i/historyChunk], i % historyChunk
}

// at returns the event of a revision before next, nil if it was dropped. What is in
// a file is read from there; when that fails, floors says so.
func (h *history) at(revision int64) *Event {
	if revision < h.base {
		return nil
	}
	c, i := h.slot(revision)
	if hot := c.hot.Load(); hot != nil {
		return hot.events[i].Load()
	}
	cold := c.cold.Load()
	if !cold.has(i) {
		return nil
	}
	past, err := cold.read(i)
	if err != nil {
		h.lose(cold, err)
		return nil
	}
	return past.event
}

// lose says that a chunk could not be read: it counts as dropped, and so do all before it.
// [Store.Tick] drops them.
func (h *history) lose(c *coldChunk, err error) {
	h.floors.raise(c.last(), c.last())
	c.file.spill.lose(err)
}

// skip returns the first revision from revision on, before next, whose event may be of a
// key with the prefix: of what is in a file it is known without reading.
func (h *history) skip(revision int64, prefix string) int64 {
	for revision >= h.base && revision < h.next {
		c, i := h.slot(revision)
		if c.hot.Load() != nil || c.cold.Load().mayHave(prefix) {
			break
		}
		revision += historyChunk - i
	}
	return min(revision, h.next)
}

// inMemory returns the event of a revision from base to next-1, nil if it was dropped or
// is in a file.
func (h *history) inMemory(revision int64) *Event {
	c, i := h.slot(revision)
	if hot := c.hot.Load(); hot != nil {
		return hot.events[i].Load()
	}
	return nil
}

// holding is what the history holds of one event.
type holding struct {
	directory    string
	bytes, large int64
	cold         bool // it is in a file
}

// holds tells of the event of a revision from base to next-1, false if it was dropped.
func (h *history) holds(revision int64) (holding, bool) {
	c, i := h.slot(revision)
	if hot := c.hot.Load(); hot != nil {
		e := hot.events[i].Load()
		if e == nil {
			return holding{}, false
		}
		bytes, large := e.cost()
		return holding{directory: directoryOf(e.KV.Key), bytes: bytes, large: large}, true
	}
	return c.cold.Load().holds(i)
}

// hashAt returns the hash up to a revision before next, if it is still known.
func (h *history) hashAt(revision int64) (hash uint64, ok bool) {
	if revision < h.base {
		return 0, false
	}
	c, i := h.slot(revision)
	if hot := c.hot.Load(); hot != nil {
		hash = hot.hashes[i]
	} else if past, err := c.cold.Load().read(i); err == nil {
		hash = past.hash
	}
	return hash, hash != 0 // 0 is that of a gap
}

// timeAt returns when the event of a revision from base to next-1 came.
func (h *history) timeAt(revision int64) int64 {
	c, i := h.slot(revision)
	if hot := c.hot.Load(); hot != nil {
		return hot.times[i]
	}
	return c.cold.Load().time(i)
}

// grow returns the slot of the revision next.
func (h *history) grow() (hot *hotChunk, i int64) {
	i = h.next - h.base
	if i%historyChunk == 0 {
		h.chunks = append(h.chunks, newChunk())
	}
	return h.chunks[i/historyChunk].hot.Load(), i % historyChunk
}

func (h *history) append(e *Event, hash uint64, time int64) {
	if e.Revision != h.next {
		panic("state: event out of order") // would break every watch; never seen
	}
	hot, i := h.grow()
	hot.hashes[i], hot.times[i] = hash, time
	hot.events[i].Store(e)
	h.next++
}

// gap takes the place of an event that is not there.
func (h *history) gap() {
	hot, i := h.grow()
	if h.next > h.base {
		hot.times[i] = h.timeAt(h.next - 1)
	}
	h.next++
}

// shift moves the times of a history that nobody else has yet.
func (h *history) shift(by int64) {
	for _, c := range h.chunks {
		for i := range c.hot.Load().times {
			if t := &c.hot.Load().times[i]; *t != 0 {
				*t = max(1, *t+by)
			}
		}
	}
}

// empty drops the event of a revision. floors has to say so before.
func (h *history) empty(revision int64) {
	c, i := h.slot(revision)
	if hot := c.hot.Load(); hot != nil {
		hot.events[i].Store(nil)
	} else {
		c.cold.Load().empty(i)
	}
}

// shrink moves first past what was dropped, and lets go of chunks that tell nothing
// any more.
func (h *history) shrink() {
	for h.first < h.next {
		if _, ok := h.holds(h.first); ok {
			break
		}
		h.first++
	}
	if n := (min(h.first, h.read+1) - h.base) / historyChunk; n > 0 {
		h.chunks = slices.Clone(h.chunks[n:]) // copies read the former array
		h.base += n * historyChunk
	}
}
