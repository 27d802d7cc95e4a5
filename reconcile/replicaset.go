package reconcile

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state/objects"
)

// burstBytes is how large the pods that one pass creates may be together, by their
// encoding. Each is a copy of a template that may have a MiB, and many times that in
// memory, and as many ReplicaSets are worked on at a time as the runner takes keys.
const burstBytes = 4 << 20

// ReplicaSet keeps the number of pods that each ReplicaSet asks for.
type ReplicaSet struct {
	// Burst is how many pods one pass creates or deletes at most, large ones fewer.
	// Default 500.
	Burst int
}

// Name implements Reconciler.
func (ReplicaSet) Name() string { return "replicaset-controller" }

// All implements Reconciler.
func (ReplicaSet) All(s *objects.Snapshot) []Key {
	var keys []Key
	for rs := range s.ReplicaSets().All() {
		keys = append(keys, replicaSetKey(rs.Namespace, rs.Name))
	}
	return keys
}

// Keys implements Reconciler: a ReplicaSet follows itself, its pods, and pods
// without a controller that it could adopt.
func (ReplicaSet) Keys(c objects.Changed, s *objects.Snapshot) []Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case replicaSetKind.GroupKind():
		return []Key{replicaSetKey(now.Namespace, now.Name)}
	case podKind.GroupKind():
		var keys []Key
		for _, m := range versions(c) {
			if ref := metav1.GetControllerOfNoCopy(m); ref != nil {
				if ref.Kind == replicaSetKind.Kind {
					keys = append(keys, replicaSetKey(m.Namespace, ref.Name))
				}
				continue
			}
			if m != c.New {
				continue
			}
			for rs := range s.ReplicaSets().InNamespace(m.Namespace) {
				if selects(rs.Spec.Selector, m.Labels) {
					keys = append(keys, replicaSetKey(rs.Namespace, rs.Name))
				}
			}
		}
		return keys
	}
	return nil
}

func replicaSetKey(namespace, name string) Key {
	return Key{Group: "apps", Kind: replicaSetKind.Kind, Namespace: namespace, Name: name}
}

// Reconcile implements Reconciler.
func (r ReplicaSet) Reconcile(in Input, key Key) (Result, error) {
	rs, ok := in.Snapshot.ReplicaSets().Get(key.Namespace, key.Name)
	if !ok {
		return Result{}, nil
	}
	selector, err := metav1.LabelSelectorAsSelector(rs.Spec.Selector)
	if err != nil {
		return Result{}, fmt.Errorf("replica set %s/%s: spec.selector: %w", rs.Namespace, rs.Name, err)
	}
	c := claim{owner: rs, ownerKind: replicaSetKind, resource: podsResource, selector: selector}
	var pods []*corev1.Pod
	var terminating int32
	for pod := range ownedPods(in.Snapshot, rs) {
		switch {
		case podActive(pod):
			if c.claims(pod) {
				pods = append(pods, pod)
			}
		case !podEnded(pod) && metav1.IsControlledBy(pod, rs) && selector.Matches(labels.Set(pod.Labels)):
			terminating++
		}
	}
	if rs.DeletionTimestamp == nil {
		for pod := range in.Snapshot.Pods().InNamespace(rs.Namespace) {
			if metav1.GetControllerOfNoCopy(pod) == nil && podActive(pod) && c.claims(pod) {
				pods = append(pods, pod)
			}
		}
	}

	result := Result{Changes: c.changes}
	if rs.DeletionTimestamp == nil {
		r.manage(in, rs, pods, &result)
		if len(result.Changes) > 0 && len(in.Failed) == 0 {
			return result, nil // the next pass, which sees the pods, reports once instead of twice
		}
	}
	r.status(in, rs, pods, terminating, &result)
	return result, nil
}

