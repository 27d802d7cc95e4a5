package tables

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/knftables"
)

// Trust is why a table is believed to be as it was left. The zero value is of one that was
// not written yet.
type Trust struct {
	table   *watched
	seen    uint64        // how often somebody else had changed nftables
	watched uint64        // the same, at the last look
	print   string        // of the table when it was surely ours,
	printOf uint64        // which was after so many transactions of it; 0: never
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

// Watch returns a way to the table whose transactions are known to be ours.
func (t *Trust) Watch(w *Watcher, nft knftables.Interface) knftables.Interface {
	t.table = &watched{Interface: nft, w: w}
	return t.table
}

// Written says that the table was written whole, and since when.
func (t *Trust) Written(begun time.Time) {
	*t = Trust{table: t.table, watched: t.watched, seen: t.watched, wholeAt: time.Now(), took: time.Since(begun)}
}

// Of names a table in what is said of it: "the table of" what.
type Of struct {
	What   string
	Family knftables.Family
	Name   string
}

// Touched says whether the table must be written anew since somebody else changed it.
// plausible says whether nothing is missing and nothing too much of what a listing has.
func (t *Trust) Touched(ctx context.Context, of Of, plausible func(*Listing) bool, log *slog.Logger) bool {
	t.watched = t.table.w.look()
	ours := t.table.ran()
	known := t.printOf != 0 && t.printOf == ours
	if known && t.watched == t.seen {
		return false
	}
	l, err := list(ctx, t.table, of)
	switch {
	case err != nil:
		log.Warn("the table of "+of.What+" is gone or cannot be read; it is written anew", "family", of.Family, "error", Brief(err))
		return true
	case !plausible(l), known && l.print != t.print:
		log.Warn("somebody else has changed the table of "+of.What+"; it is written anew", "family", of.Family)
		return true
	}
	t.print, t.printOf = l.print, ours
	return t.watched != t.seen && time.Since(t.wholeAt) > max(leastRest, restTimes*t.took)
}

// Listing is what of a table costs little to read.
type Listing struct {
	// Names of chains, sets and maps, by these words. Sets without a name, which rules have
	// of their own, are left out.
	Names map[string][]string
	// Rules is how many each chain has; those without any are left out.
	Rules map[string]int

	print string
}

func list(ctx context.Context, nft knftables.Interface, of Of) (*Listing, error) {
	all, err := nft.ListAll(ctx)
	if err != nil {
		return nil, err
	}
	var lines []string
	for kind, names := range all {
		for _, n := range names {
			lines = append(lines, kind+" "+n)
		}
		all[kind] = slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, "__") })
	}
	each, err := rules(of.Family, of.Name)
	if err != nil {
		return nil, err
	}
	out := &Listing{Names: all, Rules: map[string]int{}}
	for _, r := range each {
		out.Rules[r.chain]++
		lines = append(lines, fmt.Sprintf("rule %s %d", r.chain, r.handle))
	}
	slices.Sort(lines)
	out.print = strings.Join(lines, "\n")
	return out, nil
}
