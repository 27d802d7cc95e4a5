package workload

import (
	"fmt"
	"math"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/reconcile"
	"timonel/state/objects"
)

// Deployment keeps each Deployment's ReplicaSets: it makes the one that has the
// Deployment's template, moves replicas to it by the strategy, keeps the
// revision history, and reports status and progress.
type Deployment struct{}

// Name implements Reconciler.
func (Deployment) Name() string { return "deployment-controller" }

// All implements Reconciler.
func (Deployment) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.DeploymentKind, s.Deployments().All())
}

// Keys implements Reconciler: a Deployment follows itself and its ReplicaSets,
// and, for Recreate, the end of its ReplicaSets' pods.
func (Deployment) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case reconcile.DeploymentKind.GroupKind():
		return []reconcile.Key{reconcile.KeyOf(reconcile.DeploymentKind, now)}
	case reconcile.ReplicaSetKind.GroupKind():
		var keys []reconcile.Key
		for _, m := range reconcile.Versions(c) {
			if ref := metav1.GetControllerOfNoCopy(m); ref != nil {
				if ref.Kind == reconcile.DeploymentKind.Kind {
					keys = append(keys, reconcile.NewKey(reconcile.DeploymentKind, m.Namespace, ref.Name))
				}
				continue
			}
			for d := range s.Deployments().InNamespace(m.Namespace) {
				if reconcile.Selects(d.Spec.Selector, m.Labels) {
					keys = append(keys, reconcile.KeyOf(reconcile.DeploymentKind, d))
				}
			}
		}
		return keys
	case reconcile.PodKind.GroupKind():
		pod, ok := now.Object.(*corev1.Pod)
		if !ok || c.New != nil && !objects.PodEnded(pod) {
			return nil
		}
		ref := metav1.GetControllerOfNoCopy(pod)
		if ref == nil || ref.Kind != reconcile.ReplicaSetKind.Kind {
			return nil
		}
		rs, ok := s.ReplicaSets().Get(pod.Namespace, ref.Name)
		if !ok {
			return nil
		}
		owner := metav1.GetControllerOfNoCopy(rs)
		if owner == nil || owner.Kind != reconcile.DeploymentKind.Kind {
			return nil
		}
		d, ok := s.Deployments().Get(pod.Namespace, owner.Name)
		if ok && d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
			return []reconcile.Key{reconcile.NewKey(reconcile.DeploymentKind, pod.Namespace, owner.Name)}
		}
	}
	return nil
}

// rollout is one pass over one Deployment. Deployment and ReplicaSets are
// working copies; finish compares them with what they were and returns the difference.
type rollout struct {
	in     reconcile.Input
	d      *appsv1.Deployment
	before *appsv1.Deployment
	// sets are the ReplicaSets of the Deployment that exist, oldest first.
	sets []*appsv1.ReplicaSet
	was  map[*appsv1.ReplicaSet]*appsv1.ReplicaSet
	// current has the Deployment's template; nil while there is none. old are the others.
	current *appsv1.ReplicaSet
	old     []*appsv1.ReplicaSet
	// created says that current does not exist yet.
	created bool
	// refused says that the API refused to create current in the pass before.
	refused bool
	tallies map[*appsv1.ReplicaSet]tally
	result  reconcile.Result
}

// Reconcile implements Reconciler.
func (Deployment) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	found, ok := in.Snapshot.Deployments().Get(key.Namespace, key.Name)
	if !ok {
		return reconcile.Result{}, nil
	}
	r := &rollout{in: in, d: found.DeepCopy(), before: found, was: map[*appsv1.ReplicaSet]*appsv1.ReplicaSet{}}
	if equality.Semantic.DeepEqual(r.d.Spec.Selector, &metav1.LabelSelector{}) {
		r.result.Events = append(r.result.Events, *reconcile.NewEvent(reconcile.DeploymentKind, r.d, corev1.EventTypeWarning, "SelectingAll",
			"This deployment is selecting all pods. A non-empty selector is required."))
		r.d.Status.ObservedGeneration = r.d.Generation
		r.finish()
		return r.result, nil
	}
	selector, err := metav1.LabelSelectorAsSelector(r.d.Spec.Selector)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("deployment %s/%s: spec.selector: %w", r.d.Namespace, r.d.Name, err)
	}
	r.claim(selector)
	r.split()

	switch {
	case r.d.DeletionTimestamp != nil:
		r.syncRevision(false)
		r.status()
	case r.d.Spec.Paused:
		r.pausedCondition()
		r.syncRevision(false)
		r.scale()
		if rollbackTo(r.d) == nil {
			r.cleanUp()
		}
		r.status()
	case rollbackTo(r.d) != nil:
		if done := r.rollback(); done {
			return r.result, nil
		}
	case r.scaling():
		r.pausedCondition()
		r.syncRevision(false)
		r.scale()
		r.status()
	case r.d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType:
		r.pausedCondition()
		r.recreate()
		r.rolloutStatus()
	case r.d.Spec.Strategy.Type == appsv1.RollingUpdateDeploymentStrategyType:
		r.pausedCondition()
		r.rolling()
		r.rolloutStatus()
	default:
		return reconcile.Result{}, fmt.Errorf("deployment %s/%s: spec.strategy.type %q is not known", r.d.Namespace, r.d.Name, r.d.Spec.Strategy.Type)
	}
	r.finish()
	return r.result, nil
}

