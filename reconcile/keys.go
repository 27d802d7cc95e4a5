package reconcile

import (
	corev1 "k8s.io/api/core/v1"

	"timonel/state/objects"
)

func NodeKey(name string) Key { return Key{Kind: NodeKind.Kind, Name: name} }

// NamespaceKeys returns a key for each namespace.
func NamespaceKeys(s *objects.Snapshot) []Key {
	var keys []Key
	for ns := range s.Namespaces().All() {
		keys = append(keys, Key{Kind: NamespaceKind.Kind, Name: ns.Name})
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
