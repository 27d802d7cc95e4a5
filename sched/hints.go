package sched

import (
	"cmp"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"timonel/state/objects"
)

// Causes is a set of filters: those that refused a pod on some node.
type Causes uint32

const (
	causeNoNodes Causes = 1 << iota
	// causeError: something could not be read. It is tried again by time alone.
	causeError
	// causePod: only a change of the pod itself helps.
	causePod
	causeUnschedulable
	causeTaints
	causeNodeAffinity
	causePorts
	causeResources
	causeVolumeUse
	causeVolumeLimits
	causeVolumeBinding
	causeVolumeZone
	causeSpread
	// causePodAffinity is of the pod's own terms, causeOthersAffinity of the
	// anti-affinity of pods that run.
	causePodAffinity
	causeOthersAffinity
	causeFeatures
	// causeDevices is of ResourceClaims, and of the devices for them.
	causeDevices
)

// hint says which pods that were refused a change may let in: as upstream's queueing
// hints do, and in some cases that those leave to the flush every five minutes. It
// may wake a pod in vain, and must wake every one that fits now
// (TestWhatLetsAPodInWakesIt).
type hint struct {
	// concerns are the causes that cures can say yes to.
	concerns Causes
	// urgent: such changes are few, so that a pod need not wait for its back-off.
	urgent bool
	// cures is asked about pods that have one of the causes in concerns.
	cures func(p *podInfo, why Causes) bool
}

// hints returns what a change may have cured. c and s are of after the change, and
// perhaps of after later ones.
func hints(ch objects.Changed, c *Cluster, s State, cfg *compiled) []hint {
	switch ch.Meta().Object.(type) {
	case *corev1.Pod:
		return podHints(ch, c, s, cfg)
	case *corev1.Node:
		return nodeHints(typed[*corev1.Node](ch.Old), typed[*corev1.Node](ch.New), c, cfg)
	case *corev1.Namespace:
		if ch.Old != nil && ch.New != nil && maps.Equal(ch.Old.Labels, ch.New.Labels) {
			return nil
		}
		return always(causePodAffinity | causeOthersAffinity)
	}
	if h := deviceHints(ch); h != nil {
		return h
	}
	return volumeHints(ch)
}

func typed[T any](m *objects.Meta) T {
	var none T
	if m == nil {
		return none
	}
	o, _ := m.Object.(T)
	return o
}

// always is the hint of a change that may cure whoever has one of the causes.
func always(causes Causes) []hint {
	return []hint{{concerns: causes, cures: func(*podInfo, Causes) bool { return true }}}
}

// room is the node on which a pod takes room or is to take it; empty: none.
func room(pod *corev1.Pod) string {
	if pod == nil || objects.PodEnded(pod) || pod.Spec.NodeName == "" && pod.DeletionTimestamp != nil {
		return ""
	}
	return cmp.Or(pod.Spec.NodeName, pod.Status.NominatedNodeName)
}

// podHints are those of a pod that came to a node, left it, or changed there.
func podHints(ch objects.Changed, c *Cluster, s State, cfg *compiled) []hint {
	before, after := typed[*corev1.Pod](ch.Old), typed[*corev1.Pod](ch.New)
	from, to := room(before), room(after)
	replaced := before != nil && after != nil && before.UID != after.UID
	switch {
	case from == "" && to == "":
		return nil
	case from != "" && (from != to || replaced):
		out := []hint{podLeft(before, c, s, cfg)}
		if to != "" {
			out = append(out, podCame(after, s))
		}
		return out
	case from == "":
		return []hint{podCame(after, s)}
	}
	var out []hint
	if !maps.Equal(before.Labels, after.Labels) || (before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) {
		was := podLeft(before, c, s, cfg)
		was.concerns &= causeSpread | causePodAffinity | causeOthersAffinity
		out = append(out, was, podCame(after, s))
	}
	if ch.Old.Generation != ch.New.Generation || !equality.Semantic.DeepEqual(before.Status.ContainerStatuses, after.Status.ContainerStatuses) {
		old, now := makePodInfo(before), makePodInfo(after)
		if !slices.Equal(old.req.scalars, now.req.scalars) || old.req.milliCPU > now.req.milliCPU ||
			old.req.memory > now.req.memory || old.req.ephemeralStorage > now.req.ephemeralStorage {
			out = append(out, hint{concerns: causeResources, cures: func(p *podInfo, _ Causes) bool { return c.mayFit(p, to, cfg) }})
		}
	}
	return out
}

