package workload

import (
	"fmt"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/reconcile"
	"timonel/state/objects"
)

// ReplicaSet keeps the number of pods that each ReplicaSet asks for.
type ReplicaSet struct {
	// Burst is how many pods one pass creates or deletes at most, large ones fewer.
	// Default 500.
	Burst int
}

// Name implements Reconciler.
func (ReplicaSet) Name() string { return "replicaset-controller" }

// All implements Reconciler.
func (ReplicaSet) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.ReplicaSetKind, s.ReplicaSets().All())
}

// Keys implements Reconciler: a ReplicaSet follows itself, its pods, and pods
// without a controller that it could adopt.
func (ReplicaSet) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	return replicasKeys(c, reconcile.ReplicaSetKind, func(m *objects.Meta) (keys []reconcile.Key) {
		for rs := range s.ReplicaSets().InNamespace(m.Namespace) {
			if reconcile.Selects(rs.Spec.Selector, m.Labels) {
				keys = append(keys, reconcile.KeyOf(reconcile.ReplicaSetKind, rs))
			}
		}
		return keys
	})
}

// replicasKeys returns the keys of owners of a kind that a change concerns; adopters
// returns those of a changed pod's namespace that could adopt it.
func replicasKeys(c objects.Changed, kind schema.GroupVersionKind, adopters func(m *objects.Meta) []reconcile.Key) []reconcile.Key {
	switch c.Meta().GVK.GroupKind() {
	case kind.GroupKind():
		return []reconcile.Key{reconcile.KeyOf(kind, c.Meta())}
	case reconcile.PodKind.GroupKind():
		return reconcile.OwnerKeys(c, kind, adopters)
	}
	return nil
}

// Reconcile implements Reconciler.
func (r ReplicaSet) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	rs, ok := in.Snapshot.ReplicaSets().Get(key.Namespace, key.Name)
	if !ok {
		return reconcile.Result{}, nil
	}
	return r.engine().reconcile(in, rs)
}

func (r ReplicaSet) engine() replicas {
	return replicas{kind: reconcile.ReplicaSetKind, burst: r.Burst, terminating: true, update: func(rs *appsv1.ReplicaSet) reconcile.Request {
		return reconcile.UpdateStatus(reconcile.ReplicaSetsResource, rs)
	}}
}

// replicas keeps the number of pods that an owner asks for: a ReplicaSet, or what can
// be seen as one.
type replicas struct {
	kind  schema.GroupVersionKind
	burst int
	// terminating says that the owner's status has the number of terminating pods.
	terminating bool
	// update returns the request that writes the status of an owner seen as a ReplicaSet.
	update func(*appsv1.ReplicaSet) reconcile.Request
}

// reconcile decides for one owner.
func (r replicas) reconcile(in reconcile.Input, rs *appsv1.ReplicaSet) (reconcile.Result, error) {
	selector, err := metav1.LabelSelectorAsSelector(rs.Spec.Selector)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("%s %s/%s: spec.selector: %w", r.kind.Kind, rs.Namespace, rs.Name, err)
	}
	c := reconcile.Claim{Owner: rs, OwnerKind: r.kind, Resource: reconcile.PodsResource, Selector: selector}
	var pods []*corev1.Pod
	var terminating int32
	for pod := range reconcile.OwnedPods(in.Snapshot, rs) {
		switch {
		case reconcile.PodActive(pod):
			if c.Claims(pod) {
				pods = append(pods, pod)
			}
		case !objects.PodEnded(pod) && metav1.IsControlledBy(pod, rs) && selector.Matches(labels.Set(pod.Labels)):
			terminating++
		}
	}
	if rs.DeletionTimestamp == nil {
		for pod := range in.Snapshot.OrphanPods(rs.Namespace) {
			if reconcile.PodActive(pod) && c.Claims(pod) {
				pods = append(pods, pod)
			}
		}
	}

	result := reconcile.Result{Requests: c.Requests}
	if rs.DeletionTimestamp == nil {
		r.manage(in, rs, pods, &result)
		if len(result.Requests) > 0 && len(in.Failed) == 0 {
			return result, nil // the next pass, which sees the pods, reports once instead of twice
		}
	}
	r.status(in, rs, pods, terminating, &result)
	return result, nil
}

