package cleanup

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"

	"timonel/reconcile"
	"timonel/state/objects"
)

// GarbageCollector deletes objects whose owners are gone, and carries out
// foreground deletion and orphaning by their finalizers. It works on the
// metadata of every object of every kind.
type GarbageCollector struct{}

// Name implements Reconciler.
func (GarbageCollector) Name() string { return "garbage-collector-controller" }

// Traits implements reconcile.Reconciler: what may own depends on what the API serves.
func (GarbageCollector) Traits() reconcile.Traits { return reconcile.Traits{Kinds: true} }

// All implements Reconciler: only objects about which something may have to be
// done have a key, or the start of a term would look at everything.
func (GarbageCollector) All(s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for m := range s.Metas().All() {
		if garbageWork(m, s) {
			keys = append(keys, garbageKey(m))
		}
	}
	return keys
}

// garbageWork says whether an object may have to be collected or released.
func garbageWork(m *objects.Meta, s *objects.Snapshot) bool {
	if m.DeletionTimestamp != nil {
		return hasFinalizer(m, metav1.FinalizerDeleteDependents) || hasFinalizer(m, metav1.FinalizerOrphanDependents)
	}
	for i := range m.OwnerReferences {
		owner, ok := s.Metas().ByUID(m.OwnerReferences[i].UID)
		if !ok || owner.DeletionTimestamp != nil || !isOwner(owner, m, &m.OwnerReferences[i]) {
			return true
		}
	}
	return false
}

// Keys implements Reconciler.
func (GarbageCollector) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	if c.New != nil && garbageWork(c.New, s) {
		keys = append(keys, garbageKey(c.New))
	}
	// The dependents of an object that is gone, or that another one replaced
	// under the same name, have lost an owner. Those of one that begins to wait for
	// them, whether it is being deleted since now or was before, are to be deleted.
	if c.Old != nil && (c.New == nil || c.New.UID != c.Old.UID || waits(c.New) != waits(c.Old)) {
		for dependent := range s.OwnedBy(c.Old.UID) {
			keys = append(keys, garbageKey(dependent))
		}
	}
	// An owner that waits for its dependents may wait for this one no longer, and
	// one that gives them up has another to give up.
	for _, m := range reconcile.Versions(c) {
		for i := range m.OwnerReferences {
			if owner, ok := s.Metas().ByUID(m.OwnerReferences[i].UID); ok && owner.DeletionTimestamp != nil && garbageWork(owner, s) {
				keys = append(keys, garbageKey(owner))
			}
		}
	}
	return keys
}

// waits says whether an object is to be gone after its dependents.
func waits(m *objects.Meta) bool {
	return m.DeletionTimestamp != nil && hasFinalizer(m, metav1.FinalizerDeleteDependents)
}

func garbageKey(m *objects.Meta) reconcile.Key {
	return reconcile.Key{Group: m.GVK.Group, Kind: m.GVK.Kind, Namespace: m.Namespace, Name: m.Name, UID: m.UID}
}

func hasFinalizer(m *objects.Meta, finalizer string) bool {
	return slices.Contains(m.Finalizers, finalizer)
}

// isOwner says whether found, which has the UID of ref, is what a dependent can
// be owned by under that reference.
func isOwner(found, dependent *objects.Meta, ref *metav1.OwnerReference) bool {
	if found.Name != ref.Name || found.GVK.Kind != ref.Kind {
		return false
	}
	return found.Namespace == "" || found.Namespace == dependent.Namespace
}

// Reconcile implements Reconciler.
func (g GarbageCollector) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	m, ok := in.Snapshot.Metas().ByUID(key.UID)
	if !ok || m.Name != key.Name || m.Namespace != key.Namespace {
		return reconcile.Result{}, nil
	}
	kind, ok := in.Kinds.Lookup(m.GVK.GroupKind())
	if !ok {
		return reconcile.Result{}, nil // not served (yet): the key comes again when it is
	}
	if m.DeletionTimestamp != nil {
		switch {
		case hasFinalizer(m, metav1.FinalizerOrphanDependents):
			return g.orphan(in, m, kind), nil
		case hasFinalizer(m, metav1.FinalizerDeleteDependents):
			return g.foreground(in, m, kind), nil
		}
		return reconcile.Result{}, nil
	}
	return g.collect(in, m, kind), nil
}

// orphan takes the owner out of its dependents, and then lets it go.
func (GarbageCollector) orphan(in reconcile.Input, m *objects.Meta, kind reconcile.Kind) reconcile.Result {
	var result reconcile.Result
	waiting := false
	for dependent := range in.Snapshot.OwnedBy(m.UID) {
		waiting = true
		if of, ok := in.Kinds.Lookup(dependent.GVK.GroupKind()); ok {
			result.Add(reconcile.PatchOwners(of.Resource, dependent, slices.DeleteFunc(slices.Clone(dependent.OwnerReferences),
				func(r metav1.OwnerReference) bool { return r.UID == m.UID })))
		}
	}
	if !waiting {
		result.Add(withoutFinalizer(kind.Resource, m, metav1.FinalizerOrphanDependents))
	}
	return result
}

// foreground lets an owner go once no dependent that blocks its deletion is left.
// The dependents are deleted under their own keys.
func (GarbageCollector) foreground(in reconcile.Input, m *objects.Meta, kind reconcile.Kind) reconcile.Result {
	for dependent := range in.Snapshot.OwnedBy(m.UID) {
		for i := range dependent.OwnerReferences {
			if ref := &dependent.OwnerReferences[i]; ref.UID == m.UID && ref.BlockOwnerDeletion != nil && *ref.BlockOwnerDeletion && isOwner(m, dependent, ref) {
				return reconcile.Result{}
			}
		}
	}
	var result reconcile.Result
	result.Add(withoutFinalizer(kind.Resource, m, metav1.FinalizerDeleteDependents))
	return result
}

