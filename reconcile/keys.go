package reconcile

import (
	"iter"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state/objects"
)

// NewKey returns the key of the object of a kind that has a name. The namespace is
// empty for kinds without one.
func NewKey(kind schema.GroupVersionKind, namespace, name string) Key {
	return Key{Group: kind.Group, Kind: kind.Kind, Namespace: namespace, Name: name}
}

// KeyOf returns the key of an object of a kind.
func KeyOf(kind schema.GroupVersionKind, obj metav1.Object) Key {
	return NewKey(kind, obj.GetNamespace(), obj.GetName())
}

// KeysOf returns the keys of objects of a kind.
func KeysOf[T metav1.Object](kind schema.GroupVersionKind, objs iter.Seq[T]) []Key {
	var keys []Key
	for obj := range objs {
		keys = append(keys, KeyOf(kind, obj))
	}
	return keys
}

// NodeKey returns the key of the Node of a name.
func NodeKey(name string) Key { return NewKey(NodeKind, "", name) }

// OwnerKeys returns the keys of the controllers of a changed object, before and after,
// that are of a kind; and, when it has none now, those that adopters returns, which may
// be nil: of the owners that could adopt it.
func OwnerKeys(c objects.Changed, kind schema.GroupVersionKind, adopters func(m *objects.Meta) []Key) []Key {
	var keys []Key
	for _, m := range Versions(c) {
		ref := metav1.GetControllerOfNoCopy(m)
		switch {
		case ref != nil && ref.Kind == kind.Kind:
			keys = append(keys, NewKey(kind, m.Namespace, ref.Name))
		case ref == nil && m == c.New && adopters != nil:
			keys = append(keys, adopters(m)...)
		}
	}
	return keys
}

// NodeCondition returns a Node's condition of a type, or nil.
func NodeCondition(node *corev1.Node, t corev1.NodeConditionType) *corev1.NodeCondition {
	for i := range node.Status.Conditions {
		if node.Status.Conditions[i].Type == t {
			return &node.Status.Conditions[i]
		}
	}
	return nil
}
