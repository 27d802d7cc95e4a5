package scheduler

import (
	"maps"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/dynamic-resource-allocation/resourceclaim"

	"timonel/reconcile"
	"timonel/sched"
	"timonel/state/objects"
)

const (
	// recount is how often a pod's condition is written again when only the numbers in
	// its message are others: a node more or less would otherwise be a write for each
	// pod that waits.
	recount = time.Minute
	// portion is how many pods are planned before their bindings are committed.
	portion = 500

	selectedNodeAnnotation = "volume.kubernetes.io/selected-node"
)

var resourceClaims = resourcev1.SchemeGroupVersion.WithResource("resourceclaims")

// Scheduler drives sched: it plans the pending pods under one key and turns the
// plan into changes. What it keeps from pass to pass is derived from the
// snapshots it has seen, and from what became of the pods it has tried.
type Scheduler struct {
	planner  *sched.Planner
	revision int64 // of the snapshot the planner followed to
	// told is when a pod's condition was written last.
	told map[types.UID]time.Time
}

// New returns a Scheduler. It fails on a config that cannot be.
func New(cfg sched.Config) (*Scheduler, error) {
	if cfg.MaxPods == 0 {
		cfg.MaxPods = portion
	}
	planner, err := sched.NewPlanner(cfg)
	if err != nil {
		return nil, err
	}
	return &Scheduler{planner: planner, told: map[types.UID]time.Time{}}, nil
}

// Name implements Reconciler.
func (s *Scheduler) Name() string { return corev1.DefaultSchedulerName }

// Traits implements reconcile.Reconciler: one pod that is refused holds up no other.
func (s *Scheduler) Traits() reconcile.Traits { return reconcile.Traits{Steady: true} }

// All implements Reconciler.
func (s *Scheduler) All(*objects.Snapshot) []reconcile.Key {
	return []reconcile.Key{reconcile.Singleton}
}

// Keys implements Reconciler: the key comes up when a pod wants a Node, or when
// something changed that may make room for one that found none.
func (s *Scheduler) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if s.concerns(c) {
		return []reconcile.Key{reconcile.Singleton}
	}
	return nil
}

func (s *Scheduler) concerns(c objects.Changed) bool {
	switch o := c.Meta().Object.(type) {
	case *corev1.Pod:
		if c.Old == nil || c.New == nil {
			return true
		}
		before, _ := c.Old.Object.(*corev1.Pod)
		return before == nil || before.Spec.NodeName != o.Spec.NodeName || before.Status.NominatedNodeName != o.Status.NominatedNodeName || objects.PodEnded(before) != objects.PodEnded(o) ||
			c.Old.Generation != c.New.Generation || (c.Old.DeletionTimestamp == nil) != (c.New.DeletionTimestamp == nil) ||
			!maps.Equal(c.Old.Labels, c.New.Labels) ||
			!resourceclaim.PodStatusEqual(before.Status.ResourceClaimStatuses, o.Status.ResourceClaimStatuses)
	case *corev1.Node:
		return nodeMatters(c)
	case *corev1.PersistentVolumeClaim, *corev1.PersistentVolume:
		return true
	case *corev1.Namespace:
		return c.Old == nil || c.New == nil || !maps.Equal(c.Old.Labels, c.New.Labels)
	}
	switch c.Meta().GVK.Kind {
	case "VolumeAttachment":
		return c.New == nil // what was attached made room
	case "StorageClass", "CSINode", "CSIDriver", "CSIStorageCapacity", "ResourceClaim", "DeviceClass", "ResourceSlice", "DeviceTaintRule":
		return true
	}
	return false
}

// nodeMatters says whether a Node changed in what decides about pods: not in
// its heartbeats, images or addresses.
func nodeMatters(c objects.Changed) bool {
	if c.Old == nil || c.New == nil {
		return true
	}
	before, _ := c.Old.Object.(*corev1.Node)
	after, _ := c.New.Object.(*corev1.Node)
	if before == nil || after == nil {
		return true
	}
	return !maps.Equal(before.Labels, after.Labels) || before.Spec.Unschedulable != after.Spec.Unschedulable ||
		!equality.Semantic.DeepEqual(before.Spec.Taints, after.Spec.Taints) ||
		!equality.Semantic.DeepEqual(before.Status.Allocatable, after.Status.Allocatable) ||
		objects.NodeReady(before) != objects.NodeReady(after)
}

