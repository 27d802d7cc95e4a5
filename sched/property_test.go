package sched

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

// reference answers, slowly and plainly, whether a pod may run on a node; it
// shares nothing with the code under test.
type reference struct {
	nodes []*corev1.Node
	pods  []*corev1.Pod // placed, spec.nodeName set
	now   *fakeState
}

func (r *reference) node(name string) *corev1.Node {
	i := slices.IndexFunc(r.nodes, func(n *corev1.Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return r.nodes[i]
}

func cpuOf(p *corev1.Pod) int64 {
	var sum int64
	for _, c := range p.Spec.Containers {
		sum += c.Resources.Requests.Cpu().MilliValue()
	}
	return sum
}

func (r *reference) feasible(p *corev1.Pod, n *corev1.Node) bool {
	var cpu, count int64
	for _, q := range r.pods {
		if q.Spec.NodeName != n.Name {
			continue
		}
		count++
		cpu += cpuOf(q)
		for _, a := range p.Spec.Containers[0].Ports {
			for _, b := range q.Spec.Containers[0].Ports {
				if a.HostPort == b.HostPort {
					return false
				}
			}
		}
	}
	if want := cpuOf(p); want > 0 && cpu+want > n.Status.Allocatable.Cpu().MilliValue() || count+1 > n.Status.Allocatable.Pods().Value() {
		return false
	}
	if n.Spec.Unschedulable {
		return false
	}
	for _, t := range n.Spec.Taints {
		if !slices.ContainsFunc(p.Spec.Tolerations, func(o corev1.Toleration) bool { return o.Key == t.Key }) {
			return false
		}
	}
	return r.selected(p, n) && r.spreadOK(p, n) && r.affinityOK(p, n) && r.antiOK(p, n) && r.antiOfOthersOK(p, n)
}

func (r *reference) selected(p *corev1.Pod, n *corev1.Node) bool {
	for k, v := range p.Spec.NodeSelector {
		if n.Labels[k] != v {
			return false
		}
	}
	return true
}

func selects(s *metav1.LabelSelector, p *corev1.Pod) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(labels.Set(p.Labels))
}

func (r *reference) spreadOK(p *corev1.Pod, n *corev1.Node) bool {
	for _, c := range p.Spec.TopologySpreadConstraints {
		if c.WhenUnsatisfiable != corev1.DoNotSchedule {
			continue
		}
		mine, ok := n.Labels[c.TopologyKey]
		if !ok {
			return false
		}
		counts := map[string]int{}
		for _, other := range r.nodes {
			if r.hasAllKeys(p, other) && r.selected(p, other) {
				counts[other.Labels[c.TopologyKey]] += 0
			}
		}
		for _, q := range r.pods {
			at := r.node(q.Spec.NodeName)
			if at == nil || !r.hasAllKeys(p, at) || !r.selected(p, at) || q.Namespace != p.Namespace || q.DeletionTimestamp != nil || !selects(c.LabelSelector, q) {
				continue
			}
			counts[at.Labels[c.TopologyKey]]++
		}
		least := math.MaxInt
		for _, v := range counts {
			least = min(least, v)
		}
		if c.MinDomains != nil && len(counts) < int(*c.MinDomains) {
			least = 0
		}
		self := 0
		if selects(c.LabelSelector, p) {
			self = 1
		}
		if counts[mine]+self-least > int(c.MaxSkew) {
			return false
		}
	}
	return true
}

func (r *reference) hasAllKeys(p *corev1.Pod, n *corev1.Node) bool {
	for _, c := range p.Spec.TopologySpreadConstraints {
		if _, ok := n.Labels[c.TopologyKey]; !ok && c.WhenUnsatisfiable == corev1.DoNotSchedule {
			return false
		}
	}
	return true
}

func (r *reference) together(a *corev1.Node, b *corev1.Node, key string) bool {
	if a == nil || b == nil {
		return false
	}
	x, ok := a.Labels[key]
	y, ok2 := b.Labels[key]
	return ok && ok2 && x == y
}

func affinityTerms(p *corev1.Pod, anti bool) []corev1.PodAffinityTerm {
	switch a := p.Spec.Affinity; {
	case a == nil:
	case anti && a.PodAntiAffinity != nil:
		return a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	case !anti && a.PodAffinity != nil:
		return a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	}
	return nil
}

func (r *reference) speaksOf(owner *corev1.Pod, t corev1.PodAffinityTerm, q *corev1.Pod) bool {
	ns := len(t.Namespaces) == 0 && t.NamespaceSelector == nil && q.Namespace == owner.Namespace
	ns = ns || slices.Contains(t.Namespaces, q.Namespace)
	if t.NamespaceSelector != nil {
		o, ok := r.now.Namespace(q.Namespace)
		sel, _ := metav1.LabelSelectorAsSelector(t.NamespaceSelector)
		ns = ns || (ok && sel.Matches(labels.Set(o.Labels)))
	}
	return ns && selects(t.LabelSelector, q)
}

func (r *reference) affinityOK(p *corev1.Pod, n *corev1.Node) bool {
	terms := affinityTerms(p, false)
	all := func(q *corev1.Pod) bool {
		for _, t := range terms {
			if !r.speaksOf(p, t, q) {
				return false
			}
		}
		return true
	}
	satisfied, anywhere := true, false
	for _, t := range terms {
		if _, ok := n.Labels[t.TopologyKey]; !ok {
			return false
		}
		found := false
		for _, q := range r.pods {
			at := r.node(q.Spec.NodeName)
			if at == nil || !all(q) {
				continue
			}
			_, keyed := at.Labels[t.TopologyKey]
			anywhere = anywhere || keyed
			found = found || r.together(n, at, t.TopologyKey)
		}
		satisfied = satisfied && found
	}
	return satisfied || (!anywhere && all(p))
}

func (r *reference) antiOK(p *corev1.Pod, n *corev1.Node) bool {
	for _, t := range affinityTerms(p, true) {
		for _, q := range r.pods {
			if r.speaksOf(p, t, q) && r.together(n, r.node(q.Spec.NodeName), t.TopologyKey) {
				return false
			}
		}
	}
	return true
}

func (r *reference) antiOfOthersOK(p *corev1.Pod, n *corev1.Node) bool {
	for _, q := range r.pods {
		for _, t := range affinityTerms(q, true) {
			if r.speaksOf(q, t, p) && r.together(n, r.node(q.Spec.NodeName), t.TopologyKey) {
				return false
			}
		}
	}
	return true
}

// world draws clusters.
type world struct {
	state   *fakeState
	created int
}

var zoneKey = corev1.LabelTopologyZone

func (w *world) node(t *rapid.T, name string) *corev1.Node {
	n := makeNode(name)
	if zone := rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, "zone"); zone != "" {
		n.Labels[zoneKey] = zone
	}
	n.Labels["disk"] = rapid.SampledFrom([]string{"ssd", "hdd"}).Draw(t, "disk")
	n.Status.Allocatable[corev1.ResourceCPU] = *resource.NewQuantity(int64(rapid.IntRange(1, 4).Draw(t, "cpu")), resource.DecimalSI)
	n.Status.Allocatable[corev1.ResourcePods] = *resource.NewQuantity(int64(rapid.IntRange(1, 6).Draw(t, "maxPods")), resource.DecimalSI)
	n.Spec.Unschedulable = rapid.IntRange(0, 9).Draw(t, "cordoned") == 0
	if rapid.IntRange(0, 4).Draw(t, "tainted") == 0 {
		n.Spec.Taints = []corev1.Taint{{Key: "gpu", Effect: corev1.TaintEffectNoSchedule}}
	}
	return n
}

