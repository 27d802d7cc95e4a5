package service

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"timonel/network/tables"
)

// trust is why a table is believed to be as it was left.
type trust struct {
	seen    uint64        // of tables.Watcher.Others
	watched uint64        // the same, at the last look
	print   string        // of the table when it was surely ours,
	printOf uint64        // which was after so many of tables.Watcher.Ours; 0: never
	wholeAt time.Time     // when it was last written whole,
	took    time.Duration // and what that took
}

// Somebody else's transaction may have changed elements of a table without another
// trace. Then it is written anew, which packets do not notice, but no more often than
// each of these, so that it takes little of the node's time.
const (
	leastRest = time.Minute
	restTimes = 100
)

// touched says whether a table must be written anew since somebody else changed it.
func (s *side) touched(ctx context.Context, w *tables.Watcher, log *slog.Logger) bool {
	w.Look()
	s.watched = w.Others
	known := s.printOf != 0 && s.printOf == w.Ours
	if known && w.Others == s.seen {
		return false
	}
	print, whole, err := s.fingerprint(ctx)
	switch {
	case err != nil:
		log.Warn("the table of Services is gone or cannot be read; it is written anew", "family", s.compiler.family.ip, "error", tables.Brief(err))
		return true
	case !whole, known && print != s.print:
		log.Warn("somebody else has changed the table of Services; it is written anew", "family", s.compiler.family.ip)
		return true
	}
	s.print, s.printOf = print, w.Ours
	return w.Others != s.seen && time.Since(s.wholeAt) > max(leastRest, restTimes*s.took)
}

// fingerprint is what of a table costs little to read: its chains, maps and sets, and
// which rules there are. whole says that none is missing and none is too much, as far as
// that is known without what was there before.
func (s *side) fingerprint(ctx context.Context) (print string, whole bool, err error) {
	all, err := s.table.nft.ListAll(ctx)
	if err != nil {
		return "", false, err
	}
	var out []string
	for kind, names := range all {
		for _, n := range names {
			out = append(out, kind+" "+n)
		}
	}
	list, err := tables.Rules(s.compiler.family.nft, s.name)
	if err != nil {
		return "", false, err
	}
	rules := map[string]int{}
	for _, r := range list {
		rules[r.Chain]++
		out = append(out, fmt.Sprintf("rule %s %d", r.Chain, r.Handle))
	}
	slices.Sort(out)
	return strings.Join(out, "\n"), s.plausible(all, rules), nil
}

// plausible says whether a table has the chains, maps and sets that it must have, with
// as many rules as they must have, and no others. Of a Service's own chains, which have a
// slash in their names, nothing is known.
func (s *side) plausible(all map[string][]string, rules map[string]int) bool {
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
	for _, name := range all["chain"] {
		n, known := want[name]
		_, stale := s.table.stale[name]
		switch {
		case known && n >= 0 && n != rules[name], known && n < 0 && rules[name] == 0, !known && !stale && !strings.Contains(name, "/"):
			return false
		}
		delete(want, name)
	}
	for _, m := range fixedMaps(s.compiler.family) {
		kind := "set"
		if isMap(m.name) {
			kind = "map"
		}
		if !slices.Contains(all[kind], m.name) {
			return false
		}
	}
	return len(want) == 0
}
