package history

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"
)

// Kind is what an operation does.
type Kind string

// The kinds. Update and Delete are conditional on the revision in If; ListAt lists
// the state as it was at that revision.
const (
	Get    Kind = "get"
	Create Kind = "create"
	Update Kind = "update"
	Delete Kind = "delete"
	List   Kind = "list"
	ListAt Kind = "list at"
)

// Status is what became of an operation.
type Status string

const (
	// OK: it was answered with success.
	OK Status = "ok"
	// Refused: its condition did not hold, and nothing was done.
	Refused Status = "refused"
	// Unknown: it may have been done, or may be done yet.
	Unknown Status = "unknown"
	// NoEffect: it was turned away without being tried, and says nothing.
	NoEffect Status = "no effect"
)

// Item is a key as it was read.
type Item struct {
	Value    string `json:"value"`
	Revision int64  `json:"revision"` // of its last write
}

// Outcome is how an operation ended.
type Outcome struct {
	Status Status `json:"status"`
	// Found and Value are of a Get; Revision is that of the key read or written,
	// 0 if not told, or of a List as a whole.
	Found    bool            `json:"found,omitempty"`
	Value    string          `json:"value,omitempty"`
	Revision int64           `json:"revision,omitempty"`
	Items    map[string]Item `json:"items,omitempty"` // of a List
}

// Operation is one request of one client. Times are since the recorder's start.
type Operation struct {
	Client  int           `json:"client"`
	Kind    Kind          `json:"kind"`
	Key     string        `json:"key"` // of a List or ListAt: the prefix
	Value   string        `json:"value,omitempty"`
	If      int64         `json:"if,omitempty"`
	Call    time.Duration `json:"call"`
	Return  time.Duration `json:"return"` // 0 while it has not returned
	Outcome Outcome       `json:"outcome"`
}

// Event is one event that a watcher got.
type Event struct {
	Delete   bool          `json:"delete,omitempty"`
	Key      string        `json:"key"`
	Value    string        `json:"value"`
	Revision int64         `json:"revision"`
	At       time.Duration `json:"at"`
}

// Watch is what one watcher saw: the events after a revision, across all the
// streams that it resumed with.
type Watch struct {
	Name   string  `json:"name"`
	After  int64   `json:"after"`
	Events []Event `json:"events"`
	// Streams are in the order in which they were opened.
	Streams []Stream `json:"streams,omitempty"`
}

// Recorder collects a history. Its methods may be called concurrently.
type Recorder struct {
	mu      sync.Mutex
	start   time.Time
	ops     []*Operation
	watches []*Watch
}

// now is the time since the first call of any method. mu is held.
func (r *Recorder) now() time.Duration {
	if r.start.IsZero() {
		r.start = time.Now().Add(-1) // so that no time is 0
	}
	return time.Since(r.start)
}

// Begin records that a client calls. It returns what to give to End.
func (r *Recorder) Begin(client int, o Operation) *Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	o.Client, o.Call, o.Outcome = client, r.now(), Outcome{Status: Unknown}
	r.ops = append(r.ops, &o)
	return &o
}

// End records that the call returned.
func (r *Recorder) End(o *Operation, outcome Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o.Return, o.Outcome = r.now(), outcome
}

// Watch begins the record of a watcher.
func (r *Recorder) Watch(name string, after int64) *Watch {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := &Watch{Name: name, After: after}
	r.watches = append(r.watches, w)
	return w
}

// Saw records an event of a watcher.
func (r *Recorder) Saw(w *Watch, e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.At = r.now()
	w.Events = append(w.Events, e)
}

// History is all that was recorded.
type History struct {
	Operations []Operation `json:"operations"`
	Watches    []Watch     `json:"watches"`
}

// History returns a copy of what was recorded so far.
func (r *Recorder) History() History {
	r.mu.Lock()
	defer r.mu.Unlock()
	var h History
	for _, o := range r.ops {
		h.Operations = append(h.Operations, *o)
	}
	for _, w := range r.watches {
		c := *w
		c.Events = append([]Event(nil), w.Events...)
		c.Streams = append([]Stream(nil), w.Streams...)
		h.Watches = append(h.Watches, c)
	}
	return h
}

// Save writes the history to a file, as JSON.
func (h History) Save(path string) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// Load reads what Save wrote.
func Load(path string) (h History, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return h, err
	}
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("%s: %w", path, err)
	}
	return h, nil
}
