package sched

import (
	"math"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

var (
	statusAffinity     = unresolvable(causePodAffinity, "node(s) didn't match pod affinity rules")
	statusAntiAffinity = unschedulable(causePodAffinity, "node(s) didn't match pod anti-affinity rules")
	statusExistingAnti = unschedulable(causeOthersAffinity, "node(s) didn't satisfy existing pods anti-affinity rules")
)

// domainKey is one domain of one topology.
type domainKey struct {
	topology *topology
	domain   int32
}

// affinityFilter checks required affinity and anti-affinity between a pod and
// those that run, both ways.
type affinityFilter struct {
	r        *round
	pod      *podInfo
	nsLabels labels.Set

	// affinity and anti are the pod's own required terms, resolved.
	affinity, anti []*term
	// affinityCounts, antiCounts and existing count, by domain, the pods that
	// match all affinity terms, those that match an anti-affinity term, and
	// those whose own anti-affinity terms match the pod.
	affinityCounts, antiCounts, existing map[domainKey]int64
	affinityTopologies, antiTopologies   []*topology
	// existingTopologies are those in the keys of existing.
	existingTopologies []*topology
	// selfMatch: the pod itself would satisfy its affinity terms.
	selfMatch bool
}

// namespaceLabels returns the labels of a namespace; nil if it is unknown.
func (r *round) namespaceLabels(name string) labels.Set {
	if ns, ok := r.in.State.Namespace(name); ok {
		return labels.Set(ns.Labels)
	}
	return nil
}

// prepareAffinity returns nil when no term concerns the pod.
func (r *round) prepareAffinity(p *podInfo) *affinityFilter {
	f := &affinityFilter{r: r, pod: p}
	f.nsLabels = r.namespaceLabels(p.pod.Namespace)
	r.eachTerm(requiredAntiAffinity, func(t *term, slot int32, n int64) {
		f.addExisting(t, slot, n)
	}, func(t *term) bool { return t.matches(p.pod, f.nsLabels) })

	f.affinity = r.resolve(p.terms[requiredAffinity])
	f.anti = r.resolve(p.terms[requiredAntiAffinity])
	if len(f.affinity) > 0 {
		f.affinityCounts = map[domainKey]int64{}
		f.selfMatch = matchesAll(f.affinity, p.pod)
		for _, t := range f.affinity {
			f.affinityTopologies = append(f.affinityTopologies, r.cluster.topology(t.topologyKey))
		}
		for slot, n := range r.count(allTermsMatcher(f.affinity)).slots {
			if n != 0 {
				f.addAffinity(int32(slot), n)
			}
		}
	}
	if len(f.anti) > 0 {
		f.antiCounts = map[domainKey]int64{}
		for _, t := range f.anti {
			tp := r.cluster.topology(t.topologyKey)
			f.antiTopologies = append(f.antiTopologies, tp)
			for slot, n := range r.count(allTermsMatcher([]*term{t})).slots {
				if n != 0 {
					bump(f.antiCounts, tp, int32(slot), n)
				}
			}
		}
	}
	if len(f.affinity) == 0 && len(f.anti) == 0 && len(f.existing) == 0 && r.nominatedAnti == 0 {
		return nil
	}
	return f
}

func (r *round) resolve(list []*term) []*term {
	out := make([]*term, len(list))
	for i, t := range list {
		out[i] = t.resolveNamespaces(r.in.State)
	}
	return out
}

// eachTerm visits the terms of one kind that placed pods have and that match,
// with the slots of those pods and how many they are.
func (r *round) eachTerm(kind termKind, visit func(t *term, slot int32, n int64), matches func(*term) bool) {
	for _, group := range []map[string]*termCount{r.cluster.terms[kind], r.placedTerms[kind]} {
		for _, tc := range group {
			if !matches(tc.term) {
				continue
			}
			for slot, n := range tc.slots {
				visit(tc.term, slot, n)
			}
		}
	}
}

// allTermsMatcher counts pods that match every term; namespaces must be
// resolved.
func allTermsMatcher(terms []*term) matcher {
	m := matcher{key: "terms", match: func(p *podInfo) bool { return matchesAll(terms, p.pod) }}
	for _, t := range terms {
		m.key += "|" + t.matchIdentity()
	}
	if !terms[0].namespaceSelector.Empty() {
		m.namespaces = terms[0].namespaces
		if m.namespaces == nil {
			m.namespaces = []string{}
		}
	}
	return m
}

func matchesAll(terms []*term, pod *corev1.Pod) bool {
	for _, t := range terms {
		if !t.matches(pod, nil) {
			return false
		}
	}
	return len(terms) > 0
}

// bump adds to the count of a node's domain; counts of 0 are taken out.
func bump(counts map[domainKey]int64, t *topology, slot int32, n int64) {
	domain := t.at(slot)
	if domain < 0 {
		return
	}
	k := domainKey{t, domain}
	if counts[k] += n; counts[k] == 0 {
		delete(counts, k)
	}
}

func (f *affinityFilter) addAffinity(slot int32, n int64) {
	for _, tp := range f.affinityTopologies {
		bump(f.affinityCounts, tp, slot, n)
	}
}

func (f *affinityFilter) addExisting(t *term, slot int32, n int64) {
	tp := f.r.cluster.topology(t.topologyKey)
	if f.existing == nil {
		f.existing = map[domainKey]int64{}
	}
	known := false
	for _, other := range f.existingTopologies {
		known = known || other == tp
	}
	if !known {
		f.existingTopologies = append(f.existingTopologies, tp)
	}
	bump(f.existing, tp, slot, n)
}

// count tells that a pod came to or left a node.
func (f *affinityFilter) count(p *podInfo, slot int32, sign int64) {
	for _, t := range p.terms[requiredAntiAffinity] {
		if t.matches(f.pod.pod, f.nsLabels) {
			f.addExisting(t, slot, sign)
		}
	}
	if matchesAll(f.affinity, p.pod) {
		f.addAffinity(slot, sign)
	}
	for i, t := range f.anti {
		if t.matches(p.pod, nil) {
			bump(f.antiCounts, f.antiTopologies[i], slot, sign)
		}
	}
}

func (f *affinityFilter) filter(n *nodeInfo) *status {
	if !f.affinitySatisfied(n) {
		return statusAffinity
	}
	if len(f.antiCounts) > 0 {
		for _, tp := range f.antiTopologies {
			if domain := tp.at(n.slot); domain >= 0 && f.antiCounts[domainKey{tp, domain}] > 0 {
				return statusAntiAffinity
			}
		}
	}
	if len(f.existing) > 0 {
		for _, tp := range f.existingTopologies {
			if domain := tp.at(n.slot); domain >= 0 && f.existing[domainKey{tp, domain}] > 0 {
				return statusExistingAnti
			}
		}
	}
	return nil
}

// affinitySatisfied reports whether every affinity term has a matching pod in
// the node's domain. The first of a group of pods that want to be together is
// let in anywhere: when nothing matches in the whole cluster and the pod
// matches its own terms.
func (f *affinityFilter) affinitySatisfied(n *nodeInfo) bool {
	together := true
	for _, tp := range f.affinityTopologies {
		domain := tp.at(n.slot)
		if domain < 0 {
			return false
		}
		if f.affinityCounts[domainKey{tp, domain}] <= 0 {
			together = false
		}
	}
	return together || (len(f.affinityCounts) == 0 && f.selfMatch)
}

// scoreAffinity scores feasible nodes by preferred terms: those of the pod for
// the pods that run, and those of the pods that run for the pod; required
// affinity of running pods counts as a preference too. It reports false when
// no term has a say.
func (r *round) scoreAffinity(c *candidate, feasible []int32, scores []int64) bool {
	p := c.p
	if c.profile.IgnorePreferredTermsOfExistingPods && len(p.terms[preferredAffinity])+len(p.terms[preferredAntiAffinity]) == 0 {
		return false
	}
	sums := map[*topology][]int64{}
	add := func(t *term, slot int32, n int64) {
		tp := r.cluster.topology(t.topologyKey)
		domain := tp.at(slot)
		if domain < 0 || n == 0 {
			return
		}
		if sums[tp] == nil {
			sums[tp] = make([]int64, tp.size)
		}
		sums[tp][domain] += n
	}
	for _, own := range []struct {
		kind termKind
		sign int64
	}{{preferredAffinity, 1}, {preferredAntiAffinity, -1}} {
		for _, t := range r.resolve(p.terms[own.kind]) {
			for slot, n := range r.count(allTermsMatcher([]*term{t})).slots {
				add(t, int32(slot), own.sign*t.weight*n)
			}
		}
	}
	nsLabels := r.namespaceLabels(p.pod.Namespace)
	matches := func(t *term) bool { return t.matches(p.pod, nsLabels) }
	if hard := int64(c.profile.HardPodAffinityWeight); hard > 0 {
		r.eachTerm(requiredAffinity, func(t *term, slot int32, n int64) { add(t, slot, hard*n) }, matches)
	}
	r.eachTerm(preferredAffinity, func(t *term, slot int32, n int64) { add(t, slot, t.weight*n) }, matches)
	r.eachTerm(preferredAntiAffinity, func(t *term, slot int32, n int64) { add(t, slot, -t.weight*n) }, matches)
	if len(sums) == 0 {
		return false
	}
	lowest, highest := int64(math.MaxInt64), int64(math.MinInt64)
	for i, slot := range feasible {
		scores[i] = 0
		for tp, byDomain := range sums {
			if domain := tp.at(slot); domain >= 0 {
				scores[i] += byDomain[domain]
			}
		}
		lowest, highest = min(lowest, scores[i]), max(highest, scores[i])
	}
	for i := range scores {
		if highest == lowest {
			scores[i] = 0
			continue
		}
		scores[i] = int64(float64(maxScore) * (float64(scores[i]-lowest) / float64(highest-lowest)))
	}
	return true
}
