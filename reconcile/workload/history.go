package workload

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"timonel/reconcile"
	"timonel/state/objects"
)

// history is the ControllerRevisions of a StatefulSet or DaemonSet: what its
// template is and has been. Names, numbers and data are as Kubernetes makes them,
// so that a cluster that moves over keeps its history and no pod restarts for it.
type history struct {
	owner     reconcile.Object
	kind      schema.GroupVersionKind
	revisions []*appsv1.ControllerRevision // the oldest first
	// requests adopt the revisions that match and are nobody's, and release those
	// that are the owner's and do not match.
	requests []reconcile.Request
}

// revisionKeys returns the keys of the owners that a changed revision concerns, and of
// those that could adopt it. As upstream's controllers, nobody is woken by a new one that
// has its owner already: a copy that a user makes stays until something else happens.
func revisionKeys(c objects.Changed, kind schema.GroupVersionKind, adopters func(m *objects.Meta) []reconcile.Key) []reconcile.Key {
	if c.Old == nil && metav1.GetControllerOfNoCopy(c.New) != nil && c.New.DeletionTimestamp == nil {
		return nil
	}
	return reconcile.OwnerKeys(c, kind, adopters)
}

// historyOf returns the revisions of an owner. A StatefulSet ignores revisions of
// its own that do not match its selector, a DaemonSet releases them.
func historyOf(in reconcile.Input, owner reconcile.Object, kind schema.GroupVersionKind, selector labels.Selector, release bool) history {
	h := history{owner: owner, kind: kind}
	claim := reconcile.Claim{Owner: owner, OwnerKind: kind, Resource: reconcile.ControllerRevisionsResource, Selector: selector}
	for rev := range claimable(in.Snapshot, owner, in.Snapshot.OrphanRevisions) {
		if !release && !selector.Matches(labels.Set(rev.Labels)) {
			continue
		}
		if claim.Claims(rev) {
			h.revisions = append(h.revisions, rev)
		}
	}
	h.requests = claim.Requests
	slices.SortStableFunc(h.revisions, func(a, b *appsv1.ControllerRevision) int {
		return cmp.Or(
			cmp.Compare(a.Revision, b.Revision),
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Name, b.Name),
		)
	})
	return h
}

// newest is the last revision, nil when there is none.
func (h *history) newest() *appsv1.ControllerRevision {
	if len(h.revisions) == 0 {
		return nil
	}
	return h.revisions[len(h.revisions)-1]
}

// next is the number of the revision after the newest.
func (h *history) next() int64 {
	if last := h.newest(); last != nil {
		return last.Revision + 1
	}
	return 1
}

// named returns the revision of a name, nil when there is none.
func (h *history) named(name string) *appsv1.ControllerRevision {
	for _, rev := range h.revisions {
		if rev.Name == name {
			return rev
		}
	}
	return nil
}

// equal returns the revisions that hold data, the oldest first.
func (h *history) equal(data []byte) []*appsv1.ControllerRevision {
	var out []*appsv1.ControllerRevision
	for _, rev := range h.revisions {
		if bytes.Equal(rev.Data.Raw, data) {
			out = append(out, rev)
		}
	}
	return out
}

// current returns the revision that holds data, or nil when one must be made. An
// older one becomes the newest again: it is returned with the number that the
// request gives it.
func (h *history) current(data []byte) (*appsv1.ControllerRevision, *reconcile.Request) {
	equal := h.equal(data)
	if len(equal) == 0 {
		if last := h.newest(); last != nil && holds(last, data) {
			return last, nil
		}
		return nil, nil
	}
	rev := equal[len(equal)-1]
	if bytes.Equal(h.newest().Data.Raw, rev.Data.Raw) {
		return h.newest(), nil
	}
	rev = rev.DeepCopy()
	rev.Revision = h.next()
	renumber := reconcile.Update(reconcile.ControllerRevisionsResource, rev)
	return rev, &renumber
}

