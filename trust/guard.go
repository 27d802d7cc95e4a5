package trust

import (
	"context"
	"sync"
	"time"

	"timonel/state"
)

// Party is who holds something open: a connection, a stream, a watch.
type Party struct {
	// Key is the public key of the certificate that it was opened with; empty for
	// one that was opened with a token.
	Key string
	// Node is the node that it is, or that its token was issued for something on;
	// empty for others.
	Node string
	// Since is when a token was issued, or at the latest.
	Since time.Time
}

// Check says whether somebody is good now: nil, or why not.
func (r *Registry) Check(p Party) error { return r.check(r.state.Store().View(), p) }

func (r *Registry) check(view state.View, p Party) error {
	switch {
	case p.Node != "" && p.Key != "":
		return r.checkNode(view, p.Node, p.Key)
	case p.Node != "":
		return r.checkNodeToken(view, p.Node, p.Since)
	case p.Key != "" && r.revoked(view, p.Key):
		return refuse("the key of this certificate was revoked")
	}
	return nil
}

// Guard ends what is held open by those who are revoked meanwhile. Its methods may
// be called from many goroutines.
type Guard struct {
	registry *Registry

	mu     sync.Mutex
	byKey  map[string]map[*hold]struct{}
	byNode map[string]map[*hold]struct{}
}

type hold struct {
	party Party
	end   func(error)
}

// NewGuard returns a guard that has nothing to watch over yet.
func NewGuard(r *Registry) *Guard {
	return &Guard{registry: r, byKey: make(map[string]map[*hold]struct{}), byNode: make(map[string]map[*hold]struct{})}
}

// Run ends what is to be ended, until ctx does, whose error it returns.
func (g *Guard) Run(ctx context.Context) error { return g.registry.Follow(ctx, g.changed) }

// Hold watches over what a party holds open until release is called: when the
// party is good no more, end is called with why, on a goroutine that must not be
// kept waiting. The error is [Registry.Check]'s now; nothing is watched over then.
func (g *Guard) Hold(p Party, end func(error)) (release func(), err error) {
	h := &hold{p, end}
	g.mu.Lock()
	add(g.byKey, p.Key, h)
	add(g.byNode, p.Node, h)
	g.mu.Unlock()
	release = func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		remove(g.byKey, p.Key, h)
		remove(g.byNode, p.Node, h)
	}
	// Now, as a change that came before is not told of again.
	if err := g.registry.Check(p); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

func add(m map[string]map[*hold]struct{}, by string, h *hold) {
	if by == "" {
		return
	}
	if m[by] == nil {
		m[by] = make(map[*hold]struct{})
	}
	m[by][h] = struct{}{}
}

func remove(m map[string]map[*hold]struct{}, by string, h *hold) {
	if by == "" {
		return
	}
	if delete(m[by], h); len(m[by]) == 0 {
		delete(m, by)
	}
}

// changed checks again all that a change may concern.
func (g *Guard) changed(c Changes) {
	view := g.registry.state.Store().View()
	for _, h := range g.concerned(c) {
		if err := g.registry.check(view, h.party); err != nil {
			h.end(err)
		}
	}
}

func (g *Guard) concerned(c Changes) (out []*hold) {
	g.mu.Lock()
	defer g.mu.Unlock()
	take := func(m map[*hold]struct{}) {
		for h := range m {
			out = append(out, h)
		}
	}
	if c.Reset {
		for _, m := range []map[string]map[*hold]struct{}{g.byKey, g.byNode} {
			for _, holds := range m {
				take(holds)
			}
		}
		return out
	}
	for _, node := range c.Nodes {
		take(g.byNode[node])
	}
	for _, key := range c.Revoked {
		take(g.byKey[key])
	}
	return out
}
