package reconcile

import (
	"iter"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"timonel/state/objects"
)

// versions returns the metadata of a changed object before and after, as far as there is any.
func versions(c objects.Changed) []*objects.Meta {
	out := make([]*objects.Meta, 0, 2)
	if c.Old != nil {
		out = append(out, c.Old)
	}
	if c.New != nil {
		out = append(out, c.New)
	}
	return out
}

// selects says whether a selector that is neither broken nor empty matches.
func selects(selector *metav1.LabelSelector, set map[string]string) bool {
	s, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && !s.Empty() && s.Matches(labels.Set(set))
}

// claim decides which objects are an owner's, and collects the changes that
// adopt those that match and have no controller, and release those that are
// the owner's but match no longer.
type claim struct {
	owner     metav1.Object
	ownerKind schema.GroupVersionKind
	resource  schema.GroupVersionResource // of the objects claimed
	selector  labels.Selector
	changes   []Change
}

// claims says whether obj is the owner's, and notes what makes it so.
func (c *claim) claims(obj metav1.Object) bool {
	if ref := metav1.GetControllerOfNoCopy(obj); ref != nil {
		if ref.UID != c.owner.GetUID() {
			return false
		}
		if c.selector.Matches(labels.Set(obj.GetLabels())) {
			return true
		}
		if c.owner.GetDeletionTimestamp() == nil {
			c.changes = append(c.changes, withOwners(c.resource, obj, slices.DeleteFunc(slices.Clone(obj.GetOwnerReferences()),
				func(r metav1.OwnerReference) bool { return r.UID == c.owner.GetUID() })))
		}
		return false
	}
	if c.owner.GetDeletionTimestamp() != nil || obj.GetDeletionTimestamp() != nil ||
		c.selector.Empty() || !c.selector.Matches(labels.Set(obj.GetLabels())) {
		return false
	}
	refs := slices.DeleteFunc(slices.Clone(obj.GetOwnerReferences()), func(r metav1.OwnerReference) bool { return r.UID == c.owner.GetUID() })
	c.changes = append(c.changes, withOwners(c.resource, obj, append(refs, *metav1.NewControllerRef(c.owner, c.ownerKind))))
	return true
}

// withOwners returns the change that gives this version of obj these owners.
func withOwners(resource schema.GroupVersionResource, obj metav1.Object, refs []metav1.OwnerReference) Change {
	meta := pinned(obj)
	if len(refs) == 0 {
		meta["ownerReferences"] = nil
	} else {
		meta["ownerReferences"] = refs
	}
	c := mergePatch(resource, obj, "", map[string]any{"metadata": meta})
	c.PatchType = types.MergePatchType
	return c
}

// ownedPods yields the pods that name owner among their owners.
func ownedPods(s *objects.Snapshot, owner metav1.Object) iter.Seq[*corev1.Pod] {
	return func(yield func(*corev1.Pod) bool) {
		for m := range s.OwnedBy(owner.GetUID()) {
			if pod, ok := m.Object.(*corev1.Pod); ok && pod.Namespace == owner.GetNamespace() && !yield(pod) {
				return
			}
		}
	}
}

// podEnded says whether all of a pod's containers have stopped for good.
func podEnded(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// podActive says whether a pod counts as a replica.
func podActive(pod *corev1.Pod) bool { return !podEnded(pod) && pod.DeletionTimestamp == nil }

// podCondition returns a pod's condition of a type, or nil.
func podCondition(pod *corev1.Pod, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == t {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// readyCondition returns the Ready condition if it is true, else nil.
func readyCondition(pod *corev1.Pod) *corev1.PodCondition {
	if c := podCondition(pod, corev1.PodReady); c != nil && c.Status == corev1.ConditionTrue {
		return c
	}
	return nil
}

// availableAt returns when a pod is or was available, which is when it has been
// ready for minReadySeconds, or false if it is not ready.
func availableAt(pod *corev1.Pod, minReadySeconds int32) (time.Time, bool) {
	c := readyCondition(pod)
	switch {
	case c == nil:
		return time.Time{}, false
	case minReadySeconds == 0:
		return time.Time{}, true
	case c.LastTransitionTime.IsZero():
		return time.Time{}, false
	}
	return c.LastTransitionTime.Add(time.Duration(minReadySeconds) * time.Second), true
}

// statusPatch returns the change that merges conditions by type, and other
// fields as given, into the status of a pod, as long as it is the same pod.
func statusPatch(pod *corev1.Pod, fields map[string]any, conditions ...corev1.PodCondition) Change {
	status := map[string]any{}
	for k, v := range fields {
		status[k] = v
	}
	if len(conditions) > 0 {
		status["conditions"] = conditions
	}
	c := mergePatch(podsResource, pod, "status", map[string]any{
		"metadata": map[string]any{"uid": string(pod.UID)}, "status": status,
	})
	c.PatchType = types.StrategicMergePatchType
	return c
}

// conditionTime keeps the time of a condition that does not change its status.
func conditionTime(pod *corev1.Pod, t corev1.PodConditionType, status corev1.ConditionStatus, now metav1.Time) metav1.Time {
	if c := podCondition(pod, t); c != nil && c.Status == status {
		return c.LastTransitionTime
	}
	return now
}