// claim collects the ReplicaSets that are the Deployment's, adopts those that
// match it and have no controller, and releases those that no longer match.
func (r *rollout) claim(selector labels.Selector) {
	c := reconcile.Claim{Owner: r.d, OwnerKind: reconcile.DeploymentKind, Resource: reconcile.ReplicaSetsResource, Selector: selector}
	for rs := range claimable(r.in.Snapshot, r.d, r.in.Snapshot.OrphanReplicaSets) {
		if !c.Claims(rs) {
			continue
		}
		work := rs.DeepCopy()
		if work.Spec.Replicas == nil {
			one := int32(1)
			work.Spec.Replicas = &one
		}
		r.sets = append(r.sets, work)
		r.was[work] = rs
	}
	r.result.Requests = append(r.result.Requests, c.Requests...)
	slices.SortFunc(r.sets, olderSet)
}

// split finds the current ReplicaSet (the oldest that has the template) among all.
func (r *rollout) split() {
	r.current, r.old = nil, nil
	for _, rs := range r.sets {
		if r.current == nil && sameTemplate(&rs.Spec.Template, &r.d.Spec.Template) {
			r.current = rs
			continue
		}
		r.old = append(r.old, rs)
	}
}

// all returns every ReplicaSet of the rollout, the current one last if there is one.
func (r *rollout) all() []*appsv1.ReplicaSet {
	out := slices.Clone(r.old)
	if r.current != nil {
		out = append(out, r.current)
	}
	return out
}

// finish turns the difference between the working copies and the snapshot into changes.
func (r *rollout) finish() {
	var statusChange *reconcile.Request
	if !equality.Semantic.DeepEqual(r.d.Status, r.before.Status) || r.d.Annotations[RevisionAnnotation] != r.before.Annotations[RevisionAnnotation] {
		c := reconcile.UpdateStatus(reconcile.DeploymentsResource, r.d)
		statusChange = &c
	}
	for _, rs := range r.sets {
		was := r.was[rs]
		if *rs.Spec.Replicas == replicasOf(was) && rs.Spec.MinReadySeconds == was.Spec.MinReadySeconds && equality.Semantic.DeepEqual(rs.Annotations, was.Annotations) {
			continue
		}
		c := reconcile.Update(reconcile.ReplicaSetsResource, rs)
		if from, to := replicasOf(was), *rs.Spec.Replicas; from != to {
			c.Event = scalingEvent(r.d, rs.Name, from, to)
		}
		r.result.Add(c)
	}
	if r.created {
		c := reconcile.Create(reconcile.ReplicaSetsResource, r.current)
		if n := *r.current.Spec.Replicas; n > 0 {
			c.Event = scalingEvent(r.d, r.current.Name, 0, n)
		}
		c.FailEvent = reconcile.NewEvent(reconcile.DeploymentKind, r.d, corev1.EventTypeWarning, reasonSetCreateError, "Failed to create new replica set %q", r.current.Name)
		// The status says that the set was created: it must wait until that is true,
		// unless it says that the attempt before this one failed.
		if statusChange != nil && !r.refused {
			c.Then = append(c.Then, *statusChange)
			statusChange = nil
		}
		r.result.Add(c)
	}
	if statusChange != nil {
		r.result.Add(*statusChange)
	}
}

func scalingEvent(d *appsv1.Deployment, set string, from, to int32) *reconcile.Event {
	way := "up"
	if to < from {
		way = "down"
	}
	return reconcile.NewEvent(reconcile.DeploymentKind, d, corev1.EventTypeNormal, "ScalingReplicaSet", "Scaled %s replica set %s from %d to %d", way, set, from, to)
}

// replicasOf returns how many pods a ReplicaSet is to have.
func replicasOf(rs *appsv1.ReplicaSet) int32 {
	if rs.Spec.Replicas == nil {
		return 1
	}
	return *rs.Spec.Replicas
}

// wanted returns how many pods the Deployment is to have.
func (r *rollout) wanted() int32 {
	if r.d.Spec.Replicas == nil {
		return 1
	}
	return *r.d.Spec.Replicas
}

// hasDeadline says whether progress is to be watched at all.
func (r *rollout) hasDeadline() bool {
	p := r.d.Spec.ProgressDeadlineSeconds
	return p != nil && *p != math.MaxInt32
}

// deadline is the time a rollout may go without progress.
func (r *rollout) deadline() time.Duration {
	return time.Duration(*r.d.Spec.ProgressDeadlineSeconds) * time.Second
}

// olderSet orders ReplicaSets by age, then by name.
func olderSet(a, b *appsv1.ReplicaSet) int {
	if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
		return c
	}
	if a.Name < b.Name {
		return -1
	}
	if a.Name > b.Name {
		return 1
	}
	return 0
}
