package cleanup

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

	"timonel/reconcile"
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

// Traits implements reconcile.Reconciler: a pace keeps the writes of the conditions few
// while many objects go one by one.
func (Namespace) Traits() reconcile.Traits {
	return reconcile.Traits{Pace: 200 * time.Millisecond, Kinds: true}
}

// All implements Reconciler.
func (Namespace) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.NamespaceKind, s.Namespaces().All())
}

// Keys implements Reconciler: a namespace follows itself and, while it is being
// deleted, everything in it.
func (Namespace) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	m := c.Meta()
	if m.GVK == reconcile.NamespaceKind {
		return []reconcile.Key{reconcile.NewKey(reconcile.NamespaceKind, "", m.Name)}
	}
	if m.Namespace == "" {
		return nil
	}
	if ns, ok := s.Namespaces().Get("", m.Namespace); !ok || ns.DeletionTimestamp == nil {
		return nil
	}
	return []reconcile.Key{reconcile.NewKey(reconcile.NamespaceKind, "", m.Namespace)}
}

// Reconcile implements Reconciler.
func (n Namespace) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	ns, ok := in.Snapshot.Namespaces().Get("", key.Name)
	if !ok || ns.DeletionTimestamp == nil || !slices.Contains(ns.Spec.Finalizers, corev1.FinalizerKubernetes) {
		return reconcile.Result{}, nil
	}
	if len(in.Kinds) == 0 {
		return reconcile.Result{}, nil // not known yet: the key comes again when they are
	}
	left := n.contents(in, ns.Name)

	var result reconcile.Result
	n.empty(in, left, &result)
	conditions := n.conditions(in, ns, left)
	if ns.Status.Phase != corev1.NamespaceTerminating || !slices.Equal(conditions, ns.Status.Conditions) {
		updated := ns.DeepCopy()
		updated.Status.Phase, updated.Status.Conditions = corev1.NamespaceTerminating, conditions
		result.Add(reconcile.UpdateStatus(reconcile.NamespacesResource, updated))
		return result, nil // the namespace has another version afterwards: finalize in the next pass
	}
	if len(left) > 0 {
		return result, nil
	}
	updated := ns.DeepCopy()
	updated.Spec.Finalizers = slices.DeleteFunc(updated.Spec.Finalizers, func(f corev1.FinalizerName) bool { return f == corev1.FinalizerKubernetes })
	c := reconcile.Update(reconcile.NamespacesResource, updated)
	c.Subresource = "finalize"
	result.Add(c)
	return result, nil
}

// contents returns what is left in a namespace, pods first.
func (Namespace) contents(in reconcile.Input, namespace string) []*objects.Meta {
	var pods, others []*objects.Meta
	for m := range in.Snapshot.Metas().InNamespace(namespace) {
		if m.GVK == reconcile.PodKind {
			pods = append(pods, m)
		} else {
			others = append(others, m)
		}
	}
	return append(pods, others...)
}

// empty deletes what is left and not being deleted already. Other objects wait
// until the pods are gone, because pods may need them until then.
func (n Namespace) empty(in reconcile.Input, left []*objects.Meta, result *reconcile.Result) {
	burst := cmp.Or(n.Burst, 500)
	hasPods := len(left) > 0 && left[0].GVK == reconcile.PodKind
	background := metav1.DeletePropagationBackground
	for _, m := range left {
		if hasPods && m.GVK != reconcile.PodKind {
			return
		}
		if m.DeletionTimestamp != nil {
			continue
		}
		kind, ok := in.Kinds.Lookup(m.GVK.GroupKind())
		if !ok {
			continue // a kind that is not served, or not yet: the condition says so
		}
		if len(result.Requests) == burst {
			return
		}
		c := reconcile.Delete(kind.Resource, m)
		c.Propagation = &background
		result.Add(c)
	}
}

// conditions says how far the deletion is, in Kubernetes' words.
func (Namespace) conditions(in reconcile.Input, ns *corev1.Namespace, left []*objects.Meta) []corev1.NamespaceCondition {
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
		if f.Request.Verb == reconcile.VerbDelete {
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
