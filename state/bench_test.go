package state

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
)

// filled returns a store with n keys of 256-byte values under /registry/.
func filled(b testing.TB, n int) *Store {
	s := New(Options{})
	const per = 1000
	for i := 0; i < n; i += per {
		var t Txn
		for j := i; j < min(n, i+per); j++ {
			t.Changes = append(t.Changes, Change{Key: benchKey(j), Value: make([]byte, 256)})
		}
		apply(b, s, t)
	}
	return s
}

func benchKey(i int) string {
	return fmt.Sprintf("/registry/pods/namespace-%02d/pod-%07d", i%50, i)
}

// BenchmarkApply is one conditional update per transaction, so many in a batch.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		for _, batch := range []int{1, 32} {
			b.Run(fmt.Sprintf("keys=%d/batch=%d", n, batch), func(b *testing.B) {
				s := filled(b, n)
				revisions := map[int]int64{}
				index, _ := s.Applied()
				entries := make([]Entry, 0, batch)
				value := make([]byte, 256)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					k := i * 7919 % n
					t := Txn{Changes: []Change{{Key: benchKey(k), Value: value}}}
					if r, ok := revisions[k]; ok {
						t.Conditions = []Condition{{Key: benchKey(k), ModRevision: r}}
					}
					index++
					entries = append(entries, Entry{Index: index, Term: 1, Command: t.Marshal()})
					if len(entries) == batch {
						s.ApplyBatch(entries)
						entries = entries[:0]
					}
				}
			})
		}
	}
}

func BenchmarkView(b *testing.B) {
	s := filled(b, 100_000)
	for b.Loop() {
		if s.View().Revision() == 0 {
			b.Fatal("no revision")
		}
	}
}

func BenchmarkGet(b *testing.B) {
	s := filled(b, 100_000)
	for i := 0; b.Loop(); i++ {
		if _, ok := s.View().Get(benchKey(i * 7919 % 100_000)); !ok {
			b.Fatal("missing")
		}
	}
}

// BenchmarkRange lists one of 50 namespaces, 2,000 keys.
func BenchmarkRange(b *testing.B) {
	s := filled(b, 100_000)
	for b.Loop() {
		n := 0
		for range s.View().Range("/registry/pods/namespace-07/", "") {
			n++
		}
		if n != 2000 {
			b.Fatal(n)
		}
	}
}

func BenchmarkCount(b *testing.B) {
	s := filled(b, 100_000)
	for b.Loop() {
		if s.View().Count("/registry/pods/namespace-07/") != 2000 {
			b.Fatal("wrong count")
		}
	}
}

// BenchmarkAt reads states of the past that were not read before.
func BenchmarkAt(b *testing.B) {
	s := filled(b, 100_000)
	for i := 0; b.Loop(); i++ {
		if _, err := s.At(s.CompactRevision() + int64(i*7919%90_000)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFanout is one write and its delivery to so many watchers of one
// prefix, or of a prefix each of which one is written to.
func BenchmarkFanout(b *testing.B) {
	const watchers = 1000
	for _, own := range []bool{false, true} {
		b.Run(fmt.Sprintf("watchers=%d/own=%v", watchers, own), func(b *testing.B) {
			s := New(Options{})
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			var seen, all sync.WaitGroup
			for i := range watchers {
				prefix := "/registry/pods/"
				if own {
					prefix = fmt.Sprintf("/registry/pods/%04d/", i)
				}
				w, err := s.Watch(prefix, 0)
				if err != nil {
					b.Fatal(err)
				}
				all.Go(func() {
					defer w.Close()
					for {
						events, err := w.Next(ctx)
						if err != nil {
							return
						}
						seen.Add(-len(events))
					}
				})
			}
			value := make([]byte, 256)
			for i := 0; b.Loop(); i++ {
				if own {
					seen.Add(1)
				} else {
					seen.Add(watchers)
				}
				apply(b, s, changes(Change{Key: fmt.Sprintf("/registry/pods/%04d/x", i%watchers), Value: value}))
				seen.Wait()
			}
			cancel()
			all.Wait()
		})
	}
}

func BenchmarkSave(b *testing.B) {
	s := filled(b, 100_000)
	n, err := s.View().WriteTo(io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(n)
	for b.Loop() {
		if err := s.Save(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRestore(b *testing.B) {
	saved := save(b, filled(b, 100_000))
	b.SetBytes(int64(len(saved)))
	for b.Loop() {
		if err := New(Options{}).Restore(bytes.NewReader(saved)); err != nil {
			b.Fatal(err)
		}
	}
}
