package policy

import (
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// namespace is one that is there, or has pods, or is named by a selection.
type namespace struct {
	name   string
	exists bool // there is an object, and its labels are known
	labels labels.Set
	pods   map[*pod]struct{}
	scopes map[*scope]struct{} // that it is in
	own    *scope              // that it is alone in; nil when nobody selects there
}

// scope is some namespaces, and what is selected in them.
type scope struct {
	key        string
	namespace  *namespace      // the only one,
	selector   labels.Selector // or those that this matches
	matched    map[*namespace]struct{}
	selections map[string]*chosen
	byPair     map[pair]map[*chosen]struct{}
	rest       map[*chosen]struct{} // whose selectors demand no pair
}

// pair is a label that a selector demands, with a value or with any.
type pair struct {
	key, value string
	any        bool
}

// maxPairs is how many values of an "in" a selection is found by.
const maxPairs = 8

// chosen is a selection: the pods of a scope that a selector matches.
type chosen struct {
	scope    *scope
	key      string
	selector labels.Selector
	pairs    []pair // that it is found by
	refs     int
	members  map[*pod]struct{}
	policies map[*policy]struct{} // that hold for the members
	groups   map[string]*group    // of the members' addresses or ports
}

// ref names a selection.
type ref struct {
	namespace  string          // the namespace, or
	namespaces labels.Selector // those that this matches
	pods       labels.Selector
}

func (r ref) scopeKey() string {
	if r.namespaces != nil {
		return "selector " + r.namespaces.String()
	}
	return "namespace " + r.namespace
}

func (s *scope) file(c *chosen) {
	c.pairs = s.pairsOf(c.selector)
	if len(c.pairs) == 0 {
		s.rest[c] = struct{}{}
		return
	}
	for _, p := range c.pairs {
		if s.byPair[p] == nil {
			s.byPair[p] = make(map[*chosen]struct{})
		}
		s.byPair[p][c] = struct{}{}
	}
}

// pairsOf is what a selection is found by: of what its selector demands, that by which
// the fewest others are.
func (s *scope) pairsOf(selector labels.Selector) []pair {
	requirements, selectable := selector.Requirements()
	if !selectable {
		return nil // labels.Nothing matches none of those that ask
	}
	var best []pair
	least := -1
	for _, r := range requirements {
		var pairs []pair
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			for v := range r.Values() {
				pairs = append(pairs, pair{key: r.Key(), value: v})
			}
			if len(pairs) > maxPairs {
				pairs = []pair{{key: r.Key(), any: true}}
			}
		case selection.Exists:
			pairs = []pair{{key: r.Key(), any: true}}
		default:
			continue
		}
		others := 0
		for _, p := range pairs {
			others += len(s.byPair[p])
		}
		if least < 0 || others < least {
			best, least = pairs, others
		}
	}
	return best
}

func (s *scope) unfile(c *chosen) {
	delete(s.rest, c)
	for _, p := range c.pairs {
		if delete(s.byPair[p], c); len(s.byPair[p]) == 0 {
			delete(s.byPair, p)
		}
	}
}

// matching calls f with the selections that match a set of labels. f must not change
// the scope.
func (s *scope) matching(set labels.Set, f func(*chosen)) {
	try := func(some map[*chosen]struct{}) {
		for c := range some {
			if c.selector.Matches(set) {
				f(c)
			}
		}
	}
	try(s.rest)
	if len(s.byPair) == 0 {
		return
	}
	for k, v := range set {
		try(s.byPair[pair{key: k, value: v}])
		try(s.byPair[pair{key: k, any: true}])
	}
}

// namespaceOf returns a namespace's record, which forgetNamespace drops.
func (f *Fold) namespaceOf(name string) *namespace {
	ns := f.namespaces[name]
	if ns == nil {
		ns = &namespace{name: name, pods: make(map[*pod]struct{}), scopes: make(map[*scope]struct{})}
		f.namespaces[name] = ns
	}
	return ns
}

