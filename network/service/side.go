package service

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
	"timonel/network/tables"
)

// side is all of one family: what is known of it, and its table.
type side struct {
	compiler compiler
	name     string // of the table
	table    *table
	claims   *claims
	// applied is the View that the table is of, but for held: Services whose last
	// change the kernel refused, as they are in the table.
	applied *feed.View
	held    map[feed.Name]*objects
	said    map[feed.Name]string
	around  surroundings
	wholes  uint64 // how often the whole table was written
	trust   tables.Trust
}

// outcome is what a change of a table came to.
type outcome struct {
	refused refused
	// contested are frontends of Services that have changed which another has.
	contested map[feed.Name]map[frontend]feed.Name
}

// reset makes the whole table what a View says.
func (s *side) reset(ctx context.Context, view *feed.View, around surroundings) (outcome, error) {
	begun := time.Now()
	c := newClaims()
	s.compiler.zone, s.compiler.served = view.Zone(), around.served
	first := s.compiler.orderIn(view)
	for name, svc := range view.Services() {
		c.set(name, nil, s.compiler.frontends(svc), first, func(feed.Name) {})
	}
	var all []change
	for name, svc := range view.Services() {
		if o := s.compiler.service(name, svc, view.Slices(name), c.lost[name]); !o.nothing() {
			all = append(all, change{name: name, old: &objects{}, new: o})
		}
	}
	bad, err := s.table.reset(ctx, around, all)
	if err != nil {
		return outcome{}, err
	}
	s.wholes++
	s.around = around
	s.trust.Written(begun)
	s.claims, s.applied, s.held = c, view, map[feed.Name]*objects{}
	for name := range bad {
		s.held[name] = &objects{}
	}
	out := outcome{refused: bad, contested: map[feed.Name]map[frontend]feed.Name{}}
	for name := range c.lost {
		out.contested[name] = s.contested(name)
	}
	return out, nil
}

// step makes those Services of the table what a View says that have changed.
func (s *side) step(ctx context.Context, view *feed.View, changed map[feed.Name]struct{}) (outcome, error) {
	batch := map[feed.Name]*objects{}
	touch := func(name feed.Name) { // before its claims change
		if _, is := batch[name]; is {
			return
		}
		if o := s.held[name]; o != nil {
			batch[name] = o
			return
		}
		batch[name] = s.compiler.service(name, s.applied.Service(name), s.applied.Slices(name), s.claims.lost[name])
	}
	first := s.compiler.orderIn(view)
	order := slices.SortedFunc(maps.Keys(changed), compareNames)
	for _, name := range order {
		touch(name)
	}
	// First all that is given up, so that nobody is compared with who is gone.
	kept := make(map[feed.Name][]frontend, len(order))
	for _, name := range order {
		was, is := s.applied.Service(name), view.Service(name)
		old := s.compiler.frontends(was)
		if was != nil && is != nil && was.CreationTimestamp.Equal(&is.CreationTimestamp) { // else it is another one
			new := s.compiler.frontends(is)
			kept[name] = filter(old, func(f frontend) bool {
				return slices.Contains(new, f) && s.compiler.rank(was, f) == s.compiler.rank(is, f)
			})
		}
		s.claims.set(name, old, kept[name], first, touch)
	}
	for _, name := range order {
		s.claims.set(name, kept[name], s.compiler.frontends(view.Service(name)), first, touch)
	}
	out := outcome{contested: map[feed.Name]map[frontend]feed.Name{}}
	var changes []change
	for _, name := range slices.SortedFunc(maps.Keys(batch), compareNames) {
		lost := s.claims.lost[name]
		changes = append(changes, change{name, batch[name], s.compiler.service(name, view.Service(name), view.Slices(name), lost)})
		if len(lost) > 0 {
			out.contested[name] = s.contested(name)
		}
	}
	var err error
	if out.refused, err = s.table.apply(ctx, changes); err != nil {
		s.table.broken = true // claims have changed: all is written anew
		return outcome{}, err
	}
	for _, c := range changes {
		delete(s.held, c.name)
		if _, is := out.refused[c.name]; is {
			s.held[c.name] = c.old
		}
	}
	s.applied = view
	return out, nil
}

// contested are the frontends that a Service asks for and another has.
func (s *side) contested(name feed.Name) map[frontend]feed.Name {
	out := map[frontend]feed.Name{}
	for f := range s.claims.lost[name] {
		out[f] = s.claims.owner[f]
	}
	return out
}

func (o *objects) nothing() bool {
	return len(o.elements)+len(o.chains)+len(o.sets)+len(o.sharedElements)+len(o.sharedChains) == 0
}

// rank says by what right a Service asks for a frontend: 0 is its own cluster address, or a
// port of nodes, 1 what a balancer gave it, 2 what its owner wrote into spec.externalIPs, which
// may be anything.
func (c *compiler) rank(s *corev1.Service, f frontend) int {
	a, ok := c.addressesOf(s)
	switch {
	case !ok:
		return 3
	case !f.ip.IsValid() || f.ip == a.cluster:
		return 0
	case slices.Contains(a.balancer, f.ip):
		return 1
	}
	return 2
}

// orderIn says which of two Services of a View has a frontend: by their right to it, then who
// was made first.
func (c *compiler) orderIn(view *feed.View) order {
	return func(f frontend, a, b feed.Name) bool {
		x, y := view.Service(a), view.Service(b)
		if r, s := c.rank(x, f), c.rank(y, f); r != s {
			return r < s
		}
		if x != nil && y != nil && !x.CreationTimestamp.Equal(&y.CreationTimestamp) {
			return x.CreationTimestamp.Before(&y.CreationTimestamp)
		}
		return compareNames(a, b) < 0
	}
}

func compareNames(a, b feed.Name) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// needsHealthCheck says on which port of the node a balancer asks whether this node
// has endpoints of a Service; zero: on none.
func needsHealthCheck(s *corev1.Service) int32 {
	if s == nil || s.Spec.Type != corev1.ServiceTypeLoadBalancer || s.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return 0
	}
	return s.Spec.HealthCheckNodePort
}
