package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"testing"
	"testing/synctest"
)

// put, del and when make transactions readable in tables.
func put(key, value string) Change              { return Change{Key: key, Value: []byte(value)} }
func del(key string) Change                     { return Change{Key: key, Delete: true} }
func when(key string, revision int64) Condition { return Condition{Key: key, ModRevision: revision} }

// apply applies each transaction as an entry of its own and returns the results.
func apply(t testing.TB, s *Store, txns ...Txn) []Result {
	t.Helper()
	index, _ := s.Applied()
	entries := make([]Entry, len(txns))
	for i := range txns {
		entries[i] = Entry{Index: index + uint64(i) + 1, Term: 1, Command: txns[i].Marshal()}
	}
	results := s.ApplyBatch(entries)
	for _, r := range results {
		if r.Err != nil {
			t.Fatalf("apply: %v", r.Err)
		}
	}
	return results
}

func changes(c ...Change) Txn { return Txn{Changes: c} }

// dump prints a view as "key=value@create/mod" lines.
func dump(v View) []string {
	var out []string
	for kv := range v.Range("", "") {
		out = append(out, fmt.Sprintf("%s=%s@%d/%d", kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision))
	}
	return out
}

func TestApply(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		txns     []Txn
		want     []string
		revision int64
		last     Result
	}{
		{
			name:     "empty store is at revision 1",
			revision: 1,
			txns:     []Txn{{}},
			last:     Result{Succeeded: true, Revision: 1},
		},
		{
			name:     "each change takes a revision",
			txns:     []Txn{changes(put("a", "1"), put("b", "1"), put("a", "2"))},
			want:     []string{"a=2@2/4", "b=1@3/3"},
			revision: 4,
			last:     Result{Succeeded: true, Revision: 4},
		},
		{
			name:     "delete takes a revision, delete of nothing does not",
			txns:     []Txn{changes(put("a", "1"), put("b", "1")), changes(del("a"), del("x"))},
			want:     []string{"b=1@3/3"},
			revision: 4,
			last:     Result{Succeeded: true, Revision: 4},
		},
		{
			name:     "create again begins a new life",
			txns:     []Txn{changes(put("a", "1")), changes(del("a")), changes(put("a", "2"))},
			want:     []string{"a=2@4/4"},
			revision: 4,
			last:     Result{Succeeded: true, Revision: 4},
		},
		{
			name: "must not exist, but does",
			txns: []Txn{changes(put("a", "1")), {
				Conditions: []Condition{when("a", 0)}, Changes: []Change{put("a", "2")},
			}},
			want:     []string{"a=1@2/2"},
			revision: 2,
			last:     Result{Revision: 2, Failed: []KV{{Key: "a", Value: []byte("1"), CreateRevision: 2, ModRevision: 2}}},
		},
		{
			name: "must be at a revision, but is gone",
			txns: []Txn{changes(put("a", "1")), {
				Conditions: []Condition{when("a", 2), when("b", 9)}, Changes: []Change{put("a", "2"), put("b", "2")},
			}},
			want:     []string{"a=1@2/2"},
			revision: 2,
			last:     Result{Revision: 2, Failed: []KV{{Key: "b"}}},
		},
		{
			name: "conditions hold",
			txns: []Txn{changes(put("a", "1")), {
				Conditions: []Condition{when("a", 2), when("b", 0)}, Changes: []Change{put("b", "2"), del("a")},
			}},
			want:     []string{"b=2@3/3"},
			revision: 4,
			last:     Result{Succeeded: true, Revision: 4},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := New(Options{})
			results := apply(t, s, tt.txns...)
			v := s.View()
			if got := dump(v); !slices.Equal(got, tt.want) {
				t.Errorf("state is %v, want %v", got, tt.want)
			}
			if v.Revision() != tt.revision {
				t.Errorf("revision is %d, want %d", v.Revision(), tt.revision)
			}
			if got, want := fmt.Sprintf("%+v", results[len(results)-1]), fmt.Sprintf("%+v", tt.last); got != want {
				t.Errorf("last result is %s, want %s", got, want)
			}
		})
	}
}

