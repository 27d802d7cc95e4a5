package differential

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// What agents and the scheduler do is done to both sides' pods by a rule that does not look
// at names: the pods are put in an order of what they are, and a step names them by their
// place in it. Pods that are alike in all of that are alike to a controller too.

// pods returns the pods of a side that a step may choose of, in that order.
func (s *side) pods(which func(*corev1.Pod) bool) []*corev1.Pod {
	type placed struct {
		pod   *corev1.Pod
		place string
	}
	var all []placed
	for pod := range s.Snapshot().Pods().All() {
		if which(pod) {
			all = append(all, placed{pod, s.place(pod)})
		}
	}
	slices.SortFunc(all, func(a, b placed) int {
		return cmp.Or(cmp.Compare(a.place, b.place), cmp.Compare(a.pod.UID, b.pod.UID))
	})
	out := make([]*corev1.Pod, 0, len(all))
	for _, p := range all {
		out = append(out, p.pod)
	}
	return out
}

func (s *side) place(pod *corev1.Pod) string {
	var b strings.Builder
	image := ""
	if len(pod.Spec.Containers) > 0 {
		image = pod.Spec.Containers[0].Image
	}
	fmt.Fprint(&b, s.identity(s.Find(reconcile.PodsResource, pod.Namespace, pod.Name)), image, pod.CreationTimestamp.Unix(), pod.Spec.NodeName,
		pod.Status.Phase, pod.Labels, pod.Annotations, pod.Finalizers)
	if pod.DeletionTimestamp != nil {
		fmt.Fprint(&b, "deleted", pod.DeletionTimestamp.Unix())
	}
	if c := reconcile.ReadyCondition(pod); c != nil {
		fmt.Fprint(&b, c.Status, c.LastTransitionTime.Unix())
	}
	for _, c := range pod.Status.ContainerStatuses {
		fmt.Fprint(&b, c.RestartCount)
	}
	return b.String()
}

func waiting(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodPending && p.Spec.NodeName == ""
}

func bound(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodPending && p.Spec.NodeName != ""
}

func running(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning
}

func ready(p *corev1.Pod) bool { return running(p) && reconcile.ReadyCondition(p) != nil }

func unready(p *corev1.Pod) bool { return running(p) && reconcile.ReadyCondition(p) == nil }

func alive(p *corev1.Pod) bool { return p.DeletionTimestamp == nil && !objects.PodEnded(p) }

func terminating(p *corev1.Pod) bool { return p.DeletionTimestamp != nil }

func anyPod(*corev1.Pod) bool { return true }

// pick returns n of the pods, from the one at a place on.
func pick(pods []*corev1.Pod, at, n int) []*corev1.Pod {
	out := make([]*corev1.Pod, 0, n)
	for i := range min(n, len(pods)) {
		out = append(out, pods[(at+i)%len(pods)])
	}
	return out
}

// bind gives a pod a node, as the scheduler does.
func (s *side) bind(pod *corev1.Pod, node string) {
	s.Edit(reconcile.PodsResource, pod.Namespace, pod.Name, func(m map[string]any) { m["spec"].(map[string]any)["nodeName"] = node })
}

// report writes a pod's status as its agent does.
func (s *side) report(pod *corev1.Pod, phase corev1.PodPhase, isReady bool, change func(*corev1.PodStatus)) {
	edit(s, reconcile.PodsResource, pod.Name, func(p *corev1.Pod) {
		now := metav1.NewTime(time.Now())
		p.Status.Phase = phase
		if p.Status.StartTime == nil {
			p.Status.StartTime = &now
		}
		status := corev1.ConditionFalse
		if isReady {
			status = corev1.ConditionTrue
		}
		at := slices.IndexFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady })
		if at < 0 {
			p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady})
			at = len(p.Status.Conditions) - 1
		}
		if c := &p.Status.Conditions[at]; c.Status != status {
			c.Status, c.LastTransitionTime = status, now
		}
		if change != nil {
			change(&p.Status)
		}
	})
}

// vanish removes a pod whose containers have stopped.
func (s *side) vanish(pod *corev1.Pod) {
	now := int64(0)
	s.must(reconcile.Request{Verb: reconcile.VerbDelete, Resource: reconcile.PodsResource, Namespace: pod.Namespace, Name: pod.Name, GracePeriodSeconds: &now})
}

// end ends a pod's containers.
func (s *side) end(pod *corev1.Pod, phase corev1.PodPhase, exit int32) {
	s.report(pod, phase, false, func(status *corev1.PodStatus) {
		status.ContainerStatuses = []corev1.ContainerStatus{{
			Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: exit, FinishedAt: metav1.NewTime(time.Now())}},
		}}
	})
}

// serve lets every pod get on by a step: to a node, running and ready, gone.
func (s *side) serve() {
	// Those that a controller makes meanwhile are for the next step.
	going, started, placed := s.pods(terminating), s.pods(func(p *corev1.Pod) bool { return bound(p) || unready(p) }), s.pods(waiting)
	for _, p := range started {
		s.report(p, corev1.PodRunning, true, nil)
	}
	for i, p := range placed {
		s.bind(p, s.node(i))
	}
	for _, p := range going {
		s.vanish(p)
	}
}

// node returns the name of one of the nodes that the side has.
func (s *side) node(i int) string { return fmt.Sprint("n", i%s.nodes) }
