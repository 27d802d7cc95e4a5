package consensus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// TestReadToBeApplied varies the sizes of entries that come without their data: the state machine
// gets each once, in order, and few bytes at a time; one that cannot be read ends it.
func TestReadToBeApplied(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 1000, 300 << 10, 3 << 20} {
		for _, every := range []int{1, 2, 7, 1000} { // so many have their data
			t.Run(fmt.Sprint(size, "-", every), func(t *testing.T) {
				t.Parallel()
				stop := make(chan struct{})
				fsm := &sizesFSM{}
				m := newMachine(fsm, stop)
				const entries, broken = 40, 35
				data := map[uint64][]byte{}
				var logs []*raft.Log
				for i := range uint64(entries) {
					l := logEntry(i+1, 1, command(newRequestID(), 1, strings.Repeat("x", size)))
					data[l.Index] = l.Data
					if (i+1)%uint64(every) != 0 && i+1 != broken || i+1 == broken+1 {
						l.Data = nil
					}
					if every == 1 && i%2 == 0 {
						l.Data = nil
					}
					logs = append(logs, l)
				}
				m.read = func(index uint64, l *raft.Log) error {
					if index > broken {
						return errors.New("the disk is gone")
					}
					*l = raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: data[index]}
					return nil
				}
				corrupt := make(chan error, 1)
				m.onCorrupt = func(err error) { corrupt <- err; close(stop) }
				if n := len(m.ApplyBatch(logs)); n != entries {
					t.Errorf("%d answers", n)
				}
				select {
				case err := <-corrupt:
					if !strings.Contains(err.Error(), "the disk is gone") {
						t.Error(err)
					}
				default:
					t.Error("nobody was told of an entry that cannot be read")
				}
				last := uint64(0)
				for _, batch := range fsm.batches {
					bytes := 0
					for _, e := range batch {
						if e.Index != last+1 || len(e.Command) != size {
							t.Fatalf("entry %d of %d bytes came after %d", e.Index, len(e.Command), last)
						}
						last = e.Index
						bytes += len(e.Command)
					}
					if every > entries && bytes > applyPortion+2*size { // one had its data
						t.Errorf("%d bytes at once", bytes)
					}
				}
				if last > broken || every == 1000 && size > 1<<20 && last < broken-2 {
					t.Errorf("applied up to %d", last)
				}
				for _, l := range logs {
					if every == 1000 && l.Index < last && l.Data != nil && l.Index != broken {
						t.Errorf("the data of %d is held", l.Index)
					}
				}
			})
		}
	}
}

// sizesFSM keeps what it is given.
type sizesFSM struct{ batches [][]Entry }

func (f *sizesFSM) ApplyBatch(entries []Entry) ([]any, error) {
	f.batches = append(f.batches, entries)
	return make([]any, len(entries)), nil
}
func (f *sizesFSM) Snapshot() (SnapshotWriter, error) { return nil, errors.New("not here") }
func (f *sizesFSM) Restore(io.Reader) error           { return errors.New("not here") }

// TestSlowStateMachine starts a replica again whose state machine stands still: of the log
// that it has to apply, there is only so much in memory, and all of it is applied when it
// goes on.
func TestSlowStateMachine(t *testing.T) { // not parallel: it measures the heap
	c := newCluster(t, 1)
	c.tune = func(cfg *Config) {
		cfg.ApplyBytes, cfg.LogCacheBytes, cfg.QueueBytes, cfg.ProposeTimeout = 1<<20, 1<<20, 1<<20, time.Minute
	}
	n := c.startAll(1).leader()
	const entries, size = 120, 512 << 10
	random := strings.Repeat("0123456789abcdef", size/16)
	for i := range entries {
		if _, err := n.Apply(t.Context(), []byte(fmt.Sprint("k", i, "=", random))); err != nil {
			t.Fatal(err)
		}
	}
	index, _ := n.machine.position()
	c.kill("c1")
	fsm := &standing{mapFSM: newMapFSM(), resume: make(chan struct{})}
	runtime.GC()
	before := heap()
	cfg := c.config("c1")
	c.tune(&cfg)
	r, err := Open(context.Background(), cfg, fsm)
	must(t, err)
	t.Cleanup(func() { r.close(false) })
	eventually(t, "Raft to have handed the log to the state machine", func() error {
		if node := r.node.Load(); node == nil || node.AppliedIndex() < index {
			return errors.New("it has not")
		}
		return nil
	})
	runtime.GC()
	if grown := int64(heap()) - int64(before); grown > entries*size/4 {
		t.Errorf("%d MiB more are held for a log of %d", grown>>20, entries*size>>20)
	} else {
		t.Logf("%d MiB more are held for a log of %d", grown>>20, entries*size>>20)
	}
	close(fsm.resume)
	must(t, r.ReadBarrier(t.Context()))
	for i := range entries {
		if fsm.get(fmt.Sprint("k", i)) != random {
			t.Fatalf("entry %d is not applied", i)
		}
	}
}

// standing is a state machine that waits.
type standing struct {
	*mapFSM
	resume chan struct{}
}

func (s *standing) ApplyBatch(entries []Entry) ([]any, error) {
	<-s.resume
	return s.mapFSM.ApplyBatch(entries)
}
