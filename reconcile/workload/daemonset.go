package workload

import (
	"fmt"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/reconcile"
	"timonel/state/objects"
)

// DaemonSet keeps one pod of each DaemonSet on every node that it is meant for.
type DaemonSet struct {
	// Burst is how many pods one pass creates, and how many it deletes, at most.
	// Default 250.
	Burst int
}

// Name implements Reconciler.
func (DaemonSet) Name() string { return "daemonset-controller" }

// All implements Reconciler.
func (DaemonSet) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.DaemonSetKind, s.DaemonSets().All())
}

// Keys implements Reconciler: a DaemonSet follows itself, its pods and revisions, those
// without a controller that it could adopt, and the nodes on which its pods may begin
// or cease to run.
func (DaemonSet) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	m := c.Meta()
	switch m.GVK.GroupKind() {
	case reconcile.DaemonSetKind.GroupKind():
		return []reconcile.Key{reconcile.KeyOf(reconcile.DaemonSetKind, m)}
	case reconcile.ControllerRevisionKind.GroupKind():
		return revisionKeys(c, reconcile.DaemonSetKind, func(m *objects.Meta) []reconcile.Key { return daemonSetsSelecting(m, s) })
	case reconcile.NodeKind.GroupKind():
		return daemonSetsOfNode(c, s)
	case reconcile.PodKind.GroupKind():
		return daemonSetsOfPod(c, s)
	}
	return nil
}

// daemonSetsSelecting returns the DaemonSets that could adopt an object.
func daemonSetsSelecting(m *objects.Meta, s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for ds := range s.DaemonSets().InNamespace(m.Namespace) {
		if reconcile.Selects(ds.Spec.Selector, m.Labels) {
			keys = append(keys, reconcile.KeyOf(reconcile.DaemonSetKind, ds))
		}
	}
	return keys
}

// daemonSetsOfPod returns the DaemonSets that a changed pod concerns.
func daemonSetsOfPod(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	if c.Old != nil && c.New != nil && sameDaemon(c.Old, c.New) {
		return nil
	}
	return reconcile.OwnerKeys(c, reconcile.DaemonSetKind, func(m *objects.Meta) []reconcile.Key {
		if m.DeletionTimestamp != nil {
			return nil
		}
		return daemonSetsSelecting(m, s)
	})
}

// sameDaemon says whether two versions of a pod differ in nothing that a DaemonSet
// looks at: most changes of a pod are of what its containers report.
func sameDaemon(a, b *objects.Meta) bool {
	x, isX := a.Object.(*corev1.Pod)
	y, isY := b.Object.(*corev1.Pod)
	return isX && isY && x.UID == y.UID && x.Spec.NodeName == y.Spec.NodeName && x.Status.Phase == y.Status.Phase &&
		(x.DeletionTimestamp == nil) == (y.DeletionTimestamp == nil) &&
		equality.Semantic.DeepEqual(reconcile.ReadyCondition(x), reconcile.ReadyCondition(y)) &&
		equality.Semantic.DeepEqual(x.Labels, y.Labels) &&
		equality.Semantic.DeepEqual(x.OwnerReferences, y.OwnerReferences)
}

// daemonSetsOfNode returns the DaemonSets whose pods may run on a node where they might
// not before, or the other way round.
func daemonSetsOfNode(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	before, now := objects.As[*corev1.Node](c.Old), objects.As[*corev1.Node](c.New)
	if before != nil && now != nil &&
		equality.Semantic.DeepEqual(before.Labels, now.Labels) && equality.Semantic.DeepEqual(before.Spec.Taints, now.Spec.Taints) {
		return nil
	}
	var keys []reconcile.Key
	for ds := range s.DaemonSets().All() {
		if p := placementOf(ds); p.on(before) != p.on(now) {
			keys = append(keys, reconcile.KeyOf(reconcile.DaemonSetKind, ds))
		}
	}
	return keys
}

// daemons is what one pass over a DaemonSet works on.
type daemons struct {
	DaemonSet
	in     reconcile.Input
	ds     *appsv1.DaemonSet
	nodes  []*corev1.Node
	fits   map[string]fit // by node
	pods   []*corev1.Pod
	onNode map[string][]*corev1.Pod // without those that have ended and wait for their removal
	// hash is the label of the pods of the newest template, generation the label that
	// they had before there were hashes, empty if the DaemonSet has none.
	hash, generation string
	result           *reconcile.Result
}

