package consensus

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Raft remembers an end of its log that it had cut off for entries that could not
// be written then, and would refuse its leader for ever: so that append waits for
// room. Any other fails at once, for a leader to step down.
func TestAppendAfterATruncationWaitsForRoom(t *testing.T) {
	t.Parallel()
	for name, from := range map[string]uint64{"some of the log": 7, "all of the log": 5} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stop := make(chan struct{})
			store := raft.NewInmemStore()
			d := newDisk(memoryStore{store}, raft.NewInmemSnapshotStore(), slog.New(slog.DiscardHandler), stop)
			d.cache(64, 1<<20)
			must(t, d.StoreLogs(entriesOf(1, 5, 10)))
			full := errors.New("no space left on device")
			fault := func(what string) error {
				if what == "append" {
					return full
				}
				return nil
			}
			d.fault.Store(&fault)
			if err := d.StoreLogs(entriesOf(1, 11, 11)); !errors.Is(err, full) {
				t.Fatalf("a plain append to a full disk: %v", err)
			}
			must(t, d.DeleteRange(from, 10))
			done := make(chan error, 1)
			go func() { done <- d.StoreLogs(entriesOf(2, from, 12)) }()
			select {
			case err := <-done:
				t.Fatalf("the append did not wait: %v", err)
			case <-time.After(500 * time.Millisecond):
			}
			d.fault.Store(nil)
			select {
			case err := <-done:
				must(t, err)
			case <-time.After(10 * time.Second):
				t.Fatal("the append waits although there is room")
			}
			var l raft.Log
			must(t, d.GetLog(from, &l))
			if l.Term != 2 {
				t.Errorf("entry %d is of term %d", from, l.Term)
			}

			// When the replica closes, nothing waits.
			d.fault.Store(&fault)
			must(t, d.DeleteRange(12, 12))
			go func() { done <- d.StoreLogs(entriesOf(3, 12, 12)) }()
			time.Sleep(20 * time.Millisecond)
			close(stop)
			select {
			case err := <-done:
				if !errors.Is(err, full) {
					t.Errorf("an append when the replica closes: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the append holds up closing")
			}
		})
	}
}

// An append whose last sync fails may be in the store: what of it Raft does not
// overwrite with its next append must not stay behind that.
func TestFailedAppendLeavesNothing(t *testing.T) {
	t.Parallel()
	store := &unsyncedStore{memoryStore: memoryStore{raft.NewInmemStore()}}
	d := newDisk(store, raft.NewInmemSnapshotStore(), slog.New(slog.DiscardHandler), nil)
	d.cache(64, 1<<20)
	must(t, d.StoreLogs(entriesOf(1, 1, 5)))
	store.fails = true
	if err := d.StoreLogs(entriesOf(1, 6, 9)); err == nil {
		t.Fatal("no error")
	}
	store.fails = false
	must(t, d.StoreLogs(entriesOf(2, 6, 6)))
	if last, err := d.LastIndex(); err != nil || last != 6 {
		t.Errorf("the log ends at %d, %v", last, err)
	}
}

// A vote that is cut off between its two writes must not look like one, in the new
// term, for the candidate of an earlier one.
func TestVoteIsWrittenCandidateFirst(t *testing.T) {
	t.Parallel()
	store := memoryStore{raft.NewInmemStore()}
	d := newDisk(store, raft.NewInmemSnapshotStore(), slog.New(slog.DiscardHandler), nil)
	vote := func(term uint64, candidate string) error {
		if err := d.SetUint64([]byte("LastVoteTerm"), term); err != nil {
			return err
		}
		term, err := store.GetUint64([]byte("LastVoteTerm"))
		if before, _ := store.Get([]byte("LastVoteCand")); err == nil && term > 4 && string(before) == "b" {
			t.Errorf("cut off here, it would have voted for b in term %d", term)
		}
		return d.Set([]byte("LastVoteCand"), []byte(candidate))
	}
	must(t, vote(4, "b"))
	must(t, vote(5, "a"))
	term, err := d.GetUint64([]byte("LastVoteTerm"))
	must(t, err)
	if candidate, err := d.Get([]byte("LastVoteCand")); err != nil || term != 5 || string(candidate) != "a" {
		t.Errorf("the vote reads %q in term %d, %v", candidate, term, err)
	}
}

