package dispatch

import (
	"net/netip"
	"sync"
	"time"
)

// Failed joins of one source: a few at once, then one every ten seconds. Those of
// others, and those that succeed, are not held up.
const (
	failureBurst = 10
	failureEvery = 10 * time.Second
	// sourcesMax bounds how many sources are remembered, some 100 bytes each. Of
	// sourcesLook of them, the one that may try soonest is forgotten for a new one.
	sourcesMax  = 8192
	sourcesLook = 16
	// Refusals that are logged, of all sources together.
	logBurst = 20
	logEvery = time.Second
)

// bucket holds what may be spent, and fills with time.
type bucket struct {
	full  time.Time // when it is full, or was
	every time.Duration
	burst int
}

// take spends one, if there is one.
func (b *bucket) take(now time.Time) bool {
	if !b.has(now) {
		return false
	}
	if b.full.Before(now) {
		b.full = now
	}
	b.full = b.full.Add(b.every)
	return true
}

func (b *bucket) has(now time.Time) bool {
	return b.full.Sub(now) <= time.Duration(b.burst-1)*b.every
}

// wait is how long it takes until there is one, when there is none.
func (b *bucket) wait(now time.Time) time.Duration {
	return b.full.Sub(now) - time.Duration(b.burst-1)*b.every
}

// attempts counts failed joins by source, so that secrets cannot be guessed and
// the log is not filled. An IPv6 source is its /64 network.
type attempts struct {
	now func() time.Time

	mu       sync.Mutex
	sources  map[netip.Addr]*bucket
	log      bucket
	unlogged int
}

func newAttempts(now func() time.Time) *attempts {
	return &attempts{now: now, sources: make(map[netip.Addr]*bucket), log: bucket{every: logEvery, burst: logBurst}}
}

// allowed says whether a source may try, and if not, when.
func (a *attempts) allowed(source netip.Addr) (wait time.Duration, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	b := a.sources[source]
	if b == nil || b.has(now) {
		return 0, true
	}
	return b.wait(now), false
}

// failed counts a failure, and says whether to log it and how many were not logged
// before.
func (a *attempts) failed(source netip.Addr) (log bool, unlogged int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	b := a.sources[source]
	if b == nil {
		if len(a.sources) >= sourcesMax {
			a.forget(now)
		}
		b = &bucket{every: failureEvery, burst: failureBurst}
		a.sources[source] = b
	}
	b.take(now)
	if !a.log.take(now) {
		a.unlogged++
		return false, 0
	}
	unlogged, a.unlogged = a.unlogged, 0
	return true, unlogged
}

// forget looks at some sources, as looking at all for each stranger would be dear, and
// drops those that may try as if they had never failed, or else the one that is nearest
// to that.
func (a *attempts) forget(now time.Time) {
	var oldest netip.Addr
	var at time.Time
	looked := 0
	for source, b := range a.sources {
		if looked++; looked > sourcesLook {
			break
		}
		if !b.full.After(now) {
			delete(a.sources, source)
			continue
		}
		if at.IsZero() || b.full.Before(at) {
			oldest, at = source, b.full
		}
	}
	if len(a.sources) >= sourcesMax {
		delete(a.sources, oldest)
	}
}