func TestApplyRefuses(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	good := changes(put("a", "1"))
	results := s.ApplyBatch([]Entry{
		{Index: 5, Term: 2, Command: good.Marshal()},
		{Index: 5, Term: 2, Command: good.Marshal()},
		{Index: 6, Term: 2, Command: []byte("\x01nonsense")},
		{Index: 7, Term: 3, Command: nil},
	})
	if r := results[0]; !r.Succeeded || r.Err != nil {
		t.Errorf("good entry: %+v", r)
	}
	if r := results[1]; r.Succeeded || !errors.Is(r.Err, ErrApplied) {
		t.Errorf("entry applied twice: %+v", r)
	}
	for _, r := range results[2:] {
		if r.Succeeded || !errors.Is(r.Err, ErrMalformed) {
			t.Errorf("malformed entry: %+v", r)
		}
	}
	if index, term := s.Applied(); index != 7 || term != 3 {
		t.Errorf("applied is %d/%d, want 7/3", index, term)
	}
	if s.View().Revision() != 2 {
		t.Errorf("revision is %d, want 2", s.View().Revision())
	}
}

func TestRangeAndCount(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	apply(t, s, changes(put("/a/1", ""), put("/a/2", ""), put("/a/3", ""), put("/ab/1", ""), put("/b/1", ""), put("\xff\xff", "")))
	v := s.View()
	tests := []struct {
		prefix, start string
		want          []string
	}{
		{"", "", []string{"/a/1", "/a/2", "/a/3", "/ab/1", "/b/1", "\xff\xff"}},
		{"/a/", "", []string{"/a/1", "/a/2", "/a/3"}},
		{"/a", "", []string{"/a/1", "/a/2", "/a/3", "/ab/1"}},
		{"/a/", "/a/2", []string{"/a/2", "/a/3"}},
		{"/a/", "/a/2\x00", []string{"/a/3"}},
		{"/a/", "/a/9", nil},
		{"/a/", "/b", nil},
		{"/x/", "", nil},
		{"\xff", "", []string{"\xff\xff"}},
	}
	for _, tt := range tests {
		var got []string
		for kv := range v.Range(tt.prefix, tt.start) {
			got = append(got, kv.Key)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("Range(%q, %q) is %q, want %q", tt.prefix, tt.start, got, tt.want)
		}
		if n := v.CountFrom(tt.prefix, tt.start); n != len(tt.want) {
			t.Errorf("CountFrom(%q, %q) is %d, want %d", tt.prefix, tt.start, n, len(tt.want))
		}
	}
}

func TestAt(t *testing.T) {
	t.Parallel()
	s := New(Options{HistoryChanges: 10_000})
	states := map[int64][]string{1: nil}
	for i := range 6000 { // more than one checkpoint
		c := put(fmt.Sprintf("k%d", i%7), fmt.Sprint(i))
		if i%5 == 4 {
			c = del(fmt.Sprintf("k%d", i%7))
		}
		apply(t, s, changes(c))
		states[s.View().Revision()] = dump(s.View())
	}
	for _, r := range []int64{1, 2, 3, 100, 4095, 4096, 4097, 4098, s.View().Revision() - 1, s.View().Revision()} {
		v, err := s.At(r)
		if err != nil {
			t.Fatalf("At(%d): %v", r, err)
		}
		if got := dump(v); !slices.Equal(got, states[r]) || v.Revision() != r {
			t.Errorf("At(%d) is %v at %d, want %v", r, got, v.Revision(), states[r])
		}
	}
	if _, err := s.At(s.View().Revision() + 1); !errors.Is(err, ErrFutureRevision) {
		t.Errorf("At a future revision: %v", err)
	}
	apply(t, s, Txn{Compact: 4000})
	if got := s.CompactRevision(); got != 4000 {
		t.Errorf("compact revision is %d, want 4000", got)
	}
	if _, err := s.At(3999); !errors.Is(err, ErrCompacted) {
		t.Errorf("At a compacted revision: %v", err)
	}
	if v, err := s.At(4000); err != nil || !slices.Equal(dump(v), states[4000]) {
		t.Errorf("At the compact revision: %v, %v", v, err)
	}
}