func (w *world) pod(t *rapid.T, name string) *corev1.Pod {
	w.created++
	p := simplePod(name, "cpu", fmt.Sprintf("%dm", 250*rapid.IntRange(0, 6).Draw(t, "cpu")))
	p.Namespace = rapid.SampledFrom([]string{"default", "other"}).Draw(t, "namespace")
	p.UID = types.UID(p.Namespace + name)
	p.CreationTimestamp = metav1.Time{Time: epoch.Add(time.Duration(w.created) * time.Second)}
	p.Labels["app"] = rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "app")
	priority := int32(rapid.IntRange(0, 2).Draw(t, "priority"))
	p.Spec.Priority = &priority
	if rapid.IntRange(0, 5).Draw(t, "selective") == 0 {
		p.Spec.NodeSelector = map[string]string{"disk": "ssd"}
	}
	if rapid.IntRange(0, 3).Draw(t, "tolerant") == 0 {
		p.Spec.Tolerations = []corev1.Toleration{{Key: "gpu", Operator: corev1.TolerationOpExists}}
	}
	if rapid.IntRange(0, 5).Draw(t, "port") == 0 {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{HostPort: int32(rapid.IntRange(80, 81).Draw(t, "hostPort"))}}
	}
	if rapid.IntRange(0, 3).Draw(t, "spread") == 0 {
		c := corev1.TopologySpreadConstraint{MaxSkew: int32(rapid.IntRange(1, 2).Draw(t, "skew")), TopologyKey: w.key(t),
			WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: w.selector(t)}
		if rapid.Bool().Draw(t, "minDomains") {
			three := int32(3)
			c.MinDomains = &three
		}
		p.Spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{c}
		if rapid.Bool().Draw(t, "second") {
			p.Spec.TopologySpreadConstraints = append(p.Spec.TopologySpreadConstraints, corev1.TopologySpreadConstraint{
				MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: w.selector(t)})
		}
	}
	if rapid.IntRange(0, 3).Draw(t, "affine") == 0 {
		p.Spec.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: w.terms(t)}}
	}
	if rapid.IntRange(0, 3).Draw(t, "averse") == 0 {
		if p.Spec.Affinity == nil {
			p.Spec.Affinity = &corev1.Affinity{}
		}
		p.Spec.Affinity.PodAntiAffinity = &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: w.terms(t)}
	}
	return p
}

