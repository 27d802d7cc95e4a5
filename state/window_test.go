package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestHistoryWindow(t *testing.T) {
	t.Parallel()
	at := func(seconds int64) time.Time { return time.Unix(seconds, 0) }
	tests := []struct {
		name    string
		options Options
		work    func(t *testing.T, s *Store)
		read    int64 // the oldest revision to be read
		watch   int64 // and to be watched from
	}{
		{"by count", Options{HistoryChanges: 3}, func(t *testing.T, s *Store) {
			apply(t, s, changes(put("a", ""), put("a", ""), put("a", "")), changes(put("a", ""), put("a", "")))
		}, 3, 3},
		{"by age", Options{HistoryAge: 100 * time.Second, HistoryAgeless: -1}, func(t *testing.T, s *Store) {
			s.Tick(at(1000))
			apply(t, s, changes(put("a", ""), put("a", "")))
			s.Tick(at(1050))
			apply(t, s, changes(put("a", "")))
			s.Tick(at(1111)) // a tenth more than promised
		}, 3, 3},
		{"not before its time", Options{HistoryAge: 100 * time.Second, HistoryAgeless: -1}, func(t *testing.T, s *Store) {
			s.Tick(at(1000))
			apply(t, s, changes(put("a", ""), put("a", "")))
			s.Tick(at(1100))
		}, 1, 1},
		{"by age, but some are kept for watches", Options{HistoryAge: 100 * time.Second, HistoryAgeless: 2}, func(t *testing.T, s *Store) {
			s.Tick(at(1000))
			apply(t, s, changes(put("a", ""), put("a", ""), put("a", "")))
			s.Tick(at(9000))
		}, 4, 2},
		{"a transaction's time is nobody's clock", Options{HistoryAge: 100 * time.Second, HistoryAgeless: -1}, func(t *testing.T, s *Store) {
			s.Tick(at(1000))
			apply(t, s, Txn{Time: 1 << 40, Changes: []Change{put("a", ""), put("a", "")}}, Txn{Time: 1 << 41})
			s.Tick(at(1001))
		}, 1, 1},
		{"a clock that goes back stands still", Options{HistoryAge: 100 * time.Second, HistoryAgeless: -1}, func(t *testing.T, s *Store) {
			s.Tick(at(1000))
			apply(t, s, changes(put("a", "")))
			s.Tick(at(1))
			apply(t, s, changes(put("a", "")))
			s.Tick(at(1111))
		}, 3, 3},
		{"the newest is never too old", Options{HistoryAge: 100 * time.Second, HistoryAgeless: -1}, func(t *testing.T, s *Store) {
			s.Tick(at(1000))
			apply(t, s, changes(put("a", "")))
			s.Tick(at(90000))
		}, 2, 2},
		{"live values are not its", Options{HistoryBytes: 1 << 20}, func(t *testing.T, s *Store) {
			for i := range 100 {
				apply(t, s, changes(put(fmt.Sprintf("/r/pods/a/%d", i), strings.Repeat("x", 1<<20))))
			}
		}, 1, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := New(tt.options)
			tt.work(t, s)
			if got := s.CompactRevision(); got != tt.read {
				t.Errorf("compact revision is %d, want %d", got, tt.read)
			}
			for r := range s.View().Revision() + 1 {
				if _, err := s.At(r); (err == nil) != (r >= tt.read) {
					t.Errorf("At(%d): %v", r, err)
				}
				if r == 0 {
					continue // from now on
				}
				w, err := s.Watch("", r)
				if (err == nil) != (r >= tt.watch) {
					t.Errorf("watch after %d: %v", r, err)
				}
				if err == nil {
					w.Close()
				}
			}
		})
	}
}

// resume watches the prefix after a revision and returns all there is to see.
func resume(s *Store, prefix string, after int64) ([]string, error) {
	w, err := s.Watch(prefix, after)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	return drain(w)
}

// writeGaps lets snapshots have gaps.
func writeGaps(t testing.TB, s *Store) {
	t.Helper()
	apply(t, s, changes(put(VersionKey, "2")))
}

