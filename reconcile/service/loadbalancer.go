package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

const (
	// LoadBalancerClass is the spec.loadBalancerClass of Services that get their addresses
	// here. So do those that name none, when there are pools.
	LoadBalancerClass = "timonel.io/address-pool"

	// What a Service asks for, in its annotations: addresses with commas between them, as
	// spec.loadBalancerIP for both families; a pool; and to share its address with other
	// Services that say the same word.
	askAddresses = "timonel.io/load-balancer-ips"
	askPool      = "timonel.io/load-balancer-pool"
	askSharing   = "timonel.io/load-balancer-sharing"

	// addressCondition is the condition of a Service whose addresses are given from here.
	// Addresses without it are somebody else's.
	addressCondition = "timonel.io/LoadBalancerAddress"
)

// Reasons of the condition. All but the first are those of events as well.
const (
	reasonAssigned   = "Assigned"
	reasonOutside    = "AddressOutsidePools"
	reasonFailed     = "AllocationFailed"
	reasonBadPool    = "InvalidAddressPool"
	reasonNewAddress = "AddressAssigned"
)

// LoadBalancer gives Services of type LoadBalancer their addresses. It works on all of
// them under one key, so that no two get the same, but for those that ask to share one.
type LoadBalancer struct{ Reserved Reserved }

// Name implements Reconciler.
func (LoadBalancer) Name() string { return "load-balancer-controller" }

// Traits implements reconcile.Reconciler: Services that come at the same time share a pass.
func (LoadBalancer) Traits() reconcile.Traits { return reconcile.Traits{Pace: 50 * time.Millisecond} }

// All implements Reconciler.
func (LoadBalancer) All(*objects.Snapshot) []reconcile.Key {
	return []reconcile.Key{reconcile.Singleton}
}

// Keys implements Reconciler: Services that are, or were, of the type, and the pools,
// whose own key has users told what is wrong with them.
func (LoadBalancer) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	switch m := c.Meta(); m.GVK {
	case serviceKind:
		if balanced(c) {
			return []reconcile.Key{reconcile.Singleton}
		}
	case configMapKind:
		if m.Namespace == PoolsNamespace && m.Name == PoolsName {
			return []reconcile.Key{reconcile.Singleton, reconcile.KeyOf(configMapKind, m)}
		}
	}
	return nil
}

var configMapKind = corev1.SchemeGroupVersion.WithKind("ConfigMap")

// balanced says whether a changed Service is, or was, of type LoadBalancer.
func balanced(c objects.Changed) bool {
	return slices.ContainsFunc(reconcile.Versions(c), func(m *objects.Meta) bool {
		svc, ok := m.Object.(*corev1.Service)
		return ok && svc.Spec.Type == corev1.ServiceTypeLoadBalancer
	})
}

// Reconcile implements Reconciler.
func (l LoadBalancer) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	pools, wrong := l.Reserved.poolsOf(in.Snapshot)
	var result reconcile.Result
	if key.Kind == configMapKind.Kind {
		cm, ok := in.Snapshot.ConfigMaps().Get(PoolsNamespace, PoolsName)
		for _, name := range slices.Sorted(maps.Keys(wrong)) {
			if ok {
				result.Events = append(result.Events, *reconcile.NewEvent(configMapKind, cm, corev1.EventTypeWarning, reasonBadPool,
					"Pool %s is not used, Services that have addresses of it keep them: %v", name, wrong[name]))
			}
		}
		return result, nil
	}
	a := newAllocator(in.Snapshot, pools)
	for _, svc := range a.mine {
		a.keep(svc)
	}
	for _, svc := range a.mine {
		a.assign(svc)
		if c := a.request(in, svc); c != nil {
			result.Add(*c)
		}
	}
	return result, nil
}

// given says whether a Service's addresses are given from here.
func given(svc *corev1.Service) bool {
	return meta.FindStatusCondition(svc.Status.Conditions, addressCondition) != nil
}

