package sim

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

var (
	runs = flag.Int("runs", lives, "how many seeds to run")
	from = flag.Uint64("from", 1, "the first of them")
	seed = flag.Uint64("seed", 0, "run this seed alone, and print what was done; with -log, what replicas say")
	logs = flag.Bool("log", false, "with -seed: print the replicas' logs")
)

// TestSim runs many short lives of a cluster, each from one seed.
func TestSim(t *testing.T) {
	first, last := *from, *from+uint64(*runs)
	if *seed != 0 {
		first, last = *seed, *seed+1
	}
	failFast := flag.Lookup("test.failfast").Value.String() == "true"
	for s := first; s < last; s++ {
		t.Run(fmt.Sprintf("seed=%d", s), func(t *testing.T) {
			t.Parallel()
			if failFast && failed.Load() {
				t.SkipNow() // go test would begin them all the same, being parallel
			}
			defer forgive()
			synctest.Test(t, func(t *testing.T) { one(t, s) })
		})
	}
	t.Cleanup(func() {
		n := stuck.Load()
		t.Logf("%d of %d clusters needed a restart of their replicas to recover", n, last-first)
		if few := int64(last-first) / 1000; n > few {
			t.Errorf("more than %d of them did", few)
		}
	})
}

var (
	stuck  atomic.Int64 // how many clusters needed a restart
	failed atomic.Bool  // a life had violations
)

// forgive recovers from goroutines left behind at the end of a bubble: some of
// Raft's futures are never answered when it is shut down.
func forgive() {
	if p := recover(); p != nil && !strings.Contains(fmt.Sprint(p), "main bubble goroutine has exited") {
		panic(p)
	}
}

func one(t *testing.T, s uint64) {
	log := slog.New(slog.DiscardHandler)
	if *seed != 0 && *logs {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	r := Run(s, log)
	if *seed != 0 || len(r.Violations) > 0 {
		t.Logf("%d operations; faults:\n%s", len(r.History.Operations), strings.Join(r.Faults, "\n"))
	}
	if r.Stuck != "" {
		stuck.Add(1)
		t.Logf("seed %d: %s\nfaults:\n%s", s, r.Stuck, strings.Join(r.Faults, "\n"))
	}
	if len(r.Violations) == 0 {
		return
	}
	failed.Store(true)
	dir, err := os.MkdirTemp("", "timonel-sim-")
	if err == nil {
		err = r.History.Save(filepath.Join(dir, "history.json"))
	}
	t.Errorf("seed %d:\n%s\nhistory kept in %s (%v); again: go test ./test/sim -run TestSim -seed %d -v", s, strings.Join(r.Violations, "\n"), dir, err, s)
}
