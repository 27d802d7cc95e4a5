package job

import (
	"slices"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// maxUncounted is how many pods may be on their way into the counts at a time, so
	// that a status stays small.
	maxUncounted = 500
	// maxUntracked is how many pods one pass lets go.
	maxUntracked = 500
)

// track moves each pod that has ended one step on: into the list of uncounted pods
// (or the completed indexes), and from there, when the stored status has it, out of
// its finalizer, and, when it has none any more, into the counts. It returns the pods
// whose finalizer is to be removed: nothing that the status says for the first time
// in this pass may depend on them.
func (p *pass) track() []*corev1.Pod {
	uncounted := p.status.UncountedTerminatedPods
	p.countUntracked()
	failing := p.end != nil && p.end.Type == batchv1.JobFailureTarget
	var removable []*corev1.Pod
	for _, pod := range p.pods {
		if len(uncounted.Succeeded)+len(uncounted.Failed) >= maxUncounted && !p.countedSucceeded[pod.UID] && !p.countedFailed[pod.UID] {
			continue
		}
		failed := p.failed(pod)
		if !tracked(pod) || !p.mayUntrack(pod, failed) {
			continue
		}
		switch {
		case p.countedSucceeded[pod.UID], p.countedFailed[pod.UID]:
		case pod.Status.Phase == corev1.PodSucceeded:
			if !indexed(p.job) {
				uncounted.Succeeded = append(uncounted.Succeeded, pod.UID)
				continue
			}
			if p.inRange(pod) && !p.before.has(indexOf(pod)) {
				continue // the status that has the index is written by this pass
			}
		case failed || failing: // a Job that fails takes those that still run with it
			if p.inRange(pod) && judge(p.job.Spec.PodFailurePolicy, pod).counts() {
				uncounted.Failed = append(uncounted.Failed, pod.UID)
				continue
			}
		}
		if len(removable) < maxUntracked {
			removable = append(removable, pod)
		}
	}
	p.numbers()
	if p.end != nil && !p.decided {
		return nil // first it must be written that the Job ends, and why
	}
	return removable
}

// countUntracked counts the pods of the list of uncounted ones that have no finalizer
// any more, or are gone.
func (p *pass) countUntracked() {
	left := map[types.UID]bool{}
	for _, pod := range p.pods {
		if tracked(pod) {
			left[pod.UID] = true
		}
	}
	move := func(list *[]types.UID, n *int32) {
		before := len(*list)
		*list = slices.DeleteFunc(*list, func(uid types.UID) bool { return !left[uid] })
		*n += int32(before - len(*list))
	}
	move(&p.status.UncountedTerminatedPods.Succeeded, &p.status.Succeeded)
	move(&p.status.UncountedTerminatedPods.Failed, &p.status.Failed)
}

// mayUntrack says whether nothing is expected of a pod any more.
func (p *pass) mayUntrack(pod *corev1.Pod, failed bool) bool {
	if p.job.DeletionTimestamp != nil || p.end != nil || pod.Status.Phase == corev1.PodSucceeded {
		return true
	}
	if !failed {
		return false
	}
	waits, ok := p.delayed[indexOf(pod)]
	return !ok || waits.UID != pod.UID
}

// numbers puts what was counted and seen into the status.
func (p *pass) numbers() {
	if indexed(p.job) {
		p.status.Succeeded = int32(p.done.total())
		p.status.CompletedIndexes = p.done.String()
		p.status.FailedIndexes = nil
		if p.job.Spec.BackoffLimitPerIndex != nil {
			s := p.broken.String()
			p.status.FailedIndexes = &s
		}
	}
	ready := int32(0)
	for _, pod := range p.active {
		if isReady(pod) {
			ready++
		}
	}
	p.status.Active = int32(len(p.active)) + p.created
	p.status.Ready = &ready
	p.status.Terminating = &p.terminating
}
