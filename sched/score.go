package sched

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// maxScore is the best a node gets from one score, before its weight.
const maxScore = 100

// choose returns the feasible node with the highest weighted sum of scores.
// Among equals the pod's own random numbers decide.
func (r *round) choose(c *candidate, feasible []int32) int32 {
	total := r.score(c, feasible)
	best, ties := 0, 1
	random := r.random(c.p)
	for i := 1; i < len(feasible); i++ {
		switch {
		case total[i] > total[best]:
			best, ties = i, 1
		case total[i] == total[best]:
			if ties++; random.IntN(ties) == 0 {
				best = i
			}
		}
	}
	return feasible[best]
}

// score returns the weighted sum of scores of each feasible node.
func (r *round) score(c *candidate, feasible []int32) []int64 {
	total := make([]int64, len(feasible))
	r.eachScore(c, feasible, func(_ string, weight int64, scores []int64) {
		for i := range total {
			total[i] += weight * scores[i]
		}
	})
	return total
}

// eachScore visits the scores that tell the feasible nodes apart, by the names
// of [Weights].
func (r *round) eachScore(c *candidate, feasible []int32, visit func(name string, weight int64, scores []int64)) {
	scores := make([]int64, len(feasible))
	w := &c.profile.Weights
	for _, s := range [...]struct {
		name   string
		weight int64
		score  func(*candidate, []int32, []int64) bool
	}{
		{"TaintToleration", w.TaintToleration, r.scoreTaints},
		{"NodeAffinity", w.NodeAffinity, r.scoreNodeAffinity},
		{"TopologySpread", w.TopologySpread, r.scoreSpread},
		{"PodAffinity", w.PodAffinity, r.scoreAffinity},
		{"Fit", w.Fit, r.scoreFit},
		{"BalancedResource", w.BalancedResource, r.scoreBalance},
		{"ImageLocality", w.ImageLocality, r.scoreImages},
		{"VolumeBinding", w.VolumeBinding, r.scoreVolumes},
		{"DynamicResources", w.DynamicResources, r.scoreDevices},
	} {
		if s.weight == 0 {
			continue
		}
		clear(scores)
		if s.score(c, feasible, scores) {
			visit(s.name, s.weight, scores)
		}
	}
}

// normalize stretches scores to 0..maxScore by their highest; reverse makes the
// lowest the best.
func normalize(scores []int64, reverse bool) {
	var highest int64
	for _, s := range scores {
		highest = max(highest, s)
	}
	for i := range scores {
		if highest > 0 {
			scores[i] = maxScore * scores[i] / highest
		}
		if reverse {
			scores[i] = maxScore - scores[i]
		}
	}
}

// scoreTaints prefers nodes with few PreferNoSchedule taints the pod does not
// tolerate.
func (r *round) scoreTaints(c *candidate, feasible []int32, scores []int64) bool {
	var tolerations []corev1.Toleration
	for _, t := range c.p.pod.Spec.Tolerations {
		if t.Effect == "" || t.Effect == corev1.TaintEffectPreferNoSchedule {
			tolerations = append(tolerations, t)
		}
	}
	any := false
	for i, slot := range feasible {
		taints := r.nodes[slot].node.Spec.Taints
		for j := range taints {
			if taints[j].Effect == corev1.TaintEffectPreferNoSchedule && !tolerates(tolerations, &taints[j]) {
				scores[i]++
				any = true
			}
		}
	}
	if !any {
		return false // equal for all
	}
	normalize(scores, true)
	return true
}

// scoreNodeAffinity adds the weights of the pod's preferred node affinity and of the
// profile's.
func (r *round) scoreNodeAffinity(c *candidate, feasible []int32, scores []int64) bool {
	added := c.profile.addedPreferred
	var own *nodeaffinity.PreferredSchedulingTerms
	if a := c.p.pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && len(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution) > 0 {
		// The API server validates terms; a preference is not worth failing for.
		if terms, err := nodeaffinity.NewPreferredSchedulingTerms(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution); err == nil {
			own = terms
		}
	}
	if own == nil && added == nil {
		return false
	}
	for i, slot := range feasible {
		if own != nil {
			scores[i] += own.Score(r.nodes[slot].node)
		}
		if added != nil {
			scores[i] += added.Score(r.nodes[slot].node)
		}
	}
	normalize(scores, false)
	return true
}

// scoreImages prefers nodes that have the pod's images, by size, and more so
// images that many nodes have, lest all pods of one image end on one node.
func (r *round) scoreImages(c *candidate, feasible []int32, scores []int64) bool {
	if len(r.cluster.imageNodes) == 0 {
		return false
	}
	var names []string
	add := func(name string) { names = append(names, normalizedImage(name)) }
	spec := &c.p.pod.Spec
	for i := range spec.InitContainers {
		add(spec.InitContainers[i].Image)
	}
	for i := range spec.Containers {
		add(spec.Containers[i].Image)
	}
	for i := range spec.Volumes {
		if image := spec.Volumes[i].Image; image != nil {
			add(image.Reference)
		}
	}
	if len(names) == 0 {
		return false
	}
	const small = 23 << 20
	large := int64(1000<<20) * int64(len(names))
	all := float64(len(r.cluster.order))
	any := false
	for i, slot := range feasible {
		var sum int64
		for _, name := range names {
			if size, ok := r.nodes[slot].images[name]; ok {
				sum += int64(float64(size) * (float64(r.cluster.imageNodes[name]) / all))
			}
		}
		sum = min(max(sum, small), large)
		scores[i] = maxScore * (sum - small) / (large - small)
		any = any || scores[i] > 0
	}
	return any
}

// normalizedImage gives an image name without a tag the tag it is pulled with.
func normalizedImage(name string) string {
	if strings.LastIndex(name, ":") <= strings.LastIndex(name, "/") {
		return name + ":latest"
	}
	return name
}
