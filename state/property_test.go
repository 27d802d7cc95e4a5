package state

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// model is the state as a slow and simple program keeps it: every version whole.
type model struct {
	versions map[int64]map[string]KV // by revision
	events   []string                // printed, index is revision - 2
	now      int64
	compact  int64
}

func newModel() *model {
	return &model{versions: map[int64]map[string]KV{1: {}}, now: 1, compact: 1}
}

func (m *model) apply(t Txn) Result {
	r := Result{Succeeded: true}
	for _, c := range t.Conditions {
		kv := m.versions[m.now][c.Key]
		if kv.ModRevision != c.ModRevision {
			kv.Key = c.Key
			r.Failed = append(r.Failed, kv)
			r.Succeeded = false
		}
	}
	if r.Succeeded {
		for _, c := range t.Changes {
			m.change(c)
		}
	}
	if t.Compact > m.compact {
		m.compact = min(t.Compact, m.now)
	}
	r.Revision = m.now
	return r
}

func (m *model) change(c Change) {
	old, exists := m.versions[m.now][c.Key]
	if c.Delete && !exists {
		return
	}
	next := map[string]KV{}
	for k, v := range m.versions[m.now] {
		next[k] = v
	}
	m.now++
	e := Event{Type: Put, Revision: m.now, Prev: old}
	if c.Delete {
		delete(next, c.Key)
		e.Type, e.KV = Delete, KV{Key: c.Key, ModRevision: m.now}
	} else {
		kv := KV{Key: c.Key, Value: c.Value, CreateRevision: m.now, ModRevision: m.now, ExpiresAt: c.ExpiresAt}
		if exists {
			kv.CreateRevision = old.CreateRevision
		}
		next[c.Key] = kv
		e.KV = kv
	}
	m.versions[m.now] = next
	m.events = append(m.events, printEvent(&e))
}

func printEvent(e *Event) string {
	return fmt.Sprintf("%d %s %s <- %s", e.Revision, e.Type, printKV(e.KV), printKV(e.Prev))
}

func printKV(kv KV) string {
	return fmt.Sprintf("%s=%q@%d/%d!%d", kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.ExpiresAt)
}

