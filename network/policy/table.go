package policy

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/knftables"

	"timonel/network/tables"
)

// table is one table in the kernel, and what is known of it.
type table struct {
	name    string
	family  knftables.Family
	nft     knftables.Interface
	watcher *tables.Watcher
	has     *ruleset // what the kernel was last given
	broken  bool     // what the kernel has is not known

	seen  uint64        // of Watcher.Others, when the table was surely ours
	print string        // of the table after so many
	of    uint64        // of Watcher.Ours
	whole time.Time     // when it was last written whole
	took  time.Duration // and what that took
}

// Somebody else's change of nftables may have been of elements of the table, which leaves no
// trace that costs little to see. Then it is written anew, but no more often than this.
const rest = time.Minute

// apply makes the table what it is to be, in one transaction.
func (t *table) apply(ctx context.Context, want *ruleset) error {
	if !t.broken {
		tx := t.nft.NewTransaction()
		if !change(tx, t.has, want) {
			return nil
		}
		if err := t.nft.Run(ctx, tx); err == nil {
			t.has = want
			return nil
		}
		t.broken = true // or the table is not as it was left
	}
	begun := time.Now()
	if err := t.nft.Run(ctx, t.anew(want)); err != nil {
		return err
	}
	t.has, t.broken, t.whole, t.took = want, false, time.Now(), time.Since(begun)
	t.seen, t.of = t.watcher.Others, 0
	return nil
}

// check says whether the kernel would take a whole table.
func (t *table) check(ctx context.Context, want *ruleset) error {
	return t.nft.Check(ctx, t.anew(want))
}

// anew replaces the whole table, so that no packet meets a part of it.
func (t *table) anew(want *ruleset) *knftables.Transaction {
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that deleting it cannot fail
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("network policies, of the Timonel agent")})
	change(tx, newRuleset(), want)
	return tx
}

// sift says which of names the kernel refuses: make is the table with those closed that it
// is given. An error says that it is none of them.
func sift[N comparable](ctx context.Context, t *table, names []N, make func(closed map[N]error) *ruleset) (map[N]error, error) {
	closed := map[N]error{}
	except := func(open []N) map[N]error {
		out := map[N]error{}
		for _, n := range names {
			out[n] = errTried
		}
		for _, n := range open {
			delete(out, n)
		}
		return out
	}
	if err := t.check(ctx, make(except(nil))); err != nil {
		return nil, err
	}
	var look func(list []N)
	look = func(list []N) {
		if len(list) == 0 || ctx.Err() != nil {
			return
		}
		err := t.check(ctx, make(except(list)))
		switch {
		case err == nil:
		case len(list) == 1:
			closed[list[0]] = fmt.Errorf("%s", tables.Brief(err))
		default:
			look(list[:len(list)/2])
			look(list[len(list)/2:])
		}
	}
	look(names)
	return closed, ctx.Err()
}

var errTried = fmt.Errorf("is tried without")

// touched says whether somebody else may have changed the table, which is then written anew.
func (t *table) touched(ctx context.Context, log *slog.Logger) bool {
	w := t.watcher
	w.Look()
	others, known := t.seen != w.Others, t.of == w.Ours
	if known && !others {
		return false
	}
	print, err := t.fingerprint(ctx)
	switch {
	case err != nil:
		log.Warn("the table of network policies is gone or cannot be read; it is written anew", "family", t.family, "error", tables.Brief(err))
		return true
	case known && print != t.print, !t.plausible(print):
		log.Warn("somebody else has changed the table of network policies; it is written anew", "family", t.family)
		return true
	}
	t.print, t.of = print, w.Ours
	return others && time.Since(t.whole) > max(rest, 100*t.took)
}

// fingerprint is what of a table costs little to read: names, and which rules there are.
func (t *table) fingerprint(ctx context.Context) (string, error) {
	all, err := t.nft.ListAll(ctx)
	if err != nil {
		return "", err
	}
	list, err := tables.Rules(t.family, t.name)
	if err != nil {
		return "", err
	}
	var out []string
	for kind, names := range all {
		for _, n := range names {
			out = append(out, kind+" "+n)
		}
	}
	for _, r := range list {
		out = append(out, fmt.Sprintf("rule %s %d", r.Chain, r.Handle))
	}
	slices.Sort(out)
	return strings.Join(out, "\n"), nil
}

// plausible says whether the names and numbers of rules of a table are those that it was given.
func (t *table) plausible(print string) bool {
	count := map[string]int{}
	for line := range strings.Lines(print) {
		fields := strings.Fields(line)
		switch fields[0] {
		case "rule":
			count["rule "+fields[1]]++
		default:
			count[fields[0]+" "+fields[1]]++
		}
	}
	want := map[string]int{}
	for name, rules := range t.has.chains {
		want["chain "+name] = 1
		if len(rules) > 0 {
			want["rule "+name] = len(rules)
		}
	}
	for name := range t.has.sets {
		want["set "+name] = 1
	}
	for name := range t.has.maps {
		want["map "+name] = 1
	}
	return maps.Equal(count, want)
}
