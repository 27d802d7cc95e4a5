package sched

import (
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/tidwall/btree"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/nodedeclaredfeatures"

	"timonel/state/objects"
)

// Cluster is what scheduling needs of nodes and pods, worked out ahead: sums per
// node, parsed pods, counts per selector. It is derived from a [State] and is
// immutable; [Cluster.Advance] makes the next one. It may be shared.
type Cluster struct {
	// nodes by slot. A slot is a node's small number; it stays the same from
	// one Cluster to the next and is nil when free.
	nodes []*nodeInfo
	slots map[string]int32
	// order lists the slots of existing nodes, zones interleaved.
	order []int32
	// imageNodes counts the nodes that have an image.
	imageNodes map[string]int

	// pods holds every live pod by namespace/name; queue those without a node,
	// in the order to take them; nominated the slots that pending pods hold.
	pods      *btree.Map[string, *podInfo]
	queue     *btree.BTreeG[*podInfo]
	nominated map[string][]*podInfo

	// terms counts, by kind and term key, the pods per slot that have the term.
	terms [termKinds]map[string]*termCount

	features *nodedeclaredfeatures.Framework
	memo     *memo
	devices  *devices
}

// termCount counts by slot the placed pods that have one inter-pod term.
type termCount struct {
	term  *term
	slots map[int32]int64
}

// Kind names the kinds of objects a Cluster is derived from.
type Kind string

// The kinds that [Cluster.Advance] needs to hear about. All others are read
// from the State when they are needed.
const (
	KindNode            Kind = "Node"
	KindPod             Kind = "Pod"
	KindResourceClaim   Kind = "ResourceClaim"
	KindResourceSlice   Kind = "ResourceSlice"
	KindDeviceTaintRule Kind = "DeviceTaintRule"
)

// Ref names an object that was created, changed or deleted.
type Ref struct {
	Kind            Kind
	Namespace, Name string
}

// Build derives a Cluster from scratch.
func Build(s State) *Cluster {
	c := &Cluster{
		slots:      map[string]int32{},
		imageNodes: map[string]int{},
		pods:       btree.NewMap[string, *podInfo](0),
		queue:      btree.NewBTreeGOptions(takenBefore, btree.Options{NoLocks: true}),
		nominated:  map[string][]*podInfo{},
		features:   nodedeclaredfeatures.DefaultFramework,
		memo:       newMemo(nil),
		devices:    &devices{},
	}
	for kind := range c.terms {
		c.terms[kind] = map[string]*termCount{}
	}
	e := &editor{c: c, fresh: true}
	for node := range s.Nodes() {
		e.setNode(node.Name, node)
	}
	for pod := range s.Pods() {
		e.setPod(podKey(pod.Namespace, pod.Name), pod)
	}
	e.finish()
	return c
}

// Advance returns the Cluster of a later State, given every object of those kinds that
// differs from the State this one was derived from; naming more does no harm.
// The result is the same as Build(s). What did not change is shared.
func (c *Cluster) Advance(s State, changed []Ref) *Cluster {
	if len(changed) == 0 {
		return c
	}
	next := *c
	next.devices = c.devices.advance(s, changed)
	next.nodes = slices.Clone(c.nodes)
	next.pods = c.pods.Copy()
	next.queue = c.queue.Copy()
	next.memo = newMemo(c.memo)
	e := &editor{c: &next, own: make([]bool, len(next.nodes))}
	for _, ref := range changed {
		switch ref.Kind {
		case KindNode:
			node, _ := s.Node(ref.Name)
			e.setNode(ref.Name, node)
		case KindPod:
			pod, _ := s.Pod(ref.Namespace, ref.Name)
			e.setPod(podKey(ref.Namespace, ref.Name), pod)
		}
	}
	e.finish()
	return &next
}

// takenBefore orders the queue: by priority, then age, then name.
func takenBefore(a, b *podInfo) bool {
	if a.priority != b.priority {
		return a.priority > b.priority
	}
	if at, bt := a.pod.CreationTimestamp, b.pod.CreationTimestamp; !at.Time.Equal(bt.Time) {
		return at.Time.Before(bt.Time)
	}
	if n := strings.Compare(a.pod.Namespace, b.pod.Namespace); n != 0 {
		return n < 0
	}
	return a.pod.Name < b.pod.Name
}

// editor changes a Cluster that nobody else has seen yet. Parts shared with
// the previous Cluster are copied before their first change.
type editor struct {
	c     *Cluster
	fresh bool // nothing is shared
	own   []bool

	nodesChanged, labelsChanged      bool
	ownSlots, ownImages, ownNominees bool
	ownTerms                         [termKinds]bool
	ownTermCounts                    map[*termCount]bool
}

// node returns the node at a slot, free to change.
func (e *editor) node(slot int32) *nodeInfo {
	n := e.c.nodes[slot]
	if !e.fresh && !e.own[slot] {
		n = n.clone()
		e.c.nodes[slot], e.own[slot] = n, true
	}
	return n
}