// hot is a store in which one ConfigMap was rewritten 100 times with large values,
// beside other work, and how all was at some revision.
func hot(t *testing.T) (s *Store, revision int64, then map[string][]string, since map[string][]string) {
	t.Helper()
	s = New(Options{HistoryBytes: 1 << 20, HistoryLargeBytes: 256 << 10})
	prefixes := []string{"/r/pods/", "/r/configmaps/quiet/", "/r/configmaps/", "/r/configmaps/hot/", "/r/nodes/", ""}
	apply(t, s, changes(put("/r/configmaps/hot/x", "small"), put("/r/pods/a/1", "1"), put("/r/nodes/1", "1")))
	revision = s.View().Revision()
	then, since = map[string][]string{}, map[string][]string{}
	for _, p := range prefixes {
		then[p] = list(s.View(), p, "")
	}
	m := newModel()
	m.apply(changes(put("/r/configmaps/hot/x", "small"), put("/r/pods/a/1", "1"), put("/r/nodes/1", "1")))
	for i := range 100 {
		for _, txn := range []Txn{
			changes(put("/r/configmaps/hot/x", strings.Repeat(string(rune('a'+i%26)), 64<<10))),
			changes(put("/r/pods/a/1", fmt.Sprint(i)), put("/r/configmaps/quiet/1", fmt.Sprint(i))),
			changes(put("/r/nodes/1", fmt.Sprint(i))),
		} {
			apply(t, s, txn)
			m.apply(txn)
		}
	}
	for _, p := range prefixes {
		since[p] = m.watch(p, revision)
	}
	return s, revision, then, since
}

// TestOneKeyDoesNotEmptyTheHistory is P12: 33 updates of a 1 MiB ConfigMap left 31
// revisions for all resources.
func TestOneKeyDoesNotEmptyTheHistory(t *testing.T) {
	t.Parallel()
	s, revision, then, since := hot(t)
	check := func(t *testing.T, s *Store) {
		t.Helper()
		for prefix := range then {
			mine := prefix != "/r/configmaps/" && prefix != "/r/configmaps/hot/" && prefix != ""
			events, err := resume(s, prefix, revision)
			v, errAt := s.AtPrefix(prefix, revision)
			if !mine {
				if !errors.Is(err, ErrCompacted) || !errors.Is(errAt, ErrCompacted) {
					t.Errorf("%q: %v, %v, want ErrCompacted", prefix, err, errAt)
				}
				continue
			}
			if err != nil || !slices.Equal(events, since[prefix]) {
				t.Errorf("watch of %q after %d: %v, %d events, want %d", prefix, revision, err, len(events), len(since[prefix]))
			}
			if errAt != nil {
				t.Errorf("%q at %d: %v", prefix, revision, errAt)
			} else if got := list(v, prefix, ""); !slices.Equal(got, then[prefix]) {
				t.Errorf("%q at %d is %v, want %v", prefix, revision, got, then[prefix])
			}
		}
	}
	check(t, s)
	if h := s.History(); h.Bytes > 1<<20 || h.Large > h.LargeLimit || h.Bytes < 128<<10 || h.LargeLimit != 256<<10 {
		t.Errorf("history holds %+v", h)
	}
	t.Run("in a snapshot without gaps", func(t *testing.T) {
		r := New(Options{})
		if err := r.Restore(bytes.NewReader(save(t, s))); err != nil {
			t.Fatal(err)
		}
		if _, err := resume(r, "/r/pods/", revision); !errors.Is(err, ErrCompacted) {
			t.Errorf("watch after %d: %v", revision, err)
		}
		events, err := resume(r, "", s.View().Revision()-3)
		if err != nil || len(events) != 3 {
			t.Errorf("watch of the end: %v, %v", events, err)
		}
	})
	t.Run("in a snapshot with gaps", func(t *testing.T) {
		writeGaps(t, s)
		r := New(Options{})
		if err := r.Restore(bytes.NewReader(save(t, s))); err != nil {
			t.Fatal(err)
		}
		check(t, r)
		info, err := ScanSnapshot(bytes.NewReader(save(t, s)), nil)
		if err != nil || info.Revision != s.View().Revision() {
			t.Errorf("scanned %+v, %v", info, err)
		}
	})
}

// TestManyNamespacesDoNotEmptyTheHistory writes one resource in more namespaces than
// floors are kept for.
func TestManyNamespacesDoNotEmptyTheHistory(t *testing.T) {
	t.Parallel()
	s := New(Options{HistoryBytes: 4 << 20})
	apply(t, s, changes(put("/r/pods/a/1", "1")))
	after := s.View().Revision()
	for i := range 40 * 1000 {
		key := fmt.Sprintf("/r/configmaps/%03d/x", i%1000)
		apply(t, s, changes(put(key, strings.Repeat("x", 1000))))
		if i%400 == 0 {
			apply(t, s, changes(put("/r/pods/a/1", fmt.Sprint(i))))
		}
	}
	if events, err := resume(s, "/r/pods/", after); err != nil || len(events) != 100 {
		t.Errorf("pods: %d events, %v", len(events), err)
	}
	if _, err := resume(s, "/r/configmaps/007/", after); !errors.Is(err, ErrCompacted) {
		t.Errorf("ConfigMaps: %v", err)
	}
	h := s.History()
	if h.Bytes > h.Limit || h.Bytes < h.Limit/2 || len(s.current.Load().hist.floors.cut) > maxCut {
		t.Errorf("history %+v, %d floors", h, len(s.current.Load().hist.floors.cut))
	}
	if age, ok := h.Cut["/r/configmaps/"]; len(h.Cut) != 1 || !ok || age != 0 || h.Age != 5*time.Minute {
		t.Errorf("cut %v, age %s", h.Cut, h.Age)
	}
}

