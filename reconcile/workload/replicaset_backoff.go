package workload

import (
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
)

const (
	// firstHold is how long after a pod that failed at once its replacement is
	// created; every further round of such pods doubles it, up to lastHold.
	firstHold = time.Second
	lastHold  = 5 * time.Minute
	// failureMemory is how old a failed pod may be and count. It holds more than as
	// many rounds as lastHold takes to be reached, so that the pace is kept.
	failureMemory = time.Hour
	// atOnce is how soon after its creation a pod that fails at once has failed.
	atOnce = time.Minute
)

// holdBack says how many of the missing pods of rs are not to be created before
// until, because pods like them failed as soon as a node had them. A node that
// refuses a pod does so within milliseconds, and without a pause the ReplicaSet
// would fill the log with pods as fast as it can write. Upstream does that; the
// pace here is like that of its Jobs.
//
// It is a function of the pods that are there: rounds of failures are told apart
// by when their pods were created, and what failed before a pod was created that
// became ready or ran for a while does not count. Missing pods in excess of those
// that failed within lastHold are not held back: they are not replacements of them.
func holdBack(in reconcile.Input, rs *appsv1.ReplicaSet) (held int, until time.Time) {
	var failed []time.Time
	var good time.Time // creation of the newest pod that did not fail at once
	for pod := range reconcile.OwnedPods(in.Snapshot, rs) {
		created := pod.CreationTimestamp.Time
		switch {
		case pod.DeletionTimestamp != nil, reconcile.PodActive(pod) && reconcile.ReadyCondition(pod) == nil:
			// It shows nothing, or nothing yet.
		case !failedAtOnce(pod):
			if created.After(good) {
				good = created
			}
		default:
			if age := in.Now.Sub(created); age < failureMemory && age > -lastHold { // further ahead is a clock gone wrong
				failed = append(failed, created)
			}
		}
	}
	rounds := map[int64]bool{}
	var newest time.Time
	for _, created := range failed {
		if created.Before(good) {
			continue
		}
		rounds[created.Unix()] = true
		if created.After(newest) {
			newest = created
		}
		if in.Now.Sub(created) < lastHold {
			held++
		}
	}
	if len(rounds) == 0 {
		return 0, time.Time{}
	}
	hold := lastHold
	if n := len(rounds) - 1; n < 9 { // 2^9 seconds are more than lastHold
		hold = min(firstHold<<n, lastHold)
	}
	// Creation times are whole seconds, cut off: one more, or the first hold might be none.
	if until = newest.Add(hold + time.Second); !until.After(in.Now) {
		return 0, time.Time{}
	}
	return held, until
}

// failedAtOnce says whether a pod failed as soon as a node had it: refused, or
// ended by the node within atOnce. Deleting a pod is not its failure, and one
// whose containers were last seen running was lost with its node.
func failedAtOnce(pod *corev1.Pod) bool {
	if pod.Status.Phase != corev1.PodFailed || pod.DeletionTimestamp != nil {
		return false
	}
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			state := &list[i].State
			if state.Running != nil || state.Terminated != nil && state.Terminated.FinishedAt.Sub(pod.CreationTimestamp.Time) > atOnce {
				return false
			}
		}
	}
	return true
}
