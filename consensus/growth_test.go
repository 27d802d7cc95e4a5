//go:build !race

package consensus

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The log stays bounded under constant load, however much goes through it: by
// twice (wal) or three times (boltdb) what must be kept, the entries since the last
// snapshot and TrailingLogs, and two of the pieces in which a store grows.
// The race detector makes five minutes of it.
//
// With TIMONEL_GROWTH=1 it is an hour of 1,000 writes a second at the default
// settings, as fast as the disk takes them, and prints size and rate over time.
func TestLogStaysBounded(t *testing.T) {
	t.Parallel()
	for _, kind := range logKinds {
		t.Run(kind.name, func(t *testing.T) {
			if os.Getenv("TIMONEL_GROWTH") == "" {
				t.Parallel()
				testLogStaysBounded(t, kind, growth{
					entries: 32_000, size: 10_000, clients: 256, samples: 12,
					threshold: 500, trailing: 500, interval: 20 * time.Millisecond,
				})
				return
			}
			testLogStaysBounded(t, kind, growth{
				entries: 3_600_000, size: 512, clients: 512, samples: 40,
				// A minute holds 60,000 entries at 1,000/s; here they come some 50 times faster.
				threshold: 10_000, trailing: 10_000, interval: 60 * time.Second / 50,
			})
		})
	}
}

// growth is a constant load.
type growth struct {
	entries, size, clients, samples int
	threshold, trailing             uint64
	interval                        time.Duration
}

func testLogStaysBounded(t *testing.T, kind logKind, g growth) {
	c := newCluster(t, 1)
	c.logStore = kind.name
	c.tune = func(cfg *Config) {
		cfg.SnapshotThreshold, cfg.TrailingLogs, cfg.SnapshotInterval = g.threshold, g.trailing, g.interval
	}
	c.startAll(1)
	n := c.leader()
	path := filepath.Join(c.dir, "c1", kind.file)

	value := strings.Repeat("v", g.size)
	var next, kept atomic.Int64
	var work sync.WaitGroup
	for i := range g.clients {
		random := rand.New(rand.NewPCG(uint64(i), 0))
		work.Go(func() {
			for next.Add(1) <= int64(g.entries) {
				// Lengths vary, so that freed places do not fit exactly.
				cmd := fmt.Appendf(nil, "%04d=%s", random.IntN(1000), value[:g.size/2+random.IntN(g.size/2)])
				if _, err := n.Apply(context.Background(), cmd); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { work.Wait(); close(done) }()

	var sizes []int64
	var rates []float64
	begin, last, lastAt := time.Now(), int64(0), time.Now()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(20 * time.Millisecond):
		}
		s := n.Status()
		if s.FirstIndex > 0 {
			kept.Store(max(kept.Load(), int64(s.LastIndex-s.FirstIndex)))
		}
		written := min(next.Load(), int64(g.entries))
		if written-last < int64(g.entries/g.samples) && running {
			continue
		}
		now := time.Now()
		sizes = append(sizes, sizeOf(t, path))
		rates = append(rates, float64(written-last)/now.Sub(lastAt).Seconds())
		if os.Getenv("TIMONEL_GROWTH") != "" {
			t.Logf("%8s %9d entries %7.1f MB in the log, entries %d to %d, %6.0f/s", now.Sub(begin).Round(time.Second), written,
				float64(sizes[len(sizes)-1])/1e6, s.FirstIndex, s.LastIndex, rates[len(rates)-1])
		}
		last, lastAt = written, now
	}
	if t.Failed() {
		return
	}
	grain, factor := int64(16<<20), int64(3) // bbolt's AllocSize; it leaves the pages of entries in order half full
	if kind.name == LogStoreWAL {
		grain, factor = walSegment, 2
	}
	live := kept.Load() * int64(g.size)
	written, biggest := int64(g.entries)*int64(g.size)*3/4, slices.Max(sizes)
	t.Logf("%s: %.0f MB went through the log, at most %.1f MB of it were to be kept; its size was at most %.1f MB; %.0f/s in the first tenth, %.0f/s in the last",
		kind.name, float64(written)/1e6, float64(live)/1e6, float64(biggest)/1e6, mean(rates[1:1+len(rates)/10]), mean(rates[len(rates)-1-len(rates)/10:len(rates)-1]))
	limit := factor*live + 2*grain
	if written < limit {
		t.Errorf("only %d bytes went through it, and it may have %d", written, limit)
	}
	if biggest > limit {
		t.Errorf("the log grew to %d bytes, more than %d", biggest, limit)
	}
	if first := n.Status().FirstIndex; first < uint64(g.entries)/4 {
		t.Errorf("after %d entries the log still begins at %d", g.entries, first)
	}
}

func mean(v []float64) (sum float64) {
	for _, x := range v {
		sum += x
	}
	return sum / float64(max(1, len(v)))
}
