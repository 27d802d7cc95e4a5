package service

import (
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// late is for how long changes may be without effect before this node says of itself
// that it is not healthy.
const late = 2 * time.Minute

// Stats are what a Proxy has done and has.
type Stats struct {
	// Services and Endpoints are how many the node knows.
	Services, Endpoints int
	Families            map[corev1.IPFamily]FamilyStats
}

// FamilyStats are those of one table.
type FamilyStats struct {
	// Syncs are transactions or attempts at one, of which Failures failed; Whole wrote
	// the whole table.
	Syncs, Failures, Whole uint64
	// Last and Total are how long the last and all took.
	Last, Total time.Duration
	// Refused are Services whose rules the kernel does not take; Contested those that
	// ask for what another has.
	Refused, Contested int
}

type stats struct {
	mu       sync.Mutex
	revision uint64
	family   map[corev1.IPFamily]FamilyStats
	failed   map[corev1.IPFamily]time.Time // since when
}

func (s *stats) synced(side *side, did bool, took time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.family == nil {
		s.family, s.failed = map[corev1.IPFamily]FamilyStats{}, map[corev1.IPFamily]time.Time{}
	}
	ip := side.compiler.family.ip
	f := s.family[ip]
	if did {
		f.Syncs++
		f.Last, f.Total = took, f.Total+took
	}
	switch {
	case err == nil:
		delete(s.failed, ip)
	default:
		f.Failures++
		if s.failed[ip].IsZero() {
			s.failed[ip] = time.Now()
		}
	}
	f.Whole, f.Refused, f.Contested = side.wholes, len(side.held), len(side.claims.lost)
	s.family[ip] = f
}

// took notes that both tables, or what of them the kernel takes, are what a View says.
func (s *stats) took(revision uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision = revision
}

// behind says whether some table has not been what it should be for too long.
func (s *stats) behind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, since := range s.failed {
		if time.Since(since) > late {
			return true
		}
	}
	return false
}

// Revision is that of the View that was taken last.
func (p *Proxy) Revision() uint64 {
	p.stats.mu.Lock()
	defer p.stats.mu.Unlock()
	return p.stats.revision
}

// Stats returns what the Proxy has done.
func (p *Proxy) Stats() Stats {
	view := p.cfg.Store.View()
	out := Stats{Families: map[corev1.IPFamily]FamilyStats{}}
	for name := range view.Services() {
		out.Services++
		for _, s := range view.Slices(name) {
			out.Endpoints += len(s.Endpoints)
		}
	}
	p.stats.mu.Lock()
	defer p.stats.mu.Unlock()
	for ip, f := range p.stats.family {
		out.Families[ip] = f
	}
	return out
}