// addressesOf are the addresses of a Service's balancer.
func addressesOf(svc *corev1.Service) (out []netip.Addr) {
	for i := range svc.Status.LoadBalancer.Ingress {
		if ip, err := netip.ParseAddr(svc.Status.LoadBalancer.Ingress[i].IP); err == nil {
			out = append(out, ip)
		}
	}
	return out
}

// allocator is one pass over all Services of type LoadBalancer.
type allocator struct {
	snapshot *objects.Snapshot
	pools    []*pool
	mine     []*claimant // in the order of their creation
	taken    map[netip.Addr][]*claimant
	shared   map[string][]netip.Addr // by the word for it
	cursors  map[string]*cursor
	nodes    map[netip.Addr]bool // addresses of Nodes; nil: not looked at yet
}

// claimant is a Service and what it is to have.
type claimant struct {
	svc     *corev1.Service
	foreign bool // its addresses are somebody else's
	askedOf
	families []corev1.IPFamily
	has      []netip.Addr
	outside  []netip.Addr // of these, those that are in no pool
	problems []string
}

// askedOf is what a Service asks for.
type askedOf struct {
	ips     []netip.Addr
	pool    string
	sharing string
}

func newAllocator(s *objects.Snapshot, pools []*pool) *allocator {
	a := &allocator{snapshot: s, pools: pools, taken: map[netip.Addr][]*claimant{}, shared: map[string][]netip.Addr{}, cursors: map[string]*cursor{}}
	for svc := range s.LoadBalancers() {
		c := &claimant{svc: svc}
		class := svc.Spec.LoadBalancerClass
		switch {
		case class != nil && *class != LoadBalancerClass, class == nil && !given(svc) && (len(pools) == 0 || len(svc.Status.LoadBalancer.Ingress) > 0):
			c.foreign = true
			for _, ip := range addressesOf(svc) {
				a.take(c, ip)
			}
		default:
			c.ask()
			a.mine = append(a.mine, c)
		}
	}
	slices.SortStableFunc(a.mine, func(a, b *claimant) int {
		return a.svc.CreationTimestamp.Compare(b.svc.CreationTimestamp.Time)
	})
	return a
}

// ask reads what a Service asks for.
func (c *claimant) ask() {
	c.families = c.svc.Spec.IPFamilies
	if len(c.families) == 0 {
		c.families = []corev1.IPFamily{corev1.IPv4Protocol}
	}
	c.pool, c.sharing = c.svc.Annotations[askPool], c.svc.Annotations[askSharing]
	text, field := c.svc.Annotations[askAddresses], "annotation "+askAddresses
	if text == "" {
		text, field = c.svc.Spec.LoadBalancerIP, "spec.loadBalancerIP"
	}
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		ip, err := netip.ParseAddr(part)
		if err != nil || ip.Zone() != "" {
			c.problems = append(c.problems, fmt.Sprintf("%s: %q is not an address", field, part))
			continue
		}
		c.ips = append(c.ips, ip.Unmap())
	}
}

func (a *allocator) take(c *claimant, ip netip.Addr) {
	a.taken[ip] = append(a.taken[ip], c)
	if !c.foreign {
		c.has = append(c.has, ip)
		if c.sharing != "" && !slices.Contains(a.shared[c.sharing], ip) {
			a.shared[c.sharing] = append(a.shared[c.sharing], ip)
		}
	}
}

