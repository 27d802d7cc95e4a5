package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// memoryFile is a file of a history, that may be broken.
type memoryFile struct {
	disk *memoryDisk
	mu   sync.Mutex
	b    []byte
}

// memoryDisk makes files.
type memoryDisk struct {
	room   atomic.Int64 // bytes that can be written, in all
	flip   atomic.Bool  // reads have a wrong bit
	block  atomic.Pointer[chan struct{}]
	asked  chan struct{} // a read came that block holds
	reads  atomic.Int64
	closed atomic.Int64
}

func newMemoryDisk() *memoryDisk {
	d := &memoryDisk{asked: make(chan struct{}, 1)}
	d.room.Store(1 << 40)
	return d
}

func (d *memoryDisk) create() (historyFile, error) { return &memoryFile{disk: d}, nil }

func (f *memoryFile) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if left := f.disk.room.Add(-int64(len(b))); left < 0 {
		return 0, unix.ENOSPC
	}
	f.b = append(f.b, b...)
	return len(b), nil
}

func (f *memoryFile) ReadAt(b []byte, offset int64) (int, error) {
	f.disk.reads.Add(1)
	if c := f.disk.block.Load(); c != nil {
		select {
		case f.disk.asked <- struct{}{}:
		default:
		}
		<-*c
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(b, f.b[offset:])
	if f.disk.flip.Load() {
		b[len(b)/2] ^= 1
	}
	return len(b), nil
}

func (f *memoryFile) Close() error { f.disk.closed.Add(1); return nil }

// spilling returns a store that spills all but the newest chunk onto the disk.
func spilling(o Options, d *memoryDisk) *Store {
	o.HistoryRestBytes = 1
	s := New(o)
	s.spill.create = d.create
	return s
}

func (s *Store) mustSpill(t interface {
	Helper()
	Fatal(...any)
}) {
	t.Helper()
	if err := s.Spill(); err != nil {
		t.Fatal(err)
	}
}

// TestSpilledHistoryIsTheSame does random work on two stores, one of which spills now and
// then, and compares all that can be asked of them.
func TestSpilledHistoryIsTheSame(t *testing.T) {
	t.Parallel()
	prefixes := []string{"", "/r/", "/r/pods/", "/r/pods/a/", "/r/cms/", "/r/cms/a/", "/r/cms/a/1", "/r/nodes/"}
	rapid.Check(t, func(t *rapid.T) {
		o := Options{
			HistoryBytes: 200 << 10, HistoryLargeBytes: 64 << 10, HistoryAge: 10 * time.Second,
			HistoryAgeless: rapid.IntRange(-1, 500).Draw(t, "ageless"), HistoryDiskBytes: 1 << 30,
		}
		plain, cold := New(o), spilling(o, newMemoryDisk())
		stores := []*Store{plain, cold}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		keys := []string{"/r/pods/a/1", "/r/pods/b/1", "/r/cms/a/1", "/r/cms/a/2", "/r/cms/b/1", "/r/nodes/1", "/r/nodes/2"}
		clock := int64(1000)
		if rapid.Bool().Draw(t, "clock") {
			for _, s := range stores {
				s.Tick(time.Unix(clock, 0))
			}
		}
		index := uint64(0)
		apply := func(txn Txn) {
			index++
			for _, s := range stores {
				if r := s.ApplyBatch([]Entry{{Index: index, Term: 1, Command: txn.Marshal()}})[0]; r.Err != nil {
					t.Fatal(r.Err)
				}
			}
		}
		if rapid.Bool().Draw(t, "gaps") {
			apply(changes(put(VersionKey, "2")))
		}
		watchers := map[string]*Watcher{} // of the store that spills
		seen := map[string][]string{}
		began := map[string]int64{}
		defer func() {
			for _, w := range watchers {
				w.Close()
			}
		}()
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0:
				clock += rapid.Int64Range(0, 4).Draw(t, "seconds")
				for _, s := range stores {
					s.Tick(time.Unix(clock, 0))
				}
			case 1, 2, 3:
				cold.mustSpill(t)
			case 4:
				var b, c bytes.Buffer
				if err := errors.Join(plain.Save(&b), cold.Save(&c)); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(b.Bytes(), c.Bytes()) {
					t.Fatal("the snapshots are not the same")
				}
				if rapid.Bool().Draw(t, "restore") {
					if err := errors.Join(plain.Restore(&b), cold.Restore(&c)); err != nil {
						t.Fatal(err)
					}
				}
			case 5: // a watcher reads a part, and the next time goes on
				prefix := rapid.SampledFrom(prefixes).Draw(t, "prefix")
				w := watchers[prefix]
				if w == nil {
					after := random.Int64N(cold.View().Revision()) + 1
					var err error
					if w, err = cold.Watch(prefix, after); err != nil {
						if !errors.Is(err, ErrCompacted) {
							t.Fatal(err)
						}
						continue
					}
					watchers[prefix], began[prefix], seen[prefix] = w, after, nil
				}
				events, err := w.Poll()
				for _, e := range events {
					seen[prefix] = append(seen[prefix], printEvent(e))
				}
				if err != nil {
					w.Close()
					delete(watchers, prefix)
				}
			default:
				for range random.IntN(90) {
					c := Change{Key: keys[random.IntN(len(keys))], Delete: random.IntN(6) == 0}
					if c.Value = make([]byte, []int{0, 10, 100, 1000, 8000}[random.IntN(5)]); len(c.Value) > 0 {
						c.Value[0] = byte(random.Uint32())
					}
					apply(changes(c))
				}
			}
		}
		for _, prefix := range prefixes {
			for n := range int64(16) {
				after := max(1, plain.View().Revision()-n)
				if n > 5 {
					after = 1 + random.Int64N(plain.View().Revision())
				}
				want, wantErr := resume(plain, prefix, after)
				got, err := resume(cold, prefix, after)
				if fmt.Sprint(err) != fmt.Sprint(wantErr) || !slices.Equal(got, want) {
					t.Fatalf("watch of %q after %d saw %v, %v, want %v, %v", prefix, after, got, err, want, wantErr)
				}
				v, wantErr := plain.AtPrefix(prefix, after)
				w, err := cold.AtPrefix(prefix, after)
				if (err == nil) != (wantErr == nil) {
					t.Fatalf("%q at %d: %v, want %v", prefix, after, err, wantErr)
				}
				if err == nil && !slices.Equal(list(w, prefix, ""), list(v, prefix, "")) {
					t.Fatalf("%q at %d is %v, want %v", prefix, after, list(w, prefix, ""), list(v, prefix, ""))
				}
			}
			if w := watchers[prefix]; w != nil {
				rest, err := drain(w)
				want, wantErr := resume(plain, prefix, began[prefix])
				if got := append(seen[prefix], rest...); err == nil && wantErr == nil && !slices.Equal(got, want) {
					t.Fatalf("the watcher of %q after %d saw %v, want %v", prefix, began[prefix], got, want)
				}
			}
		}
		for r := int64(1); r <= plain.View().Revision(); r++ {
			hash, ok := cold.HashAt(r)
			if want, wantOK := plain.HashAt(r); ok && (!wantOK || hash != want) {
				t.Fatalf("hash at %d is %x, want %x", r, hash, want)
			}
		}
		want, got := plain.History(), cold.History()
		if got.Spilled > got.Bytes || got.Spilled > 0 != (got.Disk > 0) {
			t.Fatalf("history %+v", got)
		}
		got.Spilled, got.Disk = 0, 0
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("history is %+v, want %+v", got, want)
		}
	})
}

