package history

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// Report is what a check found.
type Report struct {
	// Violations are sentences, each on something that cannot have happened on one
	// correct copy of the state. Empty: none was found.
	Violations []string
	// Undecided says that porcupine did not come to an end in time.
	Undecided bool

	model porcupine.Model
	info  porcupine.LinearizationInfo
}

// Visualize writes porcupine's page of the history to a file.
func (r *Report) Visualize(path string) error {
	return porcupine.VisualizePath(r.model, r.info, path)
}

// Check checks a history; porcupine gets the time given.
func Check(h History, timeout time.Duration) *Report {
	r := &Report{model: keyModel()}
	var result porcupine.CheckResult
	result, r.info = porcupine.CheckOperationsVerbose(r.model, operations(h), timeout)
	switch result {
	case porcupine.Illegal:
		r.Violations = append(r.Violations, "the operations on a key cannot be put in an order: not linearizable (see the page)")
	case porcupine.Unknown:
		r.Undecided = true
	}
	c := newRevisions(h, r)
	c.order()
	c.lists()
	for i := range h.Watches {
		c.watch(&h.Watches[i])
	}
	return r
}

// operations are those on single keys, as porcupine takes them.
func operations(h History) (out []porcupine.Operation) {
	for _, o := range h.Operations {
		if o.Kind == List || o.Kind == ListAt || o.Outcome.Status == NoEffect || (o.Kind == Get && o.Outcome.Status != OK) {
			continue
		}
		end := int64(o.Return)
		if o.Outcome.Status == Unknown {
			end = math.MaxInt64 // it may be done at any time
		}
		out = append(out, porcupine.Operation{ClientId: o.Client, Input: o, Output: o.Outcome, Call: int64(o.Call), Return: end})
	}
	return out
}

// keyState is one key. Revision 0 means that it is not known: its write was not
// acknowledged.
type keyState struct {
	exists   bool
	value    string
	revision int64
}

// keyModel is a register with conditional writes for each key.
func keyModel() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
			byKey := map[string][]porcupine.Operation{}
			for _, o := range ops {
				key := o.Input.(Operation).Key
				byKey[key] = append(byKey[key], o)
			}
			var out [][]porcupine.Operation
			for _, ops := range byKey {
				out = append(out, ops)
			}
			return out
		},
		Init: func() []any { return []any{keyState{}} },
		Step: func(state, input, output any) []any {
			return step(state.(keyState), input.(Operation), output.(Outcome))
		},
		DescribeOperation: func(input, output any) string {
			in, out := input.(Operation), output.(Outcome)
			return fmt.Sprintf("%s %s %q if %d: %s %q rev %d", in.Kind, in.Key, in.Value, in.If, out.Status, out.Value, out.Revision)
		},
		DescribeState: func(state any) string { return fmt.Sprintf("%+v", state) },
	}
	return m.ToModel()
}

func step(s keyState, in Operation, out Outcome) []any {
	if in.Kind == Get {
		switch {
		case out.Found != s.exists:
			return nil
		case !out.Found:
			return []any{s}
		case out.Value != s.value || (s.revision != 0 && out.Revision != s.revision):
			return nil
		}
		return []any{keyState{true, s.value, out.Revision}}
	}
	var can, must bool // it can be done, and it cannot be refused
	next := keyState{true, in.Value, out.Revision}
	switch in.Kind {
	case Create:
		can, must = !s.exists, !s.exists
	case Update, Delete:
		can = s.exists && (s.revision == in.If || s.revision == 0)
		must = s.exists && s.revision == in.If
		if in.Kind == Delete {
			next = keyState{}
		}
	}
	switch out.Status {
	case OK:
		if can {
			return []any{next}
		}
	case Refused:
		if !must {
			return []any{s}
		}
	case Unknown:
		next.revision = 0
		if can {
			return []any{s, next}
		}
		return []any{s}
	}
	return nil
}

// revisions checks what revisions say.
type revisions struct {
	h      History
	r      *Report
	writes []Operation            // acknowledged creates and updates, by revision
	byKey  map[string][]Operation // the same, by key
	seen   map[*Watch]map[string][]Event
}

func newRevisions(h History, r *Report) *revisions {
	c := &revisions{h: h, r: r, byKey: map[string][]Operation{}, seen: map[*Watch]map[string][]Event{}}
	for _, o := range h.Operations {
		if (o.Kind == Create || o.Kind == Update) && o.Outcome.Status == OK {
			c.writes = append(c.writes, o)
		}
	}
	slices.SortFunc(c.writes, func(a, b Operation) int { return cmp.Compare(a.Outcome.Revision, b.Outcome.Revision) })
	for _, o := range c.writes {
		c.byKey[o.Key] = append(c.byKey[o.Key], o)
	}
	return c
}

func (c *revisions) violation(format string, args ...any) {
	c.r.Violations = append(c.r.Violations, fmt.Sprintf(format, args...))
}

// order: each write has a revision of its own, and one that began after another
// had ended has a greater one.
func (c *revisions) order() {
	latestCall := time.Duration(-1) // of the writes of lower revisions
	var latest Operation
	for i, o := range c.writes {
		rev := o.Outcome.Revision
		if i > 0 && c.writes[i-1].Outcome.Revision == rev {
			c.violation("revision %d was given to both %q and %q", rev, c.writes[i-1].Value, o.Value)
		}
		if latestCall > o.Return {
			c.violation("%s %s got revision %d at %v, and %s %s, called later, at %v, the lower %d",
				o.Kind, o.Key, rev, o.Return, latest.Kind, latest.Key, latest.Call, latest.Outcome.Revision)
		}
		if o.Call > latestCall {
			latestCall, latest = o.Call, o
		}
	}
}