func (w *world) key(t *rapid.T) string {
	return rapid.SampledFrom([]string{zoneKey, corev1.LabelHostname}).Draw(t, "key")
}

func (w *world) selector(t *rapid.T) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "selects")}}
}

func (w *world) terms(t *rapid.T) []corev1.PodAffinityTerm {
	var out []corev1.PodAffinityTerm
	for range rapid.IntRange(1, 2).Draw(t, "terms") {
		term := corev1.PodAffinityTerm{TopologyKey: w.key(t), LabelSelector: w.selector(t)}
		switch rapid.IntRange(0, 4).Draw(t, "whose") {
		case 0:
			term.Namespaces = []string{"other"}
		case 1:
			term.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "blue"}}
		case 2:
			term.NamespaceSelector = &metav1.LabelSelector{}
		}
		out = append(out, term)
	}
	return out
}

func drawWorld(t *rapid.T) *world {
	w := &world{state: newState(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "other", Labels: map[string]string{"team": "blue"}}},
	)}
	nodes := rapid.IntRange(0, 5).Draw(t, "nodes")
	for i := range nodes {
		w.state.put(w.node(t, fmt.Sprintf("n%d", i)))
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "running") {
		p := w.pod(t, fmt.Sprintf("r%d", i))
		p.Spec.NodeName = fmt.Sprintf("n%d", rapid.IntRange(0, 5).Draw(t, "on")) // may not exist
		if rapid.IntRange(0, 4).Draw(t, "leaving") == 0 {
			p.DeletionTimestamp = &metav1.Time{Time: epoch}
		}
		w.state.put(p)
	}
	for i := range rapid.IntRange(0, 8).Draw(t, "pending") {
		w.state.put(w.pod(t, fmt.Sprintf("p%d", i)))
	}
	return w
}