// TestWatcherThatDoesNotReadHoldsLittle keeps a watcher that nobody reads from
// holding what the history gave up.
func TestWatcherThatDoesNotReadHoldsLittle(t *testing.T) {
	t.Parallel()
	s := New(Options{HistoryBytes: 16 << 20, HistoryLargeBytes: 2 << 20})
	hot, err := s.Watch("/r/configmaps/", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer hot.Close()
	other, err := s.Watch("/r/pods/", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	apply(t, s, changes(put("/r/pods/a/1", "")))
	for range 20 {
		apply(t, s, changes(put("/r/configmaps/hot/x", strings.Repeat("x", 1<<20))))
	}
	hot.mu.Lock()
	held := hot.position
	hot.mu.Unlock()
	if held != nil {
		t.Error("it holds the events")
	}
	if _, err := hot.Poll(); !errors.Is(err, ErrCompacted) {
		t.Errorf("it sees %v", err)
	}
	if events, err := other.Poll(); err != nil || len(events) != 1 {
		t.Errorf("the other sees %v, %v", events, err)
	}
}

func TestTickEmptiesMemosOfFormerValues(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	s.Tick(time.Unix(1000, 0))
	apply(t, s, changes(put("a", "1")))
	old, _ := s.View().Get("a")
	leave(t, old, "old")
	apply(t, s, changes(put("a", "2")))
	now, _ := s.View().Get("a")
	leave(t, now, "new")
	s.Tick(time.Unix(1000+memoAge-1, 0))
	if old.Memo().Load() == nil {
		t.Error("emptied at once")
	}
	s.Tick(time.Unix(1000+memoAge, 0))
	if old.Memo().Load() != nil || now.Memo().Load() == nil {
		t.Error("the memo of a former value is there, or that of a live one is not")
	}
}

// TestRestoredHistoryIsAsOld moves a history to a replica with another clock.
func TestRestoredHistoryIsAsOld(t *testing.T) {
	t.Parallel()
	options := Options{HistoryAge: 100 * time.Second, HistoryAgeless: -1}
	s, r := New(options), New(options)
	s.Tick(time.Unix(1000, 0))
	r.Tick(time.Unix(500_000, 0))
	apply(t, s, changes(put("a", "1")))
	s.Tick(time.Unix(1060, 0))
	apply(t, s, changes(put("a", "2")))
	if err := r.Restore(bytes.NewReader(save(t, s))); err != nil {
		t.Fatal(err)
	}
	r.Tick(time.Unix(500_040, 0))
	if got := r.CompactRevision(); got != 1 {
		t.Errorf("at 100 s the compact revision is %d", got)
	}
	r.Tick(time.Unix(500_051, 0))
	if got := r.CompactRevision(); got != 2 {
		t.Errorf("at 111 s the compact revision is %d", got)
	}
}

// TestHistoryTellsAllOrNothing does random work of all sizes in a small history and
// compares each watch and each read with the model: it sees all, or ErrCompacted.
func TestHistoryTellsAllOrNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s, m := New(Options{
			HistoryBytes: 40 << 10, HistoryLargeBytes: 16 << 10, HistoryAge: 10 * time.Second,
			HistoryAgeless: rapid.IntRange(-1, 50).Draw(t, "ageless"),
		}), newModel()
		keys := rapid.SampledFrom([]string{"/r/pods/a/1", "/r/pods/b/1", "/r/cms/a/1", "/r/cms/a/2", "/r/cms/b/1", "/r/nodes/1", "/r/nodes/2", "x"})
		prefixes := []string{"", "/r/", "/r/pods/", "/r/pods/a/", "/r/cms/", "/r/cms/a/", "/r/cms/a/1", "/r/cms/b/", "/r/nodes/", "x"}
		sizes := rapid.SampledFrom([]int{0, 10, 100, 3000, 8000})
		clock := int64(1000)
		s.Tick(time.Unix(clock, 0))
		index := uint64(0)
		if rapid.Bool().Draw(t, "gaps") {
			txn := changes(Change{Key: VersionKey, Value: []byte("2")})
			m.apply(txn)
			index++
			s.ApplyBatch([]Entry{{Index: index, Term: 1, Command: txn.Marshal()}})
		}
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			switch rapid.IntRange(0, 15).Draw(t, "step") {
			case 0:
				clock += rapid.Int64Range(0, 6).Draw(t, "seconds")
				s.Tick(time.Unix(clock, 0))
			case 1:
				var b bytes.Buffer
				if err := s.Save(&b); err != nil {
					t.Fatal(err)
				}
				if err := s.Restore(&b); err != nil {
					t.Fatal(err)
				}
			default:
				c := Change{Key: keys.Draw(t, "key"), Value: make([]byte, sizes.Draw(t, "size")), Delete: rapid.IntRange(0, 5).Draw(t, "delete") == 0}
				txn := changes(c)
				m.apply(txn)
				index++
				s.ApplyBatch([]Entry{{Index: index, Term: 1, Command: txn.Marshal()}})
			}
		}
		for _, prefix := range prefixes {
			for after := int64(1); after <= m.now; after++ {
				events, err := resume(s, prefix, after)
				if err == nil && !slices.Equal(events, m.watch(prefix, after)) {
					t.Fatalf("watch of %q after %d saw %v, want %v", prefix, after, events, m.watch(prefix, after))
				}
				if err != nil && !errors.Is(err, ErrCompacted) {
					t.Fatal(err)
				}
				v, err := s.AtPrefix(prefix, after)
				if err != nil {
					if !errors.Is(err, ErrCompacted) {
						t.Fatal(err)
					}
					continue
				}
				if got, want := list(v, prefix, ""), m.list(after, prefix, ""); !slices.Equal(got, want) {
					t.Fatalf("%q at %d is %v, want %v", prefix, after, got, want)
				}
			}
		}
		h := s.History()
		if h.Bytes > h.Limit || h.Large > h.LargeLimit {
			t.Fatalf("history holds %+v", h)
		}
		bytes, large := int64(0), int64(0)
		for r := s.head.hist.first; r < s.head.hist.next; r++ {
			if e := s.head.hist.at(r); e != nil {
				b, l := e.cost()
				bytes, large = bytes+b, large+l
			}
		}
		if bytes != h.Bytes || large != h.Large {
			t.Fatalf("history holds %d and %d, counted %+v", bytes, large, h)
		}
	})
}