// podLeft is the hint of a pod that takes no room on its node any more.
func podLeft(pod *corev1.Pod, c *Cluster, s State, cfg *compiled) hint {
	gone, nsLabels := makePodInfo(pod), namespaceLabels(s, pod.Namespace)
	h := hint{concerns: causeResources | causeSpread | causePodAffinity}
	if len(gone.ports) > 0 {
		h.concerns |= causePorts
	}
	if len(gone.terms[requiredAntiAffinity]) > 0 {
		h.concerns |= causeOthersAffinity
	}
	if len(pod.Spec.Volumes) > 0 {
		h.concerns |= causeVolumeUse | causeVolumeLimits
	}
	node := room(pod)
	h.cures = func(p *podInfo, why Causes) bool {
		switch {
		case why&causeResources != 0 && c.mayFit(p, node, cfg),
			why&causePorts != 0 && slices.ContainsFunc(p.ports, func(want hostPort) bool { return slices.ContainsFunc(gone.ports, want.conflicts) }),
			why&causeVolumeUse != 0 && sharesVolume(p.pod, pod),
			why&causeVolumeLimits != 0 && usesClaims(pod),
			why&causeSpread != 0 && p.spreadsBy(pod):
			return true
		case why&causePodAffinity != 0:
			// Where nobody is any more whom the pod wants to be with, it may be the first.
			if matchesEvery(p.terms[requiredAffinity], pod, nsLabels) || matchesAny(p.terms[requiredAntiAffinity], pod, nsLabels) {
				return true
			}
		}
		return why&causeOthersAffinity != 0 && matchesAny(gone.terms[requiredAntiAffinity], p.pod, namespaceLabels(s, p.pod.Namespace))
	}
	return h
}

// podCame is the hint of a pod that takes room on a node.
func podCame(pod *corev1.Pod, s State) hint {
	nsLabels := namespaceLabels(s, pod.Namespace)
	return hint{concerns: causeSpread | causePodAffinity, cures: func(p *podInfo, why Causes) bool {
		return why&causeSpread != 0 && p.spreadsBy(pod) || why&causePodAffinity != 0 && matchesEvery(p.terms[requiredAffinity], pod, nsLabels)
	}}
}

// mayFit says whether a pod has room on a node, those of lower priority set aside.
func (c *Cluster) mayFit(p *podInfo, node string, cfg *compiled) bool {
	by := cfg.of(p.pod)
	slot, ok := c.slots[node]
	if !ok || c.nodes[slot].node == nil {
		return false
	}
	n := c.nodes[slot]
	if n.hasRoom(p, by) {
		return true
	}
	less := func(other *podInfo) bool { return other.priority < p.priority }
	return slices.ContainsFunc(n.pods, less) && n.without(less).hasRoom(p, by)
}

func namespaceLabels(s State, name string) labels.Set {
	if ns, ok := s.Namespace(name); ok {
		return labels.Set(ns.Labels)
	}
	return nil
}

// matchesEvery says whether all of the terms, of which there are some, speak of a pod.
func matchesEvery(terms []*term, pod *corev1.Pod, nsLabels labels.Set) bool {
	for _, t := range terms {
		if !t.matches(pod, nsLabels) {
			return false
		}
	}
	return len(terms) > 0
}

func matchesAny(terms []*term, pod *corev1.Pod, nsLabels labels.Set) bool {
	return slices.ContainsFunc(terms, func(t *term) bool { return t.matches(pod, nsLabels) })
}

// spreadsBy says whether one of the pod's hard spread constraints counts another pod.
// What default constraints count is told by Services and owners: all of the namespace may.
func (p *podInfo) spreadsBy(other *corev1.Pod) bool {
	if other.Namespace != p.pod.Namespace {
		return false
	}
	constraints := p.pod.Spec.TopologySpreadConstraints
	if len(constraints) == 0 {
		return true
	}
	for i := range constraints {
		selector, err := metav1.LabelSelectorAsSelector(constraints[i].LabelSelector)
		if err != nil || constraints[i].WhenUnsatisfiable == corev1.DoNotSchedule && selector.Matches(labels.Set(other.Labels)) {
			return true
		}
	}
	return false
}

// sharesVolume says whether two pods use one claim, or a disk that only one may use.
func sharesVolume(a, b *corev1.Pod) bool {
	for i := range a.Spec.Volumes {
		v := &a.Spec.Volumes[i]
		for j := range b.Spec.Volumes {
			w := &b.Spec.Volumes[j]
			if sameDisk(v, w) {
				return true
			}
			if x, y := v.PersistentVolumeClaim, w.PersistentVolumeClaim; x != nil && y != nil && x.ClaimName == y.ClaimName && a.Namespace == b.Namespace {
				return true
			}
		}
	}
	return false
}

