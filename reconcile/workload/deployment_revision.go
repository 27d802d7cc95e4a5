package workload

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/dump"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/apimachinery/pkg/util/validation"

	"timonel/reconcile"
)

// The annotations by which a Deployment, its ReplicaSets and kubectl understand each other.
const (
	RevisionAnnotation        = "deployment.kubernetes.io/revision"
	revisionHistoryAnnotation = "deployment.kubernetes.io/revision-history"
	desiredReplicasAnnotation = "deployment.kubernetes.io/desired-replicas"
	maxReplicasAnnotation     = "deployment.kubernetes.io/max-replicas"

	// maxRevisionHistory bounds the revision-history annotation, in characters.
	maxRevisionHistory = 2000

	templateHashLabel = appsv1.DefaultDeploymentUniqueLabelKey
)

// ownAnnotation says whether an annotation is this controller's own business, so
// that it is not copied between a Deployment and its ReplicaSets.
func ownAnnotation(key string) bool {
	switch key {
	case corev1.LastAppliedConfigAnnotation, RevisionAnnotation, revisionHistoryAnnotation,
		desiredReplicasAnnotation, maxReplicasAnnotation, appsv1.DeprecatedRollbackTo:
		return true
	}
	return false
}

// templateHash is the pod-template-hash of a template, the same as Kubernetes
// computes, so that a cluster that moves over keeps its ReplicaSets.
func templateHash(template *corev1.PodTemplateSpec, collisions *int32) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(dump.ForHash(*template))) // a hash never fails
	if collisions != nil {
		b := make([]byte, 8)
		binary.LittleEndian.PutUint32(b, uint32(*collisions))
		_, _ = h.Write(b)
	}
	return rand.SafeEncodeString(strconv.FormatUint(uint64(h.Sum32()), 10))
}

// setName is the name of the ReplicaSet of a Deployment for a template hash.
func setName(deployment, hash string) string {
	if room := validation.DNS1123SubdomainMaxLength - len("-") - len(hash); len(deployment) > room && room > 0 {
		deployment = deployment[:room]
	}
	return deployment + "-" + hash
}

// sameTemplate compares two templates without their hash labels.
func sameTemplate(a, b *corev1.PodTemplateSpec) bool {
	x, y := *a, *b
	x.Labels, y.Labels = withoutHash(a.Labels), withoutHash(b.Labels)
	return equality.Semantic.DeepEqual(&x, &y)
}

func withoutHash(in map[string]string) map[string]string {
	if _, ok := in[templateHashLabel]; !ok {
		return in
	}
	out := maps.Clone(in)
	delete(out, templateHashLabel)
	return out
}

// revisionOf returns a ReplicaSet's revision, 0 when it has none that can be read.
func revisionOf(rs *appsv1.ReplicaSet) int64 {
	n, err := strconv.ParseInt(rs.Annotations[RevisionAnnotation], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// syncRevision makes the current ReplicaSet the newest revision and the
// Deployment show it. With make set, it creates the ReplicaSet if there is none.
func (r *rollout) syncRevision(make bool) {
	var newest int64
	for _, rs := range r.old {
		newest = max(newest, revisionOf(rs))
	}
	next := newest + 1

	if r.current == nil {
		if make {
			r.makeCurrent(next)
		}
		return
	}
	if r.created {
		return
	}
	r.annotate(r.current, next)
	r.current.Spec.MinReadySeconds = r.d.Spec.MinReadySeconds
	setRevision(r.d, r.current.Annotations[RevisionAnnotation])
	if r.hasDeadline() && r.condition(appsv1.DeploymentProgressing) == nil {
		r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionTrue, reasonFoundSet,
			fmt.Sprintf("Found new replica set %q", r.current.Name))
	}
}

// makeCurrent plans the ReplicaSet for the Deployment's template. When another
// object already has its name, the collision count goes up instead, and the
// next pass tries the name that follows from it.
func (r *rollout) makeCurrent(revision int64) {
	hash := templateHash(&r.d.Spec.Template, r.d.Status.CollisionCount)
	name := setName(r.d.Name, hash)
	if _, taken := r.in.Snapshot.ReplicaSets().Get(r.d.Namespace, name); taken {
		var count int32
		if r.d.Status.CollisionCount != nil {
			count = *r.d.Status.CollisionCount
		}
		count++
		r.d.Status.CollisionCount = &count
		return
	}

	template := *r.d.Spec.Template.DeepCopy()
	template.Labels = with(template.Labels, templateHashLabel, hash)
	selector := r.d.Spec.Selector.DeepCopy()
	selector.MatchLabels = with(selector.MatchLabels, templateHashLabel, hash)
	var none int32
	rs := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Name:            name,
			Namespace:       r.d.Namespace,
			Labels:          maps.Clone(template.Labels),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(r.d, reconcile.DeploymentKind)},
		},
		Spec: appsv1.ReplicaSetSpec{
			Replicas:        &none,
			MinReadySeconds: r.d.Spec.MinReadySeconds,
			Selector:        selector,
			Template:        template,
		},
	}
	r.current, r.created = rs, true
	n := r.grown()
	rs.Spec.Replicas = &n
	r.annotate(rs, revision)
	r.markReplicas(rs)

	setRevision(r.d, rs.Annotations[RevisionAnnotation])
	if !r.hasDeadline() {
		return
	}
	if f := r.in.Refused(reconcile.VerbCreate, reconcile.ReplicaSetsResource); f != nil {
		r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionFalse, reasonSetCreateError,
			fmt.Sprintf("Failed to create new replica set %q: %v", name, f.Err))
		r.refused = true
		return
	}
	r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionTrue, reasonNewSet,
		fmt.Sprintf("Created new replica set %q", name))
}

