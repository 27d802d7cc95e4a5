package sched

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// fitMessage words why no node fits, as upstream does: reasons with how many
// nodes each holds for, sorted as text. Nodes without a status count for
// absent, if given.
func (r *round) fitMessage(statuses []*status, absent *status) string {
	counts := map[string]int{}
	for _, slot := range r.cluster.order {
		s := statuses[slot]
		if s == nil {
			s = absent
		}
		if s == nil {
			continue
		}
		for _, reason := range s.reasons {
			counts[reason]++
		}
	}
	list := make([]string, 0, len(counts))
	for reason, n := range counts {
		list = append(list, fmt.Sprintf("%d %s", n, reason))
	}
	slices.Sort(list)
	message := fmt.Sprintf("0/%d nodes are available:", len(r.cluster.order))
	if len(list) > 0 {
		message += " " + strings.Join(list, ", ") + "."
	}
	return message
}

// signature is equal for pods that fail alike, and empty for pods whose outcome
// could change through pods placed after they failed: with affinity or
// spreading, others' placement can open a node, whereas resources, ports and
// taints only get tighter within a round.
func (r *round) signature(p *podInfo) string {
	spec := &p.pod.Spec
	profile := r.cfg.of(p.pod)
	if len(spec.TopologySpreadConstraints) > 0 || p.hasTerms() || usesClaims(p.pod) || len(spec.ResourceClaims) > 0 ||
		p.pod.Status.NominatedNodeName != "" || profile.DefaultSpread != nil {
		return ""
	}
	for i := range spec.Volumes {
		if isDisk(&spec.Volumes[i]) {
			return ""
		}
	}
	needs, err := r.requiredFeatures(p)
	if err != nil {
		return ""
	}
	text, err := json.Marshal([]any{
		p.pod.Namespace, p.pod.Labels, spec.SchedulerName, p.priority, spec.PreemptionPolicy, p.req.milliCPU, p.req.memory, p.req.ephemeralStorage,
		fmt.Sprint(p.req.scalars), fmt.Sprint(p.ports), spec.NodeSelector, spec.Affinity, spec.Tolerations,
		needs.String(),
	})
	if err != nil {
		return ""
	}
	return string(text)
}
