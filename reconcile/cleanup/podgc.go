package cleanup

import (
	"cmp"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// PodGC removes pods that nobody else can: those on a Node that does not exist,
// terminating ones on a Node that an operator declared out of service, and
// terminating ones that never got a Node. A pod on a Node that is merely
// unreachable stays until the Node comes back or an operator speaks.
type PodGC struct {
	// Grace is how long a Node must have been missing, since this control plane found
	// it so, before its pods are removed: it may register again. Default 40 s.
	Grace time.Duration
}

// Name implements Reconciler.
func (PodGC) Name() string { return "pod-garbage-collector-controller" }

// All implements Reconciler.
func (PodGC) All(s *objects.Snapshot) []reconcile.Key {
	nodes := map[string]bool{}
	var keys []reconcile.Key
	for pod := range s.Pods().All() {
		switch {
		case pod.Spec.NodeName == "" && pod.DeletionTimestamp != nil:
			keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
		case pod.Spec.NodeName != "" && !nodes[pod.Spec.NodeName]:
			nodes[pod.Spec.NodeName] = true
			keys = append(keys, reconcile.NodeKey(pod.Spec.NodeName))
		}
	}
	return keys
}

// Keys implements Reconciler.
func (PodGC) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	switch m := c.Meta(); m.GVK {
	case reconcile.NodeKind:
		return []reconcile.Key{reconcile.NodeKey(m.Name)}
	case reconcile.PodKind:
		pod, ok := m.Object.(*corev1.Pod)
		if !ok || c.New == nil {
			return nil
		}
		if pod.Spec.NodeName == "" {
			if pod.DeletionTimestamp == nil {
				return nil
			}
			return []reconcile.Key{reconcile.KeyOf(reconcile.PodKind, pod)}
		}
		node, ok := s.Nodes().Get("", pod.Spec.NodeName)
		if !ok || outOfService(node) {
			return []reconcile.Key{reconcile.NodeKey(pod.Spec.NodeName)}
		}
	}
	return nil
}

// outOfService says whether an operator has declared that nothing runs on a Node
// any more, and the Node does not contradict.
func outOfService(node *corev1.Node) bool {
	if ready := reconcile.NodeCondition(node, corev1.NodeReady); ready != nil && ready.Status == corev1.ConditionTrue {
		return false
	}
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService })
}

// Reconcile implements Reconciler.
func (g PodGC) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	if key.Kind == reconcile.PodKind.Kind {
		pod, ok := in.Snapshot.Pods().Get(key.Namespace, key.Name)
		if ok && pod.DeletionTimestamp != nil && pod.Spec.NodeName == "" && !forced(pod) {
			result.Add(forceDelete(in, pod, nil))
		}
		return result, nil
	}

	node, ok := in.Snapshot.Nodes().Get("", key.Name)
	if ok && !outOfService(node) {
		return result, nil
	}
	missing := in.Since
	if missing.IsZero() {
		missing = in.Now
	}
	due := missing.Add(cmp.Or(g.Grace, 40*time.Second))
	for pod := range in.Snapshot.PodsOnNode(key.Name) {
		if forced(pod) {
			continue
		}
		if ok {
			if pod.DeletionTimestamp != nil {
				result.Add(forceDelete(in, pod, nil))
			}
			continue
		}
		if due.After(in.Now) {
			result.At(due)
			return result, nil
		}
		result.Add(forceDelete(in, pod, &corev1.PodCondition{
			Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue,
			Reason: "DeletionByPodGC", Message: "PodGC: node no longer exists",
		}))
	}
	return result, nil
}

// forced says whether a pod is gone but for its finalizers: another delete would change nothing.
func forced(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil && *pod.DeletionGracePeriodSeconds == 0
}

// forceDelete returns the change that removes a pod that has no agent which
// could end it, and marks it failed before, so that whoever watches it knows.
func forceDelete(in reconcile.Input, pod *corev1.Pod, condition *corev1.PodCondition) reconcile.Request {
	now := int64(0)
	c := reconcile.Delete(reconcile.PodsResource, pod)
	c.GracePeriodSeconds = &now
	if objects.PodEnded(pod) {
		return c
	}
	var conditions []corev1.PodCondition
	if condition != nil {
		condition.LastTransitionTime = reconcile.ConditionTime(pod, condition.Type, condition.Status, metav1.NewTime(in.Now).Rfc3339Copy())
		conditions = append(conditions, *condition)
	}
	first := reconcile.PatchPodStatus(pod, map[string]any{"phase": corev1.PodFailed}, conditions...)
	first.Then = []reconcile.Request{c}
	return first
}

// TerminatedPodGC keeps the number of pods that have ended, and that nobody has
// deleted, below a threshold; evicted and old ones go first.
type TerminatedPodGC struct {
	// Threshold is how many ended pods may stay. Default 12500; negative: any number.
	Threshold int
}

// Name implements Reconciler.
func (TerminatedPodGC) Name() string { return "terminated-pod-garbage-collector-controller" }

// Traits implements reconcile.Reconciler: a pass looks at every pod that has ended.
func (TerminatedPodGC) Traits() reconcile.Traits { return reconcile.Traits{Pace: 20 * time.Second} }

// All implements Reconciler.
func (TerminatedPodGC) All(*objects.Snapshot) []reconcile.Key {
	return []reconcile.Key{reconcile.Singleton}
}

// Keys implements Reconciler.
func (TerminatedPodGC) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if c.New == nil || c.New.GVK != reconcile.PodKind {
		return nil
	}
	if pod, ok := c.New.Object.(*corev1.Pod); !ok || !objects.PodEnded(pod) {
		return nil
	}
	return []reconcile.Key{reconcile.Singleton}
}

// Reconcile implements Reconciler.
func (g TerminatedPodGC) Reconcile(in reconcile.Input, _ reconcile.Key) (reconcile.Result, error) {
	threshold := cmp.Or(g.Threshold, 12500)
	var result reconcile.Result
	if threshold < 0 || in.Snapshot.EndedPodsLen() <= threshold {
		return result, nil
	}
	ended := slices.Collect(in.Snapshot.EndedPods())
	slices.SortFunc(ended, func(a, b *corev1.Pod) int {
		aEvicted, bEvicted := a.Status.Reason == "Evicted", b.Status.Reason == "Evicted"
		switch {
		case aEvicted && !bEvicted:
			return -1
		case bEvicted && !aEvicted:
			return 1
		}
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	for _, pod := range ended[:len(ended)-threshold] {
		result.Add(forceDelete(in, pod, nil))
	}
	return result, nil
}
