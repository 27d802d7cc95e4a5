package service

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"timonel/network/tables"
)

// touched says whether a table must be written anew since somebody else changed it.
func (s *side) touched(ctx context.Context, log *slog.Logger) bool {
	return s.trust.Touched(ctx, tables.Of{What: "Services", Family: s.compiler.family.nft, Name: s.name}, s.plausible, log)
}

// plausible says whether a table has the chains, maps and sets that it must have, with
// as many rules as they must have, and no others. Of a Service's own chains, which have a
// slash in their names, nothing is known.
func (s *side) plausible(l *tables.Listing) bool {
	want := map[string]int{}
	for _, c := range fixedChains(s.compiler.family, s.around) {
		want[c.name] = len(c.rules)
	}
	for _, h := range hooks {
		want[h.name] = len(ownRules(h.hook, s.compiler.family, s.around)) + len(h.rules)
	}
	for name := range s.table.refs {
		if !strings.Contains(name, "\x00") {
			want[name] = -1
		}
	}
	for _, name := range l.Names["chain"] {
		n, known := want[name]
		_, stale := s.table.stale[name]
		switch {
		case known && n >= 0 && n != l.Rules[name], known && n < 0 && l.Rules[name] == 0, !known && !stale && !strings.Contains(name, "/"):
			return false
		}
		delete(want, name)
	}
	for _, m := range fixedMaps(s.compiler.family) {
		kind := "set"
		if isMap(m.name) {
			kind = "map"
		}
		if !slices.Contains(l.Names[kind], m.name) {
			return false
		}
	}
	return len(want) == 0
}
