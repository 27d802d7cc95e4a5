package policy

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// Name is a namespace and a name.
type Name struct{ Namespace, Name string }

// Config says what a Fold works with.
type Config struct {
	// Bytes bounds all policies and groups; a fourth of it is the policies of one
	// namespace at most.
	Bytes  int64
	Logger *slog.Logger
}

// maxNamed is how many groups the policies of a namespace may name.
const maxNamed = 4096

// Fold is who may talk to whom. Its methods are safe for concurrent use.
type Fold struct {
	cfg Config

	mu         sync.Mutex
	revision   int64
	namespaces map[string]*namespace
	pods       map[Name]*pod
	byNode     map[string]map[*pod]struct{}
	policies   map[Name]*policy
	scopes     map[string]*scope
	selecting  map[*scope]struct{} // the scopes that select namespaces
	groups     map[string]*group
	followers  map[string]*Follower // of nodes
	wants      map[string]int64     // what nodes wait to be told of

	bytes  int64            // of policies and groups
	used   map[string]int64 // bytes of policies by namespace
	named  map[string]int   // groups that they name, by namespace
	closed map[*policy]string
	shut   map[*group]struct{}

	// Since the last settle.
	dirtyPods     map[*pod]struct{}
	dirtyPolicies map[*policy]struct{}
	dirtyGroups   map[*group]struct{}
	let           []*chosen // to be released
	freed         bool      // there may be room for what was left out
	sent          int64     // bytes that followers are to be told
}

// pod is a pod that has its own network, or a node.
type pod struct {
	name Name
	ns   *namespace
	in   []*chosen
	facts
}

// facts is what of a pod matters here.
type facts struct {
	uid       string
	node      string
	labels    labels.Set
	addresses []netip.Addr // that it has
	members   []netip.Addr // and as which it is in groups: none when it has ended
	ports     []namedPort
}

type namedPort struct {
	name, protocol string
	number         uint16
}

// policy is one as it is, and as followers know it.
type policy struct {
	name      Name
	want      *Policy
	why       string // it is told without its rules; empty: it is not
	gone      bool
	subject   *chosen
	groups    map[string]*group
	told      map[string]*group // the groups that its followers have for it
	item      *content
	followers map[*Follower]int // by how many of their pods it holds for
}

// New returns a fold of nothing.
func New(cfg Config) *Fold {
	return &Fold{
		cfg: cfg, namespaces: make(map[string]*namespace), pods: make(map[Name]*pod), byNode: make(map[string]map[*pod]struct{}),
		policies: make(map[Name]*policy), scopes: make(map[string]*scope), selecting: make(map[*scope]struct{}), groups: make(map[string]*group),
		followers: make(map[string]*Follower), wants: make(map[string]int64),
		used: make(map[string]int64), named: make(map[string]int), closed: make(map[*policy]string), shut: make(map[*group]struct{}),
		dirtyPods: make(map[*pod]struct{}), dirtyPolicies: make(map[*policy]struct{}), dirtyGroups: make(map[*group]struct{}),
	}
}

// Txn is the changes up to a revision. It is valid within Update alone.
type Txn struct{ f *Fold }

// Update takes changes, after which the fold is as of a revision of the state, and
// returns about how many bytes followers are to be told of it.
func (f *Fold) Update(revision int64, do func(*Txn)) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	do(&Txn{f})
	f.settle(revision)
	sent := f.sent
	f.sent = 0
	return sent
}

// Held is how many bytes policies and groups count for, how many they are in parts, and
// how many of them are left out.
func (f *Fold) Held() (bytes int64, items, withheld int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	items = len(f.policies)
	for _, g := range f.groups {
		items += len(g.told)
	}
	return f.bytes, items, len(f.closed) + len(f.shut)
}

// Keep says what is still there.
type Keep struct {
	Pod       func(Name) bool
	Node      func(string) bool
	Namespace func(string) bool
	Policy    func(Name) bool
}

// Keep forgets what is not there any more.
func (t *Txn) Keep(keep Keep) {
	for name := range t.f.pods {
		switch {
		case name.Namespace == "" && !keep.Node(name.Name):
			t.RemoveNode(name.Name)
		case name.Namespace != "" && !keep.Pod(name):
			t.f.removePod(name)
		}
	}
	for name := range t.f.namespaces {
		if name != "" && !keep.Namespace(name) {
			t.RemoveNamespace(name)
		}
	}
	for name := range t.f.policies {
		if !keep.Policy(name) {
			t.Remove(name.Namespace, name.Name)
		}
	}
}

