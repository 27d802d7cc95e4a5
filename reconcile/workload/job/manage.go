package job

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/reconcile/workload"
	"timonel/state/objects"
)

// burst is how many pods one pass creates or deletes at most.
const burst = 500

// manage sees to it that as many pods run as are wanted, and returns how many do when
// those are there that it creates.
func (p *pass) manage() int32 {
	active := int32(len(p.active))
	if p.suspended() {
		p.deleteSurplus(len(p.active))
		return active
	}
	wanted := p.wanted()
	if p.deleteSurplus(int(max(0, active-wanted))) {
		return active // an index may have both too many pods and none: deleting comes first
	}
	for _, pod := range p.active {
		if !tracked(pod) {
			p.result.Add(track(pod))
		}
	}
	missing := wanted - active
	if p.replacesEnded() {
		missing -= p.terminating
	}
	if missing > 0 {
		p.create(int(missing))
	}
	return active + p.created
}

// wanted is how many pods should run.
func (p *pass) wanted() int32 {
	if p.job.Spec.Completions != nil {
		return max(0, min(*p.job.Spec.Completions-p.succeededPods, p.parallelism()))
	}
	if p.succeededPods > 0 {
		return int32(len(p.active)) // what runs may go on
	}
	return p.parallelism()
}

// deleteSurplus deletes at least n of the pods that run, which are then not counted,
// and says whether there are any.
func (p *pass) deleteSurplus(n int) bool {
	pods := p.surplus(n)
	for _, pod := range pods[:min(len(pods), burst)] {
		p.delete(pod, true)
	}
	return len(pods) > 0
}

// deleteActive deletes the pods that still run when the Job ends. They stay tracked.
func (p *pass) deleteActive() {
	for _, pod := range p.active[:min(len(p.active), burst)] {
		p.delete(pod, false)
	}
}

func (p *pass) delete(pod *corev1.Pod, forget bool) {
	p.changes = true
	c := workload.DeletePod(Kind, p.job, pod)
	if forget && tracked(pod) {
		first := untrack(pod)
		first.Then = []reconcile.Request{c}
		c = first
	}
	p.result.Add(c)
}

// surplus returns at least n pods that run and should not. Those of an indexed Job
// without an index, with one that it does not have, or with one that another pod has
// too, are among them whatever n is.
func (p *pass) surplus(n int) []*corev1.Pod {
	if n <= 0 && (!indexed(p.job) || p.oneEach()) {
		return nil // as in nearly all passes: nothing need be sorted
	}
	left := slices.SortedStableFunc(slices.Values(p.active), missedLess)
	var out []*corev1.Pod
	if indexed(p.job) {
		keeper := map[int]*corev1.Pod{} // the one of each index that is missed most
		for _, pod := range left {
			if p.inRange(pod) {
				keeper[indexOf(pod)] = pod
			}
		}
		kept := left[:0]
		for _, pod := range left {
			if keeper[indexOf(pod)] == pod {
				kept = append(kept, pod)
			} else {
				out = append(out, pod)
			}
		}
		left = kept
	}
	if more := n - len(out); more > 0 {
		out = append(out, left[:min(more, len(left))]...)
	}
	return out
}

// oneEach says whether each pod that runs has an index of its own.
func (p *pass) oneEach() bool {
	seen := make(map[int]bool, len(p.active))
	for _, pod := range p.active {
		i := indexOf(pod)
		if !p.inRange(pod) || seen[i] {
			return false
		}
		seen[i] = true
	}
	return true
}

// missedLess orders pods by how little they are missed, as Kubernetes does for Jobs:
// those that have not come far, that were ready late, that restart often, that are young.
func missedLess(a, b *corev1.Pod) int {
	first := func(isA, isB bool) int { // the one of which it is true comes first
		return cmp.Compare(order(isB), order(isA))
	}
	later := func(a, b metav1.Time) int {
		switch {
		case a.Equal(&b):
			return 0
		case a.IsZero() || !b.IsZero() && a.After(b.Time):
			return -1
		}
		return 1
	}
	aReady, bReady := reconcile.ReadyCondition(a), reconcile.ReadyCondition(b)
	if c := cmp.Or(
		first(a.Spec.NodeName == "", b.Spec.NodeName == ""),
		cmp.Compare(workload.PhaseOrder(a), workload.PhaseOrder(b)),
		first(aReady == nil, bReady == nil),
	); c != 0 {
		return c
	}
	if aReady != nil && bReady != nil {
		if c := later(aReady.LastTransitionTime, bReady.LastTransitionTime); c != 0 {
			return c
		}
	}
	aRestarts, aSidecars := workload.Restarts(a)
	bRestarts, bSidecars := workload.Restarts(b)
	return cmp.Or(cmp.Compare(bRestarts, aRestarts), cmp.Compare(bSidecars, aSidecars), later(a.CreationTimestamp, b.CreationTimestamp))
}