// obstacle says why a Service cannot have an address that others have, "" if it can.
func (a *allocator) obstacle(c *claimant, ip netip.Addr) string {
	for _, o := range a.taken[ip] {
		name := o.svc.Namespace + "/" + o.svc.Name
		switch {
		case o.foreign || c.sharing == "" || o.sharing != c.sharing:
			return fmt.Sprintf("%s is the address of Service %s; give both the same annotation %s to share it", ip, name, askSharing)
		case local(c.svc) != local(o.svc), local(c.svc) && !maps.Equal(c.svc.Spec.Selector, o.svc.Spec.Selector):
			return fmt.Sprintf("%s is shared with Service %s: both need externalTrafficPolicy Cluster, or Local and the same selector", ip, name)
		}
		for i := range c.svc.Spec.Ports {
			p := &c.svc.Spec.Ports[i]
			if slices.ContainsFunc(o.svc.Spec.Ports, func(q corev1.ServicePort) bool {
				return p.Port == q.Port && cmp.Or(p.Protocol, corev1.ProtocolTCP) == cmp.Or(q.Protocol, corev1.ProtocolTCP)
			}) {
				return fmt.Sprintf("%s is shared with Service %s, which has port %d/%s as well", ip, name, p.Port, cmp.Or(p.Protocol, corev1.ProtocolTCP))
			}
		}
	}
	return ""
}