// holds says whether a revision is of the same template as data, written by a
// release that encodes templates otherwise.
func holds(rev *appsv1.ControllerRevision, data []byte) bool {
	template, err := revisionTemplate(rev)
	if err != nil {
		return false
	}
	again, err := revisionData(template)
	return err == nil && bytes.Equal(again, data)
}

// propose returns a revision to create that holds data, by the name that name gives
// it, or the one that exists by that name and holds the same. A name that other data
// has counts as a collision, and another is asked for.
func (h *history) propose(s *objects.Snapshot, data []byte, collisions int32, name func(collisions int32) string) (rev *appsv1.ControllerRevision, exists bool, collided int32) {
	for ; ; collisions++ {
		n := name(collisions)
		taken, ok := s.ControllerRevisions().Get(h.owner.GetNamespace(), n)
		switch {
		case !ok:
			return &appsv1.ControllerRevision{
				ObjectMeta: metav1.ObjectMeta{
					Name: n, Namespace: h.owner.GetNamespace(),
					Annotations:     maps.Clone(h.owner.GetAnnotations()),
					OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(h.owner, h.kind)},
				},
				Data:     runtime.RawExtension{Raw: data},
				Revision: h.next(),
			}, false, collisions
		case bytes.Equal(taken.Data.Raw, data):
			return taken, true, collisions
		}
	}
}

// truncate returns requests that delete the n oldest revisions that are not live.
func (h *history) truncate(n int, live func(*appsv1.ControllerRevision) bool) []reconcile.Request {
	var out []reconcile.Request
	for _, rev := range h.revisions {
		if len(out) >= n {
			break
		}
		if !live(rev) && rev.DeletionTimestamp == nil {
			out = append(out, reconcile.Delete(reconcile.ControllerRevisionsResource, rev))
		}
	}
	return out
}

// revisionData is what a revision holds of a template: a patch that puts it back.
func revisionData(template *corev1.PodTemplateSpec) ([]byte, error) {
	raw, err := json.Marshal(template)
	if err != nil {
		return nil, fmt.Errorf("encode the pod template: %w", err)
	}
	// Through a map, which sorts the fields as Kubernetes does.
	var fields map[string]any
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, fmt.Errorf("encode the pod template: %w", err)
	}
	fields["$patch"] = "replace"
	return json.Marshal(map[string]any{"spec": map[string]any{"template": fields}})
}

// revisionTemplate is the template that a revision holds. What Kubernetes writes
// replaces the whole of it.
func revisionTemplate(rev *appsv1.ControllerRevision) (*corev1.PodTemplateSpec, error) {
	patched, err := strategicpatch.StrategicMergePatch([]byte(`{"spec":{"template":{}}}`), rev.Data.Raw, appsv1.StatefulSet{})
	if err != nil {
		return nil, fmt.Errorf("controller revision %s/%s: data: %w", rev.Namespace, rev.Name, err)
	}
	var set appsv1.StatefulSet
	if err := json.Unmarshal(patched, &set); err != nil {
		return nil, fmt.Errorf("controller revision %s/%s: data: %w", rev.Namespace, rev.Name, err)
	}
	return &set.Spec.Template, nil
}

// dataHash is the hash that a StatefulSet's revisions have in their names.
func dataHash(data []byte, collisions int32) string {
	h := fnv.New32()
	_, _ = h.Write(data) // a hash never fails
	_, _ = h.Write([]byte(strconv.FormatInt(int64(collisions), 10)))
	return rand.SafeEncodeString(strconv.FormatUint(uint64(h.Sum32()), 10))
}

// revisionName is the name of a StatefulSet's revision. The longest that leaves
// room for any hash is what Kubernetes cuts it to.
func revisionName(owner, hash string) string {
	const longest = 223
	if len(owner) > longest {
		owner = owner[:longest]
	}
	return owner + "-" + hash
}