func order(is bool) int {
	if is {
		return 1
	}
	return 0
}

// create creates up to n pods, unless it must wait because some have failed.
func (p *pass) create(n int) {
	n = min(n, burst, workload.MostPods(&p.job.Spec.Template))
	perIndex := p.job.Spec.BackoffLimitPerIndex != nil
	if !perIndex {
		if at := p.retry(); at.After(p.in.Now) {
			p.result.At(at)
			return
		}
	}
	list := make([]int, n)
	if indexed(p.job) {
		list = p.pending(n)
		if perIndex {
			var next time.Time
			list = slices.DeleteFunc(list, func(i int) bool {
				at := retryIndex(p.delayed[i])
				if !at.After(p.in.Now) {
					return false
				}
				if next.IsZero() || at.Before(next) {
					next = at
				}
				return true
			})
			p.result.At(next)
		}
	} else {
		for i := range list {
			list[i] = none
		}
	}
	list = list[:min(len(list), p.slowStart())]
	names := reconcile.NewNames(p.in, p.job)
	for _, index := range list {
		p.result.Add(workload.CreatePod(Kind, p.job, p.pod(names, index)))
	}
	if len(p.in.Failed) == 0 {
		p.created = int32(len(list))
	}
	p.changes = p.changes || len(list) > 0
}

// slowStart is how many pods may be created at a time: as many as there are already,
// so that a Job whose pods are all refused, by a quota say, asks for one at a time.
func (p *pass) slowStart() int {
	if p.in.Refused(reconcile.VerbCreate, reconcile.PodsResource) != nil {
		return 1
	}
	return max(1, len(p.pods))
}

// pending returns up to n indexes that no pod works on and that are not done or broken.
func (p *pass) pending(n int) []int {
	taken := p.done.merge(p.broken).merge(indexesOf(p.active))
	if p.replacesEnded() {
		taken = taken.merge(indexesOf(slices.DeleteFunc(slices.Clone(p.pods), func(pod *corev1.Pod) bool {
			return pod.DeletionTimestamp == nil || objects.PodEnded(pod)
		})))
	}
	return taken.missing(n, p.completions())
}

// indexVariable is the environment variable that tells containers their index.
const indexVariable = "JOB_COMPLETION_INDEX"

// pod returns a new pod of the Job, for an index unless that is none.
func (p *pass) pod(names *reconcile.Names, index int) *corev1.Pod {
	if index == none {
		return p.tracked(workload.PodFromTemplate(p.job, Kind, &p.job.Spec.Template, names.Next()))
	}
	i := strconv.Itoa(index)
	prefix := reconcile.IndexPrefix(p.job.Name, i)
	pod := p.tracked(workload.PodFromTemplate(p.job, Kind, &p.job.Spec.Template, names.NextOf(prefix)))
	pod.GenerateName = prefix
	pod.Spec.Hostname = fmt.Sprintf("%s-%d", p.job.Name, index)
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	pod.Annotations[batchv1.JobCompletionIndexAnnotation] = i
	pod.Labels[batchv1.JobCompletionIndexAnnotation] = i
	if p.job.Spec.BackoffLimitPerIndex != nil {
		counted, ignored := p.failuresBefore(index)
		pod.Annotations[batchv1.JobIndexFailureCountAnnotation] = strconv.Itoa(int(counted))
		if ignored > 0 {
			pod.Annotations[batchv1.JobIndexIgnoredFailureCountAnnotation] = strconv.Itoa(int(ignored))
		}
	}
	for _, containers := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for j := range containers {
			c := &containers[j]
			if !slices.ContainsFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == indexVariable }) {
				c.Env = append(c.Env, corev1.EnvVar{Name: indexVariable, ValueFrom: &corev1.EnvVarSource{
					FieldRef: &corev1.ObjectFieldSelector{FieldPath: fmt.Sprintf("metadata.labels['%s']", batchv1.JobCompletionIndexAnnotation)},
				}})
			}
		}
	}
	return pod
}

// tracked gives a new pod the finalizer.
func (p *pass) tracked(pod *corev1.Pod) *corev1.Pod {
	if !tracked(pod) {
		pod.Finalizers = append(pod.Finalizers, batchv1.JobTrackingFinalizer)
	}
	return pod
}

// failuresBefore returns how often pods of an index have failed, the one that is
// replaced now included.
func (p *pass) failuresBefore(index int) (counted, ignored int32) {
	last := p.delayed[index]
	if last == nil {
		return 0, 0
	}
	counted, ignored = failuresOf(last)
	if judge(p.job.Spec.PodFailurePolicy, last).counts() {
		return counted + 1, ignored
	}
	return counted, ignored + 1
}

func isReady(pod *corev1.Pod) bool { return reconcile.ReadyCondition(pod) != nil }
