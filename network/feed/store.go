package feed

import (
	"context"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// maxLog is how many names of what changed a Store remembers. Who waits for changes and is
// further behind looks at all there is.
const maxLog = 1 << 14

// Changes is what happened after a revision.
type Changes struct {
	View *View
	// Reset says that anything may have changed, and the maps are nil.
	Reset bool
	// Services names those that changed, or a slice of which did.
	Services map[Name]struct{}
	// Nodes says that a node's ranges or address changed.
	Nodes bool
	// Addresses says that who announces an address changed.
	Addresses bool
	// Policy says that something of policies changed, which the maps below name, or what
	// View.Told says.
	Policy bool
	// PoliciesChanged, GroupsChanged and PodsChanged name what came, changed or went.
	PoliciesChanged map[Name]struct{}
	GroupsChanged   map[string]struct{}
	PodsChanged     map[Name]struct{}
}

// Store keeps the newest View of one node. Its methods are safe for concurrent use.
type Store struct {
	view atomic.Pointer[View]

	mu        sync.Mutex
	sliceOf   map[Name]string // of each slice its key in View.slices
	log       []change        // in the order of their revisions
	floor     uint64          // of changes up to here, some are not in log
	nodes     uint64          // revision of the last change of a node
	told      uint64          // and of the last of View.Told
	addresses uint64          // and of who announces an address
	changed   chan struct{}   // closed with the next View
}

// kindOfChange is what changed.
type kindOfChange uint8

const (
	serviceChanged kindOfChange = iota // or a slice of it
	policyChanged
	groupChanged
	podChanged
)

// thing is one that changed.
type thing struct {
	kind kindOfChange
	name Name
}

type change struct {
	revision uint64
	thing
}

// NewStore returns the store of a node that knows nothing yet.
func NewStore(nodeName string) *Store {
	s := &Store{sliceOf: make(map[Name]string), changed: make(chan struct{})}
	s.view.Store(&View{nodeName: nodeName})
	return s
}

// View is the newest.
func (s *Store) View() *View { return s.view.Load() }

// Changes waits until there is a View newer than revision after, or ctx ends. A store
// at rest has revision 0, which is newer than nothing.
func (s *Store) Changes(ctx context.Context, after uint64) (Changes, error) {
	for {
		s.mu.Lock()
		view, changed := s.View(), s.changed
		if view.revision > after {
			out := s.since(view, after)
			s.mu.Unlock()
			return out, nil
		}
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return Changes{}, ctx.Err()
		case <-changed:
		}
	}
}

func (s *Store) since(view *View, after uint64) Changes {
	if after < s.floor {
		return Changes{View: view, Reset: true, Nodes: true, Policy: true, Addresses: true}
	}
	out := Changes{
		View: view, Services: make(map[Name]struct{}), Nodes: s.nodes > after, Policy: s.told > after, Addresses: s.addresses > after,
		PoliciesChanged: make(map[Name]struct{}), GroupsChanged: make(map[string]struct{}), PodsChanged: make(map[Name]struct{}),
	}
	for i := len(s.log) - 1; i >= 0 && s.log[i].revision > after; i-- {
		c := s.log[i]
		out.Policy = out.Policy || c.kind != serviceChanged
		switch c.kind {
		case serviceChanged:
			out.Services[c.name] = struct{}{}
		case policyChanged:
			out.PoliciesChanged[c.name] = struct{}{}
		case groupChanged:
			out.GroupsChanged[c.name.Name] = struct{}{}
		case podChanged:
			out.PodsChanged[c.name] = struct{}{}
		}
	}
	return out
}

