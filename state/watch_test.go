package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
)

func TestWatchAfter(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	apply(t, s, changes(put("/a/1", "1"), put("/b/1", "1"), put("/a/2", "1"), put("/a/1", "2"), del("/a/2"))) // 2 to 6
	tests := []struct {
		name   string
		prefix string
		after  int64
		want   string
	}{
		{"from the beginning", "/a/", 1, "[put /a/1@2 put /a/2@4 put /a/1@5 delete /a/2@6 put /a/1@7 delete /a/1@8]"},
		{"inside a transaction", "/a/", 4, "[put /a/1@5 delete /a/2@6 put /a/1@7 delete /a/1@8]"},
		{"from now", "/a/", 0, "[put /a/1@7 delete /a/1@8]"},
		{"from the future", "/a/", 7, "[delete /a/1@8]"},
		{"one key", "/b/1", 1, "[put /b/1@3]"},
		{"nothing", "/c", 1, "[]"},
		{"everything", "", 5, "[delete /a/2@6 put /a/1@7 delete /a/1@8]"},
	}
	watchers := make([]*Watcher, len(tests))
	for i, tt := range tests {
		w, err := s.Watch(tt.prefix, tt.after)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		defer w.Close()
		watchers[i] = w
	}
	apply(t, s, changes(put("/a/1", "3"), del("/a/1"))) // 7, 8
	for i, tt := range tests {
		got := []string{}
		for {
			events, err := watchers[i].Poll()
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			if len(events) == 0 {
				break
			}
			for _, e := range events {
				got = append(got, fmt.Sprintf("%s %s@%d", e.Type, e.KV.Key, e.Revision))
			}
		}
		if fmt.Sprint(got) != tt.want {
			t.Errorf("%s: saw %v, want %s", tt.name, got, tt.want)
		}
		if p := watchers[i].Progress(); p != 8 {
			t.Errorf("%s: progress is %d, want 8", tt.name, p)
		}
	}
}

func TestWatchEventsAreShared(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	a, _ := s.Watch("/a/", 0)
	b, _ := s.Watch("/", 0)
	defer a.Close()
	defer b.Close()
	apply(t, s, changes(put("/a/1", "1")))
	ea, _ := a.Poll()
	eb, _ := b.Poll()
	c, _ := s.Watch("/a/1", 1)
	defer c.Close()
	ec, _ := c.Poll()
	if len(ea) != 1 || len(eb) != 1 || len(ec) != 1 || ea[0] != eb[0] || ea[0] != ec[0] {
		t.Errorf("events are %p %p %p, want one", ea, eb, ec)
	}
}

func TestNextWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{})
		w, err := s.Watch("/a/", 0)
		if err != nil {
			t.Fatal(err)
		}
		results := make(chan string)
		next := func(ctx context.Context) {
			events, err := w.Next(ctx)
			results <- fmt.Sprint(len(events), err)
		}
		go next(t.Context())
		synctest.Wait()
		apply(t, s, changes(put("/b/1", "")))
		synctest.Wait()
		select {
		case r := <-results:
			t.Fatalf("woken by another prefix: %s", r)
		default:
		}
		apply(t, s, changes(put("/a/1", ""), put("/a/2", "")))
		if r := <-results; r != "2 <nil>" {
			t.Errorf("Next returned %s", r)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go next(ctx)
		synctest.Wait()
		cancel()
		if r := <-results; r != "0 context canceled" {
			t.Errorf("Next with a cancelled context returned %s", r)
		}
		go next(t.Context())
		synctest.Wait()
		w.Close()
		w.Close()
		if r := <-results; r != "0 watcher is closed" {
			t.Errorf("Next of a closed watcher returned %s", r)
		}
		if n := len(s.groups.byPrefix) + len(s.groups.lengths) + len(s.groups.count); n != 0 {
			t.Errorf("%d leftovers of closed watchers", n)
		}
	})
}

