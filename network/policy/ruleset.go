package policy

import (
	"maps"
	"slices"

	"sigs.k8s.io/knftables"
)

// ruleset is what a table is, or is to be.
type ruleset struct {
	hooks  map[string]hookOf // those of chains that the kernel calls
	chains map[string][]string
	sets   map[string]*set
	maps   map[string]verdicts
}

type hookOf struct{ kind, hook, priority string }

type set struct {
	typ      string
	elements map[string]struct{}
}

// verdicts is a map to what is done then.
type verdicts struct {
	typ   string
	leads map[string]string
}

func newRuleset() *ruleset {
	return &ruleset{hooks: map[string]hookOf{}, chains: map[string][]string{}, sets: map[string]*set{}, maps: map[string]verdicts{}}
}

func (r *ruleset) add(name, element string)       { r.sets[name].elements[element] = struct{}{} }
func (r *ruleset) lead(name, key, verdict string) { r.maps[name].leads[key] = verdict }

// rules counts those of all chains.
func (r *ruleset) rules() (n int) {
	for _, c := range r.chains {
		n += len(c)
	}
	return n
}

// change writes the difference between two rulesets to a transaction, and says whether
// there is any. Sets of which only elements differ cost those.
func change(tx *knftables.Transaction, old, new *ruleset) bool {
	before := tx.NumOperations()
	for _, name := range slices.Sorted(maps.Keys(new.sets)) {
		if _, had := old.sets[name]; !had {
			tx.Add(&knftables.Set{Name: name, Type: new.sets[name].typ})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(new.maps)) {
		if _, had := old.maps[name]; !had {
			tx.Add(&knftables.Map{Name: name, Type: new.maps[name].typ + " : verdict"})
		}
	}
	var write []string
	for _, name := range slices.Sorted(maps.Keys(new.chains)) {
		rules, had := old.chains[name]
		if had && slices.Equal(rules, new.chains[name]) {
			continue
		}
		write = append(write, name)
		c := &knftables.Chain{Name: name}
		if had {
			tx.Flush(c)
			continue
		}
		if h, is := new.hooks[name]; is {
			c.Type, c.Hook, c.Priority = knftables.PtrTo(knftables.BaseChainType(h.kind)), knftables.PtrTo(knftables.BaseChainHook(h.hook)), knftables.PtrTo(knftables.BaseChainPriority(h.priority))
		}
		tx.Add(c)
	}
	for _, name := range slices.Sorted(maps.Keys(new.sets)) {
		if old.sets[name] == new.sets[name] {
			continue // nobody changes one
		}
		var had map[string]struct{}
		if s := old.sets[name]; s != nil {
			had = s.elements
		}
		is := new.sets[name].elements
		for e := range had {
			if _, stays := is[e]; !stays {
				tx.Delete(&knftables.Element{Set: name, Key: []string{e}})
			}
		}
		for e := range is {
			if _, there := had[e]; !there {
				tx.Add(&knftables.Element{Set: name, Key: []string{e}})
			}
		}
	}
	for _, name := range write {
		for _, rule := range new.chains[name] {
			tx.Add(&knftables.Rule{Chain: name, Rule: rule})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(new.maps)) {
		had, is := old.maps[name].leads, new.maps[name].leads
		for key, verdict := range had {
			if is[key] != verdict {
				tx.Delete(&knftables.Element{Map: name, Key: []string{key}, Value: []string{verdict}})
			}
		}
		for key, verdict := range is {
			if had[key] != verdict {
				tx.Add(&knftables.Element{Map: name, Key: []string{key}, Value: []string{verdict}})
			}
		}
	}
	var gone []string
	for _, name := range slices.Sorted(maps.Keys(old.chains)) {
		if _, stays := new.chains[name]; !stays {
			tx.Flush(&knftables.Chain{Name: name})
			gone = append(gone, name)
		}
	}
	for _, name := range gone {
		tx.Delete(&knftables.Chain{Name: name})
	}
	for _, name := range slices.Sorted(maps.Keys(old.sets)) {
		if _, stays := new.sets[name]; !stays {
			tx.Delete(&knftables.Set{Name: name})
		}
	}
	return tx.NumOperations() > before
}
