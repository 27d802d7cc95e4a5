package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"timonel/network/feed"
)

// chainRest is for how long a chain that nobody uses any more stays, empty: kernels
// before 6.2 do not notice at once that an element that led to it is gone.
const chainRest = time.Second

// change is what one Service was in a table, and what it is to be.
type change struct {
	name     feed.Name
	old, new *objects
}

// table is one table in the kernel, and what must be known to change it.
type table struct {
	family family
	nft    knftables.Interface
	// refs are how many Services have a shared chain or element, by name or by map and key.
	refs map[string]int
	// stale are chains that nobody uses any more, since when.
	stale map[string]time.Time
	// broken: what is in the kernel is not known, and it is written anew.
	broken bool
	now    func() time.Time
}

// refused says which Services' rules the kernel does not take, and why.
type refused map[feed.Name]error

// maxRefused bounds how many of one transaction are looked for one by one.
const maxRefused = 16

// apply makes changes in one transaction. The Services that the kernel refuses stay as
// they were, and are returned; an error says that nothing was done.
func (t *table) apply(ctx context.Context, changes []change) (refused, error) {
	if len(changes) == 0 {
		return nil, nil
	}
	return t.run(ctx, changes, func(cs []change) *plan {
		p := t.plan()
		for _, c := range cs {
			p.change(c.old, c.new)
		}
		return p
	})
}

// reset writes the whole table anew: all Services, whatever was there before.
func (t *table) reset(ctx context.Context, s surroundings, all []change) (refused, error) {
	have, err := t.nft.ListAll(ctx)
	if err != nil {
		if !strings.Contains(err.Error(), unix.ENOENT.Error()) { // the library drops the error's type
			return nil, fmt.Errorf("list table: %w", err)
		}
		have = nil
	}
	refs, stale := t.refs, t.stale
	t.refs, t.stale = map[string]int{}, map[string]time.Time{}
	whole := func(cs []change) *plan {
		p := t.plan()
		p.anew, p.have = true, have
		p.surroundings = s
		for _, c := range cs {
			p.change(&objects{}, c.new)
		}
		return p
	}
	bad, err := t.run(ctx, all, whole)
	if err != nil {
		// What is there may be of another version of this program, with other types.
		bad, err = t.run(ctx, all, func(cs []change) *plan {
			p := whole(cs)
			p.replace = true
			return p
		})
	}
	if err != nil {
		t.refs, t.stale, t.broken = refs, stale, true
		return nil, err
	}
	t.broken = false
	return bad, nil
}

// run carries out the plan of all changes or, when the kernel refuses it, of those that
// it does not refuse.
func (t *table) run(ctx context.Context, all []change, plan func([]change) *plan) (refused, error) {
	p := plan(all)
	if p.empty() {
		p.done()
		return nil, nil
	}
	first := t.nft.Run(ctx, p.transaction())
	if first == nil {
		p.done()
		return nil, nil
	}
	if ctx.Err() != nil {
		t.broken = true // it may have been carried out
		return nil, ctx.Err()
	}
	bad := refused{}
	good, err := t.sift(ctx, all, plan, bad)
	if err != nil {
		return nil, errors.Join(first, err)
	}
	if len(bad) == 0 {
		return nil, first // each is taken, and not all together
	}
	p = plan(good)
	if err := t.nft.Run(ctx, p.transaction()); err != nil {
		t.broken = true
		return nil, err
	}
	p.done()
	return bad, nil
}

// sift returns those of the changes that the kernel takes, and notes the others.
func (t *table) sift(ctx context.Context, all []change, plan func([]change) *plan, bad refused) ([]change, error) {
	err := t.nft.Check(ctx, plan(nil).transaction())
	if err != nil {
		return nil, err // it is not the Services
	}
	var good []change
	var look func(cs []change) error
	look = func(cs []change) error {
		if len(cs) == 0 {
			return nil
		}
		err := t.nft.Check(ctx, plan(cs).transaction())
		switch {
		case err == nil:
			good = append(good, cs...)
		case ctx.Err() != nil:
			return ctx.Err()
		case len(cs) == 1:
			bad[cs[0].name] = err
		case len(bad) >= maxRefused:
			for _, c := range cs {
				bad[c.name] = errors.New("the kernel refuses too many others; it is tried again with the next look at the table")
			}
		default:
			return errors.Join(look(cs[:len(cs)/2]), look(cs[len(cs)/2:]))
		}
		return nil
	}
	return good, look(all)
}

