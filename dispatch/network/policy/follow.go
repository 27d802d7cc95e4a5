package policy

import (
	"cmp"
	"slices"
	"time"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// Follower is what a node is told: what its pods need, each item once. One goroutine
// takes from it.
type Follower struct {
	f    *Fold
	node string

	// All below is guarded by f.mu.
	pods     map[*pod]*holding
	policies map[*policy]int
	groups   map[*group]int
	sum      wire.Sum // of all items
	pending  map[wire.Key]*content
	since    time.Time // of the first pending
	moved    chan struct{}
}

// holding is a pod for which policies hold.
type holding struct {
	policies []*policy // in the order of their names
	item     *content
}

// Told is what changed for a node, or all there is.
type Told struct {
	Items    []*pb.NetworkItem
	Gone     []*pb.NetworkKey
	Whole    wire.Sum // of all that the node has then
	Revision int64
	Since    time.Time // when the first of it was there to be told
}

// Follow returns what a node is told. The one before, if there is any, is told nothing
// more.
func (f *Fold) Follow(node string) *Follower {
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.followers[node]; old != nil {
		old.end()
	}
	l := &Follower{
		f: f, node: node, pods: make(map[*pod]*holding), policies: make(map[*policy]int), groups: make(map[*group]int),
		pending: make(map[wire.Key]*content), moved: make(chan struct{}, 1),
	}
	f.followers[node] = l
	sent := f.sent
	for p := range f.byNode[node] {
		l.look(p)
	}
	f.sent = sent // this is a list, which is bounded elsewhere
	return l
}

// Close ends it.
func (l *Follower) Close() {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	l.end()
}

func (l *Follower) end() {
	if l.f.followers[l.node] == l {
		delete(l.f.followers, l.node)
	}
	for p := range l.policies {
		delete(p.followers, l)
	}
	for g := range l.groups {
		delete(g.followers, l)
	}
	clear(l.pods)
	clear(l.policies)
	clear(l.groups)
}

// Want says that a node waits to be told up to a revision, even if nothing changes for
// it.
func (f *Fold) Want(node string, revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wants[node] >= revision {
		return
	}
	f.wants[node] = revision
	if l := f.followers[node]; l != nil && f.revision >= revision {
		l.notify()
	}
}

// Moved has a value when Take has something.
func (l *Follower) Moved() <-chan struct{} { return l.moved }

// Take is what changed since the last Take or List, whole as of its revision. It says
// false when there is nothing.
func (l *Follower) Take() (Told, bool) {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	want, wanted := l.f.wants[l.node]
	if len(l.pending) == 0 && (!wanted || l.f.revision < want) {
		return Told{}, false
	}
	t := l.begin()
	for key, c := range l.pending {
		if c == nil {
			t.Gone = append(t.Gone, key.Proto())
		} else {
			t.Items = append(t.Items, c.item)
		}
	}
	l.pending = emptied(l.pending)
	return t, true
}

// begin is what Take and List have in common.
func (l *Follower) begin() Told {
	if l.f.wants[l.node] <= l.f.revision {
		delete(l.f.wants, l.node)
	}
	t := Told{Whole: l.sum, Revision: l.f.revision, Since: l.since}
	l.since = time.Time{}
	return t
}

// List is all that the node is told, of those buckets alone that choose says when it knows
// the digests of all.
func (l *Follower) List(choose func(*wire.Digest) wire.Set) Told {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	t := l.begin()
	l.pending = emptied(l.pending)
	var digest wire.Digest
	l.each(func(c *content) { digest.Toggle(c.bucket, c.sum) })
	set := choose(&digest)
	l.each(func(c *content) {
		if set.Has(c.bucket) {
			t.Items = append(t.Items, c.item)
		}
	})
	return t
}

func (l *Follower) each(f func(*content)) {
	for _, h := range l.pods {
		f(h.item)
	}
	for p := range l.policies {
		f(p.item)
	}
	for g := range l.groups {
		for _, c := range g.told {
			f(c)
		}
	}
}

func (l *Follower) notify() {
	select {
	case l.moved <- struct{}{}:
	default:
	}
}

// change gives the node an item instead of another; either may be nil.
func (l *Follower) change(old, next *content) {
	if old != nil {
		l.sum = l.sum.AddWhole(old.sum)
		l.pending[old.key] = nil
	}
	if next != nil {
		l.sum = l.sum.AddWhole(next.sum)
		l.pending[next.key] = next
		l.f.sent += next.size()
	}
	if l.since.IsZero() {
		l.since = time.Now()
	}
	l.notify()
}

// look makes what the node is told of a pod what it is now.
func (l *Follower) look(p *pod) {
	var policies []*policy
	for _, c := range p.in {
		for policy := range c.policies {
			policies = append(policies, policy)
		}
	}
	if len(policies) == 0 {
		l.drop(p)
		return
	}
	slices.SortFunc(policies, func(a, b *policy) int {
		return cmp.Or(cmp.Compare(a.name.Namespace, b.name.Namespace), cmp.Compare(a.name.Name, b.name.Name))
	})
	h := l.pods[p]
	if h == nil {
		h = &holding{}
		l.pods[p] = h
	}
	old := h.policies
	h.policies = policies
	for _, policy := range policies {
		l.add(policy)
	}
	for _, policy := range old {
		l.remove(policy)
	}
	next := p.encode(policies)
	if h.item == nil || h.item.sum != next.sum {
		l.change(h.item, next)
		h.item = next
	}
}

// drop is look of a pod without policies.
func (l *Follower) drop(p *pod) {
	h := l.pods[p]
	if h == nil {
		return
	}
	delete(l.pods, p)
	for _, policy := range h.policies {
		l.remove(policy)
	}
	l.change(h.item, nil)
}

func (p *pod) encode(policies []*policy) *content {
	key := wire.Key{Kind: pb.NetworkKind_NETWORK_KIND_POD, Namespace: p.name.Namespace, Name: p.name.Name}
	m := &pb.NetworkPod{Namespace: p.name.Namespace, Name: p.name.Name, Uid: p.uid}
	for _, policy := range policies {
		m.Policies = append(m.Policies, &pb.NetworkPolicyRef{Namespace: policy.name.Namespace, Name: policy.name.Name})
	}
	for _, ip := range p.addresses {
		m.Addresses = append(m.Addresses, ip.AsSlice())
	}
	return encode(key, m)
}

func (l *Follower) add(p *policy) {
	if l.policies[p]++; l.policies[p] > 1 {
		p.followers[l] = l.policies[p]
		return
	}
	p.followers[l] = 1
	l.change(nil, p.item)
	for _, g := range p.told {
		l.need(g)
	}
}

func (l *Follower) remove(p *policy) {
	if l.policies[p]--; l.policies[p] > 0 {
		p.followers[l] = l.policies[p]
		return
	}
	delete(l.policies, p)
	delete(p.followers, l)
	l.change(p.item, nil)
	for _, g := range p.told {
		l.unneed(g)
	}
}

func (l *Follower) need(g *group) {
	if l.groups[g]++; l.groups[g] > 1 {
		return
	}
	g.followers[l] = struct{}{}
	for _, c := range g.told {
		l.change(nil, c)
	}
}

func (l *Follower) unneed(g *group) {
	if l.groups[g]--; l.groups[g] > 0 {
		return
	}
	delete(l.groups, g)
	delete(g.followers, l)
	for _, c := range g.told {
		l.change(c, nil)
	}
}