// Update makes one View of what do puts and removes. A do that changes nothing makes
// none.
func (s *Store) Update(do func(*Txn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.View()
	next := &View{revision: old.revision + 1, synced: old.synced, nodeName: old.nodeName, zone: old.zone, epoch: old.epoch}
	next.nodes, next.services, next.slices = *old.nodes.Copy(), *old.services.Copy(), *old.slices.Copy()
	next.policies, next.groups, next.pods, next.told = *old.policies.Copy(), *old.groups.Copy(), *old.pods.Copy(), old.told
	next.addresses = *old.addresses.Copy()
	t := &Txn{store: s, view: next, touched: make(map[thing]struct{})}
	do(t)
	if !t.changed {
		return
	}
	if t.nodes {
		s.nodes = next.revision
	}
	if t.addresses {
		s.addresses = next.revision
	}
	if t.told {
		s.told = next.revision
	}
	for what := range t.touched {
		s.log = append(s.log, change{next.revision, what})
	}
	switch {
	case t.reset:
		s.log, s.floor = nil, next.revision
	case len(s.log) > maxLog:
		cut := len(s.log) - maxLog/2
		s.floor = s.log[cut-1].revision
		for cut < len(s.log) && s.log[cut].revision == s.floor {
			cut++
		}
		s.log = append([]change(nil), s.log[cut:]...)
	}
	s.view.Store(next)
	close(s.changed)
	s.changed = make(chan struct{})
}

// Txn is one change of a Store. It is valid within Update alone.
type Txn struct {
	store     *Store
	view      *View
	touched   map[thing]struct{}
	changed   bool
	reset     bool
	nodes     bool
	told      bool
	addresses bool
}

func (t *Txn) touch(kind kindOfChange, name Name) {
	t.changed = true
	t.touched[thing{kind, name}] = struct{}{}
}

// SetNode puts what is known of a node, which is the store's from now on.
func (t *Txn) SetNode(n *pb.NodeRoute) {
	t.view.nodes.Set(n.GetNodeName(), n)
	t.changed, t.nodes = true, true
}

// RemoveNode forgets a node if it is there.
func (t *Txn) RemoveNode(name string) {
	if _, ok := t.view.nodes.Delete(name); ok {
		t.changed, t.nodes = true, true
	}
}

// SetAddress puts who announces an address, which is the store's from now on.
func (t *Txn) SetAddress(a *pb.AddressHolder) {
	t.view.addresses.Set(a.GetAddress(), a)
	t.changed, t.addresses = true, true
}

// RemoveAddress forgets an address if it is there.
func (t *Txn) RemoveAddress(ip string) {
	if _, ok := t.view.addresses.Delete(ip); ok {
		t.changed, t.addresses = true, true
	}
}

// SetService puts a Service, which is the store's from now on.
func (t *Txn) SetService(o *corev1.Service) {
	name := Name{o.Namespace, o.Name}
	t.view.services.Set(name.key(), o)
	t.touch(serviceChanged, name)
}

// RemoveService removes a Service if it is there.
func (t *Txn) RemoveService(name Name) {
	if _, ok := t.view.services.Delete(name.key()); ok {
		t.touch(serviceChanged, name)
	}
}

// SetSlice puts an EndpointSlice, which is the store's from now on. It is of the
// Service that its label names.
func (t *Txn) SetSlice(o *discoveryv1.EndpointSlice) {
	name, service := Name{o.Namespace, o.Name}, Name{o.Namespace, o.Labels[discoveryv1.LabelServiceName]}
	key := service.key() + nul + o.Name
	if had, ok := t.store.sliceOf[name]; ok && had != key {
		t.RemoveSlice(name)
	}
	t.store.sliceOf[name] = key
	t.view.slices.Set(key, o)
	t.touch(serviceChanged, service)
}

// RemoveSlice removes an EndpointSlice if it is there.
func (t *Txn) RemoveSlice(name Name) {
	key, ok := t.store.sliceOf[name]
	if !ok {
		return
	}
	delete(t.store.sliceOf, name)
	o, _ := t.view.slices.Delete(key)
	t.touch(serviceChanged, Name{o.Namespace, o.Labels[discoveryv1.LabelServiceName]})
}

// SetZone says in which zone this node is; hints of all Services are read by it.
func (t *Txn) SetZone(zone string) {
	if t.view.zone != zone {
		t.view.zone, t.changed, t.reset = zone, true, true
	}
}

// SetSynced says that the view is all that the controllers know.
func (t *Txn) SetSynced() { t.setSynced(t.view.epoch) }

// setSynced says that the view is all that the controllers of a cluster know.
func (t *Txn) setSynced(epoch string) {
	if !t.view.synced || t.view.epoch != epoch {
		t.view.synced, t.view.epoch, t.changed, t.reset = true, epoch, true, true
	}
}

// set puts a decoded item.
func (t *Txn) set(o wire.Object) {
	switch {
	case o.Node != nil:
		t.SetNode(o.Node)
	case o.Service != nil:
		t.SetService(o.Service)
	case o.Slice != nil:
		t.SetSlice(o.Slice)
	case o.Policy != nil:
		t.SetPolicy(o.Policy)
	case o.Group != nil:
		t.SetGroup(o.Group)
	case o.Address != nil:
		t.SetAddress(o.Address)
	case o.Pod != nil:
		t.SetPod(o.Pod)
	}
}

// remove removes an item.
func (t *Txn) remove(k wire.Key) {
	switch k.Kind {
	case pb.NetworkKind_NETWORK_KIND_NODE:
		t.RemoveNode(k.Name)
	case pb.NetworkKind_NETWORK_KIND_SERVICE:
		t.RemoveService(Name{k.Namespace, k.Name})
	case pb.NetworkKind_NETWORK_KIND_SLICE:
		t.RemoveSlice(Name{k.Namespace, k.Name})
	case pb.NetworkKind_NETWORK_KIND_POLICY:
		t.RemovePolicy(Name{k.Namespace, k.Name})
	case pb.NetworkKind_NETWORK_KIND_GROUP:
		t.RemoveGroup(k.Name)
	case pb.NetworkKind_NETWORK_KIND_ADDRESS:
		t.RemoveAddress(k.Name)
	case pb.NetworkKind_NETWORK_KIND_POD:
		t.RemovePod(Name{k.Namespace, k.Name})
	}
}
