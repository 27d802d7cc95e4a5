package workload

import (
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The reasons of a Deployment's conditions, which kubectl and others know.
const (
	reasonSetUpdated     = "ReplicaSetUpdated"
	reasonSetCreateError = "ReplicaSetCreateError"
	reasonNewSet         = "NewReplicaSetCreated"
	reasonFoundSet       = "FoundNewReplicaSet"
	reasonSetAvailable   = "NewReplicaSetAvailable"
	reasonTimedOut       = "ProgressDeadlineExceeded"
	reasonPaused         = "DeploymentPaused"
	reasonResumed        = "DeploymentResumed"
	reasonAvailable      = "MinimumReplicasAvailable"
	reasonUnavailable    = "MinimumReplicasUnavailable"
)

// condition returns the working copy's condition of a type, or nil.
func (r *rollout) condition(t appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	return deploymentCondition(&r.d.Status, t)
}

func deploymentCondition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	for i := range s.Conditions {
		if s.Conditions[i].Type == t {
			return &s.Conditions[i]
		}
	}
	return nil
}

// setCondition sets a condition, unless the one there has the same status and reason.
func (r *rollout) setCondition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType, status corev1.ConditionStatus, reason, message string) {
	now := metav1.NewTime(r.in.Now).Rfc3339Copy()
	c := appsv1.DeploymentCondition{Type: t, Status: status, LastUpdateTime: now, LastTransitionTime: now, Reason: reason, Message: message}
	if old := deploymentCondition(s, t); old != nil {
		if old.Status == status && old.Reason == reason {
			return
		}
		if old.Status == status {
			c.LastTransitionTime = old.LastTransitionTime
		}
	}
	dropCondition(s, t)
	s.Conditions = append(s.Conditions, c)
}

func dropCondition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType) {
	s.Conditions = slices.DeleteFunc(slices.Clone(s.Conditions), func(c appsv1.DeploymentCondition) bool { return c.Type == t })
}

// pausedCondition notes a pause or its end in the Progressing condition, so that
// the time of the pause does not count against the progress deadline.
func (r *rollout) pausedCondition() {
	if !r.hasDeadline() {
		return
	}
	c := r.condition(appsv1.DeploymentProgressing)
	if c != nil && c.Reason == reasonTimedOut {
		return
	}
	noted := c != nil && c.Reason == reasonPaused
	switch {
	case r.d.Spec.Paused && !noted:
		r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionUnknown, reasonPaused, "Deployment is paused")
	case !r.d.Spec.Paused && noted:
		r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionUnknown, reasonResumed, "Deployment is resumed")
	}
}

// complete says whether all wanted pods are updated and available, and no others run.
func (r *rollout) complete(s *appsv1.DeploymentStatus) bool {
	n := r.wanted()
	return s.UpdatedReplicas == n && s.Replicas == n && s.AvailableReplicas == n && s.ObservedGeneration >= r.d.Generation
}

// counted returns the status that the ReplicaSets add up to, with the working copy's conditions.
func (r *rollout) counted() appsv1.DeploymentStatus {
	all := r.all()
	available := total(all, availableReplicas)
	s := appsv1.DeploymentStatus{
		ObservedGeneration:  r.d.Generation,
		Replicas:            total(all, statusReplicas),
		ReadyReplicas:       total(all, readyReplicas),
		AvailableReplicas:   available,
		UnavailableReplicas: max(0, total(all, specReplicas)-available),
		TerminatingReplicas: terminatingReplicas(all),
		CollisionCount:      r.d.Status.CollisionCount,
		Conditions:          slices.Clone(r.d.Status.Conditions),
	}
	if r.current != nil {
		s.UpdatedReplicas = r.current.Status.Replicas
	}
	if available >= r.wanted()-r.maxUnavailable() {
		r.setCondition(&s, appsv1.DeploymentAvailable, corev1.ConditionTrue, reasonAvailable, "Deployment has minimum availability.")
	} else {
		r.setCondition(&s, appsv1.DeploymentAvailable, corev1.ConditionFalse, reasonUnavailable, "Deployment does not have minimum availability.")
	}
	return s
}