// TestHistoryUnderLoad cuts the history while watchers resume and the past is read.
// It is meant for -race.
func TestHistoryUnderLoad(t *testing.T) {
	t.Parallel()
	const writes = 4000
	s := New(Options{HistoryBytes: 400 << 10, HistoryLargeBytes: 100 << 10, HistoryAge: time.Minute})
	var group sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range 4 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 3))
			for ctx.Err() == nil {
				now := s.View().Revision()
				after := max(1, now-random.Int64N(1000))
				prefix := []string{"/r/pods/", "/r/cms/", "/r/cms/hot/", ""}[random.IntN(4)]
				w, err := s.Watch(prefix, after)
				if err == nil {
					var got []*Event
					for {
						var events []*Event
						if events, err = w.Poll(); err != nil || len(events) == 0 {
							break
						}
						got = append(got, events...)
					}
					if err == nil && prefix == "/r/pods/" { // revision r is of a pod when it is even
						for j, e := range got {
							if want := (after/2 + 1 + int64(j)) * 2; e.Revision != want {
								t.Errorf("watch after %d saw %d, want %d", after, e.Revision, want)
								break
							}
						}
					}
					w.Close()
				}
				if err != nil && !errors.Is(err, ErrCompacted) {
					t.Error(err)
				}
				if v, err := s.AtPrefix("/r/pods/", after); err == nil && after > 1 {
					if kv, ok := v.Get("/r/pods/a/1"); !ok || kv.ModRevision != after/2*2 {
						t.Errorf("at %d the pod is of %d", after, kv.ModRevision)
					}
				} else if err != nil && !errors.Is(err, ErrCompacted) {
					t.Error(err)
				}
			}
		})
	}
	group.Go(func() {
		for ctx.Err() == nil {
			var b bytes.Buffer
			if err := s.Save(&b); err != nil {
				t.Error(err)
			}
			if err := New(Options{}).Restore(&b); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range int64(writes / 2) {
		s.Tick(time.Unix(1000+i/20, 0))
		apply(t, s, changes(put("/r/pods/a/1", fmt.Sprint(i))), changes(put("/r/cms/hot/x", strings.Repeat("x", 10_000))))
	}
	cancel()
	group.Wait()
}