func (w *world) reference() *reference {
	r := &reference{nodes: list[*corev1.Node](w.state), now: w.state}
	for _, p := range list[*corev1.Pod](w.state) {
		if p.Spec.NodeName != "" {
			r.pods = append(r.pods, p)
		}
	}
	return r
}

// TestPlansAreRight replays plans against the reference: a pod is bound only
// where it may run at that moment, and fails only when it may run nowhere.
func TestPlansAreRight(t *testing.T) {
	t.Parallel()
	cfg := DefaultConfig()
	cfg.Profiles[0].DisablePreemption = true
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		plan, err := Schedule(cfg, Input{Seed: rapid.Uint64().Draw(t, "seed"), State: w.state})
		if err != nil {
			t.Fatal(err)
		}
		bound, failed := map[string]string{}, map[string]string{}
		for _, b := range plan.Bindings {
			bound[podKey(b.Pod.Namespace, b.Pod.Name)] = b.Node
		}
		for _, f := range plan.Failures {
			failed[podKey(f.Pod.Namespace, f.Pod.Name)] = f.Message
		}
		r := w.reference()
		for _, p := range inOrder(w.state) {
			key := podKey(p.Namespace, p.Name)
			node, isBound := bound[key]
			message, isFailed := failed[key]
			if isBound == isFailed {
				t.Fatalf("pod %s: bound %v, failed %v", key, isBound, isFailed)
			}
			if isBound {
				if !r.feasible(p, r.node(node)) {
					t.Fatalf("pod %s must not run on %s\n%s", key, node, describePlan(plan))
				}
				p = p.DeepCopy()
				p.Spec.NodeName = node
				r.pods = append(r.pods, p)
				continue
			}
			for _, n := range r.nodes {
				if r.feasible(p, n) {
					t.Fatalf("pod %s may run on %s, but: %s", key, n.Name, message)
				}
			}
		}
	})
}

// inOrder lists the pending pods as they are to be taken.
func inOrder(s *fakeState) []*corev1.Pod {
	pods := slices.DeleteFunc(list[*corev1.Pod](s), func(p *corev1.Pod) bool { return p.Spec.NodeName != "" || p.DeletionTimestamp != nil })
	slices.SortFunc(pods, func(a, b *corev1.Pod) int {
		if *a.Spec.Priority != *b.Spec.Priority {
			return int(*b.Spec.Priority - *a.Spec.Priority)
		}
		return a.CreationTimestamp.Compare(b.CreationTimestamp.Time)
	})
	return pods
}

// TestPreemptionsHelp checks that evicting the victims of the first preemption
// lets the pod in, that they are less important, and that none is spare.
func TestPreemptionsHelp(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		cfg := DefaultConfig()
		cfg.MaxPods = 1
		plan, err := Schedule(cfg, Input{Now: epoch, Seed: rapid.Uint64().Draw(t, "seed"), State: w.state})
		if err != nil {
			t.Fatal(err)
		}
		for _, pre := range plan.Preemptions {
			r := w.reference()
			n := r.node(pre.Node)
			if r.feasible(pre.Pod, n) {
				t.Fatalf("evicts for %s from %s for nothing", pre.Pod.Name, pre.Node)
			}
			before := r.pods
			for _, v := range pre.Victims {
				if *v.Spec.Priority >= *pre.Pod.Spec.Priority || v.Spec.NodeName != pre.Node {
					t.Fatalf("victim %s of priority %d on %s for %s", v.Name, *v.Spec.Priority, v.Spec.NodeName, pre.Pod.Name)
				}
			}
			r.pods = slices.DeleteFunc(slices.Clone(before), func(p *corev1.Pod) bool { return slices.Contains(pre.Victims, p) })
			if !r.feasible(pre.Pod, n) {
				t.Fatalf("evicting %d pods from %s does not let %s in", len(pre.Victims), pre.Node, pre.Pod.Name)
			}
			spare := pre.Victims[len(pre.Victims)-1]
			r.pods = append(r.pods, spare)
			if len(affinityTerms(pre.Pod, false)) == 0 && len(pre.Pod.Spec.TopologySpreadConstraints) == 0 && r.feasible(pre.Pod, n) {
				t.Fatalf("evicting %s from %s for %s is not needed", spare.Name, pre.Node, pre.Pod.Name)
			}
		}
	})
}

