package sched

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/nodedeclaredfeatures"
)

// nodeInfo is a node with the sum of what its pods take. It is immutable once
// it is part of a Cluster; a round changes only clones.
type nodeInfo struct {
	slot int32
	name string
	// node is nil while pods name a node that does not exist.
	node        *corev1.Node
	allocatable resources
	// images maps names of images present on the node to bytes.
	images   map[string]int64
	features nodedeclaredfeatures.FeatureSet

	pods                    []*podInfo
	requested               resources
	scoredCPU, scoredMemory int64
	ports                   []hostPort
	// claimUsers counts pods that use volume claims; most nodes' checks of
	// claims are skipped by it.
	claimUsers int
}

func (n *nodeInfo) setNode(node *corev1.Node, features *nodedeclaredfeatures.Framework) {
	n.node = node
	n.allocatable = resources{}
	n.images = nil
	if node == nil {
		return
	}
	n.allocatable = makeResources(node.Status.Allocatable)
	n.features = features.TryMap(node.Status.DeclaredFeatures)
	if len(node.Status.Images) > 0 {
		n.images = make(map[string]int64, 2*len(node.Status.Images))
		for _, image := range node.Status.Images {
			for _, name := range image.Names {
				n.images[name] = image.SizeBytes
			}
		}
	}
}

// clone returns a copy whose pods and sums can be changed.
func (n *nodeInfo) clone() *nodeInfo {
	c := *n
	c.pods = make([]*podInfo, len(n.pods), len(n.pods)+4)
	copy(c.pods, n.pods)
	c.requested = n.requested.clone()
	c.ports = slices.Clone(n.ports)
	return &c
}

// without returns a copy that has only the pods that stay.
func (n *nodeInfo) without(goes func(*podInfo) bool) *nodeInfo {
	c := *n
	c.pods = make([]*podInfo, 0, len(n.pods)+1)
	c.requested, c.ports = n.requested.clone(), nil
	for _, p := range n.pods {
		if goes(p) {
			c.update(p, -1)
			continue
		}
		c.pods = append(c.pods, p)
		c.ports = append(c.ports, p.ports...)
	}
	return &c
}

func (n *nodeInfo) add(p *podInfo) {
	n.pods = append(n.pods, p)
	n.ports = append(n.ports, p.ports...)
	n.update(p, 1)
}

// remove takes the pod out and reports whether it was there.
func (n *nodeInfo) remove(p *podInfo) bool {
	at := slices.Index(n.pods, p)
	if at < 0 {
		return false
	}
	n.pods = slices.Delete(n.pods, at, at+1)
	for _, port := range p.ports {
		if i := slices.Index(n.ports, port); i >= 0 {
			n.ports = slices.Delete(n.ports, i, i+1)
		}
	}
	n.update(p, -1)
	return true
}

// pop takes out the pod that was added last.
func (n *nodeInfo) pop() {
	p := n.pods[len(n.pods)-1]
	n.pods = n.pods[:len(n.pods)-1]
	n.ports = n.ports[:len(n.ports)-len(p.ports)]
	n.update(p, -1)
}

func (n *nodeInfo) update(p *podInfo, sign int64) {
	n.requested.add(&p.req, sign)
	n.scoredCPU += sign * p.scoredCPU
	n.scoredMemory += sign * p.scoredMemory
	if usesClaims(p.pod) {
		n.claimUsers += int(sign)
	}
}

func (n *nodeInfo) portsFree(p *podInfo) bool {
	for _, want := range p.ports {
		if slices.ContainsFunc(n.ports, want.conflicts) {
			return false
		}
	}
	return true
}

// zone is the key by which nodes are taken in turns, so that a search that
// stops early has seen every zone.
func (n *nodeInfo) zone() string {
	l := n.node.Labels
	region, zone := l[corev1.LabelTopologyRegion], l[corev1.LabelTopologyZone]
	if zone == "" {
		zone = l[corev1.LabelFailureDomainBetaZone]
	}
	if region == "" {
		region = l[corev1.LabelFailureDomainBetaRegion]
	}
	return region + "\x00" + zone
}

// interleaveZones orders nodes by taking one of each zone in turn.
func interleaveZones(nodes []*nodeInfo) []int32 {
	slices.SortFunc(nodes, func(a, b *nodeInfo) int { return strings.Compare(a.name, b.name) })
	byZone := map[string][]int32{}
	var zones []string
	for _, n := range nodes {
		z := n.zone()
		if _, seen := byZone[z]; !seen {
			zones = append(zones, z)
		}
		byZone[z] = append(byZone[z], n.slot)
	}
	slices.Sort(zones)
	order := make([]int32, 0, len(nodes))
	for i := 0; len(order) < len(nodes); i++ {
		for _, z := range zones {
			if i < len(byZone[z]) {
				order = append(order, byZone[z][i])
			}
		}
	}
	return order
}

func usesClaims(pod *corev1.Pod) bool {
	for i := range pod.Spec.Volumes {
		if v := &pod.Spec.Volumes[i]; v.PersistentVolumeClaim != nil || v.Ephemeral != nil {
			return true
		}
	}
	return false
}
