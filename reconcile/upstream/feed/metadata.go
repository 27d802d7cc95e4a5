package feed

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state/objects"
)

// metadataOf returns a function that gives an object's metadata as a client asks for
// it in a version, which need not be the one that is stored.
func metadataOf(version schema.GroupVersion) func(*objects.Meta) any {
	return func(m *objects.Meta) any {
		return &metav1.PartialObjectMetadata{
			TypeMeta:   metav1.TypeMeta{APIVersion: version.String(), Kind: m.GVK.Kind},
			ObjectMeta: *m.ObjectMeta,
		}
	}
}
