package pod

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"timonel/agent/admission"
)

// allocation is the resources that a pod was accepted with, which it keeps: a
// running pod is not resized. It is in the pod's status, and so outlives the
// agent.
type allocation struct {
	pod        *corev1.ResourceRequirements
	containers map[string]corev1.ResourceRequirements
}

// allocate is what pod asks for or, of a pod that runs, what its status says
// that it has.
func allocate(pod *corev1.Pod, st *corev1.PodStatus) *allocation {
	a := &allocation{pod: pod.Spec.Resources, containers: map[string]corev1.ResourceRequirements{}}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			a.containers[list[i].Name] = list[i].Resources
		}
	}
	if st == nil {
		return a
	}
	if st.Resources != nil {
		a.pod = st.Resources
	}
	for _, list := range [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses} {
		for i := range list {
			if have := list[i].Resources; have != nil {
				own := a.containers[list[i].Name]
				own.Requests, own.Limits = have.Requests, have.Limits
				a.containers[list[i].Name] = own
			}
		}
	}
	return a
}

// apply returns pod with the resources of a, and whether it asks for others.
func (a *allocation) apply(pod *corev1.Pod) (*corev1.Pod, bool) {
	if a == nil {
		return pod, false
	}
	same := equality.Semantic.DeepEqual(a.pod, pod.Spec.Resources)
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			same = same && equality.Semantic.DeepEqual(a.containers[list[i].Name], list[i].Resources)
		}
	}
	if same {
		return pod, false
	}
	out := *pod // shared with the store, which nobody changes
	out.Spec.Resources = a.pod
	replace := func(list []corev1.Container) []corev1.Container {
		list = append([]corev1.Container(nil), list...)
		for i := range list {
			list[i].Resources = a.containers[list[i].Name]
		}
		return list
	}
	out.Spec.InitContainers, out.Spec.Containers = replace(pod.Spec.InitContainers), replace(pod.Spec.Containers)
	return &out, true
}

// resizeCondition says that what is asked for will not be.
func resizeCondition(pod *corev1.Pod) corev1.PodCondition {
	return corev1.PodCondition{
		Type: corev1.PodResizePending, Status: corev1.ConditionTrue, Reason: corev1.PodReasonInfeasible,
		Message: admission.ResizeMessage, ObservedGeneration: pod.Generation,
	}
}

// sayResize tells of a resize that cannot be, once for each that was asked for.
func (w *worker) sayResize(pod *corev1.Pod, old *corev1.PodStatus) {
	if c := findCondition(old.Conditions, corev1.PodResizePending); c != nil && c.ObservedGeneration == pod.Generation {
		return
	}
	w.eventOnce(pod, corev1.EventTypeWarning, "ResizeInfeasible",
		fmt.Sprintf("Pod resize Infeasible: %s (generation %d)", admission.ResizeMessage, pod.Generation), "")
}