// written is a store with many small updates of a few objects in spilled history, and what a
// watch of each prefix sees of all revisions from 1 on.
func written(t testing.TB, o Options, d *memoryDisk, writes int) (*Store, map[string][]string) {
	t.Helper()
	s, m := spilling(o, d), newModel()
	s.Tick(time.Unix(1000, 0))
	for i := range writes {
		txn := changes(put(fmt.Sprintf("/r/pods/a/%d", i%7), fmt.Sprint(i)))
		if i%100 < 10 {
			txn = changes(put("/r/nodes/1", strings.Repeat(fmt.Sprint(i), 100)))
		}
		apply(t, s, txn)
		m.apply(txn)
	}
	s.mustSpill(t)
	all := map[string][]string{}
	for _, prefix := range []string{"", "/r/pods/", "/r/nodes/"} {
		all[prefix] = m.watch(prefix, 1)
	}
	return s, all
}

// TestSpilledHistoryResumesEverywhere resumes watches at every revision of the last 5
// minutes, after all was taken out of memory.
func TestSpilledHistoryResumesEverywhere(t *testing.T) {
	t.Parallel()
	d := newMemoryDisk()
	s, all := written(t, Options{HistoryAgeless: -1}, d, 1000)
	if h := s.History(); h.Spilled < h.Bytes*8/10 {
		t.Fatalf("little was taken out of memory: %+v", h)
	}
	s.Tick(time.Unix(1000+5*60, 0))
	for after := int64(1); after <= s.View().Revision(); after++ {
		got, err := resume(s, "", after)
		if err != nil || !slices.Equal(got, all[""][after-1:]) {
			t.Fatalf("after %d: %d events, %v", after, len(got), err)
		}
	}
	before := d.reads.Load()
	if got, err := resume(s, "/r/cms/", 1); err != nil || len(got) > 0 || d.reads.Load() != before {
		t.Errorf("a resource that had no events: %d, %v, %d reads", len(got), err, d.reads.Load()-before)
	}
	s.Tick(time.Unix(1000+5*60+40, 0))
	s.Tick(time.Unix(1000+5*60+60, 0))
	if h := s.History(); h.Spilled != 0 || h.Disk != 0 {
		t.Errorf("when it is old it is gone: %+v", h)
	}
}

