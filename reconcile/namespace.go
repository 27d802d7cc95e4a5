package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state/objects"
)

// Namespace empties a namespace that is being deleted, pods first, and then
// gives up the finalizer "kubernetes" so that it can go.
type Namespace struct {
	// Burst is how many objects one pass deletes at most. Default 500.
	Burst int
}

// Name implements Reconciler.
func (Namespace) Name() string { return "namespace-controller" }

// Pace implements PacedReconciler: it keeps the writes of the conditions few
// while many objects go one by one.
func (Namespace) Pace() time.Duration { return 200 * time.Millisecond }

// FollowsKinds implements KindsReconciler.
func (Namespace) FollowsKinds() {}

// All implements Reconciler.
func (Namespace) All(s *objects.Snapshot) []Key { return namespaceKeys(s) }

// Keys implements Reconciler: a namespace follows itself and, while it is being
// deleted, everything in it.
func (Namespace) Keys(c objects.Changed, s *objects.Snapshot) []Key {
	m := c.Meta()
	if m.GVK == namespaceKind {
		return []Key{{Kind: namespaceKind.Kind, Name: m.Name}}
	}
	if m.Namespace == "" {
		return nil
	}
	if ns, ok := s.Namespaces().Get("", m.Namespace); !ok || ns.DeletionTimestamp == nil {
		return nil
	}
	return []Key{{Kind: namespaceKind.Kind, Name: m.Namespace}}
}

// Reconcile implements Reconciler.
func (n Namespace) Reconcile(in Input, key Key) (Result, error) {
	ns, ok := in.Snapshot.Namespaces().Get("", key.Name)
	if !ok || ns.DeletionTimestamp == nil || !slices.Contains(ns.Spec.Finalizers, corev1.FinalizerKubernetes) {
		return Result{}, nil
	}
	if len(in.Kinds) == 0 {
		return Result{}, nil // not known yet: the key comes again when they are
	}
	left := n.contents(in, ns.Name)

	var result Result
	n.empty(in, left, &result)
	conditions := n.conditions(in, ns, left)
	if ns.Status.Phase != corev1.NamespaceTerminating || !slices.Equal(conditions, ns.Status.Conditions) {
		updated := ns.DeepCopy()
		updated.Status.Phase, updated.Status.Conditions = corev1.NamespaceTerminating, conditions
		result.change(updateStatus(namespacesResource, updated))
		return result, nil // the namespace has another version afterwards: finalize in the next pass
	}
	if len(left) > 0 {
		return result, nil
	}
	updated := ns.DeepCopy()
	updated.Spec.Finalizers = slices.DeleteFunc(updated.Spec.Finalizers, func(f corev1.FinalizerName) bool { return f == corev1.FinalizerKubernetes })
	c := update(namespacesResource, updated)
	c.Subresource = "finalize"
	result.change(c)
	return result, nil
}

// contents returns what is left in a namespace, pods first.
func (Namespace) contents(in Input, namespace string) []*objects.Meta {
	var pods, others []*objects.Meta
	for m := range in.Snapshot.Metas().InNamespace(namespace) {
		if m.GVK == podKind {
			pods = append(pods, m)
		} else {
			others = append(others, m)
		}
	}
	return append(pods, others...)
}

// empty deletes what is left and not being deleted already. Other objects wait
// until the pods are gone, because pods may need them until then.
func (n Namespace) empty(in Input, left []*objects.Meta, result *Result) {
	burst := cmp.Or(n.Burst, 500)
	hasPods := len(left) > 0 && left[0].GVK == podKind
	background := metav1.DeletePropagationBackground
	for _, m := range left {
		if hasPods && m.GVK != podKind {
			return
		}
		if m.DeletionTimestamp != nil {
			continue
		}
		kind, ok := in.Kinds.Lookup(m.GVK.GroupKind())
		if !ok {
			continue // a kind that is not served, or not yet: the condition says so
		}
		if len(result.Changes) == burst {
			return
		}
		c := remove(kind.Resource, m)
		c.Propagation = &background
		result.change(c)
	}
}

// conditions says how far the deletion is, in Kubernetes' words.
func (Namespace) conditions(in Input, ns *corev1.Namespace, left []*objects.Meta) []corev1.NamespaceCondition {
	byResource, byFinalizer := map[schema.GroupResource]int{}, map[string]int{}
	unserved := map[string]bool{}
	for _, m := range left {
		kind, ok := in.Kinds.Lookup(m.GVK.GroupKind())
		if !ok {
			unserved[m.GVK.GroupKind().String()] = true
			kind.Resource = schema.GroupVersionResource{Group: m.GVK.Group, Resource: strings.ToLower(m.GVK.Kind)}
		}
		byResource[kind.Resource.GroupResource()]++
		for _, f := range m.Finalizers {
			byFinalizer[f]++
		}
	}
	var resources, finalizers, failures []string
	for r, count := range byResource {
		resources = append(resources, fmt.Sprintf("%s.%s has %d resource instances", r.Resource, r.Group, count))
	}
	for f, count := range byFinalizer {
		finalizers = append(finalizers, fmt.Sprintf("%s in %d resource instances", f, count))
	}
	for _, f := range in.Failed {
		if f.Change.Verb == Delete {
			failures = append(failures, f.Err.Error())
		}
	}
	slices.Sort(resources)
	slices.Sort(finalizers)
	slices.Sort(failures)

	out := slices.Clone(ns.Status.Conditions)
	set := func(t corev1.NamespaceConditionType, bad bool, reason, message, okReason, okMessage string) {
		c := corev1.NamespaceCondition{Type: t, Status: corev1.ConditionFalse, Reason: okReason, Message: okMessage}
		if bad {
			c.Status, c.Reason, c.Message = corev1.ConditionTrue, reason, message
		}
		c.LastTransitionTime = metav1.NewTime(in.Now).Rfc3339Copy()
		at := slices.IndexFunc(out, func(o corev1.NamespaceCondition) bool { return o.Type == t })
		if at < 0 {
			out = append(out, c)
			return
		}
		if out[at].Status == c.Status {
			c.LastTransitionTime = out[at].LastTransitionTime
		}
		out[at] = c
	}
	set(corev1.NamespaceDeletionDiscoveryFailure, len(unserved) > 0, "DiscoveryFailed",
		"Not served by the API: "+strings.Join(slices.Sorted(maps.Keys(unserved)), ", "),
		"ResourcesDiscovered", "All resources successfully discovered")
	set(corev1.NamespaceDeletionGVParsingFailure, false, "", "", "ParsedGroupVersions", "All legacy kube types successfully parsed")
	set(corev1.NamespaceDeletionContentFailure, len(failures) > 0, "ContentDeletionFailed",
		fmt.Sprintf("Failed to delete all resource types, %d remaining: %s", len(failures), strings.Join(failures, ", ")),
		"ContentDeleted", "All content successfully deleted, may be waiting on finalization")
	set(corev1.NamespaceContentRemaining, len(resources) > 0, "SomeResourcesRemain",
		"Some resources are remaining: "+strings.Join(resources, ", "), "ContentRemoved", "All content successfully removed")
	set(corev1.NamespaceFinalizersRemaining, len(finalizers) > 0, "SomeFinalizersRemain",
		"Some content in the namespace has finalizers remaining: "+strings.Join(finalizers, ", "),
		"ContentHasNoFinalizers", "All content-preserving finalizers finished")
	return out
}
