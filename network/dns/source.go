package dns

import (
	"net/netip"
	"sync"
	"time"
)

const (
	// rate is how many queries of one address are answered in a second, and burst how
	// many at once; one that takes long counts as many.
	rate  = 10_000
	burst = 10_000
	// costs is how long one query may take.
	costs = 20 * time.Microsecond
	// waiting is how many queries of one address may wait for other servers, and
	// waitingAll how many of all, as CoreDNS' max_concurrent in clusters.
	waiting    = 100
	waitingAll = 1000
	// connections is how many one address may have by TCP, connectionsAll how many
	// all.
	connections    = 50
	connectionsAll = 500
	// few are as many as a client may have of the last quarter, which is for those that
	// have few: so no ten clients keep all others out.
	few = 4
	// maxSources is how many addresses are told apart.
	maxSources = 1 << 14
)

// sources bound what each client takes, so that one that floods takes it from itself.
type sources struct {
	now func() time.Time

	mu    sync.Mutex
	known map[netip.Addr]*source
	rest  source // of all that are not told apart
	holds [2]int // by use
	swept time.Time
}

// use is what a client holds.
type use int

const (
	holdsQuery use = iota
	holdsConnection
)

type source struct {
	tokens float64
	at     time.Time
	holds  [2]int
}

func newSources() *sources {
	return &sources{now: time.Now, known: make(map[netip.Addr]*source)}
}

// of returns a client's source, with its tokens as of now.
func (s *sources) of(ip netip.Addr, now time.Time) *source {
	src := s.known[ip]
	if src == nil {
		if len(s.known) >= maxSources && now.Sub(s.swept) > time.Second {
			s.sweep(now)
		}
		if src = &s.rest; len(s.known) < maxSources {
			src = &source{tokens: burst, at: now}
			s.known[ip] = src
		}
	}
	src.tokens = min(src.tokens+now.Sub(src.at).Seconds()*rate, burst)
	src.at = now
	return src
}

// sweep forgets those that are as if they had never asked.
func (s *sources) sweep(now time.Time) {
	s.swept = now
	for ip, src := range s.known {
		if now.Sub(src.at) > burst/rate*time.Second && src.holds == [2]int{} {
			delete(s.known, ip)
		}
	}
}

// allow says whether a query of a client is answered now.
func (s *sources) allow(ip netip.Addr) bool {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.of(ip, now)
	if src.tokens < 1 {
		return false
	}
	src.tokens--
	return true
}

// charge takes what a query took beyond what it may.
func (s *sources) charge(ip netip.Addr, took time.Duration) {
	if took < 2*costs {
		return
	}
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of(ip, now).tokens -= float64(took/costs) - 1
}

// hold takes room for a client, and says whether there is any; drop gives it back.
func (s *sources) hold(ip netip.Addr, u use) (drop func(), ok bool) {
	each, all := waiting, waitingAll
	if u == holdsConnection {
		each, all = connections, connectionsAll
	}
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.of(ip, now)
	if src.holds[u] >= each || s.holds[u] >= all || s.holds[u] >= all/4*3 && src.holds[u] >= few {
		return nil, false
	}
	src.holds[u]++
	s.holds[u]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		src.holds[u]--
		s.holds[u]--
	}, true
}