func (f *Fold) forgetNamespace(ns *namespace) {
	if !ns.exists && len(ns.pods) == 0 && ns.own == nil {
		delete(f.namespaces, ns.name)
	}
}

// relabel puts a namespace into the scopes whose selectors match it, and out of the
// others.
func (f *Fold) relabel(ns *namespace) {
	for s := range f.selecting {
		_, in := ns.scopes[s]
		switch should := ns.exists && s.selector.Matches(ns.labels); {
		case should && !in:
			f.enter(ns, s)
		case !should && in:
			f.exit(ns, s)
		}
	}
}

func (f *Fold) enter(ns *namespace, s *scope) {
	s.matched[ns], ns.scopes[s] = struct{}{}, struct{}{}
	if len(s.selections) == 0 {
		return
	}
	for p := range ns.pods {
		s.matching(p.labels, func(c *chosen) { f.join(p, c) })
	}
}

func (f *Fold) exit(ns *namespace, s *scope) {
	delete(s.matched, ns)
	delete(ns.scopes, s)
	for p := range ns.pods {
		for i := len(p.in) - 1; i >= 0; i-- {
			if c := p.in[i]; c.scope == s {
				f.leave(p, c)
			}
		}
	}
}

// scopeOf returns a scope, which release drops with its last selection.
func (f *Fold) scopeOf(r ref) *scope {
	key := r.scopeKey()
	if s := f.scopes[key]; s != nil {
		return s
	}
	s := &scope{
		key: key, selector: r.namespaces, matched: make(map[*namespace]struct{}),
		selections: make(map[string]*chosen), byPair: make(map[pair]map[*chosen]struct{}), rest: make(map[*chosen]struct{}),
	}
	f.scopes[key] = s
	if s.selector == nil {
		s.namespace = f.namespaceOf(r.namespace)
		s.namespace.own = s
		f.enter(s.namespace, s)
		return s
	}
	f.selecting[s] = struct{}{}
	for _, ns := range f.namespaces {
		if ns.exists && s.selector.Matches(ns.labels) {
			f.enter(ns, s)
		}
	}
	return s
}

// acquire returns a selection, which is there until it is released as often.
func (f *Fold) acquire(r ref) *chosen {
	s, key := f.scopeOf(r), r.pods.String()
	c := s.selections[key]
	if c == nil {
		c = &chosen{
			scope: s, key: key, selector: r.pods, members: make(map[*pod]struct{}),
			policies: make(map[*policy]struct{}), groups: make(map[string]*group),
		}
		s.selections[key] = c
		s.file(c)
		for ns := range s.matched {
			for p := range ns.pods {
				if c.selector.Matches(p.labels) {
					f.join(p, c)
				}
			}
		}
	}
	c.refs++
	return c
}

func (f *Fold) release(c *chosen) {
	if c.refs--; c.refs > 0 {
		return
	}
	for p := range c.members {
		f.leave(p, c)
	}
	s := c.scope
	s.unfile(c)
	delete(s.selections, c.key)
	if len(s.selections) > 0 {
		return
	}
	delete(f.scopes, s.key)
	delete(f.selecting, s)
	for ns := range s.matched {
		delete(ns.scopes, s)
		if ns.own == s {
			ns.own = nil
			f.forgetNamespace(ns)
		}
	}
}

// join makes a pod one of a selection.
func (f *Fold) join(p *pod, c *chosen) {
	c.members[p] = struct{}{}
	p.in = append(p.in, c)
	if len(c.policies) > 0 {
		f.dirtyPods[p] = struct{}{}
	}
	for _, g := range c.groups {
		f.change(g, nil, &p.facts)
	}
}

// leave is as if join had not been.
func (f *Fold) leave(p *pod, c *chosen) {
	delete(c.members, p)
	for i, other := range p.in {
		if other == c {
			last := len(p.in) - 1
			p.in[i], p.in[last] = p.in[last], nil
			p.in = p.in[:last]
			break
		}
	}
	if len(c.policies) > 0 {
		f.dirtyPods[p] = struct{}{}
	}
	for _, g := range c.groups {
		f.change(g, &p.facts, nil)
	}
}
