package sched

import (
	"math"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

var (
	statusSpread        = unschedulable(causeSpread, "node(s) didn't match pod topology spread constraints")
	statusSpreadNoLabel = unresolvable(causeSpread, "node(s) didn't match pod topology spread constraints (missing required label)")
)

// spreadConstraint is a topology spread constraint, parsed, with the pods it
// counts.
type spreadConstraint struct {
	topologyKey string
	maxSkew     int64
	minDomains  int
	selector    labels.Selector
	// honorAffinity and honorTaints leave out nodes the pod cannot run on.
	honorAffinity, honorTaints bool

	topology *topology
	pods     *roundCount
}

// parseSpread parses the constraints with the given action. derived, when not
// nil, replaces their selectors.
func (r *round) parseSpread(p *podInfo, list []corev1.TopologySpreadConstraint, action corev1.UnsatisfiableConstraintAction, derived labels.Selector) ([]spreadConstraint, error) {
	var out []spreadConstraint
	for i := range list {
		from := &list[i]
		if from.WhenUnsatisfiable != action {
			continue
		}
		selector := derived
		if selector == nil {
			var err error
			if selector, err = metav1.LabelSelectorAsSelector(from.LabelSelector); err != nil {
				return nil, err
			}
			selector = addLabelKeys(selector, from.MatchLabelKeys, p.pod.Labels)
		}
		c := spreadConstraint{
			topologyKey:   from.TopologyKey,
			maxSkew:       int64(from.MaxSkew),
			minDomains:    1,
			selector:      selector,
			honorAffinity: true,
			topology:      r.cluster.topology(from.TopologyKey),
			pods:          r.count(spreadMatcher(p.pod.Namespace, selector)),
		}
		if from.MinDomains != nil {
			c.minDomains = int(*from.MinDomains)
		}
		if policy := from.NodeAffinityPolicy; policy != nil {
			c.honorAffinity = *policy == corev1.NodeInclusionPolicyHonor
		}
		if policy := from.NodeTaintsPolicy; policy != nil {
			c.honorTaints = *policy == corev1.NodeInclusionPolicyHonor
		}
		out = append(out, c)
	}
	return out, nil
}

// addLabelKeys narrows a selector to the pod's own values of the keys.
func addLabelKeys(s labels.Selector, keys []string, podLabels map[string]string) labels.Selector {
	own := labels.Set{}
	for _, key := range keys {
		if value, ok := podLabels[key]; ok {
			own[key] = value
		}
	}
	if len(own) == 0 {
		return s
	}
	requirements, selectable := s.Requirements()
	if !selectable {
		return s
	}
	return labels.SelectorFromSet(own).Add(requirements...)
}

// spreadMatcher counts the namespace's pods that match and are not being
// deleted. An empty selector counts none.
func spreadMatcher(namespace string, s labels.Selector) matcher {
	empty := s.Empty()
	return matcher{
		key:        "spread|" + namespace + "|" + selectorIdentity(s),
		namespaces: []string{namespace},
		match: func(p *podInfo) bool {
			return !empty && p.pod.DeletionTimestamp == nil && s.Matches(labels.Set(p.pod.Labels))
		},
	}
}

// derivedSelector is the selector by which pods without constraints of their
// own are spread: that of the Services and the controller they belong to.
type derivedSelector struct{ selector labels.Selector }

func (r *round) deriveSelector(c *candidate) labels.Selector {
	if c.spreadSelector == nil {
		c.spreadSelector = &derivedSelector{r.ownersSelector(c.p.pod)}
	}
	return c.spreadSelector.selector
}

func (r *round) ownersSelector(pod *corev1.Pod) labels.Selector {
	s := r.in.State
	set := labels.Set{}
	for service := range s.ServicesIn(pod.Namespace) {
		if service.Spec.Selector != nil && subset(service.Spec.Selector, pod.Labels) {
			for k, v := range service.Spec.Selector {
				set[k] = v
			}
		}
	}
	owner := metav1.GetControllerOfNoCopy(pod)
	if owner == nil {
		return set.AsSelectorPreValidated()
	}
	var more *metav1.LabelSelector
	switch owner.APIVersion + "/" + owner.Kind {
	case "v1/ReplicationController":
		if rc, ok := s.ReplicationController(pod.Namespace, owner.Name); ok {
			for k, v := range rc.Spec.Selector {
				set[k] = v
			}
		}
	case "apps/v1/ReplicaSet":
		if rs, ok := s.ReplicaSet(pod.Namespace, owner.Name); ok {
			more = rs.Spec.Selector
		}
	case "apps/v1/StatefulSet":
		if ss, ok := s.StatefulSet(pod.Namespace, owner.Name); ok {
			more = ss.Spec.Selector
		}
	}
	selector := set.AsSelectorPreValidated()
	if more != nil {
		if other, err := metav1.LabelSelectorAsSelector(more); err == nil {
			if requirements, selectable := other.Requirements(); selectable {
				selector = selector.Add(requirements...)
			}
		}
	}
	return selector
}

func subset(of, in map[string]string) bool {
	for k, v := range of {
		if got, ok := in[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// spreadConstraints returns the pod's constraints with the given action, its
// own or the default ones, and whether nodes must have every topology label.
func (r *round) spreadConstraints(c *candidate, action corev1.UnsatisfiableConstraintAction) (list []spreadConstraint, allLabels bool, err error) {
	if own := c.p.pod.Spec.TopologySpreadConstraints; len(own) > 0 {
		list, err = r.parseSpread(c.p, own, action, nil)
		return list, true, err
	}
	defaults, system := c.profile.defaultSpread()
	any := false
	for i := range defaults {
		any = any || defaults[i].WhenUnsatisfiable == action
	}
	if !any {
		return nil, !system, nil
	}
	selector := r.deriveSelector(c)
	if selector.Empty() {
		return nil, !system, nil
	}
	list, err = r.parseSpread(c.p, defaults, action, selector)
	return list, !system, err
}

// counted reports whether a constraint looks at the node at all.
func (r *round) counted(c *candidate, sc *spreadConstraint, n *nodeInfo) bool {
	if sc.honorAffinity && !r.matchesNodeAffinity(c, n) {
		return false
	}
	return !sc.honorTaints || toleratesTaints(c.p.pod.Spec.Tolerations, n.node.Spec.Taints)
}

func hasLabels(list []spreadConstraint, slot int32) bool {
	for i := range list {
		if list[i].topology.at(slot) < 0 {
			return false
		}
	}
	return true
}

// at returns the domain number of a node; -1: none.
func (t *topology) at(slot int32) int32 {
	if int(slot) >= len(t.domain) {
		return -1
	}
	return t.domain[slot]
}

// spreadFilter checks a pod's DoNotSchedule constraints.
type spreadFilter struct {
	r           *round
	c           *candidate
	constraints []spreadConstraint
	domains     []domainCounts
}

// domainCounts counts matching pods per domain; -1 marks domains without a
// node that counts.
type domainCounts struct {
	pods    []int64
	present int
	min     int64
	stale   bool // min must be worked out again
	self    int64
}

func (r *round) prepareSpread(c *candidate) (*spreadFilter, *status) {
	list, _, err := r.spreadConstraints(c, corev1.DoNotSchedule)
	if err != nil {
		return nil, failed("topology spread constraints of pod %s/%s: %w", c.p.pod.Namespace, c.p.pod.Name, err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	f := &spreadFilter{r: r, c: c, constraints: list, domains: make([]domainCounts, len(list))}
	for i := range list {
		d := &f.domains[i]
		d.pods = make([]int64, list[i].topology.size)
		for j := range d.pods {
			d.pods[j] = -1
		}
		d.stale = true
		if list[i].selector.Matches(labels.Set(c.p.pod.Labels)) {
			d.self = 1
		}
	}
	for _, slot := range r.cluster.order {
		if !hasLabels(list, slot) {
			continue
		}
		for i := range list {
			if !r.counted(c, &list[i], r.nodes[slot]) {
				continue
			}
			d, domain := &f.domains[i], list[i].topology.domain[slot]
			if d.pods[domain] < 0 {
				d.pods[domain] = 0
				d.present++
			}
			d.pods[domain] += list[i].pods.slots[slot]
		}
	}
	return f, nil
}

// count tells that a pod came to or left a node.
func (f *spreadFilter) count(p *podInfo, slot int32, sign int64) {
	if !hasLabels(f.constraints, slot) {
		return
	}
	for i := range f.constraints {
		sc := &f.constraints[i]
		if !sc.pods.matcher.selects(p) || !f.r.counted(f.c, sc, f.r.nodes[slot]) {
			continue
		}
		d := &f.domains[i]
		d.pods[sc.topology.domain[slot]] += sign
		d.stale = true
	}
}

func (d *domainCounts) least() int64 {
	if d.stale {
		d.stale = false
		d.min = math.MaxInt32
		for _, n := range d.pods {
			if n >= 0 && n < d.min {
				d.min = n
			}
		}
	}
	return d.min
}

func (f *spreadFilter) filter(n *nodeInfo) *status {
	for i := range f.constraints {
		sc, d := &f.constraints[i], &f.domains[i]
		domain := sc.topology.at(n.slot)
		if domain < 0 {
			return statusSpreadNoLabel
		}
		least := d.least()
		if d.present < sc.minDomains {
			least = 0
		}
		if max(d.pods[domain], 0)+d.self-least > sc.maxSkew {
			return statusSpread
		}
	}
	return nil
}

// scoreSpread scores feasible nodes by the pod's ScheduleAnyway constraints:
// the fewer matching pods in a node's domains, the better. It reports false
// when the pod has none.
func (r *round) scoreSpread(c *candidate, feasible []int32, scores []int64) bool {
	list, allLabels, err := r.spreadConstraints(c, corev1.ScheduleAnyway)
	if err != nil || len(list) == 0 {
		return false
	}
	ignored := make([]bool, len(feasible))
	considered := 0
	for i, slot := range feasible {
		if ignored[i] = allLabels && !hasLabels(list, slot); !ignored[i] {
			considered++
		}
	}
	raw := make([]float64, len(feasible))
	for i := range list {
		sc := &list[i]
		perNode := sc.topologyKey == corev1.LabelHostname
		size := considered
		var domains []int64
		if !perNode {
			domains, size = r.domainsOf(c, sc, list, allLabels, feasible, ignored)
		}
		weight := math.Log(float64(size + 2))
		for j, slot := range feasible {
			domain := sc.topology.at(slot)
			if ignored[j] || domain < 0 {
				continue
			}
			n := sc.pods.slots[slot]
			if !perNode {
				n = domains[domain]
			}
			raw[j] += float64(n)*weight + float64(sc.maxSkew-1)
		}
	}
	lowest, highest := int64(math.MaxInt64), int64(0)
	for j := range scores {
		if scores[j] = int64(math.Round(raw[j])); !ignored[j] {
			lowest, highest = min(lowest, scores[j]), max(highest, scores[j])
		}
	}
	for j := range scores {
		switch {
		case ignored[j]:
			scores[j] = 0
		case highest == 0:
			scores[j] = maxScore
		default:
			scores[j] = maxScore * (highest + lowest - scores[j]) / highest
		}
	}
	return true
}

// domainsOf counts the matching pods of each domain that has a feasible node,
// on all nodes that count, and how many such domains there are. Nodes without
// the label are one more domain.
func (r *round) domainsOf(c *candidate, sc *spreadConstraint, list []spreadConstraint, allLabels bool, feasible []int32, ignored []bool) (pods []int64, size int) {
	pods = make([]int64, sc.topology.size)
	for j := range pods {
		pods[j] = -1
	}
	unlabelled := false
	for j, slot := range feasible {
		if ignored[j] {
			continue
		}
		if domain := sc.topology.at(slot); domain < 0 {
			unlabelled = true
		} else if pods[domain] < 0 {
			pods[domain] = 0
			size++
		}
	}
	if unlabelled {
		size++
	}
	for _, slot := range r.cluster.order {
		n := sc.pods.slots[slot]
		if n == 0 {
			continue
		}
		domain := sc.topology.domain[slot]
		if domain < 0 || pods[domain] < 0 || (allLabels && !hasLabels(list, slot)) || !r.counted(c, sc, r.nodes[slot]) {
			continue
		}
		pods[domain] += n
	}
	return pods, size
}
