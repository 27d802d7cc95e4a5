package policy

import (
	"fmt"
	"io"
	"time"
)

// Stats are what Rules have done and have.
type Stats struct {
	// Pods are those of this node that have addresses; Policies those that hold for one.
	Pods, Policies int
	// Groups, Elements and Rules are what is in the table of policies.
	Groups, Elements, Rules int
	// Refused are policies that the kernel does not take.
	Refused int
	// Syncs are changes, or attempts at one, of which Failures failed.
	Syncs, Failures uint64
	// Last and Total are how long the last and all took.
	Last, Total time.Duration
}

func (s *Stats) took(d time.Duration, err error) {
	s.Syncs++
	s.Last, s.Total = d, s.Total+d
	if err != nil {
		s.Failures++
	}
}

// Stats returns what the Rules have done.
func (r *Rules) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// WriteMetrics writes [Stats] as Prometheus reads it.
func (r *Rules) WriteMetrics(w io.Writer) {
	s := r.Stats()
	for _, m := range []struct {
		name, kind, help string
		value            any
	}{
		{"pods", "gauge", "Pods of this node that are held to their addresses", s.Pods},
		{"policies", "gauge", "Network policies that hold for a pod of this node", s.Policies},
		{"groups", "gauge", "Groups of addresses that these policies name", s.Groups},
		{"elements", "gauge", "Elements of sets of the nftables table", s.Elements},
		{"rules", "gauge", "Rules of the nftables table", s.Rules},
		{"refused", "gauge", "Network policies whose rules the kernel does not take", s.Refused},
		{"syncs_total", "counter", "Changes of the nftables tables, failed ones too", s.Syncs},
		{"sync_failures_total", "counter", "Changes of the nftables tables that the kernel did not take", s.Failures},
		{"sync_seconds_total", "counter", "Time that changes of the tables took", s.Total.Seconds()},
		{"last_sync_seconds", "gauge", "Time that the last change of the tables took", s.Last.Seconds()},
	} {
		fmt.Fprintf(w, "# HELP timonel_agent_policy_%s %s\n# TYPE timonel_agent_policy_%s %s\ntimonel_agent_policy_%s %v\n", m.name, m.help, m.name, m.kind, m.name, m.value)
	}
}
