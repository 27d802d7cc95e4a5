package objects

import (
	"iter"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Typed is a kind whose objects are decoded whole.
type Typed struct {
	// Directory is what the storage keys of its objects have between the cache's
	// prefix and the namespace or name, slash included: "pods/".
	Directory string
	// GVK is what they are stored as.
	GVK schema.GroupVersionKind
	// New returns an empty object of the type that they are decoded into, which may be
	// that of a later version.
	New func() runtime.Object
}

// TypedKinds yields the kinds that every cache decodes whole.
func TypedKinds() iter.Seq[Typed] {
	return func(yield func(Typed) bool) {
		for directory, k := range typedKinds() {
			if !yield(Typed{Directory: directory, GVK: k.gvk, New: func() runtime.Object { return k.new() }}) {
				return
			}
		}
	}
}

// Prefix is what the keys of all objects begin with, slash included.
func (s *Snapshot) Prefix() string { return s.prefix }
