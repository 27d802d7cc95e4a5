package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	pb "timonel/proto/timonel/v1"
	"timonel/reconcile"
	"timonel/state/objects"
)

var (
	leaseKind      = coordinationv1.SchemeGroupVersion.WithKind("Lease")
	leasesResource = coordinationv1.SchemeGroupVersion.WithResource("leases")
)

const (
	// How long after an election, or a pause, no node's addresses are moved: streams
	// come back meanwhile.
	holderSettle = 5 * time.Second
	// How long an agent that said goodbye may be away and keep its addresses: its node
	// goes on carrying what it carried, and an agent that is replaced is back sooner.
	holderGoodbye = 5 * time.Second
	// How many controllers' failed probes count as a second witness.
	holderProbes = 2

	autoscalerTaint = "ToBeDeletedByClusterAutoscaler"
)

// AddressHolder decides which node announces each address of Services of type
// LoadBalancer, and says so in a Lease of the address. It works on all of them under
// one key, so that they are spread. An address stays where it is while that node is
// there and may have it, and moves as soon as two witnesses miss the node: unlike pods,
// an address that was moved without need costs only its connections.
type AddressHolder struct{ Reserved Reserved }

// Name implements Reconciler.
func (AddressHolder) Name() string { return "load-balancer-address-controller" }

// All implements Reconciler.
func (AddressHolder) All(*objects.Snapshot) []reconcile.Key {
	return []reconcile.Key{reconcile.Singleton}
}

// Keys implements Reconciler: balancers, the pools, the Leases, Nodes that may have
// addresses or not any more, and slices of balancers that want local endpoints.
func (AddressHolder) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	m, matters := c.Meta(), false
	switch m.GVK {
	case serviceKind:
		matters = balanced(c)
	case configMapKind:
		matters = m.Namespace == PoolsNamespace && m.Name == PoolsName
	case leaseKind:
		matters = m.Namespace == pb.AddressNamespace && strings.HasPrefix(m.Name, pb.AddressLease)
	case reconcile.NodeKind:
		before, after := objects.As[*corev1.Node](c.Old), objects.As[*corev1.Node](c.New)
		matters = before == nil || after == nil || mayAnnounce(before) != mayAnnounce(after) || unknown(before) != unknown(after) ||
			objects.NodeReady(before) != objects.NodeReady(after) || !maps.Equal(before.Labels, after.Labels)
	case endpointSliceKind:
		svc, ok := s.Services().Get(m.Namespace, m.Labels[discoveryv1.LabelServiceName])
		matters = ok && svc.Spec.Type == corev1.ServiceTypeLoadBalancer && local(svc)
	}
	if matters {
		return []reconcile.Key{reconcile.Singleton}
	}
	return nil
}

// HealthKeys implements HealthReconciler.
func (AddressHolder) HealthKeys(before, after reconcile.Health, s *objects.Snapshot) []reconcile.Key {
	if !before.Since.Equal(after.Since) {
		return []reconcile.Key{reconcile.Singleton}
	}
	for l := range leases(s) {
		if node := holderOf(l); before.Nodes[node] != after.Nodes[node] {
			return []reconcile.Key{reconcile.Singleton}
		}
	}
	return nil
}

// leases yields the Leases of addresses.
func leases(s *objects.Snapshot) func(func(*coordinationv1.Lease) bool) {
	return s.Leases().Named(pb.AddressNamespace, pb.AddressLease)
}

func holderOf(l *coordinationv1.Lease) string {
	if l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

// mayAnnounce says whether a Node may announce addresses at all.
func mayAnnounce(node *corev1.Node) bool {
	_, excluded := node.Labels[corev1.LabelNodeExcludeBalancers]
	return !excluded && node.DeletionTimestamp == nil &&
		!slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == autoscalerTaint })
}

// unknown says whether a Node was given up.
func unknown(node *corev1.Node) bool {
	ready := reconcile.NodeCondition(node, corev1.NodeReady)
	return ready != nil && ready.Status == corev1.ConditionUnknown
}

// away says whether a node's addresses go elsewhere because it is gone, and when that may
// change with no news.
func away(h reconcile.Health, node string, now time.Time) (bool, time.Time) {
	n := h.Nodes[node]
	if n.Stream {
		return false, time.Time{}
	}
	due := h.Since.Add(holderSettle)
	if n.Goodbye {
		due = reconcile.Latest(due, n.StreamSince.Add(holderGoodbye))
	} else if _, _, missed := n.MissedBy(holderProbes); !missed {
		return false, time.Time{}
	}
	if now.Before(due) {
		return false, due
	}
	return true, time.Time{}
}

// announced is an address and what it takes to announce it.
type announced struct {
	ip       netip.Addr
	services []*corev1.Service // the oldest first
	pool     *pool             // nil: none any more
	nodes    map[string]bool   // with ready endpoints; nil: any
	lease    *coordinationv1.Lease
}

// Reconcile implements Reconciler.
func (h AddressHolder) Reconcile(in reconcile.Input, _ reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	p := placing{in: in, result: &result, held: map[string]int{}}
	all := map[netip.Addr]*announced{}
	pools, _ := h.Reserved.poolsOf(in.Snapshot)
	alloc := allocator{pools: pools}
	for svc := range in.Snapshot.LoadBalancers() {
		if !given(svc) {
			continue
		}
		for _, ip := range addressesOf(svc) {
			if all[ip] == nil {
				all[ip] = &announced{ip: ip, pool: alloc.poolOf(ip)}
			}
			all[ip].add(in.Snapshot, svc)
		}
	}
	for l := range leases(in.Snapshot) {
		switch ip, ok := pb.LeasedAddress(l.Name, l.Annotations); {
		case ok && all[ip] != nil:
			all[ip].lease = l
		case ok && l.DeletionTimestamp == nil:
			result.Add(reconcile.Delete(leasesResource, l))
		}
	}
	var homeless []*announced
	for _, ip := range slices.SortedFunc(maps.Keys(all), netip.Addr.Compare) {
		a := all[ip]
		if a.lease != nil && p.stays(a) {
			p.held[holderOf(a.lease)]++
		} else {
			homeless = append(homeless, a)
		}
	}
	for _, a := range homeless {
		p.place(a)
	}
	return result, nil
}

