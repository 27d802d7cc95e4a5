package sched

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// fakeState is a State of a few maps by kind/namespace/name.
type fakeState struct {
	objects map[string]runtime.Object
}

func newState(list ...runtime.Object) *fakeState {
	s := &fakeState{objects: map[string]runtime.Object{}}
	s.put(list...)
	return s
}

func kindOf(o runtime.Object) string {
	return strings.TrimPrefix(fmt.Sprintf("%T", o), "*v1.")
}

func keyOf(o runtime.Object) string {
	m := o.(metav1.Object)
	return kindOf(o) + "/" + m.GetNamespace() + "/" + m.GetName()
}

func (s *fakeState) put(list ...runtime.Object) {
	for _, o := range list {
		s.objects[keyOf(o)] = o
	}
}

func (s *fakeState) clone() *fakeState { return &fakeState{objects: maps.Clone(s.objects)} }

func list[T runtime.Object](s *fakeState) []T {
	var out []T
	for _, key := range slices.Sorted(maps.Keys(s.objects)) {
		if o, ok := s.objects[key].(T); ok {
			out = append(out, o)
		}
	}
	return out
}

func get[T runtime.Object](s *fakeState, kind, namespace, name string) (T, bool) {
	o, ok := s.objects[kind+"/"+namespace+"/"+name].(T)
	return o, ok
}

func (s *fakeState) Nodes() iter.Seq[*corev1.Node] { return slices.Values(list[*corev1.Node](s)) }
func (s *fakeState) Pods() iter.Seq[*corev1.Pod]   { return slices.Values(list[*corev1.Pod](s)) }
func (s *fakeState) Namespaces() iter.Seq[*corev1.Namespace] {
	return slices.Values(list[*corev1.Namespace](s))
}
func (s *fakeState) PersistentVolumes() iter.Seq[*corev1.PersistentVolume] {
	return slices.Values(list[*corev1.PersistentVolume](s))
}
func (s *fakeState) PodDisruptionBudgets() iter.Seq[*policyv1.PodDisruptionBudget] {
	return slices.Values(list[*policyv1.PodDisruptionBudget](s))
}
func (s *fakeState) CSIStorageCapacities() iter.Seq[*storagev1.CSIStorageCapacity] {
	return slices.Values(list[*storagev1.CSIStorageCapacity](s))
}
func (s *fakeState) VolumeAttachments() iter.Seq[*storagev1.VolumeAttachment] {
	return slices.Values(list[*storagev1.VolumeAttachment](s))
}
func (s *fakeState) ServicesIn(namespace string) iter.Seq[*corev1.Service] {
	return slices.Values(slices.DeleteFunc(list[*corev1.Service](s), func(o *corev1.Service) bool {
		return o.Namespace != namespace
	}))
}
func (s *fakeState) Node(name string) (*corev1.Node, bool) {
	return get[*corev1.Node](s, "Node", "", name)
}
func (s *fakeState) Pod(namespace, name string) (*corev1.Pod, bool) {
	return get[*corev1.Pod](s, "Pod", namespace, name)
}
func (s *fakeState) Namespace(name string) (*corev1.Namespace, bool) {
	return get[*corev1.Namespace](s, "Namespace", "", name)
}
func (s *fakeState) ReplicationController(namespace, name string) (*corev1.ReplicationController, bool) {
	return get[*corev1.ReplicationController](s, "ReplicationController", namespace, name)
}
func (s *fakeState) ReplicaSet(namespace, name string) (*appsv1.ReplicaSet, bool) {
	return get[*appsv1.ReplicaSet](s, "ReplicaSet", namespace, name)
}
func (s *fakeState) StatefulSet(namespace, name string) (*appsv1.StatefulSet, bool) {
	return get[*appsv1.StatefulSet](s, "StatefulSet", namespace, name)
}
func (s *fakeState) PersistentVolumeClaim(namespace, name string) (*corev1.PersistentVolumeClaim, bool) {
	return get[*corev1.PersistentVolumeClaim](s, "PersistentVolumeClaim", namespace, name)
}
func (s *fakeState) PersistentVolume(name string) (*corev1.PersistentVolume, bool) {
	return get[*corev1.PersistentVolume](s, "PersistentVolume", "", name)
}
func (s *fakeState) StorageClass(name string) (*storagev1.StorageClass, bool) {
	return get[*storagev1.StorageClass](s, "StorageClass", "", name)
}
func (s *fakeState) CSINode(name string) (*storagev1.CSINode, bool) {
	return get[*storagev1.CSINode](s, "CSINode", "", name)
}
func (s *fakeState) CSIDriver(name string) (*storagev1.CSIDriver, bool) {
	return get[*storagev1.CSIDriver](s, "CSIDriver", "", name)
}
func (s *fakeState) ResourceClaim(namespace, name string) (*resourcev1.ResourceClaim, bool) {
	return get[*resourcev1.ResourceClaim](s, "ResourceClaim", namespace, name)
}
func (s *fakeState) ResourceClaims() iter.Seq[*resourcev1.ResourceClaim] {
	return slices.Values(list[*resourcev1.ResourceClaim](s))
}
func (s *fakeState) DeviceClass(name string) (*resourcev1.DeviceClass, bool) {
	return get[*resourcev1.DeviceClass](s, "DeviceClass", "", name)
}
func (s *fakeState) DeviceClasses() iter.Seq[*resourcev1.DeviceClass] {
	return slices.Values(list[*resourcev1.DeviceClass](s))
}
func (s *fakeState) ResourceSlices() iter.Seq[*resourcev1.ResourceSlice] {
	return slices.Values(list[*resourcev1.ResourceSlice](s))
}
func (s *fakeState) DeviceTaintRules() iter.Seq[*resourcev1.DeviceTaintRule] {
	return slices.Values(list[*resourcev1.DeviceTaintRule](s))
}