// A truncation whose last sync fails has happened: Raft is told so.
func TestTruncationIsTriedAgain(t *testing.T) {
	t.Parallel()
	store := &unsyncedStore{memoryStore: memoryStore{raft.NewInmemStore()}}
	d := newDisk(store, raft.NewInmemSnapshotStore(), slog.New(slog.DiscardHandler), nil)
	must(t, d.StoreLogs(entriesOf(1, 1, 9)))
	store.fails = true
	time.AfterFunc(100*time.Millisecond, func() {
		store.mu.Lock()
		defer store.mu.Unlock()
		store.fails = false
	})
	must(t, d.DeleteRange(5, 9))
	if last, err := d.LastIndex(); err != nil || last != 4 {
		t.Errorf("the log ends at %d, %v", last, err)
	}
}

// The last entry of a snapshot stands in for one that the log lacks only when Raft
// has installed the snapshot: one whose last sync failed is on the disk as well, and
// what follows it must not be appended behind a gap.
func TestSnapshotThatWasNotInstalledStandsForNothing(t *testing.T) {
	t.Parallel()
	snapshots := raft.NewInmemSnapshotStore()
	sink, err := snapshots.Create(1, 9, 2, raft.Configuration{}, 1, nil)
	must(t, err)
	must(t, sink.Close())
	d := newDisk(memoryStore{raft.NewInmemStore()}, snapshots, slog.New(slog.DiscardHandler), nil)
	must(t, d.StoreLogs(entriesOf(1, 1, 5)))
	var l raft.Log
	d.snapshot = func() uint64 { return 5 }
	if err := d.GetLog(9, &l); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("entry 9 of term %d, %v", l.Term, err)
	}
	d.snapshot = func() uint64 { return 9 }
	if err := d.GetLog(9, &l); err != nil || l.Term != 2 {
		t.Errorf("entry 9 of term %d, %v", l.Term, err)
	}
}

// unsyncedStore writes, and says that it failed.
type unsyncedStore struct {
	memoryStore
	mu    sync.Mutex
	fails bool
}

func (s *unsyncedStore) result(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails {
		return errors.New("sync: input/output error")
	}
	return err
}

func (s *unsyncedStore) StoreLogs(logs []*raft.Log) error {
	return s.result(s.memoryStore.StoreLogs(logs))
}

func (s *unsyncedStore) DeleteRange(first, last uint64) error {
	return s.result(s.memoryStore.DeleteRange(first, last))
}

func entriesOf(term, first, last uint64) (out []*raft.Log) {
	for i := first; i <= last; i++ {
		out = append(out, &raft.Log{Index: i, Term: term})
	}
	return out
}

// memoryStore is a store in memory that can be closed.
type memoryStore struct{ *raft.InmemStore }

func (memoryStore) Close() error { return nil }

// A founding that fails between its writes can be tried again.
func TestFoundingIsTriedAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3) // it waits for two others
	r := c.start("c1")
	self := Server{ID: "c1", Addr: r.raft}
	full := errors.New("no space left on device")
	fails := func(what string) {
		t.Helper()
		if err := r.Bootstrap(self); err == nil || !strings.Contains(err.Error(), full.Error()) || r.node.Load() != nil {
			t.Fatalf("founded without its %s: %v", what, err)
		}
	}
	fault := func(what string) error {
		if what == "append" {
			return full
		}
		return nil
	}
	r.disk.fault.Store(&fault)
	fails("first entry")
	r.disk.fault.Store(nil)
	setKeep := func(keep func([]byte) error) {
		r.members.start.Lock()
		defer r.members.start.Unlock()
		r.folder.keep = keep
	}
	setKeep(func([]byte) error { return full })
	fails("mark that it started")
	setKeep(nil)
	must(t, r.Bootstrap(self))
	c.leader().put(t, "k", "v")
	c.kill("c1")
	c.start("c1")
	if got := c.leader().fsm.get("k"); got != "v" {
		t.Errorf("after a restart k is %q", got)
	}
}
