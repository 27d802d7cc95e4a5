package history

import (
	"fmt"
	"time"
)

// Stream is one stream of a watcher: the time it was open on a replica, from a revision
// on.
type Stream struct {
	Replica string        `json:"replica"`
	After   int64         `json:"after"`
	Opened  time.Duration `json:"opened"`
	Closed  time.Duration `json:"closed"` // 0 while it is open
}

// Opened records that a watcher opened a stream; the function that it returns, that it
// ended.
func (r *Recorder) Opened(w *Watch, replica string, after int64) (closed func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := len(w.Streams)
	w.Streams = append(w.Streams, Stream{Replica: replica, After: after, Opened: r.now()})
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		w.Streams[i].Closed = r.now()
	}
}

// Kept returns sentences on streams that were open for longer than a bound after a write
// was acknowledged and had neither told of it, or of a later one, nor ended: their
// replica was out of touch.
func Kept(h History, bound time.Duration) (out []string) {
	var writes []Operation
	for _, o := range h.Operations {
		if (o.Kind == Create || o.Kind == Update) && o.Outcome.Status == OK {
			writes = append(writes, o)
		}
	}
	for i := range h.Watches {
		w := &h.Watches[i]
		for _, s := range w.Streams {
			for _, o := range writes {
				due := o.Return + bound
				if o.Outcome.Revision > s.After && o.Return >= s.Opened && s.Closed > due && !w.knew(o.Outcome.Revision, due) {
					out = append(out, fmt.Sprintf("the stream of %s on %s, open from %v to %v, had not told of revision %d, acknowledged at %v, after %v", w.Name, s.Replica, s.Opened, s.Closed, o.Outcome.Revision, o.Return, bound))
					break
				}
			}
		}
	}
	return out
}

// knew says whether the watcher had seen a revision, or a later one, at some time.
func (w *Watch) knew(revision int64, at time.Duration) bool {
	for i := len(w.Events) - 1; i >= 0 && w.Events[i].Revision >= revision; i-- {
		if w.Events[i].At <= at {
			return true
		}
	}
	return false
}
