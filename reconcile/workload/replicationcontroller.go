package workload

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/reconcile"
	"timonel/state/objects"
)

// ReplicationController keeps the number of pods that each ReplicationController asks
// for, as a ReplicaSet's are kept: it is what came before.
type ReplicationController struct {
	// Burst is as in ReplicaSet.
	Burst int
}

// Name implements Reconciler.
func (ReplicationController) Name() string { return "replication-controller" }

// All implements Reconciler.
func (ReplicationController) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.ReplicationControllerKind, s.ReplicationControllers().All())
}

// Keys implements Reconciler: a ReplicationController follows what a ReplicaSet does.
func (ReplicationController) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	return replicasKeys(c, reconcile.ReplicationControllerKind, func(m *objects.Meta) (keys []reconcile.Key) {
		for rc := range s.ReplicationControllers().InNamespace(m.Namespace) {
			if len(rc.Spec.Selector) > 0 && labels.SelectorFromSet(rc.Spec.Selector).Matches(labels.Set(m.Labels)) {
				keys = append(keys, reconcile.KeyOf(reconcile.ReplicationControllerKind, rc))
			}
		}
		return keys
	})
}

// Reconcile implements Reconciler.
func (r ReplicationController) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	rc, ok := in.Snapshot.ReplicationControllers().Get(key.Namespace, key.Name)
	if !ok {
		return reconcile.Result{}, nil
	}
	engine := replicas{kind: reconcile.ReplicationControllerKind, burst: r.Burst, update: func(rs *appsv1.ReplicaSet) reconcile.Request {
		updated := rc.DeepCopy()
		updated.Status = controllerStatus(rs.Status)
		return reconcile.UpdateStatus(reconcile.ReplicationControllersResource, updated)
	}}
	return engine.reconcile(in, controllerAsSet(rc))
}

// controllerAsSet returns a ReplicationController seen as a ReplicaSet.
func controllerAsSet(rc *corev1.ReplicationController) *appsv1.ReplicaSet {
	rs := &appsv1.ReplicaSet{
		ObjectMeta: rc.ObjectMeta,
		Spec: appsv1.ReplicaSetSpec{
			Replicas:        rc.Spec.Replicas,
			MinReadySeconds: rc.Spec.MinReadySeconds,
			Selector:        &metav1.LabelSelector{MatchLabels: rc.Spec.Selector},
		},
		Status: appsv1.ReplicaSetStatus{
			Replicas:             rc.Status.Replicas,
			FullyLabeledReplicas: rc.Status.FullyLabeledReplicas,
			ReadyReplicas:        rc.Status.ReadyReplicas,
			AvailableReplicas:    rc.Status.AvailableReplicas,
			ObservedGeneration:   rc.Status.ObservedGeneration,
		},
	}
	if rc.Spec.Template != nil {
		rs.Spec.Template = *rc.Spec.Template
	}
	for _, c := range rc.Status.Conditions {
		rs.Status.Conditions = append(rs.Status.Conditions, appsv1.ReplicaSetCondition{
			Type: appsv1.ReplicaSetConditionType(c.Type), Status: c.Status,
			LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message,
		})
	}
	return rs
}

// controllerStatus returns a ReplicaSet's status as a ReplicationController's.
func controllerStatus(s appsv1.ReplicaSetStatus) corev1.ReplicationControllerStatus {
	out := corev1.ReplicationControllerStatus{
		Replicas:             s.Replicas,
		FullyLabeledReplicas: s.FullyLabeledReplicas,
		ReadyReplicas:        s.ReadyReplicas,
		AvailableReplicas:    s.AvailableReplicas,
		ObservedGeneration:   s.ObservedGeneration,
	}
	for _, c := range s.Conditions {
		out.Conditions = append(out.Conditions, corev1.ReplicationControllerCondition{
			Type: corev1.ReplicationControllerConditionType(c.Type), Status: c.Status,
			LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message,
		})
	}
	return out
}