// TestSpilledHistoryIsDamaged changes a bit of what is read: who asks sees all or
// ErrCompacted, and nothing that is in memory is lost.
func TestSpilledHistoryIsDamaged(t *testing.T) {
	t.Parallel()
	for name, ask := range map[string]func(s *Store) error{
		"watch": func(s *Store) error { _, err := resume(s, "/r/pods/", 100); return err },
		"read":  func(s *Store) error { _, err := s.At(100); return err },
		"snapshot": func(s *Store) error {
			if s.Save(&bytes.Buffer{}) == nil {
				return errors.New("a snapshot was written")
			}
			_, err := resume(s, "", 100)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newMemoryDisk()
			s, all := written(t, Options{}, d, 1000)
			inMemory := int64(1 + 1000/historyChunk*historyChunk)
			d.flip.Store(true)
			if err := ask(s); !errors.Is(err, ErrCompacted) {
				t.Fatalf("%v", err)
			}
			d.flip.Store(false)
			if err := s.Spill(); !errors.Is(err, ErrCorrupt) {
				t.Errorf("nobody is told: %v", err)
			}
			for range 2 { // before and after the next Tick
				_ = s.spill.forget()
				for prefix, want := range all {
					for after := int64(1); after <= s.View().Revision(); after++ {
						got, err := resume(s, prefix, after)
						if err != nil && !errors.Is(err, ErrCompacted) || err != nil && after >= inMemory {
							t.Fatal(err)
						}
						if err == nil && len(got) > 0 && !slices.Equal(got, want[len(want)-len(got):]) {
							t.Fatalf("watch of %q after %d saw %v", prefix, after, got)
						}
					}
				}
				var b bytes.Buffer
				if err := s.Save(&b); err != nil {
					t.Fatal(err)
				}
				if err := New(Options{}).Restore(&b); err != nil {
					t.Fatal(err)
				}
				s.Tick(time.Unix(1001, 0))
			}
			if s.View().CompactRevision() < 100 || s.spill.disk != 0 && s.spill.bytes == 0 {
				t.Errorf("what cannot be read is still counted: %+v", s.History())
			}
		})
	}
}

