package sched

import (
	"iter"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	storagev1 "k8s.io/api/storage/v1"

	"timonel/state/objects"
)

// FromObjects is the State of a decoded snapshot.
func FromObjects(s *objects.Snapshot) State { return snapshotState{s} }

// Refs names those among changed objects that [Cluster.Advance] needs to hear about.
func Refs(changed []objects.Changed) []Ref {
	var refs []Ref
	for _, c := range changed {
		switch o := c.Meta().Object.(type) {
		case *corev1.Node:
			refs = append(refs, Ref{Kind: KindNode, Name: o.Name})
		case *corev1.Pod:
			refs = append(refs, Ref{Kind: KindPod, Namespace: o.Namespace, Name: o.Name})
		case *resourcev1.ResourceClaim:
			refs = append(refs, Ref{Kind: KindResourceClaim, Namespace: o.Namespace, Name: o.Name})
		case *resourcev1.ResourceSlice:
			refs = append(refs, Ref{Kind: KindResourceSlice, Name: o.Name})
		case *resourcev1.DeviceTaintRule:
			refs = append(refs, Ref{Kind: KindDeviceTaintRule, Name: o.Name})
		}
	}
	return refs
}

type snapshotState struct{ s *objects.Snapshot }

func (v snapshotState) Nodes() iter.Seq[*corev1.Node] { return v.s.Nodes().All() }

func (v snapshotState) Node(name string) (*corev1.Node, bool) { return v.s.Nodes().Get("", name) }

func (v snapshotState) Pods() iter.Seq[*corev1.Pod] { return v.s.Pods().All() }

func (v snapshotState) Pod(namespace, name string) (*corev1.Pod, bool) {
	return v.s.Pods().Get(namespace, name)
}

func (v snapshotState) Namespaces() iter.Seq[*corev1.Namespace] { return v.s.Namespaces().All() }

func (v snapshotState) Namespace(name string) (*corev1.Namespace, bool) {
	return v.s.Namespaces().Get("", name)
}

func (v snapshotState) ServicesIn(namespace string) iter.Seq[*corev1.Service] {
	return v.s.Services().InNamespace(namespace)
}

func (v snapshotState) ReplicationController(namespace, name string) (*corev1.ReplicationController, bool) {
	return v.s.ReplicationControllers().Get(namespace, name)
}

func (v snapshotState) ReplicaSet(namespace, name string) (*appsv1.ReplicaSet, bool) {
	return v.s.ReplicaSets().Get(namespace, name)
}

func (v snapshotState) StatefulSet(namespace, name string) (*appsv1.StatefulSet, bool) {
	return v.s.StatefulSets().Get(namespace, name)
}

func (v snapshotState) PersistentVolumeClaim(namespace, name string) (*corev1.PersistentVolumeClaim, bool) {
	return v.s.PVCs().Get(namespace, name)
}

func (v snapshotState) PersistentVolume(name string) (*corev1.PersistentVolume, bool) {
	return v.s.PVs().Get("", name)
}

func (v snapshotState) PersistentVolumes() iter.Seq[*corev1.PersistentVolume] { return v.s.PVs().All() }

func (v snapshotState) StorageClass(name string) (*storagev1.StorageClass, bool) {
	return v.s.StorageClasses().Get("", name)
}

func (v snapshotState) CSINode(name string) (*storagev1.CSINode, bool) {
	return v.s.CSINodes().Get("", name)
}

func (v snapshotState) CSIDriver(name string) (*storagev1.CSIDriver, bool) {
	return v.s.CSIDrivers().Get("", name)
}

func (v snapshotState) CSIStorageCapacities() iter.Seq[*storagev1.CSIStorageCapacity] {
	return v.s.CSIStorageCapacities().All()
}

func (v snapshotState) VolumeAttachments() iter.Seq[*storagev1.VolumeAttachment] {
	return v.s.VolumeAttachments().All()
}

func (v snapshotState) PodDisruptionBudgets() iter.Seq[*policyv1.PodDisruptionBudget] {
	return v.s.PodDisruptionBudgets().All()
}

func (v snapshotState) ResourceClaim(namespace, name string) (*resourcev1.ResourceClaim, bool) {
	return v.s.ResourceClaims().Get(namespace, name)
}

func (v snapshotState) ResourceClaims() iter.Seq[*resourcev1.ResourceClaim] {
	return v.s.ResourceClaims().All()
}

func (v snapshotState) DeviceClass(name string) (*resourcev1.DeviceClass, bool) {
	return v.s.DeviceClasses().Get("", name)
}

func (v snapshotState) DeviceClasses() iter.Seq[*resourcev1.DeviceClass] {
	return v.s.DeviceClasses().All()
}

func (v snapshotState) ResourceSlices() iter.Seq[*resourcev1.ResourceSlice] {
	return v.s.ResourceSlices().All()
}

func (v snapshotState) DeviceTaintRules() iter.Seq[*resourcev1.DeviceTaintRule] {
	return v.s.DeviceTaintRules().All()
}
