package sched

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"sync"

	corev1 "k8s.io/api/core/v1"
)

// Schedule plans every pending pod that names one of the profiles. It
// returns an error only for a Config that Validate refuses or a missing view;
// whatever is wrong with one pod is a [Failure] of that pod.
func Schedule(c Config, in Input) (Plan, error) {
	cfg, err := c.compile()
	if err != nil {
		return Plan{}, err
	}
	return cfg.schedule(in)
}

func (c *compiled) schedule(in Input) (Plan, error) {
	if err := in.complete(); err != nil {
		return Plan{}, err
	}
	r := newRound(c, in)
	r.releaseHeld()
	tried := 0
	// try says whether there was room in this call for the pod.
	try := func(p *podInfo) bool {
		if c.of(p.pod) == nil {
			return true
		}
		if (c.MaxPods > 0 && tried == c.MaxPods) || (c.MaxVictimSearches > 0 && r.searches == c.MaxVictimSearches) {
			r.plan.Remaining++
			return false
		}
		tried++
		r.schedule(p)
		return true
	}
	if in.Pods == nil {
		in.Cluster.queue.Scan(func(p *podInfo) bool { try(p); return true })
		return r.plan, nil
	}
	for pod := range in.Pods {
		if p, ok := in.Cluster.pods.Get(podKey(pod.Namespace, pod.Name)); ok && pending(p.pod) && !try(p) {
			break
		}
	}
	return r.plan, nil
}

// complete fills in what can be derived.
func (in *Input) complete() error {
	if in.State == nil {
		if in.Snapshot == nil {
			return fmt.Errorf("sched: Input.Snapshot and Input.State are both nil; give a view to plan from")
		}
		in.State = FromObjects(in.Snapshot)
	}
	if in.Cluster == nil {
		in.Cluster = Build(in.State)
	}
	return nil
}

// round is one call of Schedule: the Cluster it started from and what it has
// placed since. It belongs to one goroutine.
type round struct {
	cfg     *compiled
	in      Input
	cluster *Cluster
	plan    Plan

	// nodes by slot: the Cluster's until a pod is placed there, then the
	// round's own (see own).
	nodes []*nodeInfo
	own   []bool
	// start is where in cluster.order the next search begins.
	start int

	// terms and counts are the Cluster's plus what this round placed.
	placedTerms [termKinds]map[string]*termCount
	counts      map[string]*roundCount
	// nominated pods hold room by slot until they are placed.
	nominated map[int32][]*podInfo
	// nominatedAnti counts the nominated pods that have required anti-affinity.
	nominatedAnti int

	volumes volumeRound
	devices deviceRound
	// evicted pods were chosen as victims in this round.
	evicted map[*podInfo]bool
	// searches counts how often victims were looked for.
	searches int
	// hopeless maps what a pod asks for to the failure of an equal pod.
	hopeless map[string]hopeless
	// equal maps what a pod asks for to what nodes answered to equal pods; versions say
	// which answers still hold.
	equal    map[string]*answers
	versions []uint32
	budgets  func() []budget
	// attachments are the volumes attached to nodes; see listAttachments.
	attachments func() map[string]map[string]string

	// affinities keeps which nodes node selectors match; see affinityAnswers.
	affinities map[string][]uint8

	// statuses by slot of the pod being scheduled; nil: passed or not tried.
	statuses []*status
	scratch  scratch
}

// hopeless is what a pod was told that fits nowhere.
type hopeless struct {
	message string
	causes  Causes
}

// roundCount is a matchCount by slot, brought up to date by placements.
type roundCount struct {
	matcher matcher
	slots   []int64
	total   int64
}

func newRound(c *compiled, in Input) *round {
	cl := in.Cluster
	r := &round{
		cfg: c, in: in, cluster: cl,
		nodes:      append([]*nodeInfo(nil), cl.nodes...),
		own:        make([]bool, len(cl.nodes)),
		counts:     map[string]*roundCount{},
		nominated:  map[int32][]*podInfo{},
		evicted:    map[*podInfo]bool{},
		hopeless:   map[string]hopeless{},
		affinities: map[string][]uint8{},
		statuses:   make([]*status, len(cl.nodes)),
		equal:      map[string]*answers{},
		versions:   make([]uint32, len(cl.nodes)),
	}
	r.budgets = sync.OnceValue(r.listBudgets)
	r.attachments = sync.OnceValue(r.listAttachments)
	for kind := range r.placedTerms {
		r.placedTerms[kind] = map[string]*termCount{}
	}
	for name, list := range cl.nominated {
		if slot, ok := cl.slots[name]; ok {
			for _, p := range list {
				r.nominate(p, slot)
			}
		}
	}
	if n := len(cl.order); n > 0 {
		r.start = int(in.Seed % uint64(n))
	}
	return r
}

