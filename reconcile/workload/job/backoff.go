package job

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
)

const (
	// firstWait is how long after a pod failed it is replaced. Each further failure
	// without a success between doubles it, up to lastWait.
	firstWait = 10 * time.Second
	lastWait  = 10 * time.Minute
)

// retryAt is when a pod that failed at last as the n-th in a row is replaced.
func retryAt(failures int, last time.Time) time.Time {
	if failures == 0 {
		return time.Time{}
	}
	wait := lastWait
	if failures <= 6 { // 10 s doubled 6 times is more than 10 minutes
		wait = min(lastWait, firstWait<<(failures-1))
	}
	return last.Add(wait)
}

// retry is when the Job may create pods again. It is a function of the pods that are
// there: those that failed after the last one that succeeded.
func (p *pass) retry() time.Time {
	var succeeded, last time.Time
	for _, pod := range p.pods {
		if pod.Status.Phase == corev1.PodSucceeded {
			succeeded = reconcile.Latest(succeeded, endOf(pod))
		}
	}
	failures := 0
	for _, pod := range p.pods {
		// What is deleted and not tracked was too many, and has not failed.
		failed := pod.Status.Phase == corev1.PodFailed && pod.DeletionTimestamp == nil || p.failed(pod) && tracked(pod)
		if at := endOf(pod); failed && p.inRange(pod) && at.After(succeeded) {
			failures++
			last = reconcile.Latest(last, at)
		}
	}
	return retryAt(failures, last)
}

// retryIndex is when the pod of an index that failed at last is replaced.
func retryIndex(pod *corev1.Pod) time.Time {
	if pod == nil {
		return time.Time{}
	}
	counted, ignored := failuresOf(pod)
	return retryAt(int(counted+ignored)+1, endOf(pod))
}

// endOf is when a pod ended: when its containers did, else when it ceased to be ready,
// else when it was deleted, else, for want of anything, when it was created.
func endOf(pod *corev1.Pod) time.Time {
	if t, ok := containersEnd(pod); ok {
		return t
	}
	if c := reconcile.PodCondition(pod, corev1.PodReady); c != nil && c.Status == corev1.ConditionFalse && !c.LastTransitionTime.IsZero() {
		return c.LastTransitionTime.Time
	}
	if pod.DeletionTimestamp != nil {
		var grace int64
		if pod.DeletionGracePeriodSeconds != nil {
			grace = *pod.DeletionGracePeriodSeconds
		}
		return pod.DeletionTimestamp.Add(-time.Duration(grace) * time.Second)
	}
	return pod.CreationTimestamp.Time
}

// containersEnd is when the last container of a pod ended, sidecars included, or
// false when not all have.
func containersEnd(pod *corev1.Pod) (time.Time, bool) {
	var last time.Time
	for i := range pod.Status.ContainerStatuses {
		t := pod.Status.ContainerStatuses[i].State.Terminated
		if t == nil || t.FinishedAt.IsZero() {
			return time.Time{}, false
		}
		last = reconcile.Latest(last, t.FinishedAt.Time)
	}
	for i := range pod.Status.InitContainerStatuses {
		status := &pod.Status.InitContainerStatuses[i]
		if !slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool {
			return c.Name == status.Name && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		}) {
			continue
		}
		t := status.State.Terminated
		if t == nil || t.FinishedAt.IsZero() {
			return time.Time{}, false
		}
		last = reconcile.Latest(last, t.FinishedAt.Time)
	}
	return last, !last.IsZero()
}