func (e *editor) setNode(name string, node *corev1.Node) {
	slot, known := e.c.slots[name]
	if !known {
		if node == nil {
			return
		}
		slot = e.newSlot(name)
	}
	if e.c.nodes[slot].node == node {
		return
	}
	n := e.node(slot)
	old := n.node
	e.countImages(n, -1)
	n.setNode(node, e.c.features)
	e.countImages(n, 1)
	switch {
	case (old == nil) != (node == nil):
		e.nodesChanged, e.labelsChanged = true, true
	case !maps.Equal(old.Labels, node.Labels):
		e.labelsChanged = true
	}
	e.freeIfUnused(slot)
}

func (e *editor) newSlot(name string) int32 {
	if !e.fresh && !e.ownSlots {
		e.c.slots, e.ownSlots = maps.Clone(e.c.slots), true
	}
	slot := int32(slices.Index(e.c.nodes, nil))
	if slot < 0 {
		slot = int32(len(e.c.nodes))
		e.c.nodes = append(e.c.nodes, nil)
		e.own = append(e.own, false)
	}
	e.c.nodes[slot] = &nodeInfo{slot: slot, name: name}
	e.own[slot] = true
	e.c.slots[name] = slot
	return slot
}

// freeIfUnused gives up the slot of a node that neither exists nor has pods.
func (e *editor) freeIfUnused(slot int32) {
	n := e.c.nodes[slot]
	if n.node != nil || len(n.pods) > 0 {
		return
	}
	if !e.fresh && !e.ownSlots {
		e.c.slots, e.ownSlots = maps.Clone(e.c.slots), true
	}
	delete(e.c.slots, n.name)
	e.c.nodes[slot] = nil
}

func (e *editor) countImages(n *nodeInfo, sign int) {
	if len(n.images) == 0 {
		return
	}
	if !e.fresh && !e.ownImages {
		e.c.imageNodes, e.ownImages = maps.Clone(e.c.imageNodes), true
	}
	for name := range n.images {
		if e.c.imageNodes[name] += sign; e.c.imageNodes[name] == 0 {
			delete(e.c.imageNodes, name)
		}
	}
}

func (e *editor) setPod(key string, pod *corev1.Pod) {
	old, known := e.c.pods.Get(key)
	if known && old.pod == pod {
		return
	}
	if known {
		e.removePod(key, old)
	}
	if pod != nil && !objects.PodEnded(pod) {
		e.addPod(key, makePodInfo(pod))
	}
}

func (e *editor) addPod(key string, p *podInfo) {
	e.c.pods.Set(key, p)
	if !occupies(p.pod) {
		if pending(p.pod) {
			e.c.queue.Set(p)
			e.nominate(p, true)
		}
		return
	}
	slot, known := e.c.slots[p.pod.Spec.NodeName]
	if !known {
		slot = e.newSlot(p.pod.Spec.NodeName)
	}
	e.node(slot).add(p)
	e.countTerms(p, slot, 1)
	e.c.memo.count(p, slot, 1)
}

func (e *editor) removePod(key string, p *podInfo) {
	e.c.pods.Delete(key)
	if !occupies(p.pod) {
		if pending(p.pod) {
			e.c.queue.Delete(p)
			e.nominate(p, false)
		}
		return
	}
	slot := e.c.slots[p.pod.Spec.NodeName]
	e.node(slot).remove(p)
	e.countTerms(p, slot, -1)
	e.c.memo.count(p, slot, -1)
	e.freeIfUnused(slot)
}

func (e *editor) nominate(p *podInfo, add bool) {
	name := p.pod.Status.NominatedNodeName
	if name == "" {
		return
	}
	if !e.fresh && !e.ownNominees {
		e.c.nominated, e.ownNominees = maps.Clone(e.c.nominated), true
	}
	list := slices.Clone(e.c.nominated[name])
	if add {
		list = append(list, p)
	} else if at := slices.Index(list, p); at >= 0 {
		list = slices.Delete(list, at, at+1)
	}
	if len(list) == 0 {
		delete(e.c.nominated, name)
		return
	}
	e.c.nominated[name] = list
}

func (e *editor) countTerms(p *podInfo, slot int32, sign int64) {
	for kind, list := range p.terms {
		for _, t := range list {
			if !e.fresh && !e.ownTerms[kind] {
				e.c.terms[kind], e.ownTerms[kind] = maps.Clone(e.c.terms[kind]), true
			}
			tc := e.c.terms[kind][t.key]
			switch {
			case tc == nil:
				tc = &termCount{term: t, slots: map[int32]int64{}}
				e.c.terms[kind][t.key] = tc
				e.ownTermCount(tc)
			case !e.fresh && !e.ownTermCounts[tc]:
				tc = &termCount{term: tc.term, slots: maps.Clone(tc.slots)}
				e.c.terms[kind][t.key] = tc
				e.ownTermCount(tc)
			}
			if tc.slots[slot] += sign; tc.slots[slot] == 0 {
				delete(tc.slots, slot)
			}
			if len(tc.slots) == 0 {
				delete(e.c.terms[kind], t.key)
			}
		}
	}
}

