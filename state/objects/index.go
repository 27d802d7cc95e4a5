package objects

import (
	"iter"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/node/topology"
)

// indexes find objects other than by key. Their keys are what is looked for, a
// slash, and the object's storage key, unless said otherwise.
type indexes struct {
	byUID       *metaTree // by UID alone
	byOwner     *metaTree
	byNamespace *metaTree

	byNode  *metaTree // pods
	orphans *metaTree // pods, ReplicaSets and ControllerRevisions without a controller, by namespace
	ended   *metaTree // pods that have ended and are not being deleted, by key alone

	byVolume *metaTree // pods, volumes and claims: volumes.go
	byLabels *metaTree // pods, Services and PodDisruptionBudgets: selected.go

	balancers *metaTree // Services of type LoadBalancer, by key alone

	byZone  *metaTree // Nodes, by [Zone]
	unready *metaTree // Nodes that are not ready, by [Zone]
}

func newIndexes() indexes {
	return indexes{
		byUID: newTree(), byOwner: newTree(), byNamespace: newTree(), byNode: newTree(), orphans: newTree(), ended: newTree(),
		byVolume: newTree(), byLabels: newTree(), balancers: newTree(), byZone: newTree(), unready: newTree(),
	}
}

func (x *indexes) copy() indexes {
	return indexes{
		byUID: x.byUID.Copy(), byOwner: x.byOwner.Copy(), byNamespace: x.byNamespace.Copy(), byNode: x.byNode.Copy(),
		orphans: x.orphans.Copy(), ended: x.ended.Copy(),
		byVolume: x.byVolume.Copy(), byLabels: x.byLabels.Copy(), balancers: x.balancers.Copy(), byZone: x.byZone.Copy(), unready: x.unready.Copy(),
	}
}

// each calls f for every place of an object in the indexes that follow from it alone,
// byUID aside.
func (x *indexes) each(m *Meta, f func(tree *metaTree, key string)) {
	for i := range m.OwnerReferences {
		f(x.byOwner, string(m.OwnerReferences[i].UID)+"/"+m.Key)
	}
	if m.Namespace != "" {
		f(x.byNamespace, m.Namespace+"/"+m.Key)
	}
	for key := range volumeKeys(m) {
		f(x.byVolume, key+m.Key)
	}
	for key := range labelKeys(m) {
		f(x.byLabels, key+m.Key)
	}
	switch m.Object.(type) {
	case *corev1.Pod, *appsv1.ReplicaSet, *appsv1.ControllerRevision:
		if metav1.GetControllerOfNoCopy(m) == nil {
			f(x.orphans, m.Namespace+"/"+m.Key)
		}
	}
	switch o := m.Object.(type) {
	case *corev1.Pod:
		if o.Spec.NodeName != "" {
			f(x.byNode, o.Spec.NodeName+"/"+m.Key)
		}
		if o.DeletionTimestamp == nil && PodEnded(o) {
			f(x.ended, m.Key)
		}
	case *corev1.Service:
		if o.Spec.Type == corev1.ServiceTypeLoadBalancer {
			f(x.balancers, m.Key)
		}
	case *corev1.Node:
		zone := Zone(o) + "/"
		f(x.byZone, zone+m.Key)
		if !NodeReady(o) {
			f(x.unready, zone+m.Key)
		}
	}
}

func (x *indexes) index(m *Meta) {
	if m.UID != "" {
		x.byUID.Set(string(m.UID), m)
	}
	x.each(m, func(tree *metaTree, key string) { tree.Set(key, m) })
}

func (x *indexes) unindex(m *Meta) {
	if now, ok := x.byUID.Get(string(m.UID)); ok && now == m {
		x.byUID.Delete(string(m.UID))
	}
	x.each(m, func(tree *metaTree, key string) { tree.Delete(key) })
}

// OrphanPods yields the pods of a namespace that have no controller, in order of name.
func (s *Snapshot) OrphanPods(namespace string) iter.Seq[*corev1.Pod] {
	return only[*corev1.Pod](s.orphansOf("pods/", namespace))
}

// OrphanReplicaSets yields the ReplicaSets of a namespace that have no controller, in
// order of name.
func (s *Snapshot) OrphanReplicaSets(namespace string) iter.Seq[*appsv1.ReplicaSet] {
	return only[*appsv1.ReplicaSet](s.orphansOf("replicasets/", namespace))
}

// OrphanRevisions yields the ControllerRevisions of a namespace that have no controller,
// in order of name.
func (s *Snapshot) OrphanRevisions(namespace string) iter.Seq[*appsv1.ControllerRevision] {
	return only[*appsv1.ControllerRevision](s.orphansOf("controllerrevisions/", namespace))
}

func (s *Snapshot) orphansOf(directory, namespace string) iter.Seq[*Meta] {
	return scan(s.orphans, namespace+"/"+s.prefix+directory)
}

// EndedPods yields the pods that have succeeded or failed and are not being deleted.
func (s *Snapshot) EndedPods() iter.Seq[*corev1.Pod] {
	return only[*corev1.Pod](scan(s.ended, ""))
}

// EndedPodsLen is how many EndedPods there are.
func (s *Snapshot) EndedPodsLen() int { return s.ended.Len() }

// Zone names the zone of a Node by the labels that Kubernetes has for it, "" for a Node
// that says nothing of any.
func Zone(node *corev1.Node) string { return topology.GetZoneKey(node) }

// NodesInZone yields the Nodes of a zone, in order of name.
func (s *Snapshot) NodesInZone(zone string) iter.Seq[*corev1.Node] {
	return only[*corev1.Node](scan(s.byZone, zone+"/"))
}

// NodesInZoneLen is how many NodesInZone there are.
func (s *Snapshot) NodesInZoneLen(zone string) int { return count(s.byZone, zone+"/") }

// UnreadyNodes yields the Nodes whose Ready condition is not True, in order of zone and
// name.
func (s *Snapshot) UnreadyNodes() iter.Seq[*corev1.Node] {
	return only[*corev1.Node](scan(s.unready, ""))
}

// UnreadyNodesInZone yields those of them that are in a zone.
func (s *Snapshot) UnreadyNodesInZone(zone string) iter.Seq[*corev1.Node] {
	return only[*corev1.Node](scan(s.unready, zone+"/"))
}

// LoadBalancers yields the Services of type LoadBalancer, in order of namespace and name.
func (s *Snapshot) LoadBalancers() iter.Seq[*corev1.Service] {
	return only[*corev1.Service](scan(s.balancers, ""))
}

// PodEnded says whether all of a pod's containers have stopped for good.
func PodEnded(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// NodeReady says whether a Node says that it is ready.
func NodeReady(node *corev1.Node) bool {
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}