// TestPlansRepeat checks that the same input gives the same plan, and that a
// Cluster advanced through any changes plans as one built anew.
func TestPlansRepeat(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		cluster := Build(w.state)
		for step := range rapid.IntRange(1, 4).Draw(t, "steps") {
			seed := rapid.Uint64().Draw(t, "seed")
			in := Input{Now: epoch, Seed: seed, State: w.state}
			a, err := Schedule(DefaultConfig(), in)
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := Schedule(DefaultConfig(), in); !reflect.DeepEqual(a, b) {
				t.Fatalf("step %d: one input, two plans:\n%s\n%s", step, describePlan(a), describePlan(b))
			}
			in.Cluster = cluster
			if b, _ := Schedule(DefaultConfig(), in); !reflect.DeepEqual(a, b) {
				t.Fatalf("step %d: built anew:\n%s\nadvanced:\n%s", step, describePlan(a), describePlan(b))
			}
			cluster = cluster.Advance(w.state, w.change(t, a, step))
		}
	})
}

// change commits part of a plan and draws other changes.
func (w *world) change(t *rapid.T, plan Plan, step int) []Ref {
	var refs []Ref
	put := func(p *corev1.Pod) {
		w.state.put(p)
		refs = append(refs, Ref{KindPod, p.Namespace, p.Name})
	}
	remove := func(p *corev1.Pod) {
		delete(w.state.objects, keyOf(p))
		refs = append(refs, Ref{KindPod, p.Namespace, p.Name})
	}
	for _, b := range plan.Bindings {
		if rapid.Bool().Draw(t, "committed") {
			p := b.Pod.DeepCopy()
			p.Spec.NodeName = b.Node
			put(p)
		}
	}
	for _, f := range plan.Failures {
		if f.NominatedNode != "" {
			p := f.Pod.DeepCopy()
			p.Status.NominatedNodeName = f.NominatedNode
			put(p)
		}
	}
	for _, p := range list[*corev1.Pod](w.state) {
		switch rapid.IntRange(0, 9).Draw(t, "fate") {
		case 0:
			remove(p)
		case 1:
			done := p.DeepCopy()
			done.Status.Phase = corev1.PodSucceeded
			put(done)
		case 2:
			relabelled := p.DeepCopy()
			relabelled.Labels = map[string]string{"app": "x"}
			put(relabelled)
		}
	}
	for i := range 6 {
		name := fmt.Sprintf("n%d", i)
		switch rapid.IntRange(0, 9).Draw(t, "node") {
		case 0:
			delete(w.state.objects, "Node//"+name)
		case 1:
			w.state.put(w.node(t, name))
		default:
			continue
		}
		refs = append(refs, Ref{KindNode, "", name})
	}
	put(w.pod(t, fmt.Sprintf("s%d", step)))
	return refs
}

// TestSeedSpreadsLoad checks that the seed decides between equal nodes.
func TestSeedSpreadsLoad(t *testing.T) {
	t.Parallel()
	state := newState(makeNode("a"), makeNode("b"), makeNode("c"), simplePod("p"))
	got := map[string]int{}
	for seed := range uint64(300) {
		plan, err := Schedule(DefaultConfig(), Input{Seed: seed, State: state})
		if err != nil || len(plan.Bindings) != 1 {
			t.Fatal(plan, err)
		}
		got[plan.Bindings[0].Node]++
	}
	for _, name := range []string{"a", "b", "c"} {
		if got[name] < 60 {
			t.Errorf("of 300 seeds node %s got %d", name, got[name])
		}
	}
}