// collect deletes an object none of whose owners is left, and takes owners that
// are gone, or wait for it to be gone, out of one that has another.
func (g GarbageCollector) collect(in reconcile.Input, m *objects.Meta, kind reconcile.Kind) reconcile.Result {
	if len(m.OwnerReferences) == 0 {
		return reconcile.Result{}
	}
	var result reconcile.Result
	var solid []metav1.OwnerReference
	waiting := 0
	for i := range m.OwnerReferences {
		ref := &m.OwnerReferences[i]
		switch state := g.ownerState(in, m, ref); state {
		case ownerUnknown:
			return result // neither here nor gone for certain
		case ownerInvalid:
			result.Events = append(result.Events, reconcile.Event{
				Object: reconcile.Reference(m.GVK, m), Type: corev1.EventTypeWarning, Reason: "OwnerRefInvalidNamespace",
				Message: "ownerRef [" + ref.APIVersion + "/" + ref.Kind + ", name: " + ref.Name + ", uid: " + string(ref.UID) +
					"] names a namespaced owner, which an object of the cluster cannot have",
			})
			return result
		case ownerSolid:
			solid = append(solid, *ref)
		case ownerWaiting:
			waiting++
		}
	}
	switch {
	case len(solid) == len(m.OwnerReferences):
		return result
	case len(solid) > 0:
		result.Add(reconcile.PatchOwners(kind.Resource, m, solid))
		return result
	}

	policy := metav1.DeletePropagationBackground
	unblock := false
	if waiting > 0 {
		for dependent := range in.Snapshot.OwnedBy(m.UID) {
			// Its owner waits for it, so it waits for its own dependents in turn.
			policy = metav1.DeletePropagationForeground
			if waits(dependent) {
				unblock = true // perhaps a circle, in which everyone would wait for ever
			}
		}
	}
	if waiting == 0 || policy == metav1.DeletePropagationBackground {
		switch {
		case hasFinalizer(m, metav1.FinalizerOrphanDependents):
			policy = metav1.DeletePropagationOrphan
		case hasFinalizer(m, metav1.FinalizerDeleteDependents):
			policy = metav1.DeletePropagationForeground
		}
	}
	c := reconcile.Delete(kind.Resource, m)
	c.Propagation = &policy
	if !unblock {
		// Only this version is known to have no other owner.
		version := m.ResourceVersion
		c.Preconditions.ResourceVersion = &version
		result.Add(c)
		return result
	}
	refs := slices.Clone(m.OwnerReferences)
	for i := range refs {
		refs[i].BlockOwnerDeletion = nil
	}
	first := reconcile.PatchOwners(kind.Resource, m, refs)
	first.Then = []reconcile.Request{c}
	result.Add(first)
	return result
}

// ownerState is what became of an owner.
type ownerState int

const (
	ownerSolid   ownerState = iota // it is there
	ownerWaiting                   // it is there, and waits for its dependents to be deleted
	ownerGone                      // it is not there
	ownerInvalid                   // it can never be there
	ownerUnknown                   // the kind is not one that this state holds
)

// ownerState looks an owner up. The snapshot holds every object of this cluster,
// so one that is not in it is gone, unless another API server keeps it.
func (GarbageCollector) ownerState(in reconcile.Input, m *objects.Meta, ref *metav1.OwnerReference) ownerState {
	owner, ok := in.Snapshot.Metas().ByUID(ref.UID)
	if ok && isOwner(owner, m, ref) {
		if waits(owner) {
			return ownerWaiting
		}
		return ownerSolid
	}
	gv, err := schema.ParseGroupVersion(ref.APIVersion)
	if err != nil {
		return ownerUnknown
	}
	kind, served := in.Kinds.Lookup(schema.GroupKind{Group: gv.Group, Kind: ref.Kind})
	switch {
	case !served:
		return ownerUnknown
	case m.Namespace == "" && kind.Namespaced:
		return ownerInvalid
	case !keptHere(in.Snapshot, kind.Resource):
		return ownerUnknown
	}
	return ownerGone
}

// keptHere says whether this state holds a resource's objects: that of a built-in
// group, or one that a CustomResourceDefinition defines. Others are those of
// aggregated API servers, which keep them elsewhere.
func keptHere(s *objects.Snapshot, r schema.GroupVersionResource) bool {
	if scheme.Scheme.IsGroupRegistered(r.Group) || r.Group == crdResource.Group || r.Group == "apiregistration.k8s.io" {
		return true
	}
	_, ok := s.Metas().Get(objects.DefaultPrefix + crdResource.Group + "/" + crdResource.Resource + "/" + r.Resource + "." + r.Group)
	return ok
}

var crdResource = schema.GroupResource{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"}

// withoutFinalizer returns the change that takes a finalizer from this version of m.
func withoutFinalizer(resource schema.GroupVersionResource, m *objects.Meta, finalizer string) reconcile.Request {
	left := slices.DeleteFunc(slices.Clone(m.Finalizers), func(f string) bool { return f == finalizer })
	meta := reconcile.Pinned(m)
	if meta["finalizers"] = left; len(left) == 0 {
		meta["finalizers"] = nil
	}
	return reconcile.MergePatch(resource, m, "", map[string]any{"metadata": meta})
}