// manage creates the pods that are missing and deletes those that are too many.
func (r ReplicaSet) manage(in Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, result *Result) {
	burst := r.Burst
	if burst == 0 {
		burst = 500
	}
	missing := int(replicasOf(rs)) - len(pods)
	switch {
	case missing > 0:
		if held, until := holdBack(in, rs); held > 0 {
			missing = max(missing-held, 0)
			result.at(until)
		}
		missing = min(missing, burst, max(1, burstBytes/max(1, rs.Spec.Template.Size())))
		if in.failed(Create, podsResource) != nil {
			missing = min(missing, 1) // see whether one goes through before trying them all again
		}
		names := newNames(in, rs)
		for range missing {
			pod := podFromTemplate(rs, replicaSetKind, &rs.Spec.Template, names.next())
			ch := create(podsResource, pod)
			ch.Event = event(replicaSetKind, rs, corev1.EventTypeNormal, "SuccessfulCreate", "Created pod: %s", pod.Name)
			ch.FailEvent = event(replicaSetKind, rs, corev1.EventTypeWarning, "FailedCreate", "Error creating")
			result.change(ch)
		}
	case missing < 0:
		for _, pod := range surplus(in, rs, pods, min(-missing, burst)) {
			ch := remove(podsResource, pod)
			ch.Event = event(replicaSetKind, rs, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted pod: %s", pod.Name)
			ch.FailEvent = event(replicaSetKind, rs, corev1.EventTypeWarning, "FailedDelete", "Error deleting")
			result.change(ch)
		}
	}
}

// status reports what there is of the pods, and asks for another pass when a
// ready pod becomes available by the passing of time alone.
func (r ReplicaSet) status(in Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, terminating int32, result *Result) {
	s := appsv1.ReplicaSetStatus{
		Replicas:            int32(len(pods)),
		TerminatingReplicas: &terminating,
		ObservedGeneration:  rs.Generation,
		Conditions:          slices.Clone(rs.Status.Conditions),
	}
	template := labels.SelectorFromSet(rs.Spec.Template.Labels)
	for _, pod := range pods {
		if template.Matches(labels.Set(pod.Labels)) {
			s.FullyLabeledReplicas++
		}
		if readyCondition(pod) == nil {
			continue
		}
		s.ReadyReplicas++
		switch due, ok := availableAt(pod, rs.Spec.MinReadySeconds); {
		case ok && !due.After(in.Now):
			s.AvailableReplicas++
		case ok:
			result.at(due)
		}
	}

	s.Conditions = slices.DeleteFunc(s.Conditions, func(c appsv1.ReplicaSetCondition) bool { return c.Type == appsv1.ReplicaSetReplicaFailure })
	reason, failed := "FailedCreate", in.failed(Create, podsResource)
	if failed == nil {
		reason, failed = "FailedDelete", in.failed(Delete, podsResource)
	}
	if failed != nil {
		c := appsv1.ReplicaSetCondition{
			Type: appsv1.ReplicaSetReplicaFailure, Status: corev1.ConditionTrue, Reason: reason,
			Message: failed.Err.Error(), LastTransitionTime: metav1.NewTime(in.Now).Rfc3339Copy(),
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
	result.change(updateStatus(replicaSetsResource, updated))
}

// podFromTemplate returns a new pod of an owner.
func podFromTemplate(owner typed, kind schema.GroupVersionKind, template *corev1.PodTemplateSpec, name string) *corev1.Pod {
	t := template.DeepCopy()
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name:            name,
			GenerateName:    namePrefix(owner.GetName()),
			Namespace:       owner.GetNamespace(),
			Labels:          maps.Clone(t.Labels),
			Annotations:     maps.Clone(t.Annotations),
			Finalizers:      t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(owner, kind)},
		},
		Spec: t.Spec,
	}
}

// namePrefix is what the names of an owner's pods begin with.
func namePrefix(owner string) string {
	if prefix := owner + "-"; len(validation.NameIsDNSSubdomain(prefix, true)) == 0 {
		return prefix
	}
	return owner
}

const (
	// nameLetters are those that make no words and look unlike each other, as in Kubernetes.
	nameLetters = "bcdfghjklmnpqrstvwxz2456789"
	nameSuffix  = 5
	maxName     = 63
)

// names makes the names of an owner's new objects, pods unless taken is replaced.
// They follow from the seed, so that a pass can be repeated, and are known before
// the objects are created.
type names struct {
	prefix string
	random *rand.Rand
	used   map[string]bool
	taken  func(name string) bool
}

func newNames(in Input, owner metav1.Object) *names {
	prefix := namePrefix(owner.GetName())
	if len(prefix) > maxName-nameSuffix {
		prefix = prefix[:maxName-nameSuffix]
	}
	return &names{
		prefix: prefix, used: map[string]bool{},
		random: rand.New(rand.NewPCG(in.Seed, hashString(string(owner.GetUID())))),
		taken: func(name string) bool {
			_, ok := in.Snapshot.Pods().Get(owner.GetNamespace(), name)
			return ok
		},
	}
}

// next returns a name that none has.
func (n *names) next() string {
	for {
		suffix := make([]byte, nameSuffix)
		for i := range suffix {
			suffix[i] = nameLetters[n.random.IntN(len(nameLetters))]
		}
		name := n.prefix + string(suffix)
		if !n.used[name] && !n.taken(name) {
			n.used[name] = true
			return name
		}
	}
}
