package sched

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

var (
	statusNoVictims = unresolvable(0, "No preemption victims found for incoming pod")
	statusUnhelpful = unresolvable(0, "Preemption is not helpful for scheduling")
)

// nodeVictims is one node where evicting pods makes room.
type nodeVictims struct {
	slot       int32
	pods       []*podInfo // most important first
	violations int
	// highest is their highest priority, sum that of all, earliest the start of the first
	// of those that have the highest.
	highest, sum int64
	earliest     time.Time
}

// preempt looks for a node where evicting pods of lower priority lets the pod
// in, and adds the best to the plan. It returns whether pods are evicted, the
// node whose room the pod then holds, and what to add to the failure message.
func (r *round) preempt(c *candidate) (evicts bool, nominated, message string) {
	if c.profile.DisablePreemption {
		return false, "", ""
	}
	if why := r.mayNotPreempt(c); why != "" {
		// The pod keeps the node it waits for.
		return false, c.p.pod.Status.NominatedNodeName, " preemption: " + why
	}
	best, statuses := r.findVictims(c)
	if best == nil {
		return false, "", " preemption: " + r.fitMessage(statuses, statusUnhelpful)
	}
	n := r.nodes[best.slot]
	r.withdraw(c.p)
	r.nominate(c.p, best.slot)
	if len(best.pods) == 0 {
		return false, n.name, " preemption: waiting for evicted pods to leave node " + n.name + "."
	}
	victims := make([]*corev1.Pod, len(best.pods))
	for i, p := range best.pods {
		victims[i] = p.pod
		r.evicted[p] = true
	}
	r.plan.Preemptions = append(r.plan.Preemptions, Preemption{
		Pod: c.p.pod, Node: n.name, Victims: victims, Violations: best.violations,
	})
	return true, n.name, fmt.Sprintf(" preemption: found a potential placement for pod on node %s, preempting %d victims", n.name, len(victims))
}

// preemptionUnhelpful is the message for a pod that no node was tried for.
func (r *round) preemptionUnhelpful(c *candidate) string {
	if why := r.mayNotPreempt(c); why != "" {
		return " preemption: " + why
	}
	return " preemption: " + r.fitMessage(r.statuses, statusUnhelpful)
}

// mayNotPreempt says why the pod must not evict others; empty: it may.
func (r *round) mayNotPreempt(c *candidate) string {
	pod := c.p.pod
	if p := pod.Spec.PreemptionPolicy; p != nil && *p == corev1.PreemptNever {
		return "not eligible due to preemptionPolicy=Never."
	}
	slot, ok := r.cluster.slots[pod.Status.NominatedNodeName]
	if pod.Status.NominatedNodeName == "" || !ok {
		return ""
	}
	if s := r.statuses[slot]; s != nil && s.unresolvable {
		return ""
	}
	for _, p := range r.nodes[slot].pods {
		if p.priority < c.p.priority && p.leaving {
			return "not eligible due to a terminating pod on the nominated node."
		}
	}
	return ""
}

// leaving reports whether the pod was evicted for another, in this round or
// before.
func (r *round) leaving(p *podInfo) bool { return p.leaving || r.evicted[p] }

func leavingForPreemptor(pod *corev1.Pod) bool {
	if pod.DeletionTimestamp == nil {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.DisruptionTarget {
			return c.Status == corev1.ConditionTrue && c.Reason == corev1.PodReasonPreemptionByScheduler
		}
	}
	return false
}

// findVictims tries nodes where evictions could help, from a random one on, and
// returns the best; nil and the nodes' statuses when there is none.
func (r *round) findVictims(c *candidate) (*nodeVictims, []*status) {
	var nodes []int32
	for _, slot := range r.cluster.order {
		if s := r.statuses[slot]; s != nil && !s.unresolvable {
			nodes = append(nodes, slot)
		}
	}
	statuses := make([]*status, len(r.nodes))
	if len(nodes) == 0 {
		return nil, statuses
	}
	enough := max(len(nodes)*int(c.profile.PreemptionCandidatesPercentage)/100, int(c.profile.PreemptionCandidatesMin))
	var offset int
	if c.answers != nil {
		offset = int(c.answers.offset % uint64(len(nodes)))
	} else {
		offset = r.random(c.p).IntN(len(nodes))
	}
	var found []*nodeVictims
	harmless, searched := false, false
	for i := range nodes {
		slot := nodes[(offset+i)%len(nodes)]
		v, s := r.victims(c, slot)
		if s != statusNoVictims && !searched {
			searched = true
			r.searches++
		}
		if s != nil {
			statuses[slot] = s
			continue
		}
		found = append(found, v)
		harmless = harmless || v.violations == 0
		if harmless && len(found) >= enough {
			break
		}
	}
	if len(found) == 0 {
		return nil, statuses
	}
	return leastHarm(found), nil
}