// schedule decides about one pod and adds the decision to the plan.
func (r *round) schedule(p *podInfo) {
	if len(r.cluster.order) == 0 {
		r.fail(p, corev1.PodReasonUnschedulable, "no nodes available to schedule pods", "", causeNoNodes)
		return
	}
	signature := ""
	if len(r.hopeless)+len(r.equal) > 0 {
		if signature = r.signature(p); signature != "" {
			if h, ok := r.hopeless[signature]; ok {
				r.fail(p, corev1.PodReasonUnschedulable, h.message, "", h.causes)
				return
			}
		}
	}
	c, rejected := r.prepare(p)
	if rejected != nil {
		r.reject(c, rejected)
		return
	}
	if a := r.equal[signature]; a != nil && c.plain() {
		c.answers = a
	}
	feasible, failed := r.findFeasible(c)
	if failed != nil {
		r.reject(c, failed)
		return
	}
	if len(feasible) == 0 {
		message, causes := r.fitMessage(r.statuses, nil), r.causes()
		if signature == "" {
			signature = r.signature(p)
		}
		r.remembers(c, signature)
		preempted, nominated, extra := r.preempt(c)
		extra = r.releaseClaim(c) + extra
		r.fail(p, corev1.PodReasonUnschedulable, message+extra, nominated, causes)
		if !preempted && nominated == "" && signature != "" {
			r.hopeless[signature] = hopeless{message + extra, causes}
		}
		return
	}
	slot := feasible[0]
	if len(feasible) > 1 {
		slot = r.choose(c, feasible)
	}
	r.place(c, slot)
}

// reject records a pod that no node was tried for.
func (r *round) reject(c *candidate, s *status) {
	if s.err != nil {
		r.fail(c.p, corev1.PodReasonSchedulerError, s.err.Error(), "", s.cause)
		return
	}
	if s.gated {
		r.plan.Gated = append(r.plan.Gated, Failure{Pod: c.p.pod, Reason: corev1.PodReasonUnschedulable, Message: s.text(), Causes: s.cause})
		return
	}
	for i := range r.statuses {
		r.statuses[i] = nil
	}
	message := fmt.Sprintf("0/%d nodes are available: %s.", len(r.cluster.order), s.text())
	if !c.profile.DisablePreemption {
		message += r.preemptionUnhelpful(c)
	}
	r.fail(c.p, corev1.PodReasonUnschedulable, message, "", s.cause)
}

func (r *round) fail(p *podInfo, reason, message, nominated string, causes Causes) {
	r.plan.Failures = append(r.plan.Failures, Failure{
		Pod: p.pod, Reason: reason, Message: message, NominatedNode: nominated, Causes: causes,
	})
}

// causes are the filters that refused the pod on some node.
func (r *round) causes() Causes {
	var out Causes
	for _, slot := range r.cluster.order {
		if s := r.statuses[slot]; s != nil {
			out |= s.cause
		}
	}
	return out
}

// place takes room for the pod on a node, so that later pods see it, and adds
// the binding, or what must come before it, to the plan.
func (r *round) place(c *candidate, slot int32) {
	n := r.assume(c.p, slot)
	r.withdraw(c.p)
	var writes []ClaimWrite
	ready := true
	if c.claims != nil {
		writes, ready = r.assumeClaims(c, slot)
	}
	if c.volumes != nil && len(c.volumes.delayed) > 0 {
		decisions := r.assumeVolumes(c, n)
		r.plan.Waiting = append(r.plan.Waiting, Waiting{Pod: c.p.pod, Node: n.name, Claims: decisions, ResourceClaims: writes})
		return
	}
	if !ready {
		brief := len(writes) > 0 && !writes[0].Status
		r.plan.Waiting = append(r.plan.Waiting, Waiting{Pod: c.p.pod, Node: n.name, ResourceClaims: writes, Brief: brief})
		return
	}
	r.plan.Bindings = append(r.plan.Bindings, Binding{Pod: c.p.pod, Node: n.name, ResourceClaims: writes})
}

