package state

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"testing"
)

func TestRaiseSnapshot(t *testing.T) {
	t.Parallel()
	s := sample(t)
	saved := save(t, s)
	const by = 1_000_000
	var raised bytes.Buffer
	info, err := RaiseSnapshot(&raised, bytes.NewReader(saved), Raise{By: by, Index: 500, Term: 9})
	if err != nil {
		t.Fatal(err)
	}
	old := s.View()
	want := SnapshotInfo{Revision: old.Revision() + by, CompactRevision: old.Revision() + by, Index: 500, Term: 9, Hash: old.Hash(), Keys: old.Len()}
	if info != want {
		t.Errorf("%+v, want %+v", info, want)
	}
	if scanned, err := ScanSnapshot(bytes.NewReader(raised.Bytes()), nil); err != nil || scanned != want {
		t.Errorf("scanned %+v, %v, want %+v", scanned, err, want)
	}
	r := New(Options{})
	if err := r.Restore(bytes.NewReader(raised.Bytes())); err != nil {
		t.Fatal(err)
	}
	view := r.View()
	if index, term := view.Applied(); view.Revision() != want.Revision || index != 500 || term != 9 || view.Hash() != old.Hash() || view.Bytes() != old.Bytes() {
		t.Errorf("restored revision %d, index %d, term %d", view.Revision(), index, term)
	}
	for kv := range old.Range("", "") {
		got, ok := view.Get(kv.Key)
		if !ok || !bytes.Equal(got.Value, kv.Value) || got.ModRevision != kv.ModRevision+by || got.CreateRevision != kv.CreateRevision+by || got.ExpiresAt != kv.ExpiresAt {
			t.Errorf("%+v is %+v", kv, got)
		}
	}
	if len(slices.Collect(view.Expired(1<<40))) != len(slices.Collect(old.Expired(1<<40))) {
		t.Error("keys that expire were lost")
	}
	for _, revision := range []int64{1, s.CompactRevision(), old.Revision(), old.Revision() + 100, view.Revision() - 1} {
		if _, err := r.At(revision); !errors.Is(err, ErrCompacted) {
			t.Errorf("at %d: %v, want ErrCompacted", revision, err)
		}
		if _, err := r.Watch("", revision); !errors.Is(err, ErrCompacted) {
			t.Errorf("watch after %d: %v, want ErrCompacted", revision, err)
		}
	}
	// The log goes on behind it.
	txn := Txn{Changes: []Change{{Key: "/registry/new", Value: []byte("v")}}}
	if got := r.ApplyBatch([]Entry{{Index: 501, Term: 10, Command: txn.Marshal()}})[0]; !got.Succeeded || got.Revision != want.Revision+1 {
		t.Errorf("%+v", got)
	}
	if _, err := RaiseSnapshot(io.Discard, bytes.NewReader(saved), Raise{By: 1 << 62}); err == nil {
		t.Error("raised beyond what a revision can be")
	}
}

func TestScanAndRaiseRefuseDamage(t *testing.T) {
	t.Parallel()
	saved := save(t, sample(t))
	for i := range saved {
		altered := bytes.Clone(saved)
		altered[i] ^= 0x40
		if i == 10 { // the version: one that is not known
			altered[i] = 0
		}
		for what, b := range map[string][]byte{"cut off": saved[:i], "altered": altered} {
			if _, err := ScanSnapshot(bytes.NewReader(b), nil); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s at %d: scan says %v", what, i, err)
			}
			if _, err := RaiseSnapshot(io.Discard, bytes.NewReader(b), Raise{By: 1}); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s at %d: raise says %v", what, i, err)
			}
		}
	}
}

// TestRaiseTakesBoundedMemory raises 100 MiB and looks at the heap meanwhile.
func TestRaiseTakesBoundedMemory(t *testing.T) {
	s := New(Options{HistoryChanges: 10})
	for i := range 100 {
		var txn Txn
		for j := range 64 {
			txn.Changes = append(txn.Changes, Change{Key: fmt.Sprintf("/registry/%03d/%03d", i, j), Value: bytes.Repeat([]byte{byte(j)}, 16<<10)})
		}
		apply(t, s, txn)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(s.Save(w)) }()
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	var most, written uint64
	info, err := RaiseSnapshot(writerFunc(func(p []byte) (int, error) {
		if written/(10<<20) != (written+uint64(len(p)))/(10<<20) {
			most = max(most, heap())
		}
		written += uint64(len(p))
		return len(p), nil
	}), r, Raise{By: 1})
	if err != nil || info.Keys != 6400 || written < 100<<20 {
		t.Fatalf("%+v, %d bytes, %v", info, written, err)
	}
	t.Logf("%d MiB raised with %d KiB of heap", written>>20, (int64(most)-int64(before))>>10)
	if most > before+8<<20 {
		t.Errorf("the heap grew from %d to %d bytes", before, most)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