// nodeHints are those of a node that came, changed or went.
func nodeHints(before, after *corev1.Node, c *Cluster, cfg *compiled) []hint {
	added, gone := before == nil, after == nil
	if added && gone {
		return nil
	}
	// A node that went can make a spread even, or leave the pods on it out of account.
	h := hint{urgent: true}
	if gone {
		h.concerns = causeSpread | causePodAffinity | causeOthersAffinity
		h.cures = func(*podInfo, Causes) bool { return true }
		return []hint{h}
	}
	if added {
		before = &corev1.Node{}
		h.concerns = causeNoNodes | causePorts | causeVolumeUse | causeVolumeLimits | causeDevices
	}
	if !after.Spec.Unschedulable && (added || before.Spec.Unschedulable) {
		h.concerns |= causeUnschedulable
	}
	taints := added || !equality.Semantic.DeepEqual(before.Spec.Taints, after.Spec.Taints)
	if taints {
		h.concerns |= causeTaints | causeSpread
	}
	if added || !equality.Semantic.DeepEqual(before.Status.Allocatable, after.Status.Allocatable) {
		h.concerns |= causeResources | causeDevices
	}
	relabelled := added || !maps.Equal(before.Labels, after.Labels)
	if relabelled {
		h.concerns |= causeNodeAffinity | causeDevices | causeVolumeBinding | causeVolumeZone | causeSpread | causePodAffinity | causeOthersAffinity
	}
	if added || !slices.Equal(before.Status.DeclaredFeatures, after.Status.DeclaredFeatures) {
		h.concerns |= causeFeatures
	}
	if h.concerns == 0 {
		return nil
	}
	const other = causeNoNodes | causePorts | causeVolumeUse | causeVolumeLimits | causeUnschedulable | causeFeatures | causeVolumeBinding | causeVolumeZone | causeDevices
	h.cures = func(p *podInfo, why Causes) bool {
		if why &= h.concerns; why&other != 0 ||
			why&causeTaints != 0 && toleratesTaints(p.pod.Spec.Tolerations, after.Spec.Taints) && (added || !toleratesTaints(p.pod.Spec.Tolerations, before.Spec.Taints)) ||
			why&causeResources != 0 && c.mayFit(p, after.Name, cfg) {
			return true
		}
		if why&(causeNodeAffinity|causeSpread|causePodAffinity|causeOthersAffinity) == 0 {
			return false
		}
		if added || why&causeOthersAffinity != 0 {
			return why&^causeNodeAffinity != 0 || cfg.selects(p.pod, after)
		}
		matched, matches := cfg.selects(p.pod, before), cfg.selects(p.pod, after)
		return why&causeNodeAffinity != 0 && !matched && matches ||
			why&causeSpread != 0 && (taints || matched != matches || spreadKeyChanged(p.pod, before, after)) ||
			why&causePodAffinity != 0 && slices.ContainsFunc(slices.Concat(p.terms[requiredAffinity], p.terms[requiredAntiAffinity]), func(t *term) bool {
				return labelChanged(t.topologyKey, before, after)
			})
	}
	return []hint{h}
}

// selects says whether a node has what a pod and its profile ask of a node's labels.
func (c *compiled) selects(pod *corev1.Pod, node *corev1.Node) bool {
	if added := c.of(pod).addedRequired; added != nil && !added.Match(node) {
		return false
	}
	ok, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node)
	return ok || err != nil
}

func spreadKeyChanged(pod *corev1.Pod, before, after *corev1.Node) bool {
	list := pod.Spec.TopologySpreadConstraints
	return len(list) == 0 || slices.ContainsFunc(list, func(c corev1.TopologySpreadConstraint) bool { return labelChanged(c.TopologyKey, before, after) })
}

func labelChanged(key string, before, after *corev1.Node) bool {
	a, had := before.Labels[key]
	b, has := after.Labels[key]
	return had != has || a != b
}

// volumeHints are those of claims, volumes and what is known of their drivers.
func volumeHints(ch objects.Changed) []hint {
	if ch.New == nil {
		if _, ok := ch.Old.Object.(*storagev1.VolumeAttachment); ok {
			return always(causeVolumeLimits)
		}
		return nil
	}
	switch now := ch.New.Object.(type) {
	case *corev1.PersistentVolumeClaim:
		return []hint{{concerns: causeVolumeBinding | causeVolumeZone | causeVolumeUse | causeVolumeLimits, cures: func(p *podInfo, _ Causes) bool {
			if p.pod.Namespace != now.Namespace {
				return false
			}
			for i := range p.pod.Spec.Volumes {
				if name, _ := claimName(p.pod, &p.pod.Spec.Volumes[i]); name == now.Name {
					return true
				}
			}
			return false
		}}}
	case *corev1.PersistentVolume:
		return always(causeVolumeBinding | causeVolumeZone)
	case *storagev1.StorageClass:
		return always(causeVolumeBinding | causeVolumeZone)
	case *storagev1.CSINode:
		return always(causeVolumeBinding | causeVolumeLimits)
	case *storagev1.CSIDriver:
		return always(causeVolumeBinding | causeVolumeLimits)
	case *storagev1.CSIStorageCapacity:
		return always(causeVolumeBinding)
	}
	return nil
}
