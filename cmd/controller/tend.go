package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// idleGC is the GOGC of a controller that has little to do: its heap may grow
	// by a quarter between collections.
	idleGC = 25
	// A busy one's may grow by what it allocates in four seconds, or in as long as it takes
	// for a collection, which marks what lives at marked bytes a second, to be no more than a
	// fortieth of a processor: within these bounds, but for Go's default of what lives, and
	// by no more than four times that. More is not good: what outlives a
	// collection lies scattered over all that was allocated since the one before, and
	// keeps its pages from the system.
	minGrowth, maxGrowth = 16 << 20, 256 << 20
	maxBusy              = 400
	marked               = 1 << 30
	// busyRate is from how many bytes allocated per second a controller is busy.
	// At that rate an idle one would collect every four seconds or so.
	busyRate = 4 << 20
	// tendEvery is how often to look which it is, quietFor how often in a row it
	// must have been quiet to be called idle.
	tendEvery, quietFor = 2 * time.Second, 4
	// tidyEvery is how often, in such looks, an idle controller gives back what a busy
	// time has left behind, tidyFrom from how much on it is worth a collection.
	tidyEvery, tidyFrom = 8, 4 << 20
	// idleLogCache is what an idle controller keeps of the log's newest entries, which
	// its followers have.
	idleLogCache = 1 << 20
	// idleReplaced is what it keeps of replaced objects, for agents that come back: older
	// ones are sent all that is theirs.
	idleReplaced = 256 << 10
)

// trim lets go of what only a busy controller has a use for.
func (k *controller) trim() {
	k.replica.Trim(idleLogCache)
	k.decoded.Age()
	k.cache.Trim(idleReplaced)
	if err := k.store.Spill(); err != nil {
		k.log.Warn("a part of the history is lost: watches and lists that would go on in it begin again", "error", err)
	}
}

// tendMemory keeps the memory of a controller small while it has little to do,
// and leaves the collector alone while it is busy, as at the start: of that, nothing is
// left a minute later but what lives. trim is called while it is idle. It ends with ctx.
func tendMemory(ctx context.Context, trim func()) error {
	if os.Getenv("GOGC") != "" {
		return nil // the operator decides
	}
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	last, lastTime := sample[0].Value.Uint64(), time.Now()
	var mood mood // the start is a busy time
	var stacks stackHint
	defer stacks.set(0)
	percent := 100
	setGC := func(to int) { // a change stops the world, so small ones are not worth it
		if to < percent*7/8 || to > percent*9/8 {
			percent = to
			debug.SetGCPercent(to)
		}
	}
	for pause(ctx, tendEvery) {
		metrics.Read(sample)
		allocated, now := sample[0].Value.Uint64(), time.Now()
		rate := float64(allocated-last) / now.Sub(lastTime).Seconds()
		last, lastTime = allocated, now
		switch mood.look(rate) {
		case works:
			setGC(busyGC(sample[1].Value.Uint64(), rate))
			stacks.set(runtime.NumGoroutine())
		case comesToRest:
			stacks.set(0)
			setGC(idleGC)
			trim()
			debug.FreeOSMemory()
			_ = releaseFiles() // an economy, nothing depends on it
		case tidies:
			trim()
			if untidy() > tidyFrom {
				debug.FreeOSMemory()
			}
			_ = releaseFiles() // what is used is mapped again within milliseconds
		}
	}
	return ctx.Err()
}

// mood is whether a controller is busy, as it is at its start, or idle.
type mood struct {
	idle  bool
	quiet int // looks in a row that found little to do
}

// What there is to do after a look.
type chore int

const (
	nothing chore = iota
	works
	comesToRest
	tidies
)

// look is told how many bytes a second were allocated since the last look.
func (m *mood) look(rate float64) chore {
	if rate >= busyRate {
		*m = mood{}
		return works
	}
	m.quiet++
	switch {
	case !m.idle && m.quiet == quietFor:
		m.idle = true
		return comesToRest
	case m.idle && m.quiet%tidyEvery == 0:
		return tidies
	}
	return nothing
}

// stackHint makes goroutines start with stacks of 16 KiB: a request of the API runs
// on three new goroutines, each of which would else grow its stack by copying it
// three or four times, a tenth of what a request costs. The runtime starts
// goroutines with what stacks use on average (runtime/stack.go,
// gcComputeStartingStackSize), and the many that wait use little; so one more waits
// here, with a stack deep enough for all.
type stackHint struct {
	depth   int
	release chan struct{}
}

// stackFor is the part of each goroutine in that one's stack: with it the average
// is between 8 and 16 KiB, and is rounded up to a power of two.
const stackFor = 11 << 10

// set is told how many goroutines there are; 0 ends the hint.
func (h *stackHint) set(goroutines int) {
	depth := goroutines * stackFor
	if depth > h.depth*3/4 && depth < h.depth*5/4 || depth == h.depth {
		return
	}
	if h.release != nil {
		close(h.release)
		h.release = nil
	}
	if h.depth = depth; depth > 0 {
		h.release = make(chan struct{})
		go holdStack(depth, h.release)
	}
}

// holdStack waits with a stack of that many bytes.
//
//go:noinline
func holdStack(depth int, release <-chan struct{}) {
	var frame [16 << 10]byte
	if depth > len(frame) {
		holdStack(depth-len(frame), release)
	} else {
		<-release
	}
	runtime.KeepAlive(&frame)
}

// busyGC is the GOGC of a busy controller with so many bytes live that allocates rate
// bytes a second.
func busyGC(live uint64, rate float64) int {
	seconds := max(4, 40*float64(live)/marked)
	growth := min(max(seconds*rate, minGrowth), max(maxGrowth, float64(live)))
	return int(min(growth*100/max(float64(live), 1), maxBusy))
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// untidy is how much memory a collection might give back: what was allocated since the
// last one and what that has freed and kept.
func untidy() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}}
	metrics.Read(sample)
	n := sample[2].Value.Uint64() + sample[3].Value.Uint64()
	if objects, live := sample[0].Value.Uint64(), sample[1].Value.Uint64(); objects > live {
		n += objects - live
	}
	return n
}

// releaseFiles tells the kernel that the pages of files need not stay mapped: half of
// the program's ran at the start alone, and the log's store has been read all over when
// there was much to do. What is needed is mapped again from the page cache when it is
// next touched. Left alone are pages that can be written to, and mappings with pages
// that were: those of libraries have addresses in them that are nowhere else, and cannot
// be written to any more.
func releaseFiles() error {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	var start, end uintptr // of the mapping that the lines are about, if it is one to release
	s := bufio.NewScanner(f)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		switch {
		case len(fields) == 0:
		case !strings.HasSuffix(fields[0], ":"): // start-end perms offset device inode path
			start, end = 0, 0
			if len(fields) < 6 || !strings.HasPrefix(fields[5], "/") || strings.Contains(fields[1], "w") {
				continue
			}
			if _, err := fmt.Sscanf(fields[0], "%x-%x", &start, &end); err != nil {
				return err
			}
		case fields[0] == "Anonymous:" && fields[1] == "0" && end != 0:
			if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED); errno != 0 {
				return fmt.Errorf("madvise %x-%x: %w", start, end, errno)
			}
		}
	}
	return s.Err()
}

// residentMemory is how many bytes this process holds in memory, and how many of
// them are anonymous (not backed by the program's file). Zeros where the kernel
// does not say.
func residentMemory() (resident, anonymous int64) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), ":")
		kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
		switch name {
		case "VmRSS":
			resident = kib << 10
		case "RssAnon":
			anonymous = kib << 10
		}
	}
	return resident, anonymous
}