// Reconcile implements Reconciler.
func (s *Scheduler) Reconcile(in reconcile.Input, _ reconcile.Key) (reconcile.Result, error) {
	s.follow(in)
	s.noteRefused(in)
	var result reconcile.Result
	plan, err := s.planner.Plan(in.Now, in.Seed, s.planner.Ready(in.Now))
	if err != nil {
		return result, err
	}
	s.planner.Tried(plan, in.Now)
	result.At(s.planner.Next(in.Now))

	for _, b := range plan.Bindings {
		result.Add(bind(b))
	}
	claims := map[types.UID]bool{}
	for _, w := range plan.Waiting {
		for _, d := range w.Claims {
			if !claims[d.Claim.UID] {
				claims[d.Claim.UID] = true
				result.Add(commitClaim(d, w.Node))
			}
		}
		if len(w.ResourceClaims) > 0 {
			result.Add(waitForDevices(w))
		}
		if !w.Brief && w.Pod.Status.NominatedNodeName != w.Node {
			result.Add(reconcile.PatchPodStatus(w.Pod, map[string]any{"nominatedNodeName": w.Node}))
		}
	}
	for _, w := range plan.Releases {
		result.Add(writeClaim(w.ClaimWrite))
	}
	for _, p := range plan.Preemptions {
		for _, victim := range p.Victims {
			result.Add(preempt(in, p, victim))
		}
	}
	for _, f := range plan.Failures {
		if c, ok := s.unplaced(in, f); ok {
			result.Add(c)
			s.told[f.Pod.UID] = in.Now
		}
	}
	if len(s.told) > 2*s.planner.Len()+portion {
		maps.DeleteFunc(s.told, func(_ types.UID, at time.Time) bool { return in.Now.Sub(at) >= recount })
	}
	return result, nil
}

// follow brings the planner to the newest snapshot.
func (s *Scheduler) follow(in reconcile.Input) {
	changes := objects.Changes{Snapshot: in.Snapshot, Reset: true}
	if s.revision > 0 && in.Changes != nil {
		changes = in.Changes(s.revision)
	}
	s.planner.Follow(changes, in.Now)
	s.revision = changes.Snapshot.Revision()
}

// noteRefused has pods tried again, after a while, for which the API refused something.
func (s *Scheduler) noteRefused(in reconcile.Input) {
	others := false
	for _, f := range in.Failed {
		switch o := f.Request.Object.(type) {
		case *corev1.Binding:
			s.planner.Refused(o.UID, in.Now)
		case *resourcev1.ResourceClaim:
			s.planner.RefusedClaim(o, in.Now)
		default:
			others = true
		}
	}
	if others {
		s.planner.RefusedOthers(in.Now)
	}
}

// newEvent is about a pod, and is reported by the profile that the pod to place names.
func newEvent(toPlace, about *corev1.Pod, kind, reason, format string, args ...any) *reconcile.Event {
	e := reconcile.NewEvent(reconcile.PodKind, about, kind, reason, format, args...)
	e.Component = toPlace.Spec.SchedulerName
	return e
}

// bind returns the change that assigns a pod to its Node, once its devices are its own.
func bind(b sched.Binding) reconcile.Request {
	return afterClaims(b.Pod, b.ResourceClaims, binding(b))
}

func binding(b sched.Binding) reconcile.Request {
	c := reconcile.Create(reconcile.PodsResource, &corev1.Pod{ObjectMeta: b.Pod.ObjectMeta})
	c.Subresource = "binding"
	c.Object = &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: b.Pod.Namespace, Name: b.Pod.Name, UID: b.Pod.UID},
		Target:     corev1.ObjectReference{Kind: reconcile.NodeKind.Kind, Name: b.Node},
	}
	c.Event = newEvent(b.Pod, b.Pod, corev1.EventTypeNormal, "Scheduled", "Successfully assigned %s/%s to %s", b.Pod.Namespace, b.Pod.Name, b.Node)
	c.FailEvent = newEvent(b.Pod, b.Pod, corev1.EventTypeWarning, "FailedScheduling", "binding rejected")
	return c
}