// TestSpilledHistoryDiskIsFull fills the disk: what cannot be written is gone, what is
// newer is there, and when there is room again it goes on.
func TestSpilledHistoryDiskIsFull(t *testing.T) {
	t.Parallel()
	d := newMemoryDisk()
	s := spilling(Options{}, d)
	write := func() {
		for i := range 1000 {
			apply(t, s, changes(put(fmt.Sprintf("/r/pods/a/%d", i%7), fmt.Sprint(i))))
		}
	}
	write()
	d.room.Store(100)
	if err := s.Spill(); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if d.closed.Load() != 1 {
		t.Error("the file is left open")
	}
	now := s.View().Revision()
	if _, err := resume(s, "/r/pods/", 100); !errors.Is(err, ErrCompacted) {
		t.Error(err)
	}
	if _, err := s.At(100); !errors.Is(err, ErrCompacted) {
		t.Error(err)
	}
	if h := s.History(); h.Disk != 0 || h.Spilled != 0 || h.Changes > 2*historyChunk {
		t.Errorf("%+v", h)
	}
	const kept = historyChunk / 2 // the newest chunk has some more
	if got, err := resume(s, "", now-kept); err != nil || len(got) != kept {
		t.Errorf("%d events, %v", len(got), err)
	}
	d.room.Store(1 << 30)
	write()
	s.mustSpill(t)
	if got, err := resume(s, "", now-kept); err != nil || len(got) != 1000+kept || s.History().Spilled == 0 {
		t.Errorf("%d events, %v", len(got), err)
	}
}

// TestSpilledHistoryIsBoundedOnDisk writes what cannot be compressed and rests, again and
// again: beyond the bound the oldest goes.
func TestSpilledHistoryIsBoundedOnDisk(t *testing.T) {
	t.Parallel()
	const limit = 1 << 20
	s := spilling(Options{HistoryDiskBytes: limit, HistoryBytes: 64 << 20}, newMemoryDisk())
	random := rand.New(rand.NewPCG(1, 1))
	most := int64(0)
	for range 40 {
		for i := range 256 {
			value := make([]byte, 500)
			for j := range value {
				value[j] = byte(random.Uint32())
			}
			apply(t, s, changes(put(fmt.Sprintf("/r/pods/a/%d", i%7), string(value))))
		}
		s.mustSpill(t)
		h := s.History()
		if most = max(most, h.Disk); h.Disk > limit {
			t.Fatalf("%+v", h)
		}
		if got, err := resume(s, "", s.View().Revision()-256); err != nil || len(got) != 256 {
			t.Fatalf("%d events, %v", len(got), err)
		}
	}
	if most < limit/2 {
		t.Errorf("of %d bytes it used %d", limit, most)
	}
	if _, err := resume(s, "", 2); !errors.Is(err, ErrCompacted) {
		t.Errorf("all is there: %v", err)
	}
	big := make([]byte, 3*limit)
	for j := range big {
		big[j] = byte(random.Uint32())
	}
	for i := range 320 { // more than all of the bound
		apply(t, s, changes(put("/r/pods/a/1", string(big[i*4000:(i+1)*4000]))))
	}
	if err := s.Spill(); err == nil {
		t.Error("two MB were written to one")
	}
	if h := s.History(); h.Disk != 0 {
		t.Errorf("%+v", h)
	}
}

// TestLargeValuesAtRest writes values of a MiB and rests: what stays in memory of the
// history is little, wherever the last of them lies.
func TestLargeValuesAtRest(t *testing.T) {
	t.Parallel()
	for _, n := range []int{40, 47, 56, 63} {
		s := spilling(Options{HistoryBytes: 64 << 20, HistoryLargeBytes: 64 << 20, HistoryRestBytes: 4 << 20, HistoryDiskBytes: 1 << 30}, newMemoryDisk())
		value := strings.Repeat("x", 1<<20)
		for range n {
			apply(t, s, changes(put("/r/configmaps/a/1", value)))
		}
		s.mustSpill(t)
		if h := s.History(); h.Bytes-h.Spilled > 20<<20 {
			t.Errorf("after %d writes %d of %d bytes are in memory", n, h.Bytes-h.Spilled, h.Bytes)
		}
	}
}

// TestSpilledHistoryOnASlowDisk lets a watcher wait for the disk: nobody waits for it.
func TestSpilledHistoryOnASlowDisk(t *testing.T) {
	t.Parallel()
	d := newMemoryDisk()
	s, _ := written(t, Options{HistoryChanges: 4000}, d, 1000)
	gate := make(chan struct{})
	d.block.Store(&gate)
	ended := make(chan error)
	go func() { _, err := resume(s, "/r/pods/", 100); ended <- err }()
	<-d.asked
	for i := range 8 * sweepEvery { // looks for watchers that fell behind, and this one has
		apply(t, s, changes(put("/r/pods/a/1", fmt.Sprint(i))))
	}
	close(gate)
	if err := <-ended; !errors.Is(err, ErrCompacted) {
		t.Error(err)
	}
}

