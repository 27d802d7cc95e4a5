package sched

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/nodedeclaredfeatures"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
)

// status says why a pod cannot run on a node, or nowhere. nil: it can.
type status struct {
	reasons []string
	// unresolvable: evicting pods from the node would not help.
	unresolvable bool
	// cause is the filter that says so.
	cause Causes
	// gated: something that the pod names is not there yet. Nothing is said of it: it is
	// on its way, most of the time.
	gated bool
	// err: the pod or what it refers to cannot be understood.
	err error
}

func (s *status) text() string { return strings.Join(s.reasons, ", ") }

func unschedulable(cause Causes, reasons ...string) *status {
	return &status{reasons: reasons, cause: cause}
}

func unresolvable(cause Causes, reasons ...string) *status {
	return &status{reasons: reasons, unresolvable: true, cause: cause}
}

func failed(format string, args ...any) *status {
	return &status{err: fmt.Errorf(format, args...), cause: causeError}
}

// The verdicts that need no details, shared and never changed. The words are
// upstream's.
var (
	statusUnschedulable = unresolvable(causeUnschedulable, "node(s) were unschedulable")
	statusTainted       = unresolvable(causeTaints, "node(s) had untolerated taint(s)")
	statusAddedAffinity = unresolvable(causeNodeAffinity, "node(s) didn't match scheduler-enforced node affinity")
	statusNodeAffinity  = unresolvable(causeNodeAffinity, "node(s) didn't match Pod's node affinity/selector")
	statusNotNamed      = unresolvable(causeNodeAffinity, "node(s) didn't satisfy plugin(s) [NodeAffinity]")
	statusPorts         = unschedulable(causePorts, "node(s) didn't have free ports for the requested pod ports")
	statusFeatures      = unresolvable(causeFeatures, "node(s) didn't match Pod's required features")

	taintUnschedulable = corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule}
)

// candidate is a pending pod with what its filters share between nodes.
type candidate struct {
	p       *podInfo
	profile *profile
	// only names the nodes that the pod's node affinity names; nil: any.
	only map[string]bool
	// nodeAffinity matches nodes; selective is false when it matches all.
	// affinityKnown keeps its answers by slot: 0 unknown, 1 yes, 2 no.
	nodeAffinity  nodeaffinity.RequiredNodeAffinity
	selective     bool
	affinityKnown []uint8
	needs         nodedeclaredfeatures.FeatureSet
	needsAny      bool

	spread   *spreadFilter
	affinity *affinityFilter
	volumes  *podVolumes
	claims   *podClaims
	// answers are what nodes said to equal pods; nil: nobody remembers.
	answers *answers
	// spreadSelector is the selector for default spreading; see spread.go.
	spreadSelector *derivedSelector
}

// scratch holds memory that is reused from pod to pod.
type scratch struct {
	feasible           []int32
	leaving, potential []*podInfo
}

// keepAffinities is how many different node selectors a round remembers the
// answers of.
const keepAffinities = 256

// affinityAnswers returns the answers by slot so far of pods that select nodes
// in the same way: usually all pods of a workload.
func (r *round) affinityAnswers(spec *corev1.PodSpec) []uint8 {
	var key strings.Builder
	for _, k := range slices.Sorted(maps.Keys(spec.NodeSelector)) {
		fmt.Fprintf(&key, "%s=%s,", k, spec.NodeSelector[k])
	}
	if a := spec.Affinity; a != nil && a.NodeAffinity != nil {
		key.WriteString(a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.String())
	}
	known, ok := r.affinities[key.String()]
	if !ok {
		known = make([]uint8, len(r.nodes))
		if len(r.affinities) >= keepAffinities {
			clear(r.affinities)
		}
		r.affinities[key.String()] = known
	}
	return known
}

// prepare works out what the filters of a pod need. A status says that the pod
// fits no node, whichever.
func (r *round) prepare(p *podInfo) (*candidate, *status) {
	c := &candidate{p: p, profile: r.cfg.of(p.pod)}
	asks := c.profile.asks
	spec := &p.pod.Spec
	if p.err != nil {
		return c, unresolvable(causePod, "parsing pod: "+p.err.Error())
	}
	c.nodeAffinity = nodeaffinity.GetRequiredNodeAffinity(p.pod)
	c.selective = len(spec.NodeSelector) > 0
	if a := spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		c.selective = true
		if asks(FilterNodeAffinity) {
			var conflict bool
			if c.only, conflict = namedNodes(a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution); conflict {
				return c, unresolvable(causePod, "pod affinity terms conflict")
			}
		}
	}
	if c.selective {
		c.affinityKnown = r.affinityAnswers(spec)
	}
	var s *status
	if c.volumes, s = r.prepareVolumes(c); s != nil {
		return c, s
	}
	if asks(FilterPodTopologySpread) {
		if c.spread, s = r.prepareSpread(c); s != nil {
			return c, s
		}
	}
	if asks(FilterInterPodAffinity) {
		c.affinity = r.prepareAffinity(p)
	}
	if c.claims, s = r.prepareClaims(c); s != nil {
		return c, s
	}
	if !asks(FilterNodeDeclaredFeatures) {
		return c, nil
	}
	needs, err := r.requiredFeatures(p)
	if err != nil {
		return c, failed("infer required node features: %w", err)
	}
	c.needs, c.needsAny = needs, !needs.IsEmpty()
	return c, nil
}

// requiredFeatures returns the features the pod needs nodes to declare.
func (r *round) requiredFeatures(p *podInfo) (nodedeclaredfeatures.FeatureSet, error) {
	return r.cluster.features.InferForPodScheduling(&nodedeclaredfeatures.PodInfo{Spec: &p.pod.Spec}, r.cfg.Version)
}