// sweep deletes chains that nobody uses any more.
func (t *table) sweep(ctx context.Context) error {
	tx := t.nft.NewTransaction()
	var gone []string
	for _, name := range slices.Sorted(maps.Keys(t.stale)) {
		if t.now().Sub(t.stale[name]) >= chainRest {
			tx.Delete(&knftables.Chain{Name: name})
			gone = append(gone, name)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	if err := t.nft.Run(ctx, tx); err != nil {
		t.broken = true
		return fmt.Errorf("delete chains that nobody uses: %w", err)
	}
	for _, name := range gone {
		delete(t.stale, name)
	}
	return nil
}

// plan gathers changes for one transaction.
type plan struct {
	t            *table
	anew         bool
	replace      bool
	surroundings surroundings
	have         map[string][]string // what is in the kernel, when anew

	remove, add         map[string][]element // by map or set
	setChains           []chain
	dropChains          []string
	addSets             []affinitySet
	dropSets            []string
	refs                map[string]int // differences
	sharedChains        map[string]chain
	sharedElements      map[string]element
	revived, newlyStale []string
}

func (t *table) plan() *plan {
	return &plan{
		t: t, remove: map[string][]element{}, add: map[string][]element{}, refs: map[string]int{},
		sharedChains: map[string]chain{}, sharedElements: map[string]element{},
	}
}

// change adds the difference between what a Service was and what it is to be.
func (p *plan) change(old, new *objects) {
	diff(old.elements, new.elements, func(e element) string { return e.in + "\x00" + e.key },
		func(a, b element) bool { return a == b },
		func(e element) { p.remove[e.in] = append(p.remove[e.in], e) },
		func(e element) { p.add[e.in] = append(p.add[e.in], e) })
	diff(old.chains, new.chains, func(c chain) string { return c.name },
		func(a, b chain) bool { return slices.Equal(a.rules, b.rules) },
		func(c chain) {
			if !slices.ContainsFunc(new.chains, func(n chain) bool { return n.name == c.name }) {
				p.dropChains = append(p.dropChains, c.name)
			}
		},
		func(c chain) { p.setChains = append(p.setChains, c) })
	diff(old.sets, new.sets, func(s affinitySet) string { return s.name },
		func(a, b affinitySet) bool { return a == b },
		func(s affinitySet) { p.dropSets = append(p.dropSets, s.name) },
		func(s affinitySet) { p.addSets = append(p.addSets, s) })
	count := func(o *objects, by int) {
		for _, c := range o.sharedChains {
			p.refs[c.name] += by
			p.sharedChains[c.name] = c
		}
		for _, e := range o.sharedElements {
			id := e.in + "\x00" + e.key
			p.refs[id] += by
			p.sharedElements[id] = e
		}
	}
	count(old, -1)
	count(new, +1)
}

// diff calls remove for what is in old and not the same in new, then add for what is in
// new and not the same in old. Of two with one key the first counts.
func diff[T any](old, new []T, key func(T) string, same func(a, b T) bool, remove, add func(T)) {
	if len(old) == 0 && len(new) == 0 {
		return
	}
	was, is := make(map[string]T, len(old)), make(map[string]bool, len(new))
	for _, o := range old {
		if _, twice := was[key(o)]; !twice {
			was[key(o)] = o
		}
	}
	for _, n := range new {
		k := key(n)
		if is[k] {
			continue
		}
		is[k] = true
		o, had := was[k]
		delete(was, k)
		if had && same(o, n) {
			continue
		}
		if had {
			remove(o)
		}
		add(n)
	}
	for _, o := range old {
		k := key(o)
		if left, ok := was[k]; ok {
			delete(was, k)
			remove(left)
		}
	}
}

// transaction writes the plan. Elements of one map stand together, since nft sends such as one.
func (p *plan) transaction() *knftables.Transaction {
	tx := p.t.nft.NewTransaction()
	if p.replace {
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
	}
	if p.anew {
		base(tx, p.t.family, p.surroundings)
	}
	p.revived, p.newlyStale = nil, nil
	var shared []chain
	for _, name := range slices.Sorted(maps.Keys(p.sharedChains)) {
		switch was, is := p.t.refs[name], p.t.refs[name]+p.refs[name]; {
		case was <= 0 && is > 0:
			shared = append(shared, p.sharedChains[name])
		case was > 0 && is <= 0:
			p.dropChains = append(p.dropChains, name)
		}
	}
	chains := append(shared, p.setChains...)
	slices.SortFunc(chains, func(a, b chain) int { return cmp.Compare(a.name, b.name) })
	keep := map[string]bool{}
	for _, c := range chains {
		keep[c.name] = true
		tx.Add(&knftables.Chain{Name: c.name})
		tx.Flush(&knftables.Chain{Name: c.name})
	}
	for _, s := range p.addSets {
		keep[s.name] = true
		tx.Add(s.object(p.t.family))
	}
	for _, c := range chains {
		write(tx, c)
	}
	if p.anew && !p.replace {
		p.leftovers(keep)
	}
	for _, name := range p.dropChains {
		if !keep[name] {
			tx.Flush(&knftables.Chain{Name: name})
			p.newlyStale = append(p.newlyStale, name)
		}
	}
	for _, name := range p.dropSets {
		tx.Delete(&knftables.Set{Name: name})
	}
	for name := range keep {
		p.revived = append(p.revived, name)
	}
	p.elements(tx)
	return tx
}

// elements writes what maps and sets lose, then what they get.
func (p *plan) elements(tx *knftables.Transaction) {
	for id, by := range p.refs {
		e, is := p.sharedElements[id]
		if !is {
			continue
		}
		switch was, now := p.t.refs[id], p.t.refs[id]+by; {
		case was <= 0 && now > 0:
			p.add[e.in] = append(p.add[e.in], e)
		case was > 0 && now <= 0:
			p.remove[e.in] = append(p.remove[e.in], e)
		}
	}
	for _, in := range slices.Sorted(maps.Keys(p.remove)) {
		for _, e := range p.remove[in] {
			tx.Delete(e.object())
		}
	}
	for _, in := range slices.Sorted(maps.Keys(p.add)) {
		for _, e := range p.add[in] {
			tx.Add(e.object())
		}
	}
}

// leftovers drops what the table has and nobody asks for.
func (p *plan) leftovers(keep map[string]bool) {
	fixed := map[string]bool{}
	for _, m := range fixedMaps(p.t.family) {
		fixed[m.name] = true
	}
	for _, c := range fixedChains(p.t.family, p.surroundings) {
		fixed[c.name] = true
	}
	for _, h := range hooks {
		fixed[h.name] = true
	}
	for _, name := range p.have["chain"] {
		if !fixed[name] && !keep[name] {
			p.dropChains = append(p.dropChains, name)
		}
	}
	for _, name := range p.have["set"] {
		if !fixed[name] && !keep[name] {
			p.dropSets = append(p.dropSets, name)
		}
	}
}

// empty says that there is nothing to do.
func (p *plan) empty() bool {
	if p.anew || len(p.remove)+len(p.add)+len(p.setChains)+len(p.dropChains)+len(p.addSets)+len(p.dropSets) > 0 {
		return false
	}
	for id, by := range p.refs {
		if was := p.t.refs[id]; (was > 0) != (was+by > 0) {
			return false
		}
	}
	return true
}

// done notes that the transaction was carried out.
func (p *plan) done() {
	for id, by := range p.refs {
		if p.t.refs[id] += by; p.t.refs[id] <= 0 {
			delete(p.t.refs, id)
		}
	}
	for _, name := range p.newlyStale {
		p.t.stale[name] = p.t.now()
	}
	for _, name := range p.revived {
		delete(p.t.stale, name)
	}
}