// SetNamespace takes a namespace's labels.
func (t *Txn) SetNamespace(o *corev1.Namespace) {
	ns := t.f.namespaceOf(o.Name)
	if ns.exists && maps.Equal(ns.labels, o.Labels) {
		return
	}
	ns.exists, ns.labels = true, o.Labels
	t.f.relabel(ns)
}

// RemoveNamespace forgets a namespace. Pods that it still has are in no selection by
// namespaces' labels.
func (t *Txn) RemoveNamespace(name string) {
	ns := t.f.namespaces[name]
	if ns == nil || !ns.exists {
		return
	}
	ns.exists, ns.labels = false, nil
	t.f.relabel(ns)
	t.f.forgetNamespace(ns)
}

// SetPod takes a pod. One in its node's network has no policies and is in no group.
func (t *Txn) SetPod(o *corev1.Pod) {
	name := Name{o.Namespace, o.Name}
	if o.Spec.HostNetwork {
		t.f.removePod(name)
		return
	}
	t.f.setPod(name, factsOf(o))
}

// RemovePod forgets a pod.
func (t *Txn) RemovePod(namespace, name string) { t.f.removePod(Name{namespace, name}) }

// SetNode takes the addresses of a node, which cluster-wide policies select by its
// labels.
func (t *Txn) SetNode(name string, set map[string]string, addresses []netip.Addr) {
	t.f.setPod(Name{"", name}, facts{labels: set, members: addresses})
}

// RemoveNode forgets a node.
func (t *Txn) RemoveNode(name string) {
	t.f.removePod(Name{"", name})
	delete(t.f.wants, name)
}

func factsOf(o *corev1.Pod) facts {
	out := facts{uid: string(o.UID), node: o.Spec.NodeName, labels: o.Labels}
	texts := make([]string, 0, 2)
	for _, ip := range o.Status.PodIPs {
		texts = append(texts, ip.IP)
	}
	if len(texts) == 0 && o.Status.PodIP != "" {
		texts = append(texts, o.Status.PodIP)
	}
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
			out.addresses = append(out.addresses, ip.Unmap())
		}
	}
	if !objects.PodEnded(o) {
		out.members = out.addresses
	}
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			n := namedPort{p.Name, protocolOf(p.Protocol), uint16(p.ContainerPort)}
			// The first of a name is the one that is meant.
			if p.Name != "" && p.ContainerPort > 0 && p.ContainerPort <= 65535 && !slices.ContainsFunc(out.ports, func(o namedPort) bool { return o.name == n.name && o.protocol == n.protocol }) {
				out.ports = append(out.ports, n)
			}
		}
	}
	for i := range o.Spec.Containers {
		add(&o.Spec.Containers[i])
	}
	for i := range o.Spec.InitContainers {
		if c := &o.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	return out
}

func (f *Fold) setPod(name Name, next facts) {
	p := f.pods[name]
	if p != nil && p.uid != next.uid {
		f.removePod(name)
		p = nil
	}
	if p == nil {
		p = &pod{name: name, ns: f.namespaceOf(name.Namespace), facts: next}
		f.pods[name], p.ns.pods[p] = p, struct{}{}
		f.place(p)
		for s := range p.ns.scopes {
			s.matching(p.labels, func(c *chosen) { f.join(p, c) })
		}
		f.dirtyPods[p] = struct{}{}
		return
	}
	old := p.facts
	if old.node != next.node || !slices.Equal(old.addresses, next.addresses) {
		f.dirtyPods[p] = struct{}{}
	}
	if old.node != next.node {
		f.unplace(p)
		defer f.place(p)
	}
	if !maps.Equal(old.labels, next.labels) {
		for i := len(p.in) - 1; i >= 0; i-- {
			if c := p.in[i]; !c.selector.Matches(next.labels) {
				f.leave(p, c)
			}
		}
	}
	p.facts = next
	if !slices.Equal(old.members, next.members) || !slices.Equal(old.ports, next.ports) {
		for _, c := range p.in {
			for _, g := range c.groups {
				f.change(g, &old, &next)
			}
		}
	}
	if !maps.Equal(old.labels, next.labels) {
		for s := range p.ns.scopes {
			s.matching(p.labels, func(c *chosen) {
				if _, in := c.members[p]; !in {
					f.join(p, c)
				}
			})
		}
	}
}