// namedNodes returns the nodes that a selector names by metadata.name in each
// of its terms; nil when some term does not. conflict says that no name is
// left.
func namedNodes(ns *corev1.NodeSelector) (names map[string]bool, conflict bool) {
	if len(ns.NodeSelectorTerms) == 0 {
		return nil, false
	}
	names = map[string]bool{}
	for _, t := range ns.NodeSelectorTerms {
		var inTerm map[string]bool
		for _, f := range t.MatchFields {
			if f.Key != metav1.ObjectNameField || f.Operator != corev1.NodeSelectorOpIn {
				continue
			}
			both := map[string]bool{}
			for _, v := range f.Values {
				if inTerm == nil || inTerm[v] {
					both[v] = true
				}
			}
			inTerm = both
		}
		if inTerm == nil {
			return nil, false
		}
		for name := range inTerm {
			names[name] = true
		}
	}
	return names, len(names) == 0
}

// filter says whether the pod can run on a node: as the node is, and as it will
// be when the pods nominated there, of at least the same priority, have come and
// those evicted for them have left. Both must hold, since the nominated may
// still go elsewhere.
func (r *round) filter(c *candidate, n *nodeInfo) *status {
	if len(r.nominated[n.slot]) > 0 {
		if s := r.filterFuture(c, n); s != nil {
			return s
		}
	}
	return r.filterNode(c, n)
}

func (r *round) filterFuture(c *candidate, n *nodeInfo) *status {
	var coming, leaving []*podInfo
	highest := int32(math.MinInt32)
	for _, p := range r.nominated[n.slot] {
		if p != c.p && p.priority >= c.p.priority {
			coming = append(coming, p)
			highest = max(highest, p.priority)
		}
	}
	if len(coming) == 0 {
		return nil
	}
	for _, p := range n.pods {
		if p.priority < highest && r.leaving(p) {
			leaving = append(leaving, p)
		}
	}
	future := n.clone()
	for _, p := range leaving {
		future.remove(p)
		c.count(p, n, -1)
	}
	for _, p := range coming {
		future.add(p)
		c.count(p, n, 1)
	}
	s := r.filterNode(c, future)
	for _, p := range leaving {
		c.count(p, n, 1)
	}
	for _, p := range coming {
		c.count(p, n, -1)
	}
	return s
}

// count tells the candidate's filters that a pod came to or left a node.
func (c *candidate) count(p *podInfo, n *nodeInfo, sign int64) {
	if c.spread != nil {
		c.spread.count(p, n.slot, sign)
	}
	if c.affinity != nil {
		c.affinity.count(p, n.slot, sign)
	}
	if c.volumes != nil {
		c.volumes.count(p, sign)
	}
}

// filterNode runs the filters in upstream's order; the first that refuses
// speaks for the node.
func (r *round) filterNode(c *candidate, n *nodeInfo) *status {
	pod, asks := c.p.pod, c.profile.asks
	if n.node.Spec.Unschedulable && asks(FilterNodeUnschedulable) && !tolerates(pod.Spec.Tolerations, &taintUnschedulable) {
		return statusUnschedulable
	}
	if asks(FilterTaintToleration) && !toleratesTaints(pod.Spec.Tolerations, n.node.Spec.Taints) {
		return statusTainted
	}
	if added := c.profile.addedRequired; added != nil && asks(FilterNodeAffinity) && !added.Match(n.node) {
		return statusAddedAffinity
	}
	if c.selective && asks(FilterNodeAffinity) && !r.matchesNodeAffinity(c, n) {
		return statusNodeAffinity
	}
	if len(c.p.ports) > 0 && asks(FilterNodePorts) && !n.portsFree(c.p) {
		return statusPorts
	}
	if asks(FilterNodeResourcesFit) {
		if s := n.insufficient(c.p, c.profile); s != nil {
			return s
		}
	}
	if c.volumes != nil {
		if s := r.filterVolumes(c, n); s != nil {
			return s
		}
	}
	if c.spread != nil {
		if s := c.spread.filter(n); s != nil {
			return s
		}
	}
	if c.affinity != nil {
		if s := c.affinity.filter(n); s != nil {
			return s
		}
	}
	if c.claims != nil {
		if s := r.filterClaims(c, n); s != nil {
			return s
		}
	}
	if c.needsAny {
		if ok, err := c.needs.IsSubset(n.features); err != nil {
			return failed("compare features of node %s: %w", n.name, err)
		} else if !ok {
			return statusFeatures
		}
	}
	return nil
}

// matchesNodeAffinity reports whether the node has what the pod's nodeSelector
// and required node affinity ask for.
func (r *round) matchesNodeAffinity(c *candidate, n *nodeInfo) bool {
	if !c.selective {
		return true
	}
	known := &c.affinityKnown[n.slot]
	if *known == 0 {
		*known = 2
		if ok, err := c.nodeAffinity.Match(n.node); ok && err == nil {
			*known = 1
		}
	}
	return *known == 1
}

func tolerates(tolerations []corev1.Toleration, taint *corev1.Taint) bool {
	return corev1helpers.TolerationsTolerateTaint(klog.Logger{}, tolerations, taint, false)
}

// toleratesTaints reports whether no taint keeps new pods away from the node.
func toleratesTaints(tolerations []corev1.Toleration, taints []corev1.Taint) bool {
	for i := range taints {
		if e := taints[i].Effect; e != corev1.TaintEffectNoSchedule && e != corev1.TaintEffectNoExecute {
			continue
		}
		if !tolerates(tolerations, &taints[i]) {
			return false
		}
	}
	return true
}
