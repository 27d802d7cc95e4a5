package state

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"testing"
	"unsafe"
)

// leave puts something into a KV's memo.
func leave(t *testing.T, kv KV, what any) {
	t.Helper()
	if kv.Memo() == nil {
		t.Fatalf("%s has no memo", kv)
	}
	kv.Memo().Store(&what)
}

// TestMemoIsShared leaves something in the memo of each version of a key and finds
// it wherever else that version is to be had.
func TestMemoIsShared(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	w, err := s.Watch("", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	apply(t, s, changes(put("a", "1")), changes(put("a", "2")), changes(del("a")), changes(put("a", "3")))
	refused := apply(t, s, Txn{Conditions: []Condition{when("a", 0)}})[0]
	memos := func(s *Store, w *Watcher) map[int64][]*Memo {
		t.Helper()
		found := map[int64][]*Memo{}
		note := func(kv KV) { found[kv.ModRevision] = append(found[kv.ModRevision], kv.Memo()) }
		events, err := w.Poll()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if e.Type == Put {
				note(e.KV)
			}
			if e.Prev.ModRevision != 0 {
				note(e.Prev)
			}
		}
		for r := s.CompactRevision(); r <= s.View().Revision(); r++ {
			v, err := s.At(r)
			if err != nil {
				t.Fatal(err)
			}
			for kv := range v.Range("", "") {
				note(kv)
			}
			if kv, ok := v.Get("a"); ok {
				note(kv)
			}
		}
		return found
	}
	found := memos(s, w)
	found[5] = append(found[5], refused.Failed[0].Memo())
	check := func(t *testing.T, found map[int64][]*Memo) {
		t.Helper()
		if len(found) != 3 {
			t.Errorf("found versions %v, want those of revisions 2, 3 and 5", found)
		}
		for revision, memos := range found {
			for _, m := range memos {
				if m == nil || m != memos[0] {
					t.Errorf("version %d has memos %p, want one and the same", revision, memos)
					break
				}
			}
		}
	}
	check(t, found)
	t.Run("after a restore", func(t *testing.T) {
		again := New(Options{})
		if err := again.Restore(bytes.NewReader(save(t, s))); err != nil {
			t.Fatal(err)
		}
		w, err := again.Watch("", 1)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		check(t, memos(again, w))
	})
	t.Run("after a restore of a window that is cut", func(t *testing.T) {
		apply(t, s, Txn{Compact: 2})
		again := New(Options{})
		if err := again.Restore(bytes.NewReader(save(t, s))); err != nil {
			t.Fatal(err)
		}
		w, err := again.Watch("", 2)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		check(t, memos(again, w))
	})
}

// TestMemoIsNoState compares a store whose memos are in use with one whose memos
// are empty, in every form that leaves the process or a test looks at.
func TestMemoIsNoState(t *testing.T) {
	t.Parallel()
	used, empty := New(Options{}), New(Options{})
	for _, s := range []*Store{used, empty} {
		apply(t, s, changes(put("a", "1"), put("b", "1")), changes(put("a", "2")))
	}
	for kv := range used.View().Range("", "") {
		leave(t, kv, "something")
	}
	if used.View().Hash() != empty.View().Hash() || !bytes.Equal(save(t, used), save(t, empty)) {
		t.Error("the hash or the snapshot differs")
	}
	a, _ := used.View().Get("a")
	b, _ := empty.View().Get("a")
	if fmt.Sprintf("%v %+v", a, Result{Failed: []KV{a}}) != fmt.Sprintf("%v %+v", b, Result{Failed: []KV{b}}) {
		t.Errorf("%+v prints other than %+v", a, b)
	}
	asJSON, err := json.Marshal(a)
	if err != nil || bytes.Contains(bytes.ToLower(asJSON), []byte("memo")) {
		t.Errorf("as JSON: %s, %v", asJSON, err)
	}
	var crossed Result // as the tests' replicas answer each other
	var wire bytes.Buffer
	if err := gob.NewEncoder(&wire).Encode(Result{Failed: []KV{a}}); err != nil {
		t.Fatal(err)
	}
	if err := gob.NewDecoder(&wire).Decode(&crossed); err != nil {
		t.Fatal(err)
	}
	if got := crossed.Failed[0]; got.String() != a.String() || got.Memo() != nil {
		t.Errorf("%s became %s with memo %v", a, got, got.Memo())
	}
}

// TestMemoIsSmall bounds what a version of a key costs: 100,000 pods have as many.
func TestMemoIsSmall(t *testing.T) {
	t.Parallel()
	if size := unsafe.Sizeof(stored{}); size > 80 {
		t.Errorf("a stored KV takes %d bytes, want no more than the 80 of a size class", size)
	}
}