// terminatingReplicas sums up the terminating pods, nil while a ReplicaSet that was seen has not said.
func terminatingReplicas(sets []*appsv1.ReplicaSet) *int32 {
	var n int32
	for _, rs := range sets {
		switch {
		case rs.Status.TerminatingReplicas != nil:
			n += *rs.Status.TerminatingReplicas
		case rs.Status.ObservedGeneration > 0:
			return nil
		}
	}
	return &n
}

// status updates the counts without judging progress.
func (r *rollout) status() { r.d.Status = r.counted() }

// rolloutStatus updates the counts and the Progressing condition, and asks for
// another pass when the progress deadline would run out.
func (r *rollout) rolloutStatus() {
	s := r.counted()
	if !r.hasDeadline() {
		dropCondition(&s, appsv1.DeploymentProgressing)
	}
	progress := r.condition(appsv1.DeploymentProgressing)
	done := s.Replicas == s.UpdatedReplicas && progress != nil && progress.Reason == reasonSetAvailable
	if r.hasDeadline() && !done {
		subject := fmt.Sprintf("Deployment %q", r.d.Name)
		if r.current != nil {
			subject = fmt.Sprintf("ReplicaSet %q", r.current.Name)
		}
		switch {
		case r.complete(&s):
			r.setCondition(&s, appsv1.DeploymentProgressing, corev1.ConditionTrue, reasonSetAvailable, subject+" has successfully progressed.")
		case r.progressed(&s):
			// The time of the update moves on with every progress, that of the transition does not.
			var since metav1.Time
			if progress != nil && progress.Status == corev1.ConditionTrue {
				since = progress.LastTransitionTime
			}
			dropCondition(&s, appsv1.DeploymentProgressing)
			r.setCondition(&s, appsv1.DeploymentProgressing, corev1.ConditionTrue, reasonSetUpdated, subject+" is progressing.")
			if !since.IsZero() {
				deploymentCondition(&s, appsv1.DeploymentProgressing).LastTransitionTime = since
			}
		case r.timedOut(&s):
			r.setCondition(&s, appsv1.DeploymentProgressing, corev1.ConditionFalse, reasonTimedOut, subject+" has timed out progressing.")
		}
	}
	if c := r.replicaFailure(); c != nil {
		r.setCondition(&s, appsv1.DeploymentReplicaFailure, c.Status, c.Reason, c.Message)
	} else {
		dropCondition(&s, appsv1.DeploymentReplicaFailure)
	}
	if equality.Semantic.DeepEqual(s, r.d.Status) {
		s = r.d.Status
	}
	r.d.Status = s

	if c := r.condition(appsv1.DeploymentProgressing); c != nil && r.hasDeadline() && !r.complete(&s) && c.Reason != reasonTimedOut && c.Reason != reasonSetAvailable {
		// Condition times are whole seconds, so one more makes sure that the deadline has passed.
		r.result.At(c.LastUpdateTime.Add(r.deadline() + time.Second))
	}
}

// progressed says whether s is nearer to complete than what the Deployment showed before.
func (r *rollout) progressed(s *appsv1.DeploymentStatus) bool {
	was := &r.before.Status
	return s.UpdatedReplicas > was.UpdatedReplicas ||
		s.Replicas-s.UpdatedReplicas < was.Replicas-was.UpdatedReplicas ||
		s.ReadyReplicas > was.ReadyReplicas ||
		s.AvailableReplicas > was.AvailableReplicas
}

// timedOut says whether the last progress is longer ago than the deadline.
func (r *rollout) timedOut(s *appsv1.DeploymentStatus) bool {
	c := deploymentCondition(s, appsv1.DeploymentProgressing)
	switch {
	case c == nil || c.Reason == reasonSetAvailable:
		return false
	case c.Reason == reasonTimedOut:
		return true
	}
	return c.LastUpdateTime.Add(r.deadline()).Before(r.in.Now)
}

// replicaFailure returns the current ReplicaSet's failure condition, or else that of an old one, or nil.
func (r *rollout) replicaFailure() *appsv1.ReplicaSetCondition {
	sets := r.old
	if r.current != nil {
		sets = append([]*appsv1.ReplicaSet{r.current}, r.old...)
	}
	for _, rs := range sets {
		for i := range rs.Status.Conditions {
			if rs.Status.Conditions[i].Type == appsv1.ReplicaSetReplicaFailure {
				return &rs.Status.Conditions[i]
			}
		}
	}
	return nil
}
