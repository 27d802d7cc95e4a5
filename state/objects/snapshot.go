package objects

import (
	"iter"
	"strconv"
	"strings"

	"github.com/tidwall/btree"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// metaTree is a copy-on-write ordered map.
type metaTree = btree.Map[string, *Meta]

// Snapshot is all objects at one revision. It never changes.
type Snapshot struct {
	revision int64
	prefix   string // of all keys
	metas    *metaTree
	indexes
}

// Revision is an object's resourceVersion as a number, which the cache wrote.
func Revision(o metav1.Object) int64 {
	n, _ := strconv.ParseInt(o.GetResourceVersion(), 10, 64)
	return n
}

// Revision is the store's revision that the snapshot shows.
func (s *Snapshot) Revision() int64 { return s.revision }

// Table is the objects of one kind.
type Table[T runtime.Object] struct {
	metas  *metaTree
	prefix string
}

func newTable[T runtime.Object](s *Snapshot, resource string) Table[T] {
	return Table[T]{metas: s.metas, prefix: s.prefix + resource}
}

// Get returns an object, or false. The namespace is empty for kinds without one.
func (t Table[T]) Get(namespace, name string) (T, bool) {
	key := t.prefix + name
	if namespace != "" {
		key = t.prefix + namespace + "/" + name
	}
	if m, ok := t.metas.Get(key); ok {
		o, ok := m.Object.(T)
		return o, ok
	}
	var none T
	return none, false
}

// All yields the objects in order of namespace and name.
func (t Table[T]) All() iter.Seq[T] { return t.scan(t.prefix) }

// InNamespace yields the objects of a namespace in order of name.
func (t Table[T]) InNamespace(namespace string) iter.Seq[T] {
	return t.scan(t.prefix + namespace + "/")
}

// Named yields the objects of a namespace whose names begin with prefix, in order of name.
func (t Table[T]) Named(namespace, prefix string) iter.Seq[T] {
	return t.scan(t.prefix + namespace + "/" + prefix)
}

func (t Table[T]) scan(prefix string) iter.Seq[T] {
	return only[T](scan(t.metas, prefix))
}

// only yields the objects of one type.
func only[T any](metas iter.Seq[*Meta]) iter.Seq[T] {
	return func(yield func(T) bool) {
		for m := range metas {
			if o, ok := m.Object.(T); ok && !yield(o) {
				return
			}
		}
	}
}

// As returns the object of a Meta that may be nil, or none of a type.
func As[T runtime.Object](m *Meta) T {
	var none T
	if m == nil {
		return none
	}
	o, _ := m.Object.(T)
	return o
}

// Len is the number of objects, in O(log² n).
func (t Table[T]) Len() int { return count(t.metas, t.prefix) }

// scan yields what is under the prefix, in order of key.
func scan(tree *metaTree, prefix string) iter.Seq[*Meta] {
	return func(yield func(*Meta) bool) {
		tree.Ascend(prefix, func(key string, m *Meta) bool {
			return strings.HasPrefix(key, prefix) && yield(m)
		})
	}
}

// count returns how many keys have the prefix, which ends with a slash.
func count(tree *metaTree, prefix string) int {
	end := prefix[:len(prefix)-1] + "0" // '0' follows '/'
	return rank(tree, end) - rank(tree, prefix)
}

// PodsOnNode yields the pods bound to a node, in order of namespace and name.
func (s *Snapshot) PodsOnNode(node string) iter.Seq[*corev1.Pod] {
	return only[*corev1.Pod](scan(s.byNode, node+"/"))
}

// OwnedBy yields the objects of any kind that name uid in their ownerReferences.
func (s *Snapshot) OwnedBy(uid types.UID) iter.Seq[*Meta] {
	return scan(s.byOwner, string(uid)+"/")
}

// Metas is the metadata of every object of every kind.
func (s *Snapshot) Metas() Metas { return Metas{s} }

// Metas is the metadata of every object in a snapshot.
type Metas struct{ s *Snapshot }

// Get returns the object with the storage key, or false.
func (m Metas) Get(key string) (*Meta, bool) { return m.s.metas.Get(key) }

// ByUID returns the object with the UID, or false.
func (m Metas) ByUID(uid types.UID) (*Meta, bool) { return m.s.byUID.Get(string(uid)) }

// All yields every object in order of storage key.
func (m Metas) All() iter.Seq[*Meta] { return scan(m.s.metas, "") }

// WithPrefix yields the objects whose storage keys have the prefix.
func (m Metas) WithPrefix(prefix string) iter.Seq[*Meta] { return scan(m.s.metas, prefix) }

// InNamespace yields the objects of all kinds that are in a namespace.
func (m Metas) InNamespace(namespace string) iter.Seq[*Meta] {
	return scan(m.s.byNamespace, namespace+"/")
}

// Len is the number of objects.
func (m Metas) Len() int { return m.s.metas.Len() }
