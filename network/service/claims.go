package service

import (
	"slices"

	"timonel/network/feed"
)

// claims say which Service has a frontend. Two can ask for one: by externalIPs, by an
// address of a balancer, or while one is deleted and another made. Whose own cluster address it
// is has it, then to whom it was given as a balancer's, and of others the older.
type claims struct {
	owner  map[frontend]feed.Name
	rivals map[frontend][]feed.Name // who else asks, in order
	lost   map[feed.Name]map[frontend]struct{}
}

// order says who of two is to have a frontend.
type order func(f frontend, a, b feed.Name) bool

func newClaims() *claims {
	return &claims{owner: map[frontend]feed.Name{}, rivals: map[frontend][]feed.Name{}, lost: map[feed.Name]map[frontend]struct{}{}}
}

// set changes what a Service asks for. touch is called before another gains or loses
// something by it.
func (c *claims) set(name feed.Name, old, new []frontend, first order, touch func(feed.Name)) {
	for _, f := range old {
		if !slices.Contains(new, f) {
			c.release(name, f, touch)
		}
	}
	for _, f := range new {
		if !slices.Contains(old, f) {
			c.take(name, f, first, touch)
		}
	}
}

func (c *claims) take(name feed.Name, f frontend, first order, touch func(feed.Name)) {
	owner, taken := c.owner[f]
	switch {
	case !taken:
		c.owner[f] = name
	case first(f, name, owner):
		touch(owner)
		c.owner[f] = name
		c.lose(owner, f)
		c.rivals[f] = slices.Insert(c.rivals[f], 0, owner)
	default:
		at, _ := slices.BinarySearchFunc(c.rivals[f], name, func(r, n feed.Name) int {
			if first(f, r, n) {
				return -1
			}
			return 1
		})
		c.lose(name, f)
		c.rivals[f] = slices.Insert(c.rivals[f], at, name)
	}
}

func (c *claims) release(name feed.Name, f frontend, touch func(feed.Name)) {
	rivals := c.rivals[f]
	switch {
	case c.owner[f] != name:
		rivals = slices.DeleteFunc(rivals, func(r feed.Name) bool { return r == name })
		c.win(name, f)
	case len(rivals) == 0:
		delete(c.owner, f)
	default:
		touch(rivals[0])
		c.owner[f] = rivals[0]
		c.win(rivals[0], f)
		rivals = rivals[1:]
	}
	if len(rivals) == 0 {
		delete(c.rivals, f)
	} else {
		c.rivals[f] = rivals
	}
}

func (c *claims) lose(name feed.Name, f frontend) {
	if c.lost[name] == nil {
		c.lost[name] = map[frontend]struct{}{}
	}
	c.lost[name][f] = struct{}{}
}

func (c *claims) win(name feed.Name, f frontend) {
	delete(c.lost[name], f)
	if len(c.lost[name]) == 0 {
		delete(c.lost, name)
	}
}