// manage creates the pods that are missing and deletes those that are too many.
func (r replicas) manage(in reconcile.Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, result *reconcile.Result) {
	burst := r.burst
	if burst == 0 {
		burst = 500
	}
	missing := int(replicasOf(rs)) - len(pods)
	switch {
	case missing > 0:
		if held, until := holdBack(in, rs); held > 0 {
			missing = max(missing-held, 0)
			result.At(until)
		}
		missing = min(missing, burst, MostPods(&rs.Spec.Template))
		names := reconcile.NewNames(in, rs)
		for range missing {
			ch := CreatePod(r.kind, rs, PodFromTemplate(rs, r.kind, &rs.Spec.Template, names.Next()))
			ch.SlowStart = true
			result.Add(ch)
		}
	case missing < 0:
		for _, pod := range surplus(in, rs, pods, min(-missing, burst)) {
			result.Add(DeletePod(r.kind, rs, pod))
		}
	}
}

// status reports what there is of the pods, and asks for another pass when a
// ready pod becomes available by the passing of time alone.
func (r replicas) status(in reconcile.Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, terminating int32, result *reconcile.Result) {
	s := appsv1.ReplicaSetStatus{
		Replicas:           int32(len(pods)),
		ObservedGeneration: rs.Generation,
		Conditions:         slices.Clone(rs.Status.Conditions),
	}
	if r.terminating {
		s.TerminatingReplicas = &terminating
	}
	template := labels.SelectorFromSet(rs.Spec.Template.Labels)
	for _, pod := range pods {
		if template.Matches(labels.Set(pod.Labels)) {
			s.FullyLabeledReplicas++
		}
		if reconcile.ReadyCondition(pod) == nil {
			continue
		}
		s.ReadyReplicas++
		if available(in, pod, rs.Spec.MinReadySeconds, result) {
			s.AvailableReplicas++
		}
	}

	s.Conditions = slices.DeleteFunc(s.Conditions, func(c appsv1.ReplicaSetCondition) bool { return c.Type == appsv1.ReplicaSetReplicaFailure })
	reason, message, failed := "FailedCreate", "", in.Refused(reconcile.VerbCreate, reconcile.PodsResource)
	if failed == nil {
		reason, message, failed = "FailedDelete", "unable to delete pods: ", in.Refused(reconcile.VerbDelete, reconcile.PodsResource)
	}
	if failed != nil {
		c := appsv1.ReplicaSetCondition{
			Type: appsv1.ReplicaSetReplicaFailure, Status: corev1.ConditionTrue, Reason: reason,
			Message: message + failed.Err.Error(), LastTransitionTime: metav1.NewTime(in.Now).Rfc3339Copy(),
		}
		for _, old := range rs.Status.Conditions {
			if old.Type == c.Type {
				c = old // the first failure stays, or every retry would be a write
			}
		}
		s.Conditions = append(s.Conditions, c)
	}
	if equality.Semantic.DeepEqual(s, rs.Status) {
		return
	}
	updated := rs.DeepCopy()
	updated.Status = s
	result.Add(r.update(updated))
}

// PodFromTemplate returns a new pod of an owner.
func PodFromTemplate(owner reconcile.Object, kind schema.GroupVersionKind, template *corev1.PodTemplateSpec, name string) *corev1.Pod {
	t := template.DeepCopy()
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name:            name,
			GenerateName:    reconcile.NamePrefix(owner.GetName()),
			Namespace:       owner.GetNamespace(),
			Labels:          maps.Clone(t.Labels),
			Annotations:     maps.Clone(t.Annotations),
			Finalizers:      t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(owner, kind)},
		},
		Spec: t.Spec,
	}
}