// TestSpilledHistoryIsNotInMemory measures what a large history of small values holds
// of the heap, and that its files have no names.
func TestSpilledHistoryIsNotInMemory(t *testing.T) {
	folder := t.TempDir()
	s := New(Options{HistoryFolder: folder, HistoryBytes: 1 << 30})
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	random := rand.New(rand.NewPCG(1, 1))
	const writes = 60_000
	for i := range writes {
		value := make([]byte, 1000)
		for j := range value {
			value[j] = byte(random.Uint32())
		}
		apply(t, s, changes(put(fmt.Sprintf("/r/pods/a/%d", i%100), string(value))))
	}
	full := heap() - before
	s.mustSpill(t)
	spilled := heap() - before
	h := s.History()
	t.Logf("history of %d MB: %d MB in memory, then %d MB and %d MB on disk", h.Bytes>>20, full>>20, spilled>>20, h.Disk>>20)
	if full < h.Bytes*3/4 {
		t.Errorf("the heap had %d bytes with a history of %d", full, h.Bytes)
	}
	if spilled > 8<<20 {
		t.Errorf("%d bytes are in memory", spilled)
	}
	if files, err := os.ReadDir(folder); err != nil || len(files) > 0 {
		t.Errorf("%v, %v", files, err)
	}
	if got, err := resume(s, "", 1); err != nil || len(got) != writes {
		t.Errorf("%d events, %v", len(got), err)
	}
	s.Tick(time.Unix(1000, 0))
}

// TestSpillUnderLoad spills all the time while much is written, watchers resume, the past
// is read, snapshots are written and restored. It is meant for -race.
func TestSpillUnderLoad(t *testing.T) {
	t.Parallel()
	const writes = 6000
	s := New(Options{HistoryBytes: 800 << 10, HistoryLargeBytes: 100 << 10, HistoryAge: time.Minute, HistoryRestBytes: 1, HistoryFolder: t.TempDir()})
	apply(t, s, changes(put(VersionKey, "2")), changes(put("/r/cms/hot/x", "")))
	var group sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range 3 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 3))
			for ctx.Err() == nil {
				now := s.View().Revision()
				after := max(3, now-random.Int64N(3000))
				got, err := resumeEvents(s, "/r/pods/", after)
				for j, e := range got { // revision r is of a pod when it is even
					if want := (after/2 + 1 + int64(j)) * 2; err == nil && e.Revision != want {
						t.Errorf("watch after %d saw %d, want %d", after, e.Revision, want)
						break
					}
				}
				if err != nil && !errors.Is(err, ErrCompacted) {
					t.Error(err)
				}
				if v, err := s.AtPrefix("/r/pods/", after); err == nil && after > 3 {
					if kv, ok := v.Get("/r/pods/a/1"); !ok || kv.ModRevision != after/2*2 {
						t.Errorf("at %d the pod is of %d", after, kv.ModRevision)
					}
				} else if err != nil && !errors.Is(err, ErrCompacted) {
					t.Error(err)
				}
			}
		})
	}
	spilled := int64(0)
	group.Go(func() {
		for ctx.Err() == nil {
			if err := s.Spill(); err != nil {
				t.Error(err)
			}
			spilled = max(spilled, s.History().Spilled)
		}
	})
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
		apply(t, s, changes(put("/r/pods/a/1", fmt.Sprint(i))), changes(put("/r/cms/hot/x", strings.Repeat("x", 5_000))))
		if i%1000 == 999 { // as from another replica, while all goes on
			var b bytes.Buffer
			if err := s.Save(&b); err != nil {
				t.Fatal(err)
			}
			if err := s.Restore(&b); err != nil {
				t.Fatal(err)
			}
		}
	}
	cancel()
	group.Wait()
	if spilled == 0 {
		t.Error("nothing was spilled")
	}
}

// resumeEvents watches the prefix after a revision and returns all there is to see.
func resumeEvents(s *Store, prefix string, after int64) (all []*Event, err error) {
	w, err := s.Watch(prefix, after)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	for {
		events, err := w.Poll()
		if err != nil || len(events) == 0 {
			return all, err
		}
		all = append(all, events...)
	}
}
