package service

import (
	"fmt"
	"io"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// WriteMetrics writes [Stats] as Prometheus reads it.
func (p *Proxy) WriteMetrics(w io.Writer) {
	s := p.Stats()
	one := func(name, kind, help string, value func(FamilyStats) any) {
		fmt.Fprintf(w, "# HELP timonel_agent_services_%s %s\n# TYPE timonel_agent_services_%s %s\n", name, help, name, kind)
		for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
			fmt.Fprintf(w, "timonel_agent_services_%s{family=%q} %v\n", name, strings.ToLower(string(family)), value(s.Families[family]))
		}
	}
	for _, m := range []struct {
		name, help string
		value      int
	}{{"known", "Services that the node knows", s.Services}, {"endpoints_known", "Endpoints of Services that the node knows", s.Endpoints}} {
		fmt.Fprintf(w, "# HELP timonel_agent_services_%s %s\n# TYPE timonel_agent_services_%s gauge\ntimonel_agent_services_%s %d\n", m.name, m.help, m.name, m.name, m.value)
	}
	one("syncs_total", "counter", "Changes of the nftables table, failed ones too", func(f FamilyStats) any { return f.Syncs })
	one("sync_failures_total", "counter", "Changes of the nftables table that the kernel did not take", func(f FamilyStats) any { return f.Failures })
	one("whole_syncs_total", "counter", "How often the whole table was written", func(f FamilyStats) any { return f.Whole })
	one("sync_seconds_total", "counter", "Time that changes of the table took", func(f FamilyStats) any { return f.Total.Seconds() })
	one("last_sync_seconds", "gauge", "Time that the last change of the table took", func(f FamilyStats) any { return f.Last.Seconds() })
	one("refused", "gauge", "Services whose rules the kernel does not take", func(f FamilyStats) any { return f.Refused })
	one("contested", "gauge", "Services that ask for an address and port that another one has", func(f FamilyStats) any { return f.Contested })
}
