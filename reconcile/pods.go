package reconcile

import (
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/state/objects"
)

// PodActive says whether a pod counts as a replica.
func PodActive(pod *corev1.Pod) bool { return !objects.PodEnded(pod) && pod.DeletionTimestamp == nil }

// PodCondition returns a pod's condition of a type, or nil.
func PodCondition(pod *corev1.Pod, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == t {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// ReadyCondition returns the Ready condition if it is true, else nil.
func ReadyCondition(pod *corev1.Pod) *corev1.PodCondition {
	if c := PodCondition(pod, corev1.PodReady); c != nil && c.Status == corev1.ConditionTrue {
		return c
	}
	return nil
}

// AvailableAt returns when a pod is or was available, which is when it has been
// ready for minReadySeconds, or false if it is not ready.
func AvailableAt(pod *corev1.Pod, minReadySeconds int32) (time.Time, bool) {
	c := ReadyCondition(pod)
	switch {
	case c == nil:
		return time.Time{}, false
	case minReadySeconds == 0:
		return time.Time{}, true
	case c.LastTransitionTime.IsZero():
		return time.Time{}, false
	}
	return c.LastTransitionTime.Add(time.Duration(minReadySeconds) * time.Second), true
}

// PatchPodStatus returns the change that merges conditions by type, and other
// fields as given, into the status of a pod, as long as it is the same pod.
func PatchPodStatus(pod *corev1.Pod, fields map[string]any, conditions ...corev1.PodCondition) Request {
	status := maps.Clone(fields)
	if status == nil {
		status = map[string]any{}
	}
	if len(conditions) > 0 {
		status["conditions"] = conditions
	}
	return patchStatus(pod, map[string]any{"uid": string(pod.UID)}, status)
}

// MergeConditions returns the change that merges conditions by type into the status of
// this version of a pod.
func MergeConditions(pod *corev1.Pod, conditions ...corev1.PodCondition) Request {
	return patchStatus(pod, Pinned(pod), map[string]any{"conditions": conditions})
}

func patchStatus(pod *corev1.Pod, metadata, status map[string]any) Request {
	c := MergePatch(PodsResource, pod, "status", map[string]any{"metadata": metadata, "status": status})
	c.PatchType = types.StrategicMergePatchType
	return c
}

// ConditionTime keeps the time of a condition that does not change its status.
func ConditionTime(pod *corev1.Pod, t corev1.PodConditionType, status corev1.ConditionStatus, now metav1.Time) metav1.Time {
	if c := PodCondition(pod, t); c != nil && c.Status == status {
		return c.LastTransitionTime
	}
	return now
}