// victimsOn returns the fewest and least important pods to evict from a node:
// all of lower priority are taken away, then put back one by one, the most
// important first, as long as the pod still fits. Pods that leave already are
// no victims. A status says why it does not help.
func (r *round) victimsOn(c *candidate, slot int32) (*nodeVictims, *status) {
	leaving, potential := r.scratch.leaving[:0], r.scratch.potential[:0]
	for _, p := range r.nodes[slot].pods {
		switch {
		case p.priority >= c.p.priority:
		case r.leaving(p):
			leaving = append(leaving, p)
		case p.pod.Spec.NodeName != "": // not placed in this very round
			potential = append(potential, p)
		}
	}
	r.scratch.leaving, r.scratch.potential = leaving, potential
	if len(leaving)+len(potential) == 0 {
		return nil, statusNoVictims
	}
	n := r.nodes[slot].without(func(p *podInfo) bool {
		return p.priority < c.p.priority && (p.pod.Spec.NodeName != "" || r.leaving(p))
	})
	plain := c.plain()
	count := func(pods []*podInfo, sign int64) {
		if plain {
			return
		}
		for _, p := range pods {
			c.count(p, n, sign)
		}
	}
	count(leaving, -1)
	defer count(leaving, 1)
	count(potential, -1)
	if s := r.filter(c, n); s != nil {
		count(potential, 1)
		return nil, s
	}
	// Of what a plain pod asks of a node alone, room and ports depend on its pods.
	fits := func() bool { return r.filter(c, n) == nil }
	if plain && c.profile.Without == 0 && !r.expects(c, slot) {
		fits = func() bool { return n.hasRoom(c.p, c.profile) && (len(c.p.ports) == 0 || n.portsFree(c.p)) }
	}
	out := &nodeVictims{slot: slot}
	reprieve := func(p *podInfo) bool {
		n.add(p)
		count([]*podInfo{p}, 1)
		if fits() {
			return true
		}
		n.pop()
		count([]*podInfo{p}, -1)
		out.pods = append(out.pods, p)
		return false
	}
	slices.SortFunc(potential, r.moreImportant)
	violating, others := r.splitByBudget(potential)
	for _, p := range violating {
		if !reprieve(p) {
			out.violations++
		}
	}
	for _, p := range others {
		reprieve(p)
	}
	count(out.pods, 1)
	if len(violating) > 0 { // else they are in order
		slices.SortFunc(out.pods, r.moreImportant)
	}
	r.weigh(out)
	return out, nil
}

// expects reports whether others are nominated for a node whose coming the candidate
// has to reckon with.
func (r *round) expects(c *candidate, slot int32) bool {
	return slices.ContainsFunc(r.nominated[slot], func(p *podInfo) bool { return p != c.p && p.priority >= c.p.priority })
}

// moreImportant orders pods by priority, then by how long they run, then by
// name, so that the order says nothing about the order of arrival.
func (r *round) moreImportant(a, b *podInfo) int {
	if a.priority != b.priority {
		return cmp.Compare(b.priority, a.priority)
	}
	if d := r.startTime(a).Compare(r.startTime(b)); d != 0 {
		return d
	}
	if d := strings.Compare(a.pod.Namespace, b.pod.Namespace); d != 0 {
		return d
	}
	return strings.Compare(a.pod.Name, b.pod.Name)
}

// startTime is when a pod started; those that have not yet do now.
func (r *round) startTime(p *podInfo) time.Time {
	if p.started.IsZero() {
		return r.in.Now
	}
	return p.started
}

// budget is a PodDisruptionBudget that selects some pods.
type budget struct {
	*policyv1.PodDisruptionBudget
	selector labels.Selector
}

func (r *round) listBudgets() (out []budget) {
	for b := range r.in.State.PodDisruptionBudgets() {
		if s, err := metav1.LabelSelectorAsSelector(b.Spec.Selector); err == nil && !s.Empty() {
			out = append(out, budget{b, s})
		}
	}
	return out
}

// splitByBudget tells the pods whose eviction a PodDisruptionBudget forbids,
// given that those before them in the list are evicted, from the others.
func (r *round) splitByBudget(pods []*podInfo) (violating, others []*podInfo) {
	budgets := r.budgets()
	if len(budgets) == 0 {
		return nil, pods
	}
	left := make([]int32, len(budgets))
	for i, b := range budgets {
		left[i] = b.Status.DisruptionsAllowed
	}
	forbidden := func(pod *corev1.Pod) bool {
		if len(pod.Labels) == 0 {
			return false
		}
		for i, b := range budgets {
			if b.Namespace != pod.Namespace || !b.selector.Matches(labels.Set(pod.Labels)) {
				continue
			}
			if _, already := b.Status.DisruptedPods[pod.Name]; already {
				continue
			}
			if left[i]--; left[i] < 0 {
				return true
			}
		}
		return false
	}
	for _, p := range pods {
		if forbidden(p.pod) {
			violating = append(violating, p)
		} else {
			others = append(others, p)
		}
	}
	return violating, others
}

// weigh works out what leastHarm compares.
func (r *round) weigh(v *nodeVictims) {
	v.highest, v.earliest = math.MinInt64, r.in.Now
	for _, p := range v.pods {
		v.sum += int64(p.priority) + math.MaxInt32 + 1
	}
	if len(v.pods) == 0 {
		return
	}
	v.highest = int64(v.pods[0].priority)
	for _, p := range v.pods {
		if start := r.startTime(p); int64(p.priority) == v.highest && start.Before(v.earliest) {
			v.earliest = start
		}
	}
}

// leastHarm picks the node with the fewest violated budgets, then the lowest
// highest priority, the lowest sum of priorities, the fewest victims, and the
// most recently started important victims; then the first.
func leastHarm(found []*nodeVictims) *nodeVictims {
	return slices.MinFunc(found, func(a, b *nodeVictims) int {
		return cmp.Or(
			cmp.Compare(a.violations, b.violations),
			cmp.Compare(a.highest, b.highest),
			cmp.Compare(a.sum, b.sum),
			cmp.Compare(len(a.pods), len(b.pods)),
			b.earliest.Compare(a.earliest),
		)
	})
}