// assume adds the pod to the round's view of a node.
func (r *round) assume(p *podInfo, slot int32) *nodeInfo {
	if !r.own[slot] {
		r.nodes[slot], r.own[slot] = r.nodes[slot].clone(), true
	}
	r.changed(slot)
	n := r.nodes[slot]
	n.add(p)
	for kind, list := range p.terms {
		for _, t := range list {
			tc := r.placedTerms[kind][t.key]
			if tc == nil {
				tc = &termCount{term: t, slots: map[int32]int64{}}
				r.placedTerms[kind][t.key] = tc
			}
			tc.slots[slot]++
		}
	}
	for _, rc := range r.counts {
		if rc.matcher.selects(p) {
			rc.slots[slot]++
			rc.total++
		}
	}
	r.volumes.addPod(p, slot)
	return n
}

// nominate keeps room on a node for a pod.
func (r *round) nominate(p *podInfo, slot int32) {
	r.nominated[slot] = append(r.nominated[slot], p)
	if len(p.terms[requiredAntiAffinity]) > 0 {
		r.nominatedAnti++
	}
	r.changed(slot)
}

// withdraw gives up the room a nominated pod held.
func (r *round) withdraw(p *podInfo) {
	name := p.pod.Status.NominatedNodeName
	if name == "" {
		return
	}
	slot, ok := r.cluster.slots[name]
	if !ok {
		return
	}
	list := r.nominated[slot]
	for i, other := range list {
		if other == p {
			r.nominated[slot] = append(list[:i:i], list[i+1:]...)
			if len(p.terms[requiredAntiAffinity]) > 0 {
				r.nominatedAnti--
			}
			r.changed(slot)
			clear(r.hopeless) // the room may be what another lacked
			return
		}
	}
}

// count returns how many pods a matcher selects by slot, this round's included.
func (r *round) count(m matcher) *roundCount {
	if rc, ok := r.counts[m.key]; ok {
		return rc
	}
	rc := &roundCount{matcher: m, slots: make([]int64, len(r.nodes))}
	for slot, n := range r.cluster.count(m) {
		rc.slots[slot] = n
		rc.total += n
	}
	for slot, own := range r.own {
		if !own {
			continue
		}
		for _, p := range r.nodes[slot].pods[len(r.cluster.nodes[slot].pods):] {
			if m.selects(p) {
				rc.slots[slot]++
				rc.total++
			}
		}
	}
	r.counts[m.key] = rc
	return rc
}

// findFeasible returns slots of nodes the pod can run on, at most as many as
// are worth scoring, and leaves the others' statuses in r.statuses. A status
// is returned when the search could not be done.
func (r *round) findFeasible(c *candidate) ([]int32, *status) {
	clear(r.statuses)
	if name := c.p.pod.Status.NominatedNodeName; name != "" {
		if slot, ok := r.cluster.slots[name]; ok && r.nodes[slot].node != nil {
			s := r.filter(c, r.nodes[slot])
			if s == nil {
				return []int32{slot}, nil
			}
			if s.err != nil {
				return nil, s
			}
		}
	}
	feasible := r.scratch.feasible[:0]
	if c.only != nil {
		// The pod's node affinity names its nodes.
		for _, slot := range r.cluster.order {
			n := r.nodes[slot]
			if !c.only[n.name] {
				r.statuses[slot] = statusNotNamed
				continue
			}
			s := r.fit(c, slot)
			if s == nil {
				feasible = append(feasible, slot)
				continue
			}
			if s.err != nil {
				return nil, s
			}
			r.statuses[slot] = s
		}
		r.scratch.feasible = feasible
		return feasible, nil
	}
	order := r.cluster.order
	want, tried := nodesToFind(int(c.profile.PercentageOfNodesToScore), len(order)), 0
	for ; tried < len(order) && len(feasible) < want; tried++ {
		slot := order[(r.start+tried)%len(order)]
		s := r.fit(c, slot)
		if s == nil {
			feasible = append(feasible, slot)
			continue
		}
		if s.err != nil {
			return nil, s
		}
		r.statuses[slot] = s
	}
	r.start = (r.start + tried) % len(order)
	r.scratch.feasible = feasible
	return feasible, nil
}

// nodesToFind says how many feasible nodes are enough among all.
func nodesToFind(percentage, all int) int {
	const enough = 100
	if all < enough {
		return all
	}
	if percentage == 0 {
		percentage = max(50-all/125, 5)
	}
	return max(all*percentage/100, enough)
}

// random returns a generator of the pod's own, so that what is drawn for one
// pod does not depend on the others.
func (r *round) random(p *podInfo) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(p.pod.UID))
	h.Write([]byte(p.pod.Namespace))
	h.Write([]byte{'/'})
	h.Write([]byte(p.pod.Name))
	return rand.New(rand.NewPCG(r.in.Seed, h.Sum64()))
}
