package storage

import (
	"cmp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

const (
	// LocalClass is the name of the StorageClass of local volumes.
	LocalClass = "local"
	// ClassAnnotation of the namespace kube-system says that the cluster's own
	// StorageClass was made, so that it is not made again once somebody deleted it.
	ClassAnnotation = "timonel.io/default-storage-class"

	defaultAnnotation     = "storageclass.kubernetes.io/is-default-class"
	betaDefaultAnnotation = "storageclass.beta.kubernetes.io/is-default-class"
)

var (
	storageClassesResource = storagev1.SchemeGroupVersion.WithResource("storageclasses")
	systemNamespace        = reconcile.NewKey(reconcile.NamespaceKind, "", metav1.NamespaceSystem)
)

// Class makes the StorageClass of local volumes, once in a cluster's life: what
// becomes of it then is the users' to say.
type Class struct{}

// Name implements Reconciler.
func (Class) Name() string { return "storage-class-controller" }

// All implements Reconciler.
func (Class) All(*objects.Snapshot) []reconcile.Key { return []reconcile.Key{systemNamespace} }

// Keys implements Reconciler.
func (Class) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if m := c.Meta(); m.GVK == reconcile.NamespaceKind && m.Name == systemNamespace.Name {
		return []reconcile.Key{systemNamespace}
	}
	return nil
}

// Reconcile implements Reconciler.
func (Class) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	ns, ok := in.Snapshot.Namespaces().Get("", key.Name)
	if !ok || ns.Annotations[ClassAnnotation] != "" {
		return result, nil
	}
	mark := reconcile.MergePatch(reconcile.NamespacesResource, ns, "", map[string]any{
		"metadata": map[string]any{"uid": string(ns.UID), "annotations": map[string]string{ClassAnnotation: LocalClass}},
	})
	if _, there := in.Snapshot.StorageClasses().Get("", LocalClass); there {
		result.Add(mark)
		return result, nil
	}
	mode, policy := storagev1.VolumeBindingWaitForFirstConsumer, corev1.PersistentVolumeReclaimDelete
	class := &storagev1.StorageClass{
		ObjectMeta:  metav1.ObjectMeta{Name: LocalClass},
		Provisioner: LocalProvisioner, VolumeBindingMode: &mode, ReclaimPolicy: &policy,
	}
	if DefaultClass(in.Snapshot) == nil {
		class.Annotations = map[string]string{defaultAnnotation: "true"}
	}
	create := reconcile.Create(storageClassesResource, class)
	create.Then = []reconcile.Request{mark}
	result.Add(create)
	return result, nil
}

func isDefault(class *storagev1.StorageClass) bool {
	return class.Annotations[defaultAnnotation] == "true" || class.Annotations[betaDefaultAnnotation] == "true"
}

// DefaultClass returns the class of claims that name none: the newest of the
// default ones, or nil.
func DefaultClass(s *objects.Snapshot) *storagev1.StorageClass {
	var classes []*storagev1.StorageClass
	for class := range s.StorageClasses().All() {
		if isDefault(class) {
			classes = append(classes, class)
		}
	}
	if len(classes) == 0 {
		return nil
	}
	return slices.MinFunc(classes, func(a, b *storagev1.StorageClass) int {
		return cmp.Or(b.CreationTimestamp.Compare(a.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
}
