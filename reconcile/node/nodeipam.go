package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// NodeIPAM gives each Node its own range of pod addresses out of the cluster's,
// the first that is free. A Node that has a range keeps it, as upstream's allows an
// administrator to set one; only ranges of the cluster's own are routed, though. It works on all Nodes under one key, so that two
// Nodes never get the same range.
type NodeIPAM struct {
	// ClusterCIDR is the range of all pods' addresses, for example 10.244.0.0/16.
	ClusterCIDR netip.Prefix
	// NodeBits is the prefix length of one Node's range. Default 24, or 64 for IPv6.
	NodeBits int
}

// Validate says what is wrong with the ranges.
func (n NodeIPAM) Validate() error {
	bits := n.nodeBits()
	switch {
	case !n.ClusterCIDR.IsValid():
		return errors.New("NodeIPAM.ClusterCIDR is not set: give a range such as 10.244.0.0/16")
	case bits < n.ClusterCIDR.Bits() || bits > n.ClusterCIDR.Addr().BitLen():
		return fmt.Errorf("NodeIPAM.NodeBits is %d: give a prefix length between that of %s and %d", bits, n.ClusterCIDR, n.ClusterCIDR.Addr().BitLen())
	case bits-n.ClusterCIDR.Bits() > 16:
		return fmt.Errorf("NodeIPAM.NodeBits is %d: %s would be cut into more than 65536 ranges; give a shorter prefix", bits, n.ClusterCIDR)
	}
	return nil
}

func (n NodeIPAM) nodeBits() int {
	if n.NodeBits != 0 {
		return n.NodeBits
	}
	if n.ClusterCIDR.Addr().Is6() {
		return 64
	}
	return 24
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
	bits := n.nodeBits()
	size := 1 << (bits - n.ClusterCIDR.Bits())
	used := make([]bool, size)
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
			n.mark(used, cidr, bits)
		}
	}

	var result reconcile.Result
	free := 0
	for _, node := range wanting {
		for free < size && used[free] {
			free++
		}
		if free == size {
			result.Events = append(result.Events, *reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeWarning, "CIDRNotAvailable",
				"All %d pod ranges of %s are taken: Node %s gets none", size, n.ClusterCIDR, node.Name))
			continue
		}
		used[free] = true
		cidr := n.nth(free, bits).String()
		c := reconcile.MergePatch(reconcile.NodesResource, node, "", map[string]any{
			"metadata": reconcile.Pinned(node),
			"spec":     map[string]any{"podCIDR": cidr, "podCIDRs": []string{cidr}},
		})
		c.FailEvent = reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeWarning, "CIDRAssignmentFailed", "Could not assign pod range %s", cidr)
		result.Add(c)
	}
	return result, nil
}

// mark marks the range that holds cidr as used. One that holds several was not
// given by the cluster and is told to nobody (package dispatch); it takes no room, or
// one Node could leave none for others.
func (n NodeIPAM) mark(used []bool, cidr string, bits int) {
	p, err := netip.ParsePrefix(cidr)
	if err != nil || p.Bits() < bits || !p.Overlaps(n.ClusterCIDR) {
		return
	}
	used[n.index(p.Masked().Addr(), bits)] = true
}

// index is the number of the range that holds addr.
func (n NodeIPAM) index(addr netip.Addr, bits int) int {
	if addr.Is4() {
		base, a := n.ClusterCIDR.Masked().Addr().As4(), addr.As4()
		return int((binary.BigEndian.Uint32(a[:]) - binary.BigEndian.Uint32(base[:])) >> (32 - bits))
	}
	// The bits that number the range lie between the two prefix lengths.
	a := addr.As16()
	var i int
	for b := n.ClusterCIDR.Bits(); b < bits; b++ {
		i = i<<1 | int(a[b/8]>>(7-b%8)&1)
	}
	return i
}

// nth is the range with a number.
func (n NodeIPAM) nth(i, bits int) netip.Prefix {
	base := n.ClusterCIDR.Masked().Addr()
	raw := base.AsSlice()
	for b := bits - 1; b >= n.ClusterCIDR.Bits(); b-- {
		raw[b/8] |= byte(i&1) << (7 - b%8)
		i >>= 1
	}
	addr, _ := netip.AddrFromSlice(raw) // as long as base, so it is an address
	return netip.PrefixFrom(addr, bits)
}