func TestSlowWatcher(t *testing.T) {
	t.Parallel()
	s := New(Options{HistoryChanges: 100})
	inList, err := s.Watch("/a/", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer inList.Close()
	apply(t, s, changes(put("/a/1", "")))
	inBacklog, err := s.Watch("/a/", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer inBacklog.Close()
	idle, err := s.Watch("/idle/", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	for range 3 * sweepEvery {
		apply(t, s, changes(put("/a/1", "")))
	}
	for name, w := range map[string]*Watcher{"in its list": inList, "in its backlog": inBacklog} {
		if _, err := w.Next(t.Context()); !errors.Is(err, ErrCompacted) {
			t.Errorf("watcher that fell behind %s: %v", name, err)
		}
	}
	// One whose prefix was quiet has missed nothing.
	r := apply(t, s, changes(put("/idle/1", "")))[0].Revision
	if events, err := idle.Next(t.Context()); err != nil || len(events) != 1 || events[0].Revision != r {
		t.Errorf("idle watcher saw %v, %v", events, err)
	}
	if _, err := s.Watch("/a/", s.CompactRevision()-1); !errors.Is(err, ErrCompacted) {
		t.Errorf("watch from a compacted revision: %v", err)
	}
	if w, err := s.Watch("/a/", s.CompactRevision()); err != nil {
		t.Errorf("watch from the compact revision: %v", err)
	} else {
		w.Close()
	}
}

// TestWatchersUnderLoad runs writers, watchers that come and go, readers of the
// past and restores at once, and checks that each watcher saw each revision of
// its prefix once and in order. It is meant for -race.
func TestWatchersUnderLoad(t *testing.T) {
	t.Parallel()
	const writes = 3000
	s := New(Options{HistoryChanges: 2 * writes})
	var group sync.WaitGroup
	var end int64 = writes + 1 // each write changes one key
	for i := range 8 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 7))
			prefix := fmt.Sprintf("/%d/", i%4)
			for after := int64(1); after < end; {
				w, err := s.Watch(prefix, after)
				if err != nil {
					t.Error(err)
					return
				}
				for range 1 + random.IntN(5) {
					ctx, cancel := context.WithCancel(t.Context())
					go func() { // do not wait for ever at the end
						if s.WaitRevision(ctx, end) == nil {
							cancel()
						}
					}()
					events, err := w.Next(ctx)
					cancel()
					if err != nil && !errors.Is(err, context.Canceled) {
						t.Error(err)
						return
					}
					for _, e := range events {
						if e.KV.Key[:3] != prefix || e.Revision <= after {
							t.Errorf("watcher of %s after %d saw %s at %d", prefix, after, e.KV.Key, e.Revision)
						}
						// Revision r is written to prefix r%4.
						if next := after + 1 + ((int64(i%4)-after-1)%4+4)%4; e.Revision != next {
							t.Errorf("watcher of %s after %d saw %d, want %d", prefix, after, e.Revision, next)
						}
						after = e.Revision
					}
					if p := w.Progress(); p >= end {
						after = end
						break
					}
				}
				w.Close()
			}
		})
	}
	group.Go(func() {
		random := rand.New(rand.NewPCG(1, 2))
		for s.View().Revision() < end {
			v := s.View()
			r := s.CompactRevision() + random.Int64N(v.Revision()-s.CompactRevision()+1)
			past, err := s.At(r)
			if err != nil && !errors.Is(err, ErrCompacted) {
				t.Error(err)
				return
			}
			if err == nil && past.Len() != past.Count("/") {
				t.Error("count differs")
			}
		}
	})
	for i := int64(2); i <= end; i++ {
		apply(t, s, changes(put(fmt.Sprintf("/%d/%d", i%4, i%100), "x")))
		if i%500 == 0 {
			var b bytes.Buffer
			if err := s.Save(&b); err != nil {
				t.Error(err)
			}
			if err := s.Restore(&b); err != nil {
				t.Error(err)
			}
		}
	}
	group.Wait()
}