func local(svc *corev1.Service) bool {
	return svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

func familyOf(ip netip.Addr) corev1.IPFamily {
	if ip.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

// of returns a Service's address of a family among some, if there is one.
func of(family corev1.IPFamily, ips []netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(ips, func(ip netip.Addr) bool { return familyOf(ip) == family })
	if i < 0 {
		return netip.Addr{}, false
	}
	return ips[i], true
}

func (a *allocator) poolOf(ip netip.Addr) *pool {
	for _, p := range a.pools {
		if p.contains(ip) {
			return p
		}
	}
	return nil
}

// keep leaves a Service the addresses that it has and that it may keep: whoever came
// first keeps one that two have.
func (a *allocator) keep(c *claimant) {
	if !given(c.svc) {
		return
	}
	for _, ip := range addressesOf(c.svc) {
		family := familyOf(ip)
		if _, twice := of(family, c.has); twice || !slices.Contains(c.families, family) {
			continue
		}
		if asked, ok := of(family, c.ips); ok && asked != ip {
			continue
		}
		p := a.poolOf(ip)
		if p != nil && c.pool != "" && p.name != c.pool || a.obstacle(c, ip) != "" {
			continue
		}
		if p == nil {
			c.outside = append(c.outside, ip)
		}
		a.take(c, ip)
	}
}

// assign gives a Service addresses of the families that it lacks.
func (a *allocator) assign(c *claimant) {
	if c.svc.DeletionTimestamp != nil || len(c.problems) > 0 {
		return
	}
	for _, family := range c.families {
		if _, has := of(family, c.has); has {
			continue
		}
		ip, problem := a.find(c, family)
		if problem != "" {
			c.problems = append(c.problems, problem)
			continue
		}
		a.take(c, ip)
	}
}

// find returns an address for a Service, or why there is none.
func (a *allocator) find(c *claimant, family corev1.IPFamily) (netip.Addr, string) {
	if ip, ok := of(family, c.ips); ok {
		switch p := a.poolOf(ip); {
		case p == nil:
			return ip, fmt.Sprintf("%s is in no pool; add it to the ConfigMap %s/%s", ip, PoolsNamespace, PoolsName)
		case !p.serves(c.svc.Namespace):
			return ip, fmt.Sprintf("%s is of pool %s, which does not serve namespace %s", ip, p.name, c.svc.Namespace)
		case c.pool != "" && p.name != c.pool:
			return ip, fmt.Sprintf("%s is of pool %s, the annotation %s says %s", ip, p.name, askPool, c.pool)
		case a.ofNode(ip):
			return ip, fmt.Sprintf("%s is the address of a Node", ip)
		}
		return ip, a.obstacle(c, ip)
	}
	if c.sharing != "" {
		for _, ip := range a.shared[c.sharing] {
			p := a.poolOf(ip)
			if familyOf(ip) == family && p != nil && p.serves(c.svc.Namespace) && (c.pool == "" || p.name == c.pool) && a.obstacle(c, ip) == "" {
				return ip, ""
			}
		}
	}
	var tried []string
	for _, p := range a.pools {
		if c.pool == "" && !p.auto || c.pool != "" && p.name != c.pool || !p.serves(c.svc.Namespace) {
			continue
		}
		key := string(family) + "/" + p.name
		if a.cursors[key] == nil {
			a.cursors[key] = &cursor{}
		}
		if ip, ok := p.next(family == corev1.IPv4Protocol, a.cursors[key], func(ip netip.Addr) bool { return len(a.taken[ip]) > 0 || a.ofNode(ip) }); ok {
			return ip, ""
		}
		tried = append(tried, p.name)
	}
	if len(tried) > 0 {
		return netip.Addr{}, fmt.Sprintf("no %s address is free in pool %s; add some to the ConfigMap %s/%s, or delete a Service of type LoadBalancer", family, strings.Join(tried, ", "), PoolsNamespace, PoolsName)
	}
	if c.pool != "" {
		return netip.Addr{}, fmt.Sprintf("there is no pool %s that serves namespace %s; look at the ConfigMap %s/%s and its events", c.pool, c.svc.Namespace, PoolsNamespace, PoolsName)
	}
	return netip.Addr{}, fmt.Sprintf("no pool gives namespace %s addresses unasked; look at the ConfigMap %s/%s and its events", c.svc.Namespace, PoolsNamespace, PoolsName)
}

// ofNode says whether an address is a Node's.
func (a *allocator) ofNode(ip netip.Addr) bool {
	if a.nodes == nil {
		a.nodes = map[netip.Addr]bool{}
		for node := range a.snapshot.Nodes().All() {
			for i := range node.Status.Addresses {
				if ip, err := netip.ParseAddr(node.Status.Addresses[i].Address); err == nil {
					a.nodes[ip.Unmap()] = true
				}
			}
		}
	}
	return a.nodes[ip]
}

// request is the change that makes a Service's status what it is to be, or nil.
func (a *allocator) request(in reconcile.Input, c *claimant) *reconcile.Request {
	if c.svc.DeletionTimestamp != nil {
		return nil
	}
	slices.SortFunc(c.has, func(x, y netip.Addr) int {
		return cmp.Compare(slices.Index(c.families, familyOf(x)), slices.Index(c.families, familyOf(y)))
	})
	next := c.svc.DeepCopy()
	next.Status.LoadBalancer.Ingress = nil
	var texts []string
	for _, ip := range c.has {
		mode := corev1.LoadBalancerIPModeVIP
		next.Status.LoadBalancer.Ingress = append(next.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip.String(), IPMode: &mode})
		texts = append(texts, ip.String())
	}
	condition := metav1.Condition{
		Type: addressCondition, Status: metav1.ConditionTrue, Reason: reasonAssigned, Message: strings.Join(texts, ", "), LastTransitionTime: metav1.NewTime(in.Now),
	}
	kind, reason := corev1.EventTypeNormal, reasonNewAddress
	switch {
	case len(c.problems) > 0:
		prefer := c.svc.Spec.IPFamilyPolicy != nil && *c.svc.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyPreferDualStack
		if !prefer || len(c.has) == 0 {
			condition.Status = metav1.ConditionFalse
		}
		condition.Reason, condition.Message = reasonFailed, strings.Join(c.problems, "; ")
	case len(c.outside) > 0:
		var out []string
		for _, ip := range c.outside {
			out = append(out, ip.String())
		}
		condition.Reason = reasonOutside
		condition.Message = fmt.Sprintf("%s is in no pool any more: the Service keeps it; add it to the ConfigMap %s/%s, or delete the Service", strings.Join(out, ", "), PoolsNamespace, PoolsName)
	}
	if condition.Reason != reasonAssigned {
		kind, reason = corev1.EventTypeWarning, condition.Reason
	}
	meta.SetStatusCondition(&next.Status.Conditions, condition)
	if equality.Semantic.DeepEqual(next.Status, c.svc.Status) {
		return nil
	}
	r := reconcile.UpdateStatus(reconcile.ServicesResource, next)
	r.Event = reconcile.NewEvent(serviceKind, c.svc, kind, reason, "%s", condition.Message)
	return &r
}
