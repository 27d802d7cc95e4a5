package node

import (
	"cmp"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

const (
	// reasonUnreachable marks conditions that this reconciler has set, not the agent.
	reasonUnreachable = "NodeStatusUnknown"
	// reasonBack marks the Ready condition of a Node whose agent is back and has not reported yet.
	reasonBack = "AgentConnected"
)

// NodeLifecycle says in the Node what health says of the machine: its conditions
// when it is gone, its taints by its conditions, and the readiness of its pods.
// An agent reports the conditions of its own Node while it is there.
type NodeLifecycle struct {
	Health HealthConfig
	// Report is how long a returned agent may take to report its conditions before
	// the Node is called Ready on the strength of its stream alone. Default 2 s.
	Report time.Duration
}

// Validate says which field makes no sense.
func (n NodeLifecycle) Validate() error { return n.Health.Validate() }

// Name implements Reconciler.
func (NodeLifecycle) Name() string { return "node-lifecycle-controller" }

// All implements Reconciler.
func (NodeLifecycle) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.NodeKind, s.Nodes().All())
}

// Keys implements Reconciler: a Node follows itself, and pods that claim to be
// ready on a Node that is not, or not on one that is.
func (NodeLifecycle) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	switch c.Meta().GVK {
	case reconcile.NodeKind:
		return append(lostKeys(c, s), reconcile.NodeKey(c.Meta().Name))
	case reconcile.PodKind:
		if c.New == nil {
			return nil
		}
		pod, ok := c.New.Object.(*corev1.Pod)
		if !ok || pod.Spec.NodeName == "" {
			return nil
		}
		node, ok := s.Nodes().Get("", pod.Spec.NodeName)
		if !ok {
			return nil
		}
		if objects.NodeReady(node) && takenReadiness(pod) != nil || !objects.NodeReady(node) && reconcile.ReadyCondition(pod) != nil {
			return []reconcile.Key{reconcile.NodeKey(node.Name)}
		}
	}
	return nil
}

// lostKeys are the keys of the Nodes that are not ready, if a change of a Node is one in
// how many Nodes are lost of how many: that decides about each that is.
func lostKeys(c objects.Changed, s *objects.Snapshot) (keys []reconcile.Key) {
	before, after := objects.As[*corev1.Node](c.Old), objects.As[*corev1.Node](c.New)
	if before != nil && after != nil && objects.NodeReady(before) == objects.NodeReady(after) && objects.Zone(before) == objects.Zone(after) &&
		(lostSince(before).IsZero() || lostSince(before).Equal(lostSince(after))) { // one that is only now lost counts no other way for a while
		return nil
	}
	for node := range s.UnreadyNodes() {
		if node.Name != c.Meta().Name {
			keys = append(keys, reconcile.NodeKey(node.Name))
		}
	}
	return keys
}

// HealthKeys implements HealthReconciler: the Nodes whose health differs, and all
// of them when the watch over them begins again. When a Node is lost or comes
// back, those that are lost too are looked at again, because how many are lost
// decides what happens to each.
func (n NodeLifecycle) HealthKeys(before, after reconcile.Health, s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for node := range s.Nodes().All() {
		name := node.Name
		if !before.Since.Equal(after.Since) || before.Nodes[name] != after.Nodes[name] || !after.Nodes[name].Stream {
			keys = append(keys, reconcile.NodeKey(name))
		}
	}
	return keys
}

// Reconcile implements Reconciler.
func (n NodeLifecycle) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	node, ok := in.Snapshot.Nodes().Get("", key.Name)
	if !ok || node.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	cfg := n.Health.withDefaults()
	var result reconcile.Result
	v := cfg.judge(in.Health, node.Name, in.Now)
	result.At(v.Next)

	if c := n.conditions(in, node, v, &result); c != nil {
		result.Add(*c)
		return result, nil // taints and pods follow the conditions, in the next pass
	}
	n.taints(in, cfg, node, v, &result)
	if ready := reconcile.NodeCondition(node, corev1.NodeReady); v.Unreachable || ready != nil && ready.Status != corev1.ConditionTrue {
		n.podsNotReady(in, node, &result)
	} else if ready != nil {
		n.podsReady(in, node, &result)
	}
	return result, nil
}