// list prints the model's keys with a prefix at a revision.
func (m *model) list(revision int64, prefix, start string) []string {
	var keys []string
	for k := range m.versions[revision] {
		if strings.HasPrefix(k, prefix) && k >= start {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for i, k := range keys {
		keys[i] = printKV(m.versions[revision][k])
	}
	return keys
}

func (m *model) watch(prefix string, after int64) []string {
	var out []string
	for _, e := range m.events[after-1:] {
		if strings.HasPrefix(strings.SplitN(e, " ", 4)[2], prefix) {
			out = append(out, e)
		}
	}
	return out
}

func list(v View, prefix, start string) []string {
	var out []string
	for kv := range v.Range(prefix, start) {
		out = append(out, printKV(kv))
	}
	return out
}

// drain returns all events that a watcher has now.
func drain(w *Watcher) ([]string, error) {
	var out []string
	for {
		events, err := w.Poll()
		if err != nil || len(events) == 0 {
			return out, err
		}
		for _, e := range events {
			out = append(out, printEvent(e))
		}
	}
}

// modelWatcher is a watcher with what it must have seen.
type modelWatcher struct {
	w      *Watcher
	prefix string
	after  int64
	seen   []string
}

// TestAgainstModel does random work on a store and the model: transactions in
// batches, reads at any revision, watches that begin anywhere and read now and
// then, compaction, and restores of a snapshot under all of it.
func TestAgainstModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		keys := rapid.SampledFrom([]string{"/a", "/a/1", "/a/2", "/ab", "/b/1", "/b/2", "/c"})
		prefixes := rapid.SampledFrom([]string{"", "/", "/a", "/a/", "/a/1", "/b/", "/x"})
		s, m := New(Options{}), newModel()
		index := uint64(0)
		var watchers []*modelWatcher
		defer func() {
			for _, w := range watchers {
				w.w.Close()
			}
		}()
		revision := func() int64 { return rapid.Int64Range(1, m.now+1).Draw(t, "revision") }
		check := func(w *modelWatcher) {
			got, err := drain(w.w)
			w.seen = append(w.seen, got...)
			if err != nil {
				t.Fatalf("watch of %q after %d: %v", w.prefix, w.after, err)
			}
			if want := m.watch(w.prefix, w.after); !slices.Equal(w.seen, want) {
				t.Fatalf("watch of %q after %d saw\n%s\nwant\n%s", w.prefix, w.after, strings.Join(w.seen, "\n"), strings.Join(want, "\n"))
			}
			if w.w.Progress() != m.now {
				t.Fatalf("watch is at %d, want %d", w.w.Progress(), m.now)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				v := s.View()
				if got, want := list(v, "", ""), m.list(m.now, "", ""); !slices.Equal(got, want) || v.Revision() != m.now {
					t.Fatalf("state at %d is %v, want %v at %d", v.Revision(), got, want, m.now)
				}
				if s.CompactRevision() != m.compact {
					t.Fatalf("compact revision is %d, want %d", s.CompactRevision(), m.compact)
				}
			},
			"apply": func(t *rapid.T) {
				var entries []Entry
				var want []Result
				for range rapid.IntRange(1, 3).Draw(t, "entries") {
					var txn Txn
					for range rapid.IntRange(0, 2).Draw(t, "conditions") {
						key := keys.Draw(t, "key")
						at := m.versions[m.now][key].ModRevision // most hold
						if rapid.IntRange(0, 3).Draw(t, "wrong") == 0 {
							at = rapid.Int64Range(0, m.now).Draw(t, "at")
						}
						txn.Conditions = append(txn.Conditions, Condition{key, at})
					}
					for range rapid.IntRange(0, 4).Draw(t, "changes") {
						c := Change{Key: keys.Draw(t, "key"), Delete: rapid.IntRange(0, 2).Draw(t, "delete") == 0}
						if !c.Delete {
							c.Value = rapid.SliceOfN(rapid.Byte(), 0, 3).Draw(t, "value")
							c.ExpiresAt = rapid.Int64Range(0, 3).Draw(t, "expires")
						}
						txn.Changes = append(txn.Changes, c)
					}
					index++
					entries = append(entries, Entry{Index: index, Term: 1, Command: txn.Marshal()})
					want = append(want, m.apply(txn))
				}
				if got := s.ApplyBatch(entries); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("results are %v, want %v", got, want)
				}
			},
			"read": func(t *rapid.T) {
				r, prefix, start := revision(), prefixes.Draw(t, "prefix"), prefixes.Draw(t, "start")
				v, err := s.At(r)
				switch {
				case r < m.compact:
					if !errors.Is(err, ErrCompacted) {
						t.Fatalf("At(%d): %v", r, err)
					}
					return
				case r > m.now:
					if !errors.Is(err, ErrFutureRevision) {
						t.Fatalf("At(%d): %v", r, err)
					}
					return
				case err != nil:
					t.Fatal(err)
				}
				want := m.list(r, prefix, start)
				if got := list(v, prefix, start); !slices.Equal(got, want) {
					t.Fatalf("%q from %q at %d is %v, want %v", prefix, start, r, got, want)
				}
				if got := v.CountFrom(prefix, start); got != len(want) {
					t.Fatalf("%q from %q at %d has %d keys, want %d", prefix, start, r, got, len(want))
				}
			},
			"watch": func(t *rapid.T) {
				r, prefix := rapid.Int64Range(1, m.now).Draw(t, "after"), prefixes.Draw(t, "prefix")
				w, err := s.Watch(prefix, r)
				if r < m.compact {
					if !errors.Is(err, ErrCompacted) {
						t.Fatalf("Watch(%d): %v", r, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				watchers = append(watchers, &modelWatcher{w: w, prefix: prefix, after: r})
			},
			"poll": func(t *rapid.T) {
				if len(watchers) > 0 {
					check(rapid.SampledFrom(watchers).Draw(t, "watcher"))
				}
			},
			"close": func(t *rapid.T) {
				if len(watchers) > 0 {
					i := rapid.IntRange(0, len(watchers)-1).Draw(t, "watcher")
					check(watchers[i])
					watchers[i].w.Close()
					watchers = slices.Delete(watchers, i, i+1)
				}
			},
			"compact": func(t *rapid.T) {
				for _, w := range watchers { // none is to lose its place
					check(w)
				}
				txn := Txn{Compact: revision()}
				m.apply(txn)
				index++
				s.ApplyBatch([]Entry{{Index: index, Term: 1, Command: txn.Marshal()}})
			},
			"restore": func(t *rapid.T) {
				var first, second bytes.Buffer
				if err := s.Save(&first); err != nil {
					t.Fatal(err)
				}
				hash := s.View().Hash()
				if err := s.Restore(bytes.NewReader(first.Bytes())); err != nil {
					t.Fatal(err)
				}
				if s.View().Hash() != hash {
					t.Fatal("hash differs after restore")
				}
				if err := s.Save(&second); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(first.Bytes(), second.Bytes()) {
					t.Fatal("a restored state saves differently")
				}
			},
		})
		for _, w := range watchers {
			check(w)
		}
	})
}