func TestExpired(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	expiring := func(key string, at int64) Change { return Change{Key: key, Value: []byte{}, ExpiresAt: at} }
	apply(t, s, changes(expiring("a", 300), expiring("b", 100), expiring("c", 200), put("d", ""), expiring("e", 150), expiring("f", 100)))
	apply(t, s, changes(put("c", ""), del("e"), expiring("f", 400)))
	keys := func(kvs iter.Seq[KV]) (out []string) {
		for kv := range kvs {
			out = append(out, kv.Key)
		}
		return out
	}
	for now, want := range map[int64][]string{99: nil, 100: {"b"}, 350: {"b", "a"}, 400: {"b", "a", "f"}} {
		if got := keys(s.View().Expired(now)); !slices.Equal(got, want) {
			t.Errorf("Expired(%d) is %v, want %v", now, got, want)
		}
	}
	for kv := range s.View().Expired(400) {
		if kv.Key != "b" {
			t.Errorf("the first that expired is %s, want b, and no other was asked for", kv.Key)
		}
		break
	}
	if at, ok := s.View().NextExpiry(); !ok || at != 100 {
		t.Errorf("next expiry is %d, %v, want 100", at, ok)
	}
	var saved bytes.Buffer
	if err := s.Save(&saved); err != nil {
		t.Fatal(err)
	}
	s2 := New(Options{})
	if err := s2.Restore(&saved); err != nil {
		t.Fatal(err)
	}
	if got, want := keys(s2.View().Expired(400)), []string{"b", "a", "f"}; !slices.Equal(got, want) {
		t.Errorf("after restore Expired(400) is %v, want %v", got, want)
	}
}

func TestWaitRevision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{})
		ctx, cancel := context.WithCancel(t.Context())
		reached := make(chan int64, 3)
		for _, r := range []int64{4, 2, 3} {
			go func() {
				if err := s.WaitRevision(ctx, r); err == nil {
					reached <- r
				} else {
					reached <- -r
				}
			}()
		}
		synctest.Wait()
		apply(t, s, changes(put("a", "")))
		if got := <-reached; got != 2 {
			t.Errorf("first to return waited for %d, want 2", got)
		}
		apply(t, s, changes(put("a", "")))
		if got := <-reached; got != 3 {
			t.Errorf("second to return waited for %d, want 3", got)
		}
		cancel()
		if got := <-reached; got != -4 {
			t.Errorf("third returned %d, want a cancelled wait for 4", got)
		}
		if err := s.WaitRevision(t.Context(), 3); err != nil {
			t.Error(err)
		}
		if len(s.waiters.heap) != 0 {
			t.Error("a waiter is left behind")
		}
	})
}

func TestHashAt(t *testing.T) {
	t.Parallel()
	s := New(Options{HistoryChanges: 3, HistoryAgeless: -1})
	hashes := map[int64]uint64{1: s.View().Hash()}
	for i := range uint64(6) {
		txn := Txn{Changes: []Change{{Key: "k", Value: []byte{byte(i)}}}}
		s.ApplyBatch([]Entry{{Index: i + 1, Term: 1, Command: txn.Marshal()}})
		hashes[s.View().Revision()] = s.View().Hash()
	}
	for revision, want := range hashes {
		got, ok := s.HashAt(revision)
		if known := ok || revision <= 4; !known || (ok && got != want) { // older ones may be forgotten
			t.Errorf("at %d: %x, %t; want %x, %t", revision, got, ok, want, known)
		}
	}
	if _, ok := s.HashAt(8); ok {
		t.Error("the future is known")
	}
	for i := range uint64(2 * historyChunk) {
		txn := Txn{Changes: []Change{{Key: "k", Value: []byte{byte(i)}}}}
		s.ApplyBatch([]Entry{{Index: i + 7, Term: 1, Command: txn.Marshal()}})
	}
	if _, ok := s.HashAt(4); ok {
		t.Error("what left the history long ago is known")
	}
}