// annotate copies the Deployment's annotations to rs and raises rs to revision,
// keeping the revisions it has served before.
func (r *rollout) annotate(rs *appsv1.ReplicaSet, revision int64) {
	if rs.Annotations == nil {
		rs.Annotations = map[string]string{}
	}
	for k, v := range r.d.Annotations {
		if !ownAnnotation(k) {
			rs.Annotations[k] = v
		}
	}
	before, had := rs.Annotations[RevisionAnnotation]
	if had && before != "" {
		n, err := strconv.ParseInt(before, 10, 64)
		if err != nil || n >= revision {
			return
		}
	}
	rs.Annotations[RevisionAnnotation] = strconv.FormatInt(revision, 10)
	if !had {
		return
	}
	var history []string
	if h := rs.Annotations[revisionHistoryAnnotation]; h != "" {
		history = strings.Split(h, ",")
	}
	history = append(history, before)
	for len(history) > 1 && len(strings.Join(history, ",")) > maxRevisionHistory {
		history = history[1:]
	}
	rs.Annotations[revisionHistoryAnnotation] = strings.Join(history, ",")
}

func setRevision(d *appsv1.Deployment, revision string) {
	if d.Annotations == nil {
		d.Annotations = map[string]string{}
	}
	d.Annotations[RevisionAnnotation] = revision
}

// rollbackTo returns the revision asked for by the annotation that the old
// rollback API leaves, or nil. 0 means the one before the current.
func rollbackTo(d *appsv1.Deployment) *int64 {
	n, err := strconv.ParseInt(d.Annotations[appsv1.DeprecatedRollbackTo], 10, 64)
	if err != nil {
		return nil
	}
	return &n
}

// rollback puts the template of the asked revision back into the Deployment. It
// returns true when the pass ends there, with the change in the result.
func (r *rollout) rollback() bool {
	r.syncRevision(false)
	want := *rollbackTo(r.d)
	all := r.all()
	if want == 0 {
		want = lastRevision(all)
	}
	changed := r.before.DeepCopy()
	delete(changed.Annotations, appsv1.DeprecatedRollbackTo)
	c := reconcile.Update(reconcile.DeploymentsResource, changed)

	at := slices.IndexFunc(all, func(rs *appsv1.ReplicaSet) bool { return want != 0 && revisionOf(rs) == want })
	switch {
	case want == 0:
		c.Event = reconcile.NewEvent(reconcile.DeploymentKind, r.d, corev1.EventTypeWarning, "DeploymentRollbackRevisionNotFound", "Unable to find last revision.")
	case at < 0:
		c.Event = reconcile.NewEvent(reconcile.DeploymentKind, r.d, corev1.EventTypeWarning, "DeploymentRollbackRevisionNotFound", "Unable to find the revision to rollback to.")
	case sameTemplate(&all[at].Spec.Template, &r.d.Spec.Template):
		c.Event = reconcile.NewEvent(reconcile.DeploymentKind, r.d, corev1.EventTypeWarning, "DeploymentRollbackTemplateUnchanged",
			"The rollback revision contains the same template as current deployment %q", r.d.Name)
	default:
		rs := all[at]
		changed.Spec.Template = *rs.Spec.Template.DeepCopy()
		changed.Spec.Template.Labels = withoutHash(changed.Spec.Template.Labels)
		maps.DeleteFunc(changed.Annotations, func(k, _ string) bool { return !ownAnnotation(k) })
		for k, v := range rs.Annotations {
			if !ownAnnotation(k) {
				changed.Annotations[k] = v
			}
		}
		c.Event = reconcile.NewEvent(reconcile.DeploymentKind, r.d, corev1.EventTypeNormal, "DeploymentRollback", "Rolled back deployment %q to revision %d", r.d.Name, want)
	}
	r.result.Add(c)
	return true
}

// lastRevision is the second highest revision, 0 when there is none.
func lastRevision(sets []*appsv1.ReplicaSet) int64 {
	var first, second int64
	for _, rs := range sets {
		switch n := revisionOf(rs); {
		case n >= first:
			first, second = n, first
		case n > second:
			second = n
		}
	}
	return second
}

// cleanUp deletes old ReplicaSets beyond the revision history limit.
func (r *rollout) cleanUp() {
	limit := r.d.Spec.RevisionHistoryLimit
	if limit == nil || *limit == math.MaxInt32 {
		return
	}
	var old []*appsv1.ReplicaSet
	for _, rs := range r.old {
		if rs.DeletionTimestamp == nil {
			old = append(old, rs)
		}
	}
	slices.SortFunc(old, func(a, b *appsv1.ReplicaSet) int {
		if x, y := revisionOf(a), revisionOf(b); x != y {
			if x < y {
				return -1
			}
			return 1
		}
		return olderSet(a, b)
	})
	for i := 0; i < len(old)-int(*limit); i++ {
		rs := old[i]
		if rs.Status.Replicas != 0 || *rs.Spec.Replicas != 0 || rs.Generation > rs.Status.ObservedGeneration {
			continue
		}
		r.result.Add(reconcile.Delete(reconcile.ReplicaSetsResource, r.was[rs]))
	}
}

// with returns a copy of labels with one more.
func with(labels map[string]string, key, value string) map[string]string {
	out := make(map[string]string, len(labels)+1)
	maps.Copy(out, labels)
	out[key] = value
	return out
}