// add counts a Service that has the address.
func (a *announced) add(s *objects.Snapshot, svc *corev1.Service) {
	a.services = append(a.services, svc)
	slices.SortStableFunc(a.services, func(x, y *corev1.Service) int {
		return x.CreationTimestamp.Compare(y.CreationTimestamp.Time)
	})
	if !local(svc) {
		return
	}
	nodes := map[string]bool{}
	for m := range s.OwnedBy(svc.UID) {
		slice, ok := m.Object.(*discoveryv1.EndpointSlice)
		if !ok || slice.Namespace != svc.Namespace {
			continue
		}
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				nodes[*e.NodeName] = true
			}
		}
	}
	if a.nodes != nil { // those of all Services that share the address
		maps.DeleteFunc(nodes, func(n string, _ bool) bool { return !a.nodes[n] })
	}
	a.nodes = nodes
}

// wants says whether a Node is one of those that an address asks for.
func (a *announced) wants(node *corev1.Node) bool {
	return mayAnnounce(node) && (a.pool == nil || a.pool.nodes.Matches(labels.Set(node.Labels))) && (a.nodes == nil || a.nodes[node.Name])
}

// placing is one pass over all addresses.
type placing struct {
	in     reconcile.Input
	result *reconcile.Result
	held   map[string]int // addresses by node
	ready  []*corev1.Node // that may announce; nil: not looked at yet
}

// stays says whether an address need not move.
func (p *placing) stays(a *announced) bool {
	node, ok := p.in.Snapshot.Nodes().Get("", holderOf(a.lease))
	if !ok || !a.wants(node) || unknown(node) {
		return false
	}
	gone, next := away(p.in.Health, node.Name, p.in.Now)
	p.result.At(next)
	return !gone
}

// place gives an address to one of the nodes with the fewest.
func (p *placing) place(a *announced) {
	if p.ready == nil {
		p.ready = []*corev1.Node{}
		for node := range p.in.Snapshot.Nodes().All() {
			if gone, _ := away(p.in.Health, node.Name, p.in.Now); !gone && mayAnnounce(node) && objects.NodeReady(node) {
				p.ready = append(p.ready, node)
			}
		}
	}
	var best *corev1.Node
	for _, node := range p.ready {
		if !a.wants(node) || a.lease != nil && node.Name == holderOf(a.lease) {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(p.held[node.Name], p.held[best.Name]), cmp.Compare(a.rank(node), a.rank(best))) < 0 {
			best = node
		}
	}
	if best == nil {
		p.nobody(a)
		return
	}
	p.held[best.Name]++
	p.write(a, &best.Name, reconcile.NewEvent(serviceKind, a.services[0], corev1.EventTypeNormal, "AddressAnnounced", "%s is announced by node %s", a.ip, best.Name))
}

// write makes the Lease of an address say who holds it; nil: nobody.
func (p *placing) write(a *announced, holder *string, event *reconcile.Event) {
	now := metav1.NewMicroTime(p.in.Now)
	var r reconcile.Request
	if a.lease == nil {
		r = reconcile.Create(leasesResource, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Namespace: pb.AddressNamespace, Name: pb.AddressLeaseName(a.ip), Annotations: map[string]string{pb.AddressAnnotation: a.ip.String()}},
			Spec:       coordinationv1.LeaseSpec{HolderIdentity: holder, AcquireTime: &now},
		})
	} else {
		next := a.lease.DeepCopy()
		transitions := int32(1)
		if n := a.lease.Spec.LeaseTransitions; n != nil {
			transitions = *n + 1
		}
		next.Spec.HolderIdentity, next.Spec.AcquireTime, next.Spec.LeaseTransitions = holder, &now, &transitions
		r = reconcile.Update(leasesResource, next)
	}
	r.Event = event
	p.result.Add(r)
}

// rank spreads addresses over nodes with equally many.
func (a *announced) rank(node *corev1.Node) uint64 {
	return reconcile.Hash(node.Name + " " + a.ip.String())
}

// nobody leaves an address where it is when no other node may have it: that node may come
// back. One that must not announce it any more does not.
func (p *placing) nobody(a *announced) {
	if a.lease != nil {
		if holderOf(a.lease) == "" {
			return // as was said
		}
		node, ok := p.in.Snapshot.Nodes().Get("", holderOf(a.lease))
		if ok && mayAnnounce(node) && (a.pool == nil || a.pool.nodes.Matches(labels.Set(node.Labels))) {
			p.held[node.Name]++
			return
		}
	}
	why := fmt.Sprintf("its Node must be Ready, without the label %s", corev1.LabelNodeExcludeBalancers)
	if a.pool != nil && !a.pool.nodes.Empty() {
		why += fmt.Sprintf(", with the labels %s that pool %s asks for", a.pool.nodes, a.pool.name)
	}
	if a.nodes != nil {
		why += ", and have a ready endpoint, as externalTrafficPolicy is Local"
	}
	p.write(a, nil, reconcile.NewEvent(serviceKind, a.services[0], corev1.EventTypeWarning, "AddressNotAnnounced", "No node can announce %s: %s", a.ip, why))
}