// conditions returns the change of the conditions, or nil: Unknown for a Node
// that is gone, and Ready again for one that is back, whose agent says nothing new.
func (n NodeLifecycle) conditions(in reconcile.Input, node *corev1.Node, v verdict, result *reconcile.Result) *reconcile.Request {
	now := metav1.NewTime(in.Now).Rfc3339Copy()
	updated := node.DeepCopy()
	set := func(t corev1.NodeConditionType, status corev1.ConditionStatus, reason, message string) {
		c := corev1.NodeCondition{Type: t, Status: status, Reason: reason, Message: message, LastHeartbeatTime: now, LastTransitionTime: now}
		if old := reconcile.NodeCondition(updated, t); old != nil {
			if old.Status == status {
				return
			}
			c.LastHeartbeatTime = old.LastHeartbeatTime
			*old = c
			return
		}
		updated.Status.Conditions = append(updated.Status.Conditions, c)
	}

	h := in.Health.Nodes[node.Name]
	ready := reconcile.NodeCondition(node, corev1.NodeReady)
	var ev *reconcile.Event
	switch {
	case v.Unreachable:
		for _, t := range []corev1.NodeConditionType{corev1.NodeReady, corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
			set(t, corev1.ConditionUnknown, reasonUnreachable, "The node is unreachable: "+v.Why+".")
		}
		if ready != nil && ready.Status == corev1.ConditionTrue {
			ev = reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeNormal, "NodeNotReady", "Node %s status is now: NodeNotReady (%s)", node.Name, v.Why)
		}
	case h.Stream && ready != nil && ready.Status == corev1.ConditionUnknown && ready.Reason == reasonUnreachable:
		// The agent reports at once. If it does not, its stream says enough.
		if due := reconcile.Latest(h.StreamSince, ready.LastTransitionTime.Time).Add(cmp.Or(n.Report, 2*time.Second)); due.After(in.Now) {
			result.At(due)
			return nil
		}
		for _, t := range []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
			if c := reconcile.NodeCondition(node, t); c != nil && c.Reason == reasonUnreachable {
				set(t, corev1.ConditionFalse, reasonBack, "The agent is connected again.")
			}
		}
		set(corev1.NodeReady, corev1.ConditionTrue, reasonBack, "The agent is connected again.")
		ev = reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeNormal, "NodeReady", "Node %s status is now: NodeReady", node.Name)
	}
	if equality.Semantic.DeepEqual(updated.Status.Conditions, node.Status.Conditions) {
		return nil
	}
	c := reconcile.UpdateStatus(reconcile.NodesResource, updated)
	c.Event = ev
	return &c
}

// conditionTaints are the keys of the taints that stand for conditions.
var conditionTaints = map[corev1.NodeConditionType]map[corev1.ConditionStatus]string{
	corev1.NodeReady: {
		corev1.ConditionFalse:   corev1.TaintNodeNotReady,
		corev1.ConditionUnknown: corev1.TaintNodeUnreachable,
	},
	corev1.NodeMemoryPressure:     {corev1.ConditionTrue: corev1.TaintNodeMemoryPressure},
	corev1.NodeDiskPressure:       {corev1.ConditionTrue: corev1.TaintNodeDiskPressure},
	corev1.NodePIDPressure:        {corev1.ConditionTrue: corev1.TaintNodePIDPressure},
	corev1.NodeNetworkUnavailable: {corev1.ConditionTrue: corev1.TaintNodeNetworkUnavailable},
}

// ownTaint says whether a taint is one of those this reconciler keeps.
func ownTaint(t *corev1.Taint) bool {
	switch t.Effect {
	case corev1.TaintEffectNoSchedule:
		switch t.Key {
		case corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable, corev1.TaintNodeUnschedulable, corev1.TaintNodeMemoryPressure,
			corev1.TaintNodeDiskPressure, corev1.TaintNodePIDPressure, corev1.TaintNodeNetworkUnavailable:
			return true
		}
	}
	return isEvictionTaint(t)
}

// taints brings the Node's taints in line with its conditions. The NoExecute
// taint, which evicts pods, is held back while many Nodes are lost at once.
func (n NodeLifecycle) taints(in reconcile.Input, cfg HealthConfig, node *corev1.Node, v verdict, result *reconcile.Result) {
	now := metav1.NewTime(in.Now.Add(time.Second - 1)).Rfc3339Copy() // never earlier than now, in whole seconds
	want := make([]corev1.Taint, 0, len(node.Spec.Taints)+2)
	for _, t := range node.Spec.Taints {
		if ownTaint(&t) {
			continue
		}
		if t.Effect == corev1.TaintEffectNoExecute && t.TimeAdded == nil {
			t.TimeAdded = &now // tolerations count from here, whoever leads
		}
		want = append(want, t)
	}
	add := func(key string, effect corev1.TaintEffect) {
		t := corev1.Taint{Key: key, Effect: effect}
		for i := range node.Spec.Taints {
			if old := &node.Spec.Taints[i]; old.MatchTaint(&t) {
				t = *old
			}
		}
		if effect == corev1.TaintEffectNoExecute && t.TimeAdded == nil {
			t.TimeAdded = &now
		}
		want = append(want, t)
	}
	for _, c := range node.Status.Conditions {
		if key, ok := conditionTaints[c.Type][c.Status]; ok {
			add(key, corev1.TaintEffectNoSchedule)
		}
	}
	if node.Spec.Unschedulable {
		add(corev1.TaintNodeUnschedulable, corev1.TaintEffectNoSchedule)
	}

	var held string
	key, again := cfg.evictionTaint(in, node, v)
	result.At(again)
	if key != "" {
		var may bool
		if may, held = cfg.mayEvict(in, node, key, result); may {
			add(key, corev1.TaintEffectNoExecute)
		}
	}
	sameTaint := func(a, b corev1.Taint) bool {
		return a.MatchTaint(&b) && a.Value == b.Value && a.TimeAdded.Equal(b.TimeAdded)
	}
	sorted := func(in []corev1.Taint) []corev1.Taint {
		return slices.SortedFunc(slices.Values(in), func(a, b corev1.Taint) int {
			return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Effect, b.Effect))
		})
	}
	if slices.EqualFunc(sorted(want), sorted(node.Spec.Taints), sameTaint) {
		return
	}
	spec := map[string]any{"taints": want}
	if len(want) == 0 {
		spec["taints"] = nil
	}
	c := reconcile.MergePatch(reconcile.NodesResource, node, "", map[string]any{"metadata": reconcile.Pinned(node), "spec": spec})
	if held != "" {
		c.Event = reconcile.NewEvent(reconcile.NodeKind, node, corev1.EventTypeWarning, "EvictionHeld",
			"Node %s is lost, but %s: that is taken for a fault of the network or of the control plane, and no pod is evicted until fewer are lost", node.Name, held)
	}
	result.Add(c)
}

