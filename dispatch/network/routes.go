package network

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	pb "timonel/proto/timonel/v1"
)

// Checks says what of a Node's own word other nodes may be told.
type Checks interface {
	// CheckRange returns a pod range, or why it cannot be a node's.
	CheckRange(text string) (netip.Prefix, error)
	// CheckAddress says why no node may have an address.
	CheckAddress(ip netip.Addr) error
}

// Routes is what nodes are told of one another: of each Node the pod ranges and the
// address that are its own. What is not the cluster's to give, or is another's that was
// there before, is left out. It is a fold over the changes of Nodes, equal to building
// it anew.
type Routes struct {
	checks    Checks
	nodes     map[string]*claims
	ranges    map[netip.Prefix]map[string]struct{} // who claims one
	addresses map[netip.Addr]map[string]struct{}
}

// claims is what one Node says, and what of it is not so.
type claims struct {
	node      *corev1.Node // for a new look when the checks changed
	created   time.Time
	ranges    []netip.Prefix
	addresses []netip.Addr // one of a family at most
	wrong     []string
}

// NewRoutes returns the routes of no nodes.
func NewRoutes(checks Checks) *Routes {
	return &Routes{
		checks: checks, nodes: make(map[string]*claims),
		ranges: make(map[netip.Prefix]map[string]struct{}), addresses: make(map[netip.Addr]map[string]struct{}),
	}
}

// InternalIP is the address that a node says others reach it by.
func InternalIP(node *corev1.Node) string {
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	return ""
}

// internalIPs are the first such address, and the first of the other family.
func internalIPs(node *corev1.Node) (out []string) {
	for _, a := range node.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if out = append(out, a.Address); len(out) == 1 {
			continue
		}
		first, err := netip.ParseAddr(out[0])
		if other, e := netip.ParseAddr(a.Address); err == nil && e == nil && first.Is4() != other.Is4() {
			return out
		}
		out = out[:1]
	}
	return out
}

// AllRoutes is what is told of all nodes, in the order of their names, and what is not
// and why.
func AllRoutes(checks Checks, nodes iter.Seq[*corev1.Node]) (out []*pb.NodeRoute, why []string) {
	r := NewRoutes(checks)
	for node := range nodes {
		r.Set(node)
	}
	for _, name := range slices.Sorted(maps.Keys(r.nodes)) {
		route, wrong := r.Route(name)
		out, why = append(out, route), append(why, wrong...)
	}
	return out, why
}

// Set takes a Node and returns the names of those of which something else is told now,
// perhaps.
func (r *Routes) Set(node *corev1.Node) map[string]struct{} {
	next := &claims{node: node, created: node.CreationTimestamp.Time}
	cidrs := node.Spec.PodCIDRs
	if len(cidrs) == 0 && node.Spec.PodCIDR != "" {
		cidrs = []string{node.Spec.PodCIDR}
	}
	for _, text := range cidrs {
		p, err := r.checks.CheckRange(text)
		if err == nil && slices.Contains(next.ranges, p) {
			err = fmt.Errorf("%s is there twice", p)
		}
		if err != nil {
			next.wrong = append(next.wrong, fmt.Sprintf("pod range of node %s: %v", node.Name, err))
			continue
		}
		next.ranges = append(next.ranges, p)
	}
	for _, ip := range internalIPs(node) {
		addr, err := netip.ParseAddr(ip)
		if err == nil {
			err = r.checks.CheckAddress(addr)
		}
		if err != nil {
			next.wrong = append(next.wrong, fmt.Sprintf("address of node %s: %v", node.Name, err))
			continue
		}
		next.addresses = append(next.addresses, addr)
	}
	if was := r.nodes[node.Name]; was != nil && was.created.Equal(next.created) && slices.Equal(was.ranges, next.ranges) &&
		slices.Equal(was.addresses, next.addresses) && slices.Equal(was.wrong, next.wrong) {
		was.node = node
		return nil
	}
	touched := r.Remove(node.Name)
	r.nodes[node.Name] = next
	for _, p := range next.ranges {
		claim(r.ranges, p, node.Name, touched)
	}
	for _, ip := range next.addresses {
		claim(r.addresses, ip, node.Name, touched)
	}
	touched[node.Name] = struct{}{}
	return touched
}

func claim[K comparable](of map[K]map[string]struct{}, k K, node string, touched map[string]struct{}) {
	if of[k] == nil {
		of[k] = make(map[string]struct{})
	}
	of[k][node] = struct{}{}
	maps.Copy(touched, of[k])
}

func unclaim[K comparable](of map[K]map[string]struct{}, k K, node string, touched map[string]struct{}) {
	maps.Copy(touched, of[k])
	delete(of[k], node)
	if len(of[k]) == 0 {
		delete(of, k)
	}
}

// Remove forgets a Node, and returns as Set does.
func (r *Routes) Remove(name string) map[string]struct{} {
	touched := make(map[string]struct{})
	was := r.nodes[name]
	if was == nil {
		return touched
	}
	delete(r.nodes, name)
	for _, p := range was.ranges {
		unclaim(r.ranges, p, name, touched)
	}
	for _, ip := range was.addresses {
		unclaim(r.addresses, ip, name, touched)
	}
	touched[name] = struct{}{}
	return touched
}

// Recheck looks at all Nodes anew: the checks say something else.
func (r *Routes) Recheck() map[string]struct{} {
	touched := make(map[string]struct{})
	for _, c := range slices.Collect(maps.Values(r.nodes)) {
		maps.Copy(touched, r.Set(c.node))
	}
	return touched
}

// Route is what is told of a node, nil when it is not there, and what is not told
// of it and why.
func (r *Routes) Route(name string) (route *pb.NodeRoute, why []string) {
	c := r.nodes[name]
	if c == nil {
		return nil, nil
	}
	why = slices.Clone(c.wrong)
	route = &pb.NodeRoute{NodeName: name}
	for _, p := range c.ranges {
		if owner := r.oldest(r.ranges[p]); owner != name {
			why = append(why, fmt.Sprintf("pod range of node %s: %s is the range of node %s", name, p, owner))
			continue
		}
		route.PodCidrs = append(route.PodCidrs, p.String())
	}
	for _, ip := range c.addresses {
		switch owner := r.oldest(r.addresses[ip]); {
		case owner != name:
			why = append(why, fmt.Sprintf("address of node %s: %s is the address of node %s", name, ip, owner))
		case route.NodeAddress == "":
			route.NodeAddress = ip.String()
		default:
			route.MoreAddresses = append(route.MoreAddresses, ip.String())
		}
	}
	return route, why
}

// oldest is who of those that claim the same was there first.
func (r *Routes) oldest(names map[string]struct{}) (first string) {
	for name := range names {
		if first == "" || cmp.Or(r.nodes[name].created.Compare(r.nodes[first].created), cmp.Compare(name, first)) < 0 {
			first = name
		}
	}
	return first
}