// TestReplicasAreEqual applies the same entries to replicas in different batches,
// one of them through a snapshot in the middle, and compares what they save.
func TestReplicasAreEqual(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		options := Options{HistoryChanges: rapid.IntRange(1, 50).Draw(t, "window"), HistoryBytes: 4000, HistoryAge: 10e9, HistoryAgeless: rapid.IntRange(-1, 5).Draw(t, "ageless")}
		var entries []Entry
		for i := range rapid.IntRange(1, 80).Draw(t, "entries") {
			txn := Txn{Time: rapid.Int64Range(0, 100).Draw(t, "time")}
			for range rapid.IntRange(0, 3).Draw(t, "changes") {
				txn.Changes = append(txn.Changes, Change{
					Key:    fmt.Sprint("k", rapid.IntRange(0, 5).Draw(t, "key")),
					Value:  make([]byte, rapid.IntRange(0, 100).Draw(t, "size")),
					Delete: rapid.Bool().Draw(t, "delete"),
				})
			}
			command := txn.Marshal()
			if rapid.IntRange(0, 20).Draw(t, "bad") == 0 {
				command = command[:len(command)-1]
			}
			entries = append(entries, Entry{Index: uint64(i + 1), Term: 3, Command: command})
		}
		cut := rapid.IntRange(0, len(entries)).Draw(t, "cut")
		one, many, late := New(options), New(options), New(options)
		one.ApplyBatch(entries)
		for _, e := range entries[:cut] {
			many.ApplyBatch([]Entry{e})
		}
		var snapshot bytes.Buffer
		if err := many.Save(&snapshot); err != nil {
			t.Fatal(err)
		}
		if err := late.Restore(&snapshot); err != nil {
			t.Fatal(err)
		}
		many.ApplyBatch(entries[cut:])
		late.ApplyBatch(entries[cut:])
		// All but the history, which is each one's own.
		saved := func(s *Store) []byte {
			var whole, bare bytes.Buffer
			if err := s.Save(&whole); err != nil {
				t.Fatal(err)
			}
			index, term := s.Applied()
			if _, err := RaiseSnapshot(&bare, &whole, Raise{Index: index, Term: term}); err != nil {
				t.Fatal(err)
			}
			return bare.Bytes()
		}
		want := saved(one)
		for name, s := range map[string]*Store{"applied one by one": many, "started from a snapshot": late} {
			if !bytes.Equal(saved(s), want) {
				t.Fatalf("the replica that %s differs", name)
			}
			if s.View().Hash() != one.View().Hash() || s.View().Bytes() != one.View().Bytes() {
				t.Fatalf("the replica that %s has another hash or size", name)
			}
		}
	})
}
