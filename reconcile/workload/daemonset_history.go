package workload

import (
	"maps"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
)

const daemonHashLabel = appsv1.DefaultDaemonSetUniqueLabelKey

// revisions keeps the ControllerRevisions of the DaemonSet and finds the hash of the
// newest. made says that it has asked for that one to be made.
func (d *daemons) revisions(selector labels.Selector) (made bool, collisions *int32, err error) {
	collisions = d.ds.Status.CollisionCount
	data, err := revisionData(&d.ds.Spec.Template)
	if err != nil {
		return false, collisions, err
	}
	h := historyOf(d.in, d.ds, reconcile.DaemonSetKind, selector, true)
	d.result.Requests = append(d.result.Requests, h.requests...)
	current, renumber := h.current(data)
	if current == nil {
		rev, exists, collided := h.propose(d.in.Snapshot, data, ptr.Deref(collisions, 0), func(n int32) string {
			return setName(d.ds.Name, templateHash(&d.ds.Spec.Template, d.count(n)))
		})
		if collided != ptr.Deref(collisions, 0) {
			collisions = &collided
		}
		if !exists {
			rev.Labels = maps.Clone(d.ds.Spec.Template.Labels)
			if rev.Labels == nil {
				rev.Labels = map[string]string{}
			}
			rev.Labels[daemonHashLabel] = templateHash(&d.ds.Spec.Template, d.count(collided))
			create := reconcile.Create(reconcile.ControllerRevisionsResource, rev)
			if collisions != d.ds.Status.CollisionCount {
				counted := d.ds.DeepCopy()
				counted.Status.CollisionCount = collisions
				count := reconcile.UpdateStatus(reconcile.DaemonSetsResource, counted)
				count.Then = []reconcile.Request{create}
				create = count
			}
			d.result.Add(create)
			d.result.At(d.in.Now) // nothing else wakes it (revisionKeys)
			return true, collisions, nil
		}
		current = rev
	}
	d.hash = hashOf(current)
	d.tidy(&h, current, renumber, data)
	return false, collisions, nil
}

// count is the number of collisions as it goes into a hash: not at all before there was
// the first.
func (d *daemons) count(n int32) *int32 {
	if n == 0 && d.ds.Status.CollisionCount == nil {
		return nil
	}
	return &n
}

// hashOf is the hash that a revision's pods are labeled with: its name, if it was made
// without one.
func hashOf(rev *appsv1.ControllerRevision) string {
	if hash, ok := rev.Labels[daemonHashLabel]; ok {
		return hash
	}
	return rev.Name
}

// tidy makes each template have one revision with a hash, the current one the newest,
// and deletes old ones that no pod has once there are more than are to be kept.
func (d *daemons) tidy(h *history, current *appsv1.ControllerRevision, renumber *reconcile.Request, data []byte) {
	if _, ok := current.Labels[daemonHashLabel]; renumber != nil && ok {
		d.result.Add(*renumber)
	}
	doubles := map[string]string{} // names of further revisions of the current template, by hash
	for _, rev := range h.equal(data) {
		if rev.Name != current.Name {
			doubles[hashOf(rev)] = rev.Name
		}
	}
	live := map[string]bool{d.hash: true}
	for _, pod := range d.pods {
		hash := pod.Labels[daemonHashLabel]
		live[hash] = true
		if _, ok := doubles[hash]; ok {
			meta := reconcile.Pinned(pod)
			meta["labels"] = map[string]any{daemonHashLabel: d.hash}
			d.result.Add(reconcile.MergePatch(reconcile.PodsResource, pod, "", map[string]any{"metadata": meta}))
		}
	}
	old := 0
	for _, rev := range h.revisions {
		switch _, ok := rev.Labels[daemonHashLabel]; {
		case !ok:
			labeled := rev.DeepCopy()
			if labeled.Labels == nil {
				labeled.Labels = map[string]string{}
			}
			labeled.Labels[daemonHashLabel] = rev.Name
			d.result.Add(reconcile.Update(reconcile.ControllerRevisionsResource, labeled))
		case doubles[hashOf(rev)] == rev.Name:
			if !live[hashOf(rev)] {
				d.result.Add(reconcile.Delete(reconcile.ControllerRevisionsResource, rev))
			}
		case rev.Name != current.Name:
			old++
		}
	}
	if d.ds.Spec.RevisionHistoryLimit == nil {
		return
	}
	if over := old - int(*d.ds.Spec.RevisionHistoryLimit); over > 0 {
		d.result.Requests = append(d.result.Requests, h.truncate(over, func(rev *appsv1.ControllerRevision) bool {
			_, double := doubles[hashOf(rev)]
			return live[hashOf(rev)] || double
		})...)
	}
}
