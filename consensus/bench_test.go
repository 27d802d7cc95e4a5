package consensus

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Benchmarks run three replicas in this process on real disks, with a value of
// 256 bytes. Run with: go test -run '^$' -bench . -benchtime 3s ./consensus

func BenchmarkApply(b *testing.B) {
	for _, kind := range logKinds {
		b.Run("log="+kind.name, func(b *testing.B) { benchApply(b, kind.name) })
	}
}

func benchApply(b *testing.B, kind string) {
	c := newCluster(b, 3)
	c.logStore = kind
	c.startAll(3)
	for _, on := range []string{"leader", "follower"} {
		for _, clients := range []int{1, 32, 100} {
			b.Run(fmt.Sprintf("%s/clients=%d", on, clients), func(b *testing.B) {
				n := c.leader()
				if on == "follower" {
					n = c.followers()[0]
				}
				before := n.Status().Disk
				benchClients(b, clients, func(i int64) error {
					_, err := n.Apply(context.Background(), fmt.Appendf(nil, "%08d=%0256d", i%10000, i))
					return err
				})
				after := n.Status().Disk
				if d := after.Appends - before.Appends; d > 0 {
					b.ReportMetric(float64(after.Entries-before.Entries)/float64(d), "entries/fsync")
				}
			})
		}
	}
}

func BenchmarkReadBarrier(b *testing.B) {
	c := newCluster(b, 3).startAll(3)
	for _, on := range []string{"leader", "follower"} {
		for _, clients := range []int{1, 32, 100} {
			b.Run(fmt.Sprintf("%s/clients=%d", on, clients), func(b *testing.B) {
				n := c.leader()
				if on == "follower" {
					n = c.followers()[0]
				}
				benchClients(b, clients, func(int64) error { return n.ReadBarrier(context.Background()) })
			})
		}
	}
}

// benchClients spreads b.N calls over the clients and reports rate and p50.
func benchClients(b *testing.B, clients int, call func(i int64) error) {
	var (
		next atomic.Int64
		mu   sync.Mutex
		all  []time.Duration
		wg   sync.WaitGroup
	)
	b.ResetTimer()
	start := time.Now()
	for range clients {
		wg.Go(func() {
			var took []time.Duration
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				t := time.Now()
				if err := call(i); err != nil {
					b.Error(err)
					return
				}
				took = append(took, time.Since(t))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	wg.Wait()
	b.StopTimer()
	slices.Sort(all)
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "ops/s")
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkFailover kills the leader while a client writes through a surviving
// follower, and reports the longest time without a successful write.
func BenchmarkFailover(b *testing.B) {
	c := newCluster(b, 3).startAll(3)
	var gaps []time.Duration
	for range b.N {
		leader, n := c.leader(), c.followers()[0]
		id := leader.cfg.ID
		ctx, cancel := context.WithCancel(context.Background())
		var last, gap atomic.Int64
		last.Store(time.Now().UnixNano())
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if _, err := n.Apply(ctx, fmt.Appendf(nil, "k=%d", i)); err == nil {
					now := time.Now().UnixNano()
					gap.Store(max(gap.Load(), now-last.Swap(now)))
				}
			}
		})
		time.Sleep(200 * time.Millisecond)
		gap.Store(0)
		c.kill(id)
		time.Sleep(time.Second)
		c.leader()
		cancel()
		wg.Wait()
		gaps = append(gaps, time.Duration(gap.Load()))
		c.start(id)
		eventually(b, "the killed replica to follow", func() error {
			return c.node(id).ReadBarrier(context.Background())
		})
	}
	slices.Sort(gaps)
	b.ReportMetric(float64(gaps[len(gaps)/2].Milliseconds()), "gap-p50-ms")
	b.ReportMetric(float64(gaps[len(gaps)-1].Milliseconds()), "gap-max-ms")
}
