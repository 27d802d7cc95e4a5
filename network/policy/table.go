package policy

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"sigs.k8s.io/knftables"

	"timonel/network/tables"
)

// table is one table in the kernel, and what is known of it.
type table struct {
	name   string
	family knftables.Family
	nft    knftables.Interface
	has    *ruleset // what the kernel was last given
	broken bool     // what the kernel has is not known

	trust tables.Trust
}

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
	t.has, t.broken = want, false
	t.trust.Written(begun)
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
	return t.trust.Touched(ctx, tables.Of{What: "network policies", Family: t.family, Name: t.name}, t.plausible, log)
}

// plausible says whether the names and numbers of rules of a table are those that it was given.
func (t *table) plausible(l *tables.Listing) bool {
	rules := map[string]int{}
	for name, list := range t.has.chains {
		if len(list) > 0 {
			rules[name] = len(list)
		}
	}
	for kind := range l.Names {
		if kind != "table" && kind != "chain" && kind != "set" && kind != "map" {
			return false
		}
	}
	return maps.Equal(l.Rules, rules) && areKeys(l.Names["chain"], t.has.chains) && areKeys(l.Names["set"], t.has.sets) && areKeys(l.Names["map"], t.has.maps)
}

// areKeys says whether names are the keys of a map.
func areKeys[V any](names []string, m map[string]V) bool {
	return slices.Equal(slices.Sorted(slices.Values(names)), slices.Sorted(maps.Keys(m)))
}
