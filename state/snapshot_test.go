package state

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// sample is a store with keys, expiring keys, deletes and a history that does
// not reach back to its beginning.
func sample(t testing.TB) *Store {
	s := New(Options{HistoryChanges: 40})
	for i := range 60 {
		c := Change{Key: fmt.Sprintf("/registry/k%d", i%13), Value: bytes.Repeat([]byte{byte(i)}, i)}
		switch i % 7 {
		case 3:
			c.ExpiresAt = int64(1000 + i)
		case 5:
			c = Change{Key: fmt.Sprintf("/registry/k%d", (i-4)%13), Delete: true}
		}
		apply(t, s, Txn{Time: int64(i + 1), Changes: []Change{c}})
	}
	return s
}

func save(t testing.TB, s *Store) []byte {
	var b bytes.Buffer
	if err := s.Save(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRestore(t *testing.T) {
	t.Parallel()
	s := sample(t)
	saved := save(t, s)
	r := New(Options{HistoryChanges: 40})
	if err := r.Restore(iotest.OneByteReader(bytes.NewReader(saved))); err != nil {
		t.Fatal(err)
	}
	if got, want := dump(r.View()), dump(s.View()); !slices.Equal(got, want) {
		t.Errorf("restored state is %v, want %v", got, want)
	}
	index, term := r.Applied()
	if index != 60 || term != 1 || r.View().Revision() != s.View().Revision() || r.CompactRevision() != s.CompactRevision() {
		t.Errorf("restored %d/%d, revision %d, compact %d", index, term, r.View().Revision(), r.CompactRevision())
	}
	// The history survives: a watch resumes on the restored replica, and the
	// past can be read.
	after := s.CompactRevision()
	for _, store := range []*Store{s, r} {
		w, err := store.Watch("/registry/k1", after)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		got, err := drain(w)
		if err != nil || len(got) == 0 {
			t.Fatalf("%v, %v", got, err)
		}
		if store == r {
			before, _ := s.Watch("/registry/k1", after)
			defer before.Close()
			want, _ := drain(before)
			if !slices.Equal(got, want) {
				t.Errorf("restored watch saw %v, want %v", got, want)
			}
		}
	}
	for revision := after; revision <= s.View().Revision(); revision++ {
		a, err := s.At(revision)
		if err != nil {
			t.Fatal(err)
		}
		b, err := r.At(revision)
		if err != nil || !slices.Equal(dump(a), dump(b)) {
			t.Fatalf("at %d the restored state is %v, %v, want %v", revision, dump(b), err, dump(a))
		}
	}
	if old, _ := r.At(after); true {
		if _, err := old.WriteTo(io.Discard); err == nil {
			t.Error("a view of the past was written")
		}
	}
}

// TestRestoreRefuses checks that each truncation and each changed byte is an
// error that leaves the store as it was.
func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	saved := save(t, sample(t))
	s := New(Options{})
	apply(t, s, changes(put("mine", "1")))
	w, err := s.Watch("", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	want := save(t, s)
	refuse := func(what string, b []byte) {
		t.Helper()
		err := s.Restore(bytes.NewReader(b))
		if newer := len(b) == len(saved) && b[10] > snapshotVersionGaps; !errors.Is(err, ErrCorrupt) && !(newer && errors.Is(err, ErrNewerVersion)) {
			t.Errorf("%s: %v, want ErrCorrupt", what, err)
		}
	}
	for n := range len(saved) {
		refuse(fmt.Sprintf("first %d bytes", n), saved[:n])
		changed := bytes.Clone(saved)
		changed[n] ^= 0x41
		refuse(fmt.Sprintf("byte %d changed", n), changed)
	}
	refuse("a byte more", append(bytes.Clone(saved), 0))
	refuse("another file", []byte("not a snapshot at all, but long enough to be one"))
	failed := errors.New("disk on fire")
	if err := s.Restore(io.MultiReader(bytes.NewReader(saved[:100]), iotest.ErrReader(failed))); !errors.Is(err, failed) {
		t.Errorf("reader's error: %v", err)
	}
	if !bytes.Equal(save(t, s), want) {
		t.Error("a refused snapshot changed the store")
	}
	if got, err := drain(w); err != nil || len(got) != 1 {
		t.Errorf("watcher saw %v, %v", got, err)
	}
}

func TestSaveFails(t *testing.T) {
	t.Parallel()
	s := sample(t)
	if err := s.Save(&failingWriter{left: 100}); !errors.Is(err, errFull) {
		t.Errorf("Save: %v", err)
	}
}

var errFull = errors.New("disk is full")

type failingWriter struct{ left int }

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func FuzzRestore(f *testing.F) {
	saved := save(f, sample(f))
	f.Add(saved)
	f.Add(saved[:len(saved)/2])
	f.Add(save(f, New(Options{})))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New(Options{})
		apply(t, s, changes(put("mine", "1")))
		want := save(t, s)
		if err := s.Restore(bytes.NewReader(b)); err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%v is not ErrCorrupt", err)
			}
			if !bytes.Equal(save(t, s), want) {
				t.Fatal("a refused snapshot changed the store")
			}
			return
		}
		// The checksum is right: it must be a state like any other.
		apply(t, s, changes(put("mine", "2")))
		if err := New(Options{}).Restore(bytes.NewReader(save(t, s))); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzRestoreRecords fuzzes what the checksum would otherwise refuse.
func FuzzRestoreRecords(f *testing.F) {
	saved := save(f, sample(f))
	f.Add(saved[:len(saved)-32])
	cut := New(Options{HistoryBytes: 4000})
	writeGaps(f, cut)
	for i := range 60 {
		apply(f, cut, changes(put(fmt.Sprintf("/r/a%d/b", i%3%2), strings.Repeat("x", 300))))
	}
	saved = save(f, cut)
	f.Add(saved[:len(saved)-32])
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New(Options{})
		if err := s.Restore(bytes.NewReader(withChecksum(b))); err == nil {
			apply(t, s, changes(put("mine", "2")))
			for r := max(s.CompactRevision(), s.View().Revision()-100); r <= s.View().Revision(); r++ {
				if _, err := s.At(r); err != nil && !errors.Is(err, ErrCompacted) {
					t.Fatal(err)
				}
			}
			if err := New(Options{}).Restore(bytes.NewReader(save(t, s))); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzTxn(f *testing.F) {
	txn := Txn{
		Time: 100, Compact: 3,
		Conditions: []Condition{when("a", 0), when("b", 7)},
		Changes:    []Change{put("a", "1"), del("b"), {Key: "c", Value: []byte("2"), ExpiresAt: 9}},
	}
	b := txn.Marshal()
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 255, 255, 255, 255, 15})
	f.Fuzz(func(t *testing.T, b []byte) {
		got := Txn{Time: -1}
		if err := got.Unmarshal(b); err != nil {
			if !errors.Is(err, ErrMalformed) || got.Time != -1 {
				t.Fatalf("%v, %+v", err, got)
			}
			return
		}
		var again Txn
		if err := again.Unmarshal(got.Marshal()); err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", again) {
			t.Fatalf("%+v became %+v, %v", got, again, err)
		}
		New(Options{}).ApplyBatch([]Entry{{Index: 1, Term: 1, Command: b}})
	})
}

func withChecksum(b []byte) []byte {
	sum := sha256.Sum256(b)
	return append(bytes.Clone(b), sum[:]...)
}