// afterClaims returns the change that writes a pod's claims, one after another, and then
// makes the last.
func afterClaims(pod *corev1.Pod, writes []sched.ClaimWrite, last ...reconcile.Request) reconcile.Request {
	var chain []reconcile.Request
	for _, w := range writes {
		c := writeClaim(w)
		c.FailEvent = newEvent(pod, pod, corev1.EventTypeWarning, "FailedScheduling", "running PreBind plugin %q", "DynamicResources")
		chain = append(chain, c)
	}
	chain = append(chain, last...)
	first := chain[0]
	first.Then = append(first.Then, chain[1:]...)
	return first
}

// writeClaim returns the change that writes a ResourceClaim if nobody has changed it.
func writeClaim(w sched.ClaimWrite) reconcile.Request {
	if w.Status {
		return reconcile.UpdateStatus(resourceClaims, w.Claim)
	}
	return reconcile.Update(resourceClaims, w.Claim)
}

// waitForDevices returns the change that writes the claims of a pod which is not to be
// bound yet.
func waitForDevices(w sched.Waiting) reconcile.Request {
	c := afterClaims(w.Pod, w.ResourceClaims)
	if last := w.ResourceClaims[len(w.ResourceClaims)-1]; last.Status && len(w.Claims) == 0 {
		c.Event = newEvent(w.Pod, w.Pod, corev1.EventTypeNormal, "BindingConditionsPending", "waiting for binding conditions for device on node %s", w.Node)
	}
	return c
}

// unplaced returns the change that says in a pod's status why it has no Node, or
// false if it says so already, or did a moment ago with other numbers.
func (s *Scheduler) unplaced(in reconcile.Input, f sched.Failure) (reconcile.Request, bool) {
	pod := f.Pod
	old := reconcile.PodCondition(pod, corev1.PodScheduled)
	said := old != nil && old.Status == corev1.ConditionFalse && old.Reason == f.Reason &&
		(old.Message == f.Message || in.Now.Sub(s.told[pod.UID]) < recount && withoutNumbers(old.Message) == withoutNumbers(f.Message))
	if said && pod.Status.NominatedNodeName == f.NominatedNode {
		return reconcile.Request{}, false
	}
	fields := map[string]any{}
	if pod.Status.NominatedNodeName != f.NominatedNode {
		fields["nominatedNodeName"] = nil
		if f.NominatedNode != "" {
			fields["nominatedNodeName"] = f.NominatedNode
		}
	}
	if said {
		return reconcile.PatchPodStatus(pod, fields), true
	}
	c := reconcile.PatchPodStatus(pod, fields, corev1.PodCondition{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: f.Reason, Message: f.Message,
		ObservedGeneration: pod.Generation,
		LastTransitionTime: reconcile.ConditionTime(pod, corev1.PodScheduled, corev1.ConditionFalse, metav1.NewTime(in.Now).Rfc3339Copy()),
	})
	c.Event = newEvent(pod, pod, corev1.EventTypeWarning, "FailedScheduling", "%s", f.Message)
	return c, true
}

// withoutNumbers is a message with its numbers taken out.
func withoutNumbers(message string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, message)
}

// preempt returns the change that ends a victim, and says why in its status before.
func preempt(in reconcile.Input, p sched.Preemption, victim *corev1.Pod) reconcile.Request {
	c := reconcile.Delete(reconcile.PodsResource, victim)
	c.Event = newEvent(p.Pod, victim, corev1.EventTypeNormal, "Preempted", "Preempted by pod %s on node %s", p.Pod.UID, p.Node)
	condition := corev1.PodCondition{
		Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: corev1.PodReasonPreemptionByScheduler,
		Message:            p.Pod.Spec.SchedulerName + ": preempting to accommodate a higher priority pod",
		LastTransitionTime: reconcile.ConditionTime(victim, corev1.DisruptionTarget, corev1.ConditionTrue, metav1.NewTime(in.Now).Rfc3339Copy()),
	}
	first := reconcile.PatchPodStatus(victim, nil, condition)
	first.Then = []reconcile.Request{c}
	return first
}

// commitClaim returns the change that ties a claim to the Node its pod is to run on.
func commitClaim(d sched.ClaimDecision, node string) reconcile.Request {
	if d.Volume != nil {
		return reconcile.Update(reconcile.PVsResource, d.Volume)
	}
	return reconcile.MergePatch(reconcile.PVCsResource, d.Claim, "", map[string]any{"metadata": map[string]any{
		"uid": string(d.Claim.UID), "resourceVersion": d.Claim.ResourceVersion,
		"annotations": map[string]string{selectedNodeAnnotation: node},
	}})
}
