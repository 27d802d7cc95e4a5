package state

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

	hash uint64 // rolling hash up to and including this event
	time int64  // the store's clock when it was applied
}

// Created reports whether the event made a key that did not exist.
func (e *Event) Created() bool { return e.Type == Put && e.Prev.ModRevision == 0 }

// eventOverhead is what an event costs beside its keys and values, roughly.
const eventOverhead = 256

func (e *Event) size() int64 {
	return int64(len(e.KV.Key)+len(e.KV.Value)+len(e.Prev.Value)) + eventOverhead
}

// historyChunk is small so that events that left the window but share a chunk
// with ones inside it hold little memory.
const historyChunk = 128

// history is the window of recent changes: the events of the revisions from
// first to next-1. A copy of the struct is a snapshot: the writer only fills
// slots that no copy reads.
type history struct {
	chunks []*[historyChunk]*Event
	base   int64 // revision of chunks[0][0]
	first  int64 // oldest revision kept
	next   int64 // revision that the next event gets
	bytes  int64
}

func newHistory(next int64) history {
	return history{base: next, first: next, next: next}
}

// compact is the newest revision whose event is no longer kept: the oldest at
// which the whole state can still be told.
func (h *history) compact() int64 { return h.first - 1 }

// at returns the event of a revision within the window.
func (h *history) at(revision int64) *Event {
	i := revision - h.base
	return h.chunks[i/historyChunk][i%historyChunk]
}

func (h *history) append(e *Event) {
	if e.Revision != h.next {
		panic("state: event out of order") // would break every watch; never seen
	}
	i := h.next - h.base
	if i%historyChunk == 0 {
		h.chunks = append(h.chunks, new([historyChunk]*Event))
	}
	h.chunks[i/historyChunk][i%historyChunk] = e
	h.next++
	h.bytes += e.size()
}

// dropTo forgets the events up to and including revision.
func (h *history) dropTo(revision int64) {
	for h.first <= revision && h.first < h.next {
		h.bytes -= h.at(h.first).size()
		h.first++
	}
	if n := (h.first - h.base) / historyChunk; n > 0 {
		h.chunks = h.chunks[n:]
		h.base += n * historyChunk
	}
}

// trim drops events from the old end until the window is within its limits.
func (h *history) trim(o *Options, clock int64) {
	maxAge := int64(o.HistoryAge.Seconds())
	for h.first < h.next {
		e, kept := h.at(h.first), h.next-h.first
		old := clock != 0 && e.time != 0 && clock-e.time > maxAge && kept > int64(o.HistoryAgeless)
		if kept <= int64(o.HistoryChanges) && h.bytes <= o.HistoryBytes && !old {
			return
		}
		h.dropTo(h.first)
	}
}
