package policy

import (
	"fmt"

	"timonel/network/feed/wire"
)

// settle makes messages of what changed, and gives followers those that concern them.
func (f *Fold) settle(revision int64) {
	f.reopen()
	for g := range f.dirtyGroups {
		if len(g.refs) > 0 {
			f.settleGroup(g)
		}
	}
	for p := range f.dirtyPolicies {
		if !p.gone {
			f.settlePolicy(p)
		}
	}
	for p := range f.dirtyPods {
		if l := f.followers[p.node]; l != nil {
			l.look(p)
		}
	}
	for p := range f.dirtyPolicies {
		if p.gone {
			f.dropPolicy(p)
		}
	}
	for g := range f.dirtyGroups {
		if len(g.refs) == 0 {
			f.dropGroup(g)
		}
	}
	for _, c := range f.let {
		f.release(c)
	}
	f.let = nil
	// What was dropped has left its groups, which nobody has any more.
	f.dirtyPods, f.dirtyPolicies, f.dirtyGroups = emptied(f.dirtyPods), emptied(f.dirtyPolicies), emptied(f.dirtyGroups)
	f.revision = revision
	for node, want := range f.wants {
		if l := f.followers[node]; l != nil && revision >= want {
			l.notify()
		}
	}
}

// reopen looks anew at what was left out, when there may be room for it.
func (f *Fold) reopen() {
	if !f.freed {
		return
	}
	f.freed = false
	for p := range f.closed {
		if !p.gone {
			f.compose(p)
		}
	}
	room := f.cfg.Bytes/16*15 - f.bytes
	for g := range f.shut {
		if g.needs <= room {
			room -= g.needs
			f.setWithheld(g, false)
			f.dirtyGroups[g] = struct{}{}
		}
	}
}

// setWithheld says whether a group is told without its members. Rules that deny to it
// are others then.
func (f *Fold) setWithheld(g *group, withheld bool) {
	g.withheld = withheld
	if withheld {
		f.shut[g] = struct{}{}
	} else {
		delete(f.shut, g)
		g.root.soil()
	}
	for p := range g.refs {
		f.dirtyPolicies[p] = struct{}{}
	}
}

func (f *Fold) settleGroup(g *group) {
	encode := func() {
		g.encode(func(old, next *content) {
			f.count("", next.size()-old.size())
			for l := range g.followers {
				l.change(old, next)
			}
		})
	}
	encode()
	if f.bytes > f.cfg.Bytes && !g.withheld && g.root.count > 0 {
		f.cfg.Logger.Error("nodes are told of a group of pods as if nobody were in it: all policies and their peers are too much; delete policies, or make those that select many pods name fewer",
			"pods", g.root.count, "selector", g.of.key, "of", g.of.scope.key, "bytes", f.bytes, "limit", f.cfg.Bytes)
		g.needs = 0
		for _, c := range g.told {
			g.needs += c.size()
		}
		f.setWithheld(g, true)
		encode()
	}
}

// count counts bytes.
func (f *Fold) count(namespace string, n int64) {
	f.bytes += n
	if n < 0 {
		f.freed = f.freed || len(f.closed)+len(f.shut) > 0
	}
	if namespace == "" {
		return
	}
	if f.used[namespace] += n; f.used[namespace] == 0 {
		delete(f.used, namespace)
	}
}

func (f *Fold) settlePolicy(p *policy) {
	old, why := p.item, p.why
	next := encode(p.key(), f.itemOf(p, why != ""))
	if why == "" {
		if why = f.tooMuch(p, old, next); why != "" {
			next = encode(p.key(), f.itemOf(p, true))
		}
	}
	f.setClosed(p, why)
	if old == nil || old.sum != next.sum {
		f.count(p.name.Namespace, next.size()-old.size())
		p.item = next
		for l := range p.followers {
			l.change(old, next)
		}
	}
	for name, g := range p.groups {
		if p.told[name] == nil {
			for l := range p.followers {
				l.need(g)
			}
		}
	}
	for name, g := range p.told {
		if p.groups[name] == nil {
			for l := range p.followers {
				l.unneed(g)
			}
		}
	}
	p.told = p.groups
}

// setClosed notes whether a policy is told without its rules, and why.
func (f *Fold) setClosed(p *policy, why string) {
	if why == "" {
		delete(f.closed, p)
		return
	}
	if f.closed[p] == "" {
		f.cfg.Logger.Error("a network policy is told to nodes without its rules, so that its pods are closed; make it smaller or delete what is not needed",
			"policy", p.name.Namespace+"/"+p.name.Name, "reason", why)
	}
	f.closed[p] = why
}

func (f *Fold) tooMuch(p *policy, old, next *content) string {
	grows := next.size() - old.size()
	switch {
	case len(next.item.Object) > wire.MaxItem:
		return fmt.Sprintf("it has %d bytes, nodes are told of %d", len(next.item.Object), wire.MaxItem)
	case grows > 0 && f.bytes+grows > f.cfg.Bytes:
		return fmt.Sprintf("all policies and groups of pods have more than %d MiB", f.cfg.Bytes>>20)
	case grows > 0 && p.name.Namespace != "" && f.used[p.name.Namespace]+grows > f.cfg.Bytes/4:
		return fmt.Sprintf("those of the namespace have more than %d MiB", f.cfg.Bytes>>22)
	}
	return ""
}

// dropPolicy forgets a policy that holds for no pod any more.
func (f *Fold) dropPolicy(p *policy) {
	f.count(p.name.Namespace, -p.item.size())
	delete(f.closed, p)
	delete(f.policies, p.name)
}

func (f *Fold) dropGroup(g *group) {
	for _, c := range g.told {
		f.count("", -c.size())
	}
	delete(f.shut, g)
	delete(f.groups, g.name)
	delete(g.of.groups, g.name)
	f.release(g.of)
}

// emptied is a map without what it has. One that was large is not kept: to empty it, and to
// look whether it has anything, takes as long as it once was large.
func emptied[M ~map[K]V, K comparable, V any](m M) M {
	if len(m) > 64 {
		return make(M)
	}
	clear(m)
	return m
}
