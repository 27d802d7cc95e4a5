package workload

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/reconcile"
	"timonel/state/objects"
)

// StatefulSet keeps the pods of each StatefulSet: one of each ordinal, under a name
// and with claims of its own, one after another unless the set says otherwise.
//
// No two pods of one ordinal are ever there: a pod has its identity as its name, and
// a new one is created once the object of the old one is gone, which is when its
// node has said that nothing of it runs.
type StatefulSet struct {
	// Burst is how many pods of a parallel set one pass creates at most, large ones
	// fewer. Default 500.
	Burst int
}

// Name implements Reconciler.
func (StatefulSet) Name() string { return "statefulset-controller" }

// All implements Reconciler.
func (StatefulSet) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.StatefulSetKind, s.StatefulSets().All())
}

// Keys implements Reconciler: a StatefulSet follows itself, its pods, its revisions,
// its claims, and pods and revisions that it could adopt.
func (StatefulSet) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case reconcile.StatefulSetKind.GroupKind():
		return []reconcile.Key{reconcile.KeyOf(reconcile.StatefulSetKind, now)}
	case reconcile.PodKind.GroupKind():
		keys := reconcile.OwnerKeys(c, reconcile.StatefulSetKind, nil)
		// It may be adopted, or was in the way of the set's own pod and is gone.
		if parent, _ := identityOf(now.Name); c.New == nil || metav1.GetControllerOfNoCopy(c.New) == nil {
			if _, ok := s.StatefulSets().Get(now.Namespace, parent); ok {
				keys = append(keys, reconcile.NewKey(reconcile.StatefulSetKind, now.Namespace, parent))
			}
		}
		return keys
	case reconcile.ControllerRevisionKind.GroupKind():
		return revisionKeys(c, reconcile.StatefulSetKind, func(m *objects.Meta) []reconcile.Key {
			var keys []reconcile.Key
			for set := range s.StatefulSets().InNamespace(m.Namespace) {
				if reconcile.Selects(set.Spec.Selector, m.Labels) {
					keys = append(keys, reconcile.KeyOf(reconcile.StatefulSetKind, set))
				}
			}
			return keys
		})
	case reconcile.PVCKind.GroupKind():
		return claimKeys(c, s)
	}
	return nil
}

// claimKeys returns the keys of the sets that a claim may be of by its name, when
// something changed that decides what becomes of pods: that it is there, is being
// deleted, or is owned.
func claimKeys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	if c.Old != nil && c.New != nil && c.Old.UID == c.New.UID && (c.Old.DeletionTimestamp == nil) == (c.New.DeletionTimestamp == nil) &&
		equality.Semantic.DeepEqual(c.Old.OwnerReferences, c.New.OwnerReferences) {
		return nil
	}
	now := c.Meta()
	rest, ordinal := identityOf(now.Name) // CLAIM-SET-ORDINAL
	if ordinal < 0 {
		return nil
	}
	var keys []reconcile.Key
	for i := range len(rest) {
		if rest[i] != '-' {
			continue
		}
		if set, ok := s.StatefulSets().Get(now.Namespace, rest[i+1:]); ok &&
			slices.ContainsFunc(set.Spec.VolumeClaimTemplates, func(t corev1.PersistentVolumeClaim) bool { return t.Name == rest[:i] }) {
			keys = append(keys, reconcile.KeyOf(reconcile.StatefulSetKind, set))
		}
	}
	return keys
}

// stateful is one pass over a StatefulSet.
type stateful struct {
	in     reconcile.Input
	set    *appsv1.StatefulSet
	burst  int
	result reconcile.Result

	history         history
	current, update *appsv1.ControllerRevision
	templates       map[string]*corev1.PodTemplateSpec // by the revision's name

	// replicas are the pods of the wanted ordinals, nil for one that is not there,
	// condemned those of others, the highest ordinal first.
	replicas, condemned []*corev1.Pod
	deleted, retained   map[*corev1.Pod]bool // in this pass
	created             int
	status              appsv1.StatefulSetStatus
}

