package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"timonel/internal/podrange"
	"timonel/reconcile"
	"timonel/state/objects"
)

// NodeIPAM gives each Node its own range of pod addresses, one of each family, the first
// that is free of the cluster's networks. A Node that has a range keeps it, as upstream's allows an
// administrator to set one; only ranges of the cluster's own are routed, though. It works on all Nodes under one key, so that two
// Nodes never get the same range.
type NodeIPAM struct {
	// Pods are the networks of all pods' addresses, for example 10.244.0.0/16.
	Pods podrange.Ranges
}

// Validate says what is wrong with the ranges.
func (n NodeIPAM) Validate() error {
	if err := n.Pods.Validate(); err != nil {
		return fmt.Errorf("NodeIPAM.Pods: %w", err)
	}
	return nil
}

// Name implements Reconciler.
func (NodeIPAM) Name() string { return "node-ipam-controller" }

// All implements Reconciler.
func (NodeIPAM) All(*objects.Snapshot) []reconcile.Key { return []reconcile.Key{reconcile.Singleton} }

// Keys implements Reconciler: a Node without a range wants one, and a Node that
// is gone may leave room for one that found none.
func (NodeIPAM) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if c.Meta().GVK != reconcile.NodeKind {
		return nil
	}
	if node, ok := c.Meta().Object.(*corev1.Node); ok && c.New != nil && node.Spec.PodCIDR != "" {
		return nil
	}
	return []reconcile.Key{reconcile.Singleton}
}

// Reconcile implements Reconciler.
func (n NodeIPAM) Reconcile(in reconcile.Input, _ reconcile.Key) (reconcile.Result, error) {
	families := make([][]*parts, 0, 2)
	for _, networks := range n.Pods.Families() {
		var family []*parts
		for _, network := range networks {
			family = append(family, newParts(network, n.Pods.Bits(network)))
		}
		families = append(families, family)
	}
	var wanting []*corev1.Node
	for node := range in.Snapshot.Nodes().All() {
		cidrs := node.Spec.PodCIDRs
		if len(cidrs) == 0 && node.Spec.PodCIDR != "" {
			cidrs = []string{node.Spec.PodCIDR}
		}
		if len(cidrs) == 0 && node.DeletionTimestamp == nil {
			wanting = append(wanting, node)
		}
		for _, cidr := range cidrs {
			for _, family := range families {
				for _, p := range family {
					p.mark(cidr)
				}
			}
		}
	}

	var result reconcile.Result
	for _, node := range wanting {
		cidrs, none := take(families)
		if none != nil {
			result.Events = append(result.Events, *reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeWarning, "CIDRNotAvailable",
				"All pod ranges of %s are taken: Node %s gets none. Add a network to --cluster-cidr on each controller, or delete Nodes that are gone", names(none), node.Name))
			continue
		}
		c := reconcile.MergePatch(reconcile.NodesResource, node, "", map[string]any{
			"metadata": reconcile.Pinned(node),
			"spec":     map[string]any{"podCIDR": cidrs[0], "podCIDRs": cidrs},
		})
		c.FailEvent = reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeWarning, "CIDRAssignmentFailed", "Could not assign pod range %s", strings.Join(cidrs, ", "))
		result.Add(c)
	}
	return result, nil
}

// take takes a free range of each family, or says of which there is none; then it takes
// none.
func take(families [][]*parts) (cidrs []string, none []*parts) {
	var from []*parts
	for _, family := range families {
		i := slices.IndexFunc(family, func(p *parts) bool { return p.next() >= 0 })
		if i < 0 {
			return nil, family
		}
		from = append(from, family[i])
	}
	for _, p := range from {
		i := p.next()
		p.used[i] = true
		cidrs = append(cidrs, p.nth(i).String())
	}
	return cidrs, nil
}

func names(family []*parts) string {
	var text []string
	for _, p := range family {
		text = append(text, p.network.String())
	}
	return strings.Join(text, ", ")
}

// parts are the ranges that a network is cut into.
type parts struct {
	network netip.Prefix
	bits    int
	used    []bool
	free    int // none before it is free
}

func newParts(network netip.Prefix, bits int) *parts {
	return &parts{network: network, bits: bits, used: make([]bool, 1<<(bits-network.Bits()))}
}

// next is the number of the first range that is free, -1 when none is.
func (p *parts) next() int {
	for ; p.free < len(p.used); p.free++ {
		if !p.used[p.free] {
			return p.free
		}
	}
	return -1
}

// mark marks the range that holds cidr as used. One that holds several was not
// given by the cluster and is told to nobody (package dispatch); it takes no room, or
// one Node could leave none for others.
func (p *parts) mark(cidr string) {
	c, err := netip.ParsePrefix(cidr)
	if err != nil || c.Bits() < p.bits || !c.Overlaps(p.network) {
		return
	}
	p.used[p.index(c.Masked().Addr())] = true
}

// index is the number of the range that holds addr: the bits between the two prefix
// lengths.
func (p *parts) index(addr netip.Addr) (i int) {
	raw := addr.AsSlice()
	for b := p.network.Bits(); b < p.bits; b++ {
		i = i<<1 | int(raw[b/8]>>(7-b%8)&1)
	}
	return i
}

// nth is the range with a number.
func (p *parts) nth(i int) netip.Prefix {
	raw := p.network.Masked().Addr().AsSlice()
	for b := p.bits - 1; b >= p.network.Bits(); b-- {
		raw[b/8] |= byte(i&1) << (7 - b%8)
		i >>= 1
	}
	addr, _ := netip.AddrFromSlice(raw) // as long as the network's, so it is an address
	return netip.PrefixFrom(addr, p.bits)
}