// lists: each shows the state at its revision, which is the one it asked for, or no
// older than what was acknowledged before it was called.
func (c *revisions) lists() {
	for _, l := range c.h.Operations {
		if l.Kind != List && l.Kind != ListAt || l.Outcome.Status != OK {
			continue
		}
		at := l.Outcome.Revision
		if l.Kind == ListAt && at != l.If {
			c.violation("the list of %s asked for at revision %d is at %d", l.Key, l.If, at)
		}
		for key, item := range l.Outcome.Items {
			if item.Revision > at {
				c.violation("the list of %s at revision %d has %s at %d", l.Key, at, key, item.Revision)
			}
		}
		for key, writes := range c.byKey {
			if !strings.HasPrefix(key, l.Key) {
				continue
			}
			c.listed(l, key, writes)
		}
		for i := range c.h.Watches {
			c.asWatched(l, &c.h.Watches[i])
		}
	}
}

// asWatched: a list has of each key what the last event that a watcher saw of it, up
// to the list's revision, says.
func (c *revisions) asWatched(l Operation, w *Watch) {
	if len(w.Events) == 0 || l.Outcome.Revision > w.Events[len(w.Events)-1].Revision {
		return // it has not seen all up to there
	}
	for key, events := range c.events(w) {
		n, _ := slices.BinarySearchFunc(events, l.Outcome.Revision+1, func(e Event, rev int64) int { return cmp.Compare(e.Revision, rev) })
		if n == 0 || !strings.HasPrefix(key, l.Key) {
			continue
		}
		item, found := l.Outcome.Items[key]
		switch e := events[n-1]; {
		case found && e.Delete:
			c.violation("the list of %s at revision %d has %s, which %s saw deleted at %d", l.Key, l.Outcome.Revision, key, w.Name, e.Revision)
		case !found && !e.Delete:
			c.violation("the list of %s at revision %d lacks %s, which %s saw written at %d", l.Key, l.Outcome.Revision, key, w.Name, e.Revision)
		case found && (item.Value != e.Value || item.Revision != e.Revision):
			c.violation("the list of %s at revision %d has %q of %d for %s, where %s saw %q of %d", l.Key, l.Outcome.Revision, item.Value, item.Revision, key, w.Name, e.Value, e.Revision)
		}
	}
}

// events are those of a watcher, by key.
func (c *revisions) events(w *Watch) map[string][]Event {
	if byKey, ok := c.seen[w]; ok {
		return byKey
	}
	byKey := map[string][]Event{}
	for _, e := range w.Events {
		byKey[e.Key] = append(byKey[e.Key], e)
	}
	c.seen[w] = byKey
	return byKey
}

// listed checks one key of a list.
func (c *revisions) listed(l Operation, key string, writes []Operation) {
	var last *Operation // acknowledged at the list's revision
	for i := range writes {
		if writes[i].Outcome.Revision <= l.Outcome.Revision {
			last = &writes[i]
		} else if l.Kind == List && writes[i].Return < l.Call {
			c.violation("the list of %s called at %v is at revision %d, older than %d of %s, acknowledged at %v", l.Key, l.Call, l.Outcome.Revision, writes[i].Outcome.Revision, key, writes[i].Return)
		}
	}
	if last == nil {
		return
	}
	item, found := l.Outcome.Items[key]
	switch {
	case found && item.Revision < last.Outcome.Revision:
		c.violation("the list of %s at revision %d has %s of revision %d, and lacks %d", l.Key, l.Outcome.Revision, key, item.Revision, last.Outcome.Revision)
	case found && item.Revision == last.Outcome.Revision && item.Value != last.Value:
		c.violation("the list of %s at revision %d has %q for %s, which was %q there", l.Key, l.Outcome.Revision, item.Value, key, last.Value)
	case !found && !slices.ContainsFunc(c.h.Operations, func(o Operation) bool {
		return o.Kind == Delete && o.Key == key && (o.Outcome.Status == OK || o.Outcome.Status == Unknown) && o.Call < l.Return
	}):
		c.violation("the list of %s at revision %d lacks %s, which nobody deleted", l.Key, l.Outcome.Revision, key)
	}
}

// watch: events come in the order of revisions, each once, none is lost, and none
// comes before its write was called.
func (c *revisions) watch(w *Watch) {
	seen := map[int64]Event{}
	last := w.After
	for _, e := range w.Events {
		if _, twice := seen[e.Revision]; twice {
			c.violation("%s saw revision %d twice", w.Name, e.Revision)
		} else if e.Revision <= last {
			c.violation("%s saw revision %d after %d", w.Name, e.Revision, last)
		}
		seen[e.Revision] = e
		last = max(last, e.Revision)
	}
	for _, o := range c.writes {
		rev := o.Outcome.Revision
		if rev <= w.After || rev > last {
			continue
		}
		e, ok := seen[rev]
		switch {
		case !ok:
			c.violation("%s did not see revision %d, %s of %s, between %d and %d", w.Name, rev, o.Kind, o.Key, w.After, last)
		case e.Key != o.Key || e.Value != o.Value || e.Delete:
			c.violation("%s saw %q for %s at revision %d, where %q was written to %s", w.Name, e.Value, e.Key, rev, o.Value, o.Key)
		case e.At < o.Call:
			c.violation("%s saw revision %d before its write was called", w.Name, rev)
		}
	}
}