// Reconcile implements Reconciler.
func (r DaemonSet) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	ds, ok := in.Snapshot.DaemonSets().Get(key.Namespace, key.Name)
	if !ok || ds.DeletionTimestamp != nil {
		return reconcile.Result{}, nil // the garbage collector sees to what it leaves
	}
	selector, err := metav1.LabelSelectorAsSelector(ds.Spec.Selector)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("daemon set %s/%s: spec.selector: %w", ds.Namespace, ds.Name, err)
	}
	if selector.Empty() {
		return reconcile.Result{Events: []reconcile.Event{*reconcile.NewEvent(reconcile.DaemonSetKind, ds, corev1.EventTypeWarning,
			"SelectingAll", "This daemon set is selecting all pods. A non-empty selector is required.")}}, nil
	}
	var result reconcile.Result
	d := daemons{DaemonSet: r, in: in, ds: ds, result: &result}
	if n := ds.Annotations[appsv1.DeprecatedTemplateGeneration]; n != "" {
		if _, err := strconv.ParseInt(n, 10, 64); err == nil {
			d.generation = n
		}
	}
	d.claim(selector)
	made, collisions, err := d.revisions(selector)
	if err != nil || made {
		return result, err // pods are labeled with the revision, which has to be there first
	}
	d.look()
	if d.manage(); d.settled() && ds.Spec.UpdateStrategy.Type == appsv1.RollingUpdateDaemonSetStrategyType {
		if err := d.update(); err != nil {
			return result, err
		}
	}
	if !d.settled() && len(in.Failed) == 0 {
		return result, nil // the next pass, which sees the pods, reports once instead of twice
	}
	d.status(collisions)
	return result, nil
}

// settled says that this pass has asked for nothing yet.
func (d *daemons) settled() bool { return len(d.result.Requests) == 0 }

// claim finds the DaemonSet's pods, adopts and releases.
func (d *daemons) claim(selector labels.Selector) {
	c := reconcile.Claim{Owner: d.ds, OwnerKind: reconcile.DaemonSetKind, Resource: reconcile.PodsResource, Selector: selector}
	for pod := range reconcile.OwnedPods(d.in.Snapshot, d.ds) {
		if metav1.GetControllerOfNoCopy(pod) != nil && c.Claims(pod) {
			d.pods = append(d.pods, pod)
		}
	}
	for pod := range d.in.Snapshot.OrphanPods(d.ds.Namespace) {
		if c.Claims(pod) {
			d.pods = append(d.pods, pod)
		}
	}
	d.result.Requests = append(d.result.Requests, c.Requests...)
}

// look finds out which nodes pods are meant for, and which they are on.
func (d *daemons) look() {
	p := placementOf(d.ds)
	d.fits = map[string]fit{}
	for node := range d.in.Snapshot.Nodes().All() {
		d.nodes = append(d.nodes, node)
		d.fits[node.Name] = p.on(node)
	}
	d.onNode = map[string][]*corev1.Pod{}
	for _, pod := range d.pods {
		if objects.PodEnded(pod) && pod.DeletionTimestamp != nil {
			continue // it waits for its removal, and nobody waits for it
		}
		if name := targetNode(pod); name != "" {
			d.onNode[name] = append(d.onNode[name], pod)
		}
	}
}

// updated says whether a pod is of the newest template.
func (d *daemons) updated(pod *corev1.Pod) bool {
	return pod.Labels[appsv1.DefaultDaemonSetUniqueLabelKey] == d.hash ||
		d.generation != "" && pod.Labels[templateGenerationLabel] == d.generation
}

func (d *daemons) available(pod *corev1.Pod) bool {
	return available(d.in, pod, d.ds.Spec.MinReadySeconds, d.result)
}

// status reports the nodes that pods are meant for and the first pod of each.
func (d *daemons) status(collisions *int32) {
	s := appsv1.DaemonSetStatus{
		ObservedGeneration: d.ds.Generation,
		CollisionCount:     collisions,
		Conditions:         d.ds.DeepCopy().Status.Conditions,
	}
	for _, node := range d.nodes {
		pods := d.onNode[node.Name]
		switch {
		case !d.fits[node.Name].run:
			if len(pods) > 0 {
				s.NumberMisscheduled++
			}
			continue
		case len(pods) > 0:
			s.CurrentNumberScheduled++
			pod := oldestFirst(pods)[0]
			if reconcile.ReadyCondition(pod) != nil {
				s.NumberReady++
				if d.available(pod) {
					s.NumberAvailable++
				}
			}
			if d.updated(pod) {
				s.UpdatedNumberScheduled++
			}
		}
		s.DesiredNumberScheduled++
	}
	s.NumberUnavailable = s.DesiredNumberScheduled - s.NumberAvailable
	if equality.Semantic.DeepEqual(s, d.ds.Status) {
		return
	}
	updated := d.ds.DeepCopy()
	updated.Status = s
	d.result.Add(reconcile.UpdateStatus(reconcile.DaemonSetsResource, updated))
}
