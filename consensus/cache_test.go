package consensus

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// Updates of one large key leave no more of them in memory than the bound, whatever
// their number.
func TestHeldIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	const limit = 8 << 20
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.LogCacheBytes = limit }
	c.startAll(3)
	value := strings.Repeat("v", 1<<20)
	for i := range lessRaced(60) {
		c.leader().put(t, "k", fmt.Sprintf("%d%s", i, value))
	}
	all := append(c.followers(), c.leader())
	for _, n := range all {
		must(t, n.ReadBarrier(context.Background()))
		if held := n.Held(); held.LogCache > limit || held.LogCache < limit/2 || held.Queue > 0 {
			t.Errorf("%s holds %d bytes of the log and %d that are not on disk, of at most %d", n.cfg.ID, held.LogCache, held.Queue, limit)
		}
	}
	for _, n := range all {
		n.Trim(limit / 4)
		if held := n.Held().LogCache; held > limit/4 || held < limit/8 {
			t.Errorf("%s holds %d bytes of the log when it is to hold %d", n.cfg.ID, held, limit/4)
		}
		n.Trim(0)
		if held := n.Held().LogCache; held != 0 {
			t.Errorf("%s holds %d bytes of the log when it is to hold nothing", n.cfg.ID, held)
		}
	}
	c.leader().put(t, "k", "v")
	for _, n := range all {
		must(t, n.ReadBarrier(context.Background()))
	}
}

// The cache answers as the store does, and keeps the newest entries up to both its
// bounds, whatever is appended and removed.
func TestLogCache(t *testing.T) {
	t.Parallel()
	for _, entries := range []int{1, 2, 16} {
		store := raft.NewInmemStore()
		const limit = 20_000
		c := newLogCache(store, entries, limit)
		random := rand.New(rand.NewPCG(1, uint64(entries)))
		for step := range 3000 {
			first, _ := store.FirstIndex()
			last, _ := store.LastIndex()
			switch n := random.Uint64N(10); {
			case n == 0 && last > first+3:
				must(t, c.DeleteRange(last-random.Uint64N(3), last))
			case n == 1 && last > first+3:
				must(t, c.DeleteRange(first, first+random.Uint64N(last-first)))
			default:
				var logs []*raft.Log
				for i := range 1 + random.Uint64N(5) {
					logs = append(logs, &raft.Log{Index: last + 1 + i, Term: uint64(step), Data: make([]byte, random.IntN(limit/10)*random.IntN(12))})
				}
				must(t, c.StoreLogs(logs))
				if newest := logs[len(logs)-1]; (c.get(newest.Index) != nil) != (inMemory(newest) <= limit) {
					t.Fatalf("entry %d of %d bytes: held %v", newest.Index, len(newest.Data), c.get(newest.Index) != nil)
				}
			}
			first, _ = store.FirstIndex()
			last, _ = store.LastIndex()
			var held, count int64
			for i := first; i <= last; i++ {
				var a, b raft.Log
				must(t, store.GetLog(i, &a))
				must(t, c.GetLog(i, &b))
				if a.Index != b.Index || a.Term != b.Term || !bytes.Equal(a.Data, b.Data) {
					t.Fatalf("step %d: entry %d is %d of term %d in the store, %d of term %d in the cache", step, i, a.Index, a.Term, b.Index, b.Term)
				}
				if l := c.get(i); l != nil {
					held += inMemory(l)
					count++
				}
			}
			if held != c.held() || held > limit || count > int64(entries) {
				t.Fatalf("step %d: it holds %d entries of %d bytes and says %d", step, count, held, c.held())
			}
			for i, l := range c.ring {
				if l != nil && c.get(l.Index) != l {
					t.Fatalf("step %d: place %d keeps entry %d, which is not held", step, i, l.Index)
				}
			}
		}
	}
}

// A leader's log whose disk stands still grows to the bound of the queue, by bytes as
// by entries, and one write takes a part of it.
func TestQueueIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	d := newDisk(memoryStore{raft.NewInmemStore()}, raft.NewInmemSnapshotStore(), slog.New(slog.DiscardHandler), stop)
	d.leads = func() bool { return true }
	d.queue.limit = 4 << 20
	large := func(i uint64) []*raft.Log { return []*raft.Log{{Index: i, Data: make([]byte, 1<<20)}} }
	added := make(chan uint64, 64)
	go func() {
		for i := uint64(1); i <= 64; i++ {
			if d.StoreLogs(large(i)) != nil {
				return
			}
			added <- i
		}
	}()
	eventually(t, "a full queue", func() error {
		if held := d.queue.held(); held < d.queue.limit {
			return fmt.Errorf("%d bytes are held", held)
		}
		return nil
	})
	if held := d.queue.held(); held > d.queue.limit+2<<20 {
		t.Errorf("%d bytes are held, at most %d and an append should be", held, d.queue.limit)
	}
	if logs := d.queue.next(); int64(len(logs)) > d.queue.limit/4>>20+1 {
		t.Errorf("one write takes %d entries of 1 MiB", len(logs))
	}
	done := make(chan struct{})
	go func() { defer close(done); d.writeQueue() }()
	for i := range uint64(64) {
		if got := <-added; got != i+1 {
			t.Fatalf("entry %d came after %d", got, i)
		}
	}
	must(t, d.queue.flush())
	if held := d.queue.held(); held != 0 {
		t.Errorf("an empty queue holds %d bytes", held)
	}
	close(stop)
	<-done
}