// Reconcile implements Reconciler.
func (s StatefulSet) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	set, ok := in.Snapshot.StatefulSets().Get(key.Namespace, key.Name)
	if !ok {
		return reconcile.Result{}, nil
	}
	selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("stateful set %s/%s: spec.selector: %w", set.Namespace, set.Name, err)
	}
	r := &stateful{in: in, set: set, burst: s.Burst, deleted: map[*corev1.Pod]bool{}, retained: map[*corev1.Pod]bool{}}
	if r.burst == 0 {
		r.burst = 500
	}
	r.history = historyOf(in, set, reconcile.StatefulSetKind, selector, false)
	r.result.Requests = r.history.requests
	pods := r.claimPods(selector)

	if ready, err := r.revisions(); err != nil || !ready {
		return r.result, err
	}
	r.partition(pods)
	r.reportFailures()
	r.count()
	if set.DeletionTimestamp == nil {
		if err := r.manage(); err != nil {
			r.report()
			return r.result, err
		}
	}
	r.truncate(pods)
	r.report()
	return r.result, nil
}

// claimPods returns the set's pods, those that have ended or terminate included.
func (r *stateful) claimPods(selector labels.Selector) []*corev1.Pod {
	claim := reconcile.Claim{
		Owner: r.set, OwnerKind: reconcile.StatefulSetKind, Resource: reconcile.PodsResource, Selector: selector,
		Match: func(obj metav1.Object) bool { parent, _ := identityOf(obj.GetName()); return parent == r.set.Name },
	}
	var pods []*corev1.Pod
	for pod := range reconcile.OwnedPods(r.in.Snapshot, r.set) {
		if metav1.GetControllerOfNoCopy(pod) != nil && claim.Claims(pod) {
			pods = append(pods, pod)
		}
	}
	for pod := range r.in.Snapshot.Pods().Named(r.set.Namespace, r.set.Name+"-") {
		if metav1.GetControllerOfNoCopy(pod) == nil && claim.Claims(pod) {
			pods = append(pods, pod)
		}
	}
	r.result.Requests = append(r.result.Requests, claim.Requests...)
	return pods
}

// revisions finds the revision that the set's template is and the one that its pods
// come from. It returns false when one must be written first: no pod is of a
// revision that is not there.
func (r *stateful) revisions() (bool, error) {
	data, err := revisionData(&r.set.Spec.Template)
	if err != nil {
		return false, fmt.Errorf("stateful set %s/%s: %w", r.set.Namespace, r.set.Name, err)
	}
	var collisions int32
	if c := r.set.Status.CollisionCount; c != nil {
		collisions = *c
	}
	update, renumber := r.history.current(data)
	switch {
	case renumber != nil:
		r.result.Add(*renumber)
		return false, nil
	case update == nil:
		hash := dataHash(data, collisions)
		rev, exists, collided := r.history.propose(r.in.Snapshot, data, collisions, func(n int32) string {
			return revisionName(r.set.Name, dataHash(data, n))
		})
		if exists {
			update, collisions = rev, collided
			break
		}
		if r.set.DeletionTimestamp != nil {
			return false, nil // what owns things must not get new ones while it goes
		}
		rev.Labels = with(r.set.Spec.Template.Labels, revisionHashLabel, hash)
		create := reconcile.Create(reconcile.ControllerRevisionsResource, rev)
		if collided != collisions {
			counted := r.set.DeepCopy()
			counted.Status.CollisionCount = &collided
			create.Then = []reconcile.Request{reconcile.UpdateStatus(reconcile.StatefulSetsResource, counted)}
		}
		r.result.Add(create)
		r.result.At(r.in.Now) // nothing else wakes it (revisionKeys)
		return false, nil
	}
	r.update, r.current = update, r.history.named(r.set.Status.CurrentRevision)
	if r.current == nil {
		r.current = r.update
	}
	r.templates = map[string]*corev1.PodTemplateSpec{r.update.Name: &r.set.Spec.Template}
	if r.current.Name != r.update.Name {
		template, err := revisionTemplate(r.current)
		if err != nil {
			return false, fmt.Errorf("stateful set %s/%s: %w", r.set.Namespace, r.set.Name, err)
		}
		r.templates[r.current.Name] = template
	}
	r.status = appsv1.StatefulSetStatus{
		ObservedGeneration: r.set.Generation,
		CurrentRevision:    r.current.Name, UpdateRevision: r.update.Name,
		CollisionCount: &collisions, Conditions: slices.Clone(r.set.Status.Conditions),
	}
	return true, nil
}

