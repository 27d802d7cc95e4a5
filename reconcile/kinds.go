package reconcile

import (
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Kind is a resource that the API serves.
type Kind struct {
	Resource   schema.GroupVersionResource
	Namespaced bool
}

// Kinds are the resources that the API serves, by group and kind, in the
// version that the API prefers.
type Kinds map[schema.GroupKind]Kind

// Lookup returns the resource of a group and kind, or false when the API serves none.
func (k Kinds) Lookup(gk schema.GroupKind) (Kind, bool) {
	kind, ok := k[gk]
	return kind, ok
}
