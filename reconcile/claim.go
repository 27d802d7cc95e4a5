package reconcile

import (
	"iter"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state/objects"
)

// Versions returns the metadata of a changed object before and after, as far as there is any.
func Versions(c objects.Changed) []*objects.Meta {
	out := make([]*objects.Meta, 0, 2)
	if c.Old != nil {
		out = append(out, c.Old)
	}
	if c.New != nil {
		out = append(out, c.New)
	}
	return out
}

// Selects says whether a selector that is neither broken nor empty matches.
func Selects(selector *metav1.LabelSelector, set map[string]string) bool {
	s, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && !s.Empty() && s.Matches(labels.Set(set))
}

// Claim decides which objects are an owner's, and collects the changes that
// adopt those that match and have no controller, and release those that are
// the owner's but match no longer.
type Claim struct {
	Owner     metav1.Object
	OwnerKind schema.GroupVersionKind
	Resource  schema.GroupVersionResource // of the objects claimed
	Selector  labels.Selector
	// Match says what else an object of the owner is like; nil for nothing.
	Match    func(metav1.Object) bool
	Requests []Request
}

// matches says whether an object is like one of the owner.
func (c *Claim) matches(obj metav1.Object) bool {
	return c.Selector.Matches(labels.Set(obj.GetLabels())) && (c.Match == nil || c.Match(obj))
}

// Claims says whether obj is the owner's, and notes what makes it so.
func (c *Claim) Claims(obj metav1.Object) bool {
	if ref := metav1.GetControllerOfNoCopy(obj); ref != nil {
		if ref.UID != c.Owner.GetUID() {
			return false
		}
		if c.matches(obj) {
			return true
		}
		if c.Owner.GetDeletionTimestamp() == nil {
			c.Requests = append(c.Requests, PatchOwners(c.Resource, obj, slices.DeleteFunc(slices.Clone(obj.GetOwnerReferences()),
				func(r metav1.OwnerReference) bool { return r.UID == c.Owner.GetUID() })))
		}
		return false
	}
	if c.Owner.GetDeletionTimestamp() != nil || obj.GetDeletionTimestamp() != nil ||
		c.Selector.Empty() || !c.matches(obj) {
		return false
	}
	refs := slices.DeleteFunc(slices.Clone(obj.GetOwnerReferences()), func(r metav1.OwnerReference) bool { return r.UID == c.Owner.GetUID() })
	c.Requests = append(c.Requests, PatchOwners(c.Resource, obj, append(refs, *metav1.NewControllerRef(c.Owner, c.OwnerKind))))
	return true
}

// PatchOwners returns the change that gives this version of obj these owners.
func PatchOwners(resource schema.GroupVersionResource, obj metav1.Object, refs []metav1.OwnerReference) Request {
	meta := Pinned(obj)
	if len(refs) == 0 {
		meta["ownerReferences"] = nil
	} else {
		meta["ownerReferences"] = refs
	}
	return MergePatch(resource, obj, "", map[string]any{"metadata": meta})
}

// OwnedPods yields the pods that name owner among their owners.
func OwnedPods(s *objects.Snapshot, owner metav1.Object) iter.Seq[*corev1.Pod] {
	return func(yield func(*corev1.Pod) bool) {
		for m := range s.OwnedBy(owner.GetUID()) {
			if pod, ok := m.Object.(*corev1.Pod); ok && pod.Namespace == owner.GetNamespace() && !yield(pod) {
				return
			}
		}
	}
}