// mayEvict says whether a Node may have the NoExecute taint of a key now: how much of its
// zone is lost decides, and how long ago another of the zone got one. held says why not,
// if that is not a matter of time alone.
func (c HealthConfig) mayEvict(in reconcile.Input, node *corev1.Node, key string, result *reconcile.Result) (may bool, held string) {
	if c.longTainted(node, in.Now) {
		return true, ""
	}
	inForce := hasTaint(node, key, corev1.TaintEffectNoExecute)
	z := c.zone(in, objects.Zone(node))
	rate, why := c.rate(in, z, inForce) // what is in force goes only when it is certain that many are lost
	switch {
	case rate == 0:
		result.At(z.until)
		return false, why
	case inForce || hasEvictionTaint(node): // one of the two for the other
		return true, ""
	}
	if at := z.evictionFrom(node.Name, rate, in.Now); at.After(in.Now) {
		result.At(at)
		return false, ""
	}
	return true, ""
}

// evictionTaint is the key of the NoExecute taint that a Node's state calls for, or
// empty; and when to look again, if that is a matter of time.
func (c HealthConfig) evictionTaint(in reconcile.Input, node *corev1.Node, v verdict) (key string, again time.Time) {
	ready := reconcile.NodeCondition(node, corev1.NodeReady)
	switch {
	case ready == nil || ready.Status == corev1.ConditionTrue:
		return "", time.Time{}
	case ready.Status == corev1.ConditionFalse:
		key = corev1.TaintNodeNotReady
	case v.Unreachable:
		return corev1.TaintNodeUnreachable, time.Time{}
	default:
		key = corev1.TaintNodeUnreachable
	}
	// What this leader has not judged itself stays as it is.
	if settled := in.Health.Since.Add(c.Settle); key == corev1.TaintNodeUnreachable || settled.After(in.Now) {
		if settled.After(in.Now) {
			again = settled
		}
		if !hasTaint(node, key, corev1.TaintEffectNoExecute) {
			return "", again
		}
	}
	return key, again
}

func hasTaint(node *corev1.Node, key string, effect corev1.TaintEffect) bool {
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key && t.Effect == effect })
}

// podsNotReady takes the readiness from the pods of a Node that is not ready, so
// that nothing is sent to them.
func (n NodeLifecycle) podsNotReady(in reconcile.Input, node *corev1.Node, result *reconcile.Result) {
	now := metav1.NewTime(in.Now).Rfc3339Copy()
	for pod := range in.Snapshot.PodsOnNode(node.Name) {
		ready := reconcile.ReadyCondition(pod)
		if ready == nil {
			continue
		}
		c := *ready
		c.Status, c.LastTransitionTime = corev1.ConditionFalse, now
		patch := reconcile.PatchPodStatus(pod, nil, c)
		patch.Event = reconcile.NewEvent(reconcile.PodKind, pod, corev1.EventTypeWarning, "NodeNotReady", "Node is not ready")
		result.Add(patch)
	}
}

// podsReady gives back the readiness that podsNotReady took: the agent, whose stream may
// never have broken, has nothing new to say of its pods.
func (n NodeLifecycle) podsReady(in reconcile.Input, node *corev1.Node, result *reconcile.Result) {
	for pod := range in.Snapshot.PodsOnNode(node.Name) {
		ready := takenReadiness(pod)
		if ready == nil {
			continue
		}
		c := *ready
		c.Status, c.LastTransitionTime = corev1.ConditionTrue, metav1.NewTime(in.Now).Rfc3339Copy()
		result.Add(reconcile.MergeConditions(pod, c))
	}
}

// takenReadiness returns the Ready condition of a pod whose readiness podsNotReady took,
// or nil. It says no without a reason, which an agent always gives, and although the
// containers are ready.
func takenReadiness(pod *corev1.Pod) *corev1.PodCondition {
	ready, containers := reconcile.PodCondition(pod, corev1.PodReady), reconcile.PodCondition(pod, corev1.ContainersReady)
	if ready == nil || ready.Status != corev1.ConditionFalse || ready.Reason != "" || objects.PodEnded(pod) ||
		containers == nil || containers.Status != corev1.ConditionTrue {
		return nil
	}
	return ready
}
