package node

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"timonel/reconcile"
	"timonel/state/objects"
)

// TaintEviction deletes pods from Nodes that have a NoExecute taint, each pod
// once it has tolerated the taint for as long as it says. The time counts from
// when the taint was added, so that it goes on under another leader.
//
// For the taints that this control plane sets by its own judgement of a Node's
// health the time counts from Health.Since at the earliest, and for the
// unreachable taint the judgement must stand at the end of the time: a control
// plane that was away does not evict for what it has not seen.
type TaintEviction struct {
	Health HealthConfig
}

// Validate says which field makes no sense.
func (e TaintEviction) Validate() error { return e.Health.Validate() }

// Name implements Reconciler.
func (TaintEviction) Name() string { return "taint-eviction-controller" }

// All implements Reconciler.
func (TaintEviction) All(s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for node := range s.Nodes().All() {
		if evicts(node) {
			keys = append(keys, reconcile.NodeKey(node.Name))
		}
	}
	return keys
}

// Keys implements Reconciler: Nodes and pods, as far as a NoExecute taint is about, and
// how many Nodes are lost.
func (TaintEviction) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	switch o := c.Meta().Object.(type) {
	case *corev1.Node:
		keys := lostKeys(c, s)
		for _, m := range reconcile.Versions(c) {
			if evicts(objects.As[*corev1.Node](m)) {
				return append(keys, reconcile.NodeKey(o.Name))
			}
		}
		return keys
	case *corev1.Pod:
		if c.New == nil || o.Spec.NodeName == "" || o.DeletionTimestamp != nil {
			return nil
		}
		if node, ok := s.Nodes().Get("", o.Spec.NodeName); ok && evicts(node) {
			return []reconcile.Key{reconcile.NodeKey(node.Name)}
		}
	}
	return nil
}

// HealthKeys implements HealthReconciler.
func (TaintEviction) HealthKeys(before, after reconcile.Health, s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for node := range s.Nodes().All() {
		if evicts(node) && (!before.Since.Equal(after.Since) || before.Nodes[node.Name] != after.Nodes[node.Name]) {
			keys = append(keys, reconcile.NodeKey(node.Name))
		}
	}
	return keys
}

// evicts says whether a Node has a NoExecute taint.
func evicts(node *corev1.Node) bool {
	for i := range node.Spec.Taints {
		if node.Spec.Taints[i].Effect == corev1.TaintEffectNoExecute {
			return true
		}
	}
	return false
}

// Reconcile implements Reconciler.
func (e TaintEviction) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	node, ok := in.Snapshot.Nodes().Get("", key.Name)
	if !ok || !evicts(node) {
		return reconcile.Result{}, nil
	}
	var result reconcile.Result
	standing := e.standing(in, node, &result)
	if len(standing) == 0 {
		return result, nil
	}
	for pod := range in.Snapshot.PodsOnNode(node.Name) {
		if pod.DeletionTimestamp != nil || objects.PodEnded(pod) {
			continue
		}
		due, ever := evictionTime(pod, standing, in.Now)
		switch {
		case !ever:
		case due.After(in.Now):
			result.At(due)
		default:
			result.Add(evict(in, pod))
		}
	}
	return result, nil
}

// standingTaint is a NoExecute taint and when the tolerations of it began to count.
type standingTaint struct {
	*corev1.Taint
	since time.Time
}

// holdPoll is how often to look whether still too many Nodes are lost to evict from any.
const holdPoll = 5 * time.Second

// standing returns the taints that evict now.
func (e TaintEviction) standing(in reconcile.Input, node *corev1.Node, result *reconcile.Result) []standingTaint {
	cfg := e.Health.withDefaults()
	held := func() bool {
		if cfg.longTainted(node, in.Now) {
			return false
		}
		if rate, _ := cfg.rate(in, cfg.zone(in, objects.Zone(node)), false); rate > 0 {
			return false
		}
		result.At(in.Now.Add(holdPoll))
		return true
	}
	var out []standingTaint
	for i := range node.Spec.Taints {
		t := &node.Spec.Taints[i]
		if t.Effect != corev1.TaintEffectNoExecute {
			continue
		}
		if t.TimeAdded == nil {
			continue // node-lifecycle-controller is about to set it
		}
		s := standingTaint{Taint: t, since: t.TimeAdded.Time}
		switch t.Key {
		case corev1.TaintNodeUnreachable:
			v := cfg.judge(in.Health, node.Name, in.Now)
			if !v.Unreachable {
				result.At(v.Next)
				continue
			}
			if held() {
				continue
			}
			s.since = reconcile.Latest(s.since, in.Health.Since)
		case corev1.TaintNodeNotReady:
			if settled := in.Health.Since.Add(cfg.Settle); settled.After(in.Now) {
				result.At(settled)
				continue
			}
			if held() {
				continue
			}
			s.since = reconcile.Latest(s.since, in.Health.Since)
		}
		out = append(out, s)
	}
	return out
}

// evictionTime returns when a pod has to go because of the taints, or false when never.
func evictionTime(pod *corev1.Pod, taints []standingTaint, now time.Time) (time.Time, bool) {
	bound := pod.CreationTimestamp.Time
	if c := reconcile.PodCondition(pod, corev1.PodScheduled); c != nil && c.Status == corev1.ConditionTrue {
		bound = reconcile.Latest(bound, c.LastTransitionTime.Time)
	}
	var due time.Time
	ever := false
	for _, t := range taints {
		tolerated, seconds := toleration(pod, t.Taint)
		at := now
		switch {
		case !tolerated:
		case seconds == nil:
			continue
		case *seconds > 0:
			at = reconcile.Latest(t.since, bound).Add(time.Duration(*seconds) * time.Second)
		}
		if !ever || at.Before(due) {
			due, ever = at, true
		}
	}
	return due, ever
}

// toleration says whether a pod tolerates a taint, and for how many seconds at
// the shortest, nil for ever.
func toleration(pod *corev1.Pod, taint *corev1.Taint) (tolerated bool, seconds *int64) {
	for i := range pod.Spec.Tolerations {
		t := &pod.Spec.Tolerations[i]
		if !t.ToleratesTaint(klog.Logger{}, taint, false) {
			continue
		}
		tolerated = true
		if t.TolerationSeconds != nil && (seconds == nil || *t.TolerationSeconds < *seconds) {
			seconds = t.TolerationSeconds
		}
	}
	return tolerated, seconds
}

// evict returns the change that deletes a pod with its grace, and says why in
// its status before.
func evict(in reconcile.Input, pod *corev1.Pod) reconcile.Request {
	c := reconcile.Delete(reconcile.PodsResource, pod)
	ev := reconcile.NewEvent(reconcile.PodKind, pod, corev1.EventTypeNormal, "TaintManagerEviction", "Marking for deletion Pod %s/%s", pod.Namespace, pod.Name)
	c.Event = ev
	condition := corev1.PodCondition{
		Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue,
		Reason: "DeletionByTaintManager", Message: "Taint manager: deleting due to NoExecute taint",
	}
	if old := reconcile.PodCondition(pod, condition.Type); old != nil && old.Status == condition.Status && old.Reason == condition.Reason {
		return c
	}
	condition.LastTransitionTime = reconcile.ConditionTime(pod, condition.Type, condition.Status, metav1.NewTime(in.Now).Rfc3339Copy())
	first := reconcile.PatchPodStatus(pod, nil, condition)
	first.Then = []reconcile.Request{c}
	return first
}
