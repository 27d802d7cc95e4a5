package service

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/reconcile"
)

// sliceWrites collects what becomes of an owner's slices.
type sliceWrites struct {
	in        reconcile.Input
	owner     reconcile.Object
	ownerKind schema.GroupVersionKind

	created, updated, deleted []*discoveryv1.EndpointSlice
}

func newSliceWrites(in reconcile.Input, owner reconcile.Object, kind schema.GroupVersionKind) *sliceWrites {
	return &sliceWrites{in: in, owner: owner, ownerKind: kind}
}

// reuse makes what would be created take the place of what would be deleted, of the
// same family, which cannot change: readers then see no moment without endpoints,
// and one write less.
func (w *sliceWrites) reuse() {
	w.created = slices.DeleteFunc(w.created, func(next *discoveryv1.EndpointSlice) bool {
		i := slices.IndexFunc(w.deleted, func(old *discoveryv1.EndpointSlice) bool { return old.AddressType == next.AddressType })
		if i < 0 {
			return false
		}
		old := w.deleted[i]
		w.deleted = slices.Delete(w.deleted, i, i+1)
		takePlace(next, old)
		w.updated = append(w.updated, next)
		return true
	})
}

// takePlace makes next the new content of old.
func takePlace(next, old *discoveryv1.EndpointSlice) {
	next.Name, next.UID, next.ResourceVersion, next.Generation = old.Name, old.UID, old.ResourceVersion, old.Generation
}

// requests adds the requests. Without create none is made anew, because the owner or
// its namespace is on its way out.
func (w *sliceWrites) requests(result *reconcile.Result, create bool) {
	w.reuse()
	failed := func(c reconcile.Request, what string) {
		c.FailEvent = reconcile.NewEvent(w.ownerKind, w.owner, corev1.EventTypeWarning, "FailedToUpdateEndpointSlices",
			"Error %s Endpoint Slice for %s %s/%s", what, w.ownerKind.Kind, w.owner.GetNamespace(), w.owner.GetName())
		result.Add(c)
	}
	if create && len(w.created) > 0 {
		names := reconcile.NewNames(w.in, w.owner)
		names.Taken = func(name string) bool {
			_, ok := w.in.Snapshot.EndpointSlices().Get(w.owner.GetNamespace(), name)
			return ok
		}
		for _, slice := range w.created {
			slice.Name, slice.GenerateName = names.Next(), reconcile.NamePrefix(w.owner.GetName())
			failed(reconcile.Create(endpointSlicesResource, slice), "creating")
		}
	}
	slices.SortFunc(w.updated, func(a, b *discoveryv1.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	for _, slice := range w.updated {
		failed(reconcile.Update(endpointSlicesResource, slice), "updating")
	}
	for _, slice := range w.deleted {
		result.Add(reconcile.Delete(endpointSlicesResource, slice))
	}
}