func (e *editor) ownTermCount(tc *termCount) {
	if e.ownTermCounts == nil {
		e.ownTermCounts = map[*termCount]bool{}
	}
	e.ownTermCounts[tc] = true
}

func (e *editor) finish() {
	if e.nodesChanged || e.labelsChanged {
		var nodes []*nodeInfo
		for _, n := range e.c.nodes {
			if n != nil && n.node != nil {
				nodes = append(nodes, n)
			}
		}
		e.c.order = interleaveZones(nodes)
		e.c.memo.topologies = map[string]*topology{}
	}
}

// topology numbers the values of one node label, so that counts per domain fit
// in a slice.
type topology struct {
	// domain is the number of the node's value by slot; -1: no such label.
	domain []int32
	// size is how many values there are.
	size int
	// values maps a label value to its number.
	values map[string]int32
}

// topology returns the domains of a node label.
func (c *Cluster) topology(key string) *topology {
	c.memo.mu.Lock()
	defer c.memo.mu.Unlock()
	if t, ok := c.memo.topologies[key]; ok {
		return t
	}
	t := &topology{domain: make([]int32, len(c.nodes)), values: map[string]int32{}}
	for slot := range t.domain {
		t.domain[slot] = -1
	}
	for _, slot := range c.order {
		value, ok := c.nodes[slot].node.Labels[key]
		if !ok {
			continue
		}
		number, ok := t.values[value]
		if !ok {
			number = int32(len(t.values))
			t.values[value] = number
		}
		t.domain[slot] = number
	}
	t.size = len(t.values)
	c.memo.topologies[key] = t
	return t
}

// matcher selects pods to count.
type matcher struct {
	// key is equal for matchers that select the same pods.
	key string
	// namespaces bounds where matching pods can be; nil: anywhere.
	namespaces []string
	match      func(*podInfo) bool
}

// memo keeps counts of matching pods that were asked for, so that the next
// Cluster need not count again. It holds nothing that could not be worked out
// from the Cluster it belongs to.
type memo struct {
	mu         sync.Mutex
	topologies map[string]*topology
	counts     map[string]*matchCount
	generation int
}

// matchCount counts by slot the placed pods a matcher selects.
type matchCount struct {
	matcher matcher
	slots   map[int32]int64
	used    int // generation that asked for it last
	shared  bool
}

// keepCounts is for how many generations a count that nobody asks for is kept
// up to date.
const keepCounts = 8

func newMemo(prior *memo) *memo {
	m := &memo{topologies: map[string]*topology{}, counts: map[string]*matchCount{}}
	if prior == nil {
		return m
	}
	prior.mu.Lock()
	defer prior.mu.Unlock()
	m.generation = prior.generation + 1
	m.topologies = maps.Clone(prior.topologies)
	for key, mc := range prior.counts {
		if m.generation-mc.used <= keepCounts {
			m.counts[key] = &matchCount{matcher: mc.matcher, slots: mc.slots, used: mc.used, shared: true}
		}
	}
	return m
}

// count notes that a pod came to (sign 1) or left (-1) a slot.
func (m *memo) count(p *podInfo, slot int32, sign int64) {
	for _, mc := range m.counts {
		if !mc.matcher.selects(p) {
			continue
		}
		if mc.shared {
			mc.slots, mc.shared = maps.Clone(mc.slots), false
		}
		if mc.slots[slot] += sign; mc.slots[slot] == 0 {
			delete(mc.slots, slot)
		}
	}
}

func (m *matcher) selects(p *podInfo) bool {
	return (m.namespaces == nil || slices.Contains(m.namespaces, p.pod.Namespace)) && m.match(p)
}

// count returns by slot how many placed pods the matcher selects. The map must
// not be changed.
func (c *Cluster) count(m matcher) map[int32]int64 {
	c.memo.mu.Lock()
	defer c.memo.mu.Unlock()
	if mc, ok := c.memo.counts[m.key]; ok {
		mc.used = c.memo.generation
		return mc.slots
	}
	slots := map[int32]int64{}
	visit := func(p *podInfo) {
		if occupies(p.pod) && m.match(p) {
			slots[c.slots[p.pod.Spec.NodeName]]++
		}
	}
	if m.namespaces == nil {
		c.pods.Scan(func(_ string, p *podInfo) bool { visit(p); return true })
	}
	for _, ns := range m.namespaces {
		c.pods.Ascend(ns+"/", func(_ string, p *podInfo) bool {
			if p.pod.Namespace != ns {
				return false
			}
			visit(p)
			return true
		})
	}
	c.memo.counts[m.key] = &matchCount{matcher: m, slots: slots, used: c.memo.generation}
	return slots
}