// revisionHashLabel holds the hash of a ControllerRevision's data.
const revisionHashLabel = "controller.kubernetes.io/hash"

// truncate deletes the oldest revisions that no pod is of, beyond the limit.
func (r *stateful) truncate(pods []*corev1.Pod) {
	live := map[string]bool{r.current.Name: true, r.update.Name: true}
	for _, pod := range pods {
		live[podRevision(pod)] = true
	}
	if limit := r.set.Spec.RevisionHistoryLimit; limit != nil && *limit >= 0 {
		dead := 0
		for _, rev := range r.history.revisions {
			if !live[rev.Name] {
				dead++
			}
		}
		r.result.Requests = append(r.result.Requests, r.history.truncate(dead-int(*limit), func(rev *appsv1.ControllerRevision) bool { return live[rev.Name] })...)
	}
}

// reportFailures tells the pods' side of claims that were refused: their request
// told the claims'.
func (r *stateful) reportFailures() {
	for _, f := range r.in.Failed {
		if f.Request.Verb != reconcile.VerbCreate || f.Request.Resource != reconcile.PVCsResource {
			continue
		}
		if _, ordinal := identityOf(f.Request.Name); ordinal >= 0 {
			r.warn("FailedCreate", "Create Pod %s in StatefulSet %s failed error: failed to create PVC %s: %v",
				podName(r.set, ordinal), r.set.Name, f.Request.Name, f.Err)
		}
	}
}

// warn records an event about the set.
func (r *stateful) warn(reason, format string, args ...any) {
	r.result.Events = append(r.result.Events, *reconcile.NewEvent(reconcile.StatefulSetKind, r.set, corev1.EventTypeWarning, reason, format, args...))
}

// tell gives a request about one of the set's pods the events of its success and failure.
func (r *stateful) tell(c reconcile.Request, verb, pod string) reconcile.Request {
	c.Event = reconcile.NewEvent(reconcile.StatefulSetKind, r.set, corev1.EventTypeNormal, "Successful"+verb, "%s Pod %s in StatefulSet %s successful", verb, pod, r.set.Name)
	c.FailEvent = reconcile.NewEvent(reconcile.StatefulSetKind, r.set, corev1.EventTypeWarning, "Failed"+verb, "%s Pod %s in StatefulSet %s failed error", verb, pod, r.set.Name)
	return c
}

// delete deletes a pod, once in a pass.
func (r *stateful) delete(pod *corev1.Pod) {
	if pod.DeletionTimestamp != nil || r.deleted[pod] {
		return
	}
	r.deleted[pod] = true
	r.result.Add(r.tell(reconcile.Delete(reconcile.PodsResource, pod), "Delete", pod.Name))
}

// withLabels returns a copy of labels with more.
func withLabels(in map[string]string, more map[string]string) map[string]string {
	out := make(map[string]string, len(in)+len(more))
	maps.Copy(out, in)
	maps.Copy(out, more)
	return out
}

// identityOf returns the set and the ordinal that a pod's name says, and the ordinal
// -1 when it says none.
func identityOf(pod string) (set string, ordinal int) {
	at := strings.LastIndexByte(pod, '-')
	if at < 0 || at == len(pod)-1 {
		return "", -1
	}
	n := 0
	for _, c := range pod[at+1:] {
		if c < '0' || c > '9' {
			return "", -1
		}
		if n = n*10 + int(c-'0'); n > maxOrdinal {
			return pod[:at], -1
		}
	}
	return pod[:at], n
}

// maxOrdinal is the highest ordinal there can be.
const maxOrdinal = 1<<31 - 1