func (f *Fold) removePod(name Name) {
	p := f.pods[name]
	if p == nil {
		return
	}
	delete(f.pods, name)
	delete(p.ns.pods, p)
	f.unplace(p)
	for len(p.in) > 0 {
		f.leave(p, p.in[len(p.in)-1])
	}
	delete(f.dirtyPods, p)
	f.forgetNamespace(p.ns)
}

func (f *Fold) place(p *pod) {
	if p.node == "" {
		return
	}
	if f.byNode[p.node] == nil {
		f.byNode[p.node] = make(map[*pod]struct{})
	}
	f.byNode[p.node][p] = struct{}{}
}

func (f *Fold) unplace(p *pod) {
	if delete(f.byNode[p.node], p); len(f.byNode[p.node]) == 0 {
		delete(f.byNode, p.node)
	}
	if l := f.followers[p.node]; l != nil {
		l.drop(p)
	}
}

// Set takes a policy.
func (t *Txn) Set(want *Policy) {
	f, name := t.f, Name{want.Item.GetNamespace(), want.Item.GetName()}
	p := f.policies[name]
	if p == nil {
		p = &policy{name: name, followers: make(map[*Follower]int)}
		f.policies[name] = p
	}
	p.want, p.gone = want, false
	f.compose(p)
}

// Remove forgets a policy; the namespace of the cluster's is empty.
func (t *Txn) Remove(namespace, name string) {
	if p := t.f.policies[Name{namespace, name}]; p != nil && !p.gone {
		p.gone = true
		t.f.compose(p)
	}
}

// compose makes a policy's subject and groups those that it wants.
func (f *Fold) compose(p *policy) {
	f.dirtyPolicies[p] = struct{}{}
	var subject *chosen
	groups := make(map[string]*group)
	if !p.gone {
		subject = f.acquire(p.want.subject)
		if n := f.named[p.name.Namespace] - len(p.groups) + len(p.want.groups); n > maxNamed && len(p.want.groups) > 0 {
			p.why = fmt.Sprintf("the policies of its namespace name more than %d selections of peers", maxNamed)
		} else {
			p.why = ""
			for name, s := range p.want.groups {
				groups[name] = f.acquireGroup(name, s, p)
			}
		}
	}
	for name, g := range p.groups {
		if groups[name] == nil {
			f.releaseGroup(g, p)
		}
	}
	if f.named[p.name.Namespace] += len(groups) - len(p.groups); f.named[p.name.Namespace] == 0 {
		delete(f.named, p.name.Namespace)
	}
	if len(groups) < len(p.groups) {
		f.freed = true
	}
	p.groups = groups
	old := p.subject
	p.subject = subject
	if subject != old {
		if subject != nil {
			f.hold(p, subject)
		}
		if old != nil {
			delete(old.policies, p)
			maps.Copy(f.dirtyPods, old.members)
		}
	}
	if old != nil {
		f.let = append(f.let, old)
	}
}

func (f *Fold) hold(p *policy, subject *chosen) {
	subject.policies[p] = struct{}{}
	maps.Copy(f.dirtyPods, subject.members)
}

func (f *Fold) acquireGroup(name string, s spec, by *policy) *group {
	g := f.groups[name]
	if g == nil {
		g = &group{
			name: name, spec: s, of: f.acquire(s.of), refs: make(map[*policy]struct{}),
			told: make(map[string]*content), followers: make(map[*Follower]struct{}),
		}
		f.groups[name], g.of.groups[name] = g, g
		g.root.dirty = true
		for p := range g.of.members {
			f.change(g, nil, &p.facts)
		}
		f.dirtyGroups[g] = struct{}{}
	}
	g.refs[by] = struct{}{}
	return g
}

// releaseGroup says that a policy names a group no more. settle drops it when nobody
// does.
func (f *Fold) releaseGroup(g *group, by *policy) {
	delete(g.refs, by)
	f.dirtyGroups[g] = struct{}{}
}

// itemOf is a policy as nodes are told of it.
func (f *Fold) itemOf(p *policy, closed bool) *pb.NetworkPolicyItem {
	if closed {
		return p.want.closed()
	}
	return p.want.without(func(name string) bool { return p.groups[name] != nil && p.groups[name].withheld })
}

func (p *policy) key() wire.Key {
	return wire.Key{Kind: pb.NetworkKind_NETWORK_KIND_POLICY, Namespace: p.name.Namespace, Name: p.name.Name}
}
