package job

import (
	"fmt"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/reconcile"
	"timonel/state/objects"
)

// pass is one look at one Job that has not ended.
type pass struct {
	in     reconcile.Input
	job    *batchv1.Job
	status batchv1.JobStatus // what it is to be
	pods   []*corev1.Pod
	active []*corev1.Pod
	// terminating is how many pods are being deleted and have not ended.
	terminating int32
	// countedSucceeded and countedFailed are the pods that the stored status holds as
	// uncounted: they are in it, and may lose their finalizer.
	countedSucceeded, countedFailed map[types.UID]bool
	// succeededPods and failedPods are how many have, those that the status does not hold included.
	succeededPods, failedPods int32
	// before and done are the succeeded indexes by the stored status, and with those of
	// pods that it does not hold. broken are the failed ones, of a Job with a limit for each.
	before, done, broken indexes
	// delayed are the failed pods, by index, that wait for their replacement, which
	// carries on the count of the index' failures.
	delayed map[int]*corev1.Pod
	// end says why the Job is to end: SuccessCriteriaMet or FailureTarget, or nil.
	// decided says that the stored status says so.
	end     *batchv1.JobCondition
	decided bool
	// changes says that pods are created or deleted, which the status does not show yet.
	changes bool
	// created is how many pods are created and will most likely be there.
	created int32
	event   *reconcile.Event
	result  reconcile.Result
}

func newPass(in reconcile.Input, job *batchv1.Job) (*pass, error) {
	selector, err := metav1.LabelSelectorAsSelector(job.Spec.Selector)
	if err != nil {
		return nil, fmt.Errorf("job %s/%s: spec.selector: %w", job.Namespace, job.Name, err)
	}
	p := &pass{in: in, job: job, status: *job.Status.DeepCopy()}
	p.pods, p.result.Requests = claim(in, job, selector)
	if p.status.UncountedTerminatedPods == nil {
		p.status.UncountedTerminatedPods = &batchv1.UncountedTerminatedPods{}
	}
	p.countedSucceeded = setOf(p.status.UncountedTerminatedPods.Succeeded)
	p.countedFailed = setOf(p.status.UncountedTerminatedPods.Failed)
	for _, pod := range p.pods {
		switch {
		case reconcile.PodActive(pod):
			p.active = append(p.active, pod)
		case !objects.PodEnded(pod):
			p.terminating++
		}
	}
	if indexed(job) {
		slices.SortStableFunc(p.pods, func(a, b *corev1.Pod) int { return indexOf(a) - indexOf(b) })
	}
	return p, nil
}

func setOf(uids []types.UID) map[types.UID]bool {
	out := make(map[types.UID]bool, len(uids))
	for _, uid := range uids {
		out[uid] = true
	}
	return out
}

// run decides what to do, in the order in which Kubernetes does, since a Job may meet
// several reasons to end at once.
func (p *pass) run() reconcile.Result {
	p.count()
	if p.status.StartTime == nil && !p.suspended() {
		p.status.StartTime = p.now()
	}
	p.judgeEnd()
	switch {
	case p.end != nil && p.decided:
		p.deleteActive()
	case p.end == nil:
		active := int32(len(p.active))
		if p.job.DeletionTimestamp == nil {
			active = p.manage()
		}
		if p.complete(active) {
			p.end = p.reason(batchv1.JobSuccessCriteriaMet, batchv1.JobReasonCompletionsReached, "Reached expected number of succeeded pods")
		} else if p.job.DeletionTimestamp == nil {
			p.suspendOrResume()
		}
	}
	removable := p.track()
	p.conclude()
	for _, pod := range removable {
		p.result.Add(untrack(pod))
	}
	p.writeStatus()
	return p.result
}

// count counts the pods that have ended and are not in the status yet.
func (p *pass) count() {
	var succeeded, failed int32
	for _, pod := range p.pods {
		if !tracked(pod) || !p.inRange(pod) {
			continue
		}
		switch {
		case pod.Status.Phase == corev1.PodSucceeded:
			if !p.countedSucceeded[pod.UID] && !p.countedFailed[pod.UID] {
				succeeded++
			}
		case p.failed(pod):
			if !p.countedFailed[pod.UID] && judge(p.job.Spec.PodFailurePolicy, pod).counts() {
				failed++
			}
		}
	}
	p.succeededPods = p.status.Succeeded + succeeded + int32(len(p.countedSucceeded))
	p.failedPods = p.status.Failed + failed + int32(len(p.countedFailed))
	if !indexed(p.job) {
		return
	}
	completions := p.completions()
	p.before = parseIndexes(p.status.CompletedIndexes, completions)
	var done, broken []int
	for _, pod := range p.pods {
		switch {
		case !tracked(pod) || !p.inRange(pod) || p.countedFailed[pod.UID]:
			// One that was deleted, counted as failed, and has succeeded after all stays failed.
		case pod.Status.Phase == corev1.PodSucceeded:
			done = append(done, indexOf(pod))
		case p.breaksIndex(pod):
			broken = append(broken, indexOf(pod))
		}
	}
	p.done = p.before.with(done...)
	p.succeededPods = int32(p.done.total())
	if p.job.Spec.BackoffLimitPerIndex == nil {
		return
	}
	if p.status.FailedIndexes != nil {
		p.broken = parseIndexes(*p.status.FailedIndexes, completions)
	}
	p.broken = p.broken.with(broken...)
	p.delayed = p.waitForReplacement()
}

// failed says whether a pod counts as failed. One that is being deleted does, unless
// the Job replaces pods only once they have ended.
func (p *pass) failed(pod *corev1.Pod) bool {
	if pod.Status.Phase == corev1.PodFailed {
		return true
	}
	return !p.replacesEnded() && pod.DeletionTimestamp != nil && pod.Status.Phase != corev1.PodSucceeded
}

// replacesEnded says whether pods are replaced only once they have ended.
func (p *pass) replacesEnded() bool {
	return p.job.Spec.PodReplacementPolicy != nil && *p.job.Spec.PodReplacementPolicy == batchv1.Failed
}

// breaksIndex says whether a pod's failure is the last that its index may have.
func (p *pass) breaksIndex(pod *corev1.Pod) bool {
	if p.job.Spec.BackoffLimitPerIndex == nil || !p.failed(pod) {
		return false
	}
	v := judge(p.job.Spec.PodFailurePolicy, pod)
	counted, _ := failuresOf(pod)
	return v.action == batchv1.PodFailurePolicyActionFailIndex || v.counts() && counted >= *p.job.Spec.BackoffLimitPerIndex
}

// waitForReplacement returns the last failed pod of each index that is neither done,
// nor broken, nor has a pod that runs.
func (p *pass) waitForReplacement() map[int]*corev1.Pod {
	running := indexesOf(p.active)
	out := map[int]*corev1.Pod{}
	for _, pod := range p.pods {
		i := indexOf(pod)
		if !tracked(pod) || !p.inRange(pod) || !p.failed(pod) || p.done.has(i) || p.broken.has(i) || running.has(i) {
			continue
		}
		if last := out[i]; last == nil || failuresSoFar(last) <= failuresSoFar(pod) && !endOf(pod).Before(endOf(last)) {
			out[i] = pod
		}
	}
	return out
}

func failuresSoFar(pod *corev1.Pod) int32 {
	counted, ignored := failuresOf(pod)
	return counted + ignored
}

func indexesOf(pods []*corev1.Pod) indexes {
	var list []int
	for _, pod := range pods {
		if i := indexOf(pod); i != none {
			list = append(list, i)
		}
	}
	return indexes(nil).with(list...)
}

// judgeEnd says whether the Job is to end, as far as that does not depend on its pods
// having ended.
func (p *pass) judgeEnd() {
	if c := condition(p.job.Status.Conditions, batchv1.JobSuccessCriteriaMet); c != nil {
		p.end, p.decided = c, true
		return
	}
	if c := condition(p.job.Status.Conditions, batchv1.JobFailureTarget); c != nil {
		p.end, p.decided = c, true
		return
	}
	p.end = p.failure()
	if p.end == nil && indexed(p.job) {
		if message, met := succeeds(p.job.Spec.SuccessPolicy, p.completions(), p.done); met {
			p.end = p.reason(batchv1.JobSuccessCriteriaMet, batchv1.JobReasonSuccessPolicy, message)
		}
	}
}

// failure returns why the Job fails, or nil, and asks for a pass at its deadline.
func (p *pass) failure() *batchv1.JobCondition {
	spec := &p.job.Spec
	if spec.PodFailurePolicy != nil {
		for _, pod := range p.pods {
			if !p.failed(pod) {
				continue
			}
			if v := judge(spec.PodFailurePolicy, pod); v.failJob != "" {
				return p.reason(batchv1.JobFailureTarget, batchv1.JobReasonPodFailurePolicy, v.failJob)
			}
		}
	}
	if p.failedPods > p.backoffLimit() || p.restartedTooOften() {
		return p.reason(batchv1.JobFailureTarget, batchv1.JobReasonBackoffLimitExceeded, "Job has reached the specified backoff limit")
	}
	if spec.ActiveDeadlineSeconds != nil && !p.suspended() && p.status.StartTime != nil {
		deadline := p.status.StartTime.Add(time.Duration(*spec.ActiveDeadlineSeconds) * time.Second)
		if !deadline.After(p.in.Now) {
			return p.reason(batchv1.JobFailureTarget, batchv1.JobReasonDeadlineExceeded, "Job was active longer than specified deadline")
		}
		p.result.At(deadline)
	}
	if spec.BackoffLimitPerIndex != nil {
		switch broken := p.broken.total(); {
		case spec.MaxFailedIndexes != nil && broken > int(*spec.MaxFailedIndexes):
			return p.reason(batchv1.JobFailureTarget, batchv1.JobReasonMaxFailedIndexesExceeded, "Job has exceeded the specified maximal number of failed indexes")
		case broken > 0 && broken+p.done.total() >= p.completions():
			return p.reason(batchv1.JobFailureTarget, batchv1.JobReasonFailedIndexes, "Job has failed indexes")
		}
	}
	return nil
}

// restartedTooOften says whether pods that their node restarts have been restarted as
// often as failures are allowed.
func (p *pass) restartedTooOften() bool {
	if p.job.Spec.Template.Spec.RestartPolicy != corev1.RestartPolicyOnFailure {
		return false
	}
	var restarts int32
	for _, pod := range p.pods {
		if pod.Status.Phase != corev1.PodRunning && pod.Status.Phase != corev1.PodPending {
			continue
		}
		for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
			for i := range list {
				restarts += list[i].RestartCount
			}
		}
	}
	return restarts > 0 && restarts >= p.backoffLimit()
}

// complete says whether as many pods have succeeded as are wanted and none runs. A Job
// that does not say how many it wants is complete once one has.
func (p *pass) complete(active int32) bool {
	if p.job.Spec.Completions == nil {
		return p.succeededPods > 0 && active == 0
	}
	return p.succeededPods >= *p.job.Spec.Completions && active == 0
}

// suspendOrResume notes in the conditions that the Job was suspended, once its pods
// are gone or cannot be made to go, or that it goes on. One that goes on starts anew.
func (p *pass) suspendOrResume() {
	if !p.suspended() {
		if condition(p.status.Conditions, batchv1.JobSuspended) != nil {
			p.setSuspended(corev1.ConditionFalse, "JobResumed", "Resumed", "Job resumed")
			p.status.StartTime = p.now()
		}
		return
	}
	if condition(p.status.Conditions, batchv1.JobSuspended) == nil && (len(p.active) == 0 || len(p.in.Failed) > 0) {
		p.setSuspended(corev1.ConditionTrue, "JobSuspended", "Suspended", "Job suspended")
		p.status.StartTime = nil
	}
}

func (p *pass) setSuspended(status corev1.ConditionStatus, reason, event, message string) {
	c := p.reason(batchv1.JobSuspended, reason, message)
	c.Status = status
	p.status.Conditions = append(slices.DeleteFunc(p.status.Conditions, func(c batchv1.JobCondition) bool {
		return c.Type == batchv1.JobSuspended
	}), *c)
	p.event = reconcile.NewEvent(Kind, p.job, corev1.EventTypeNormal, event, "%s", message)
}

// conclude writes down that the Job is to end, or, once that stands in the state,
// all pods are counted and none is left, that it has ended.
func (p *pass) conclude() {
	if p.end == nil {
		return
	}
	if !p.decided {
		p.status.Conditions = append(p.status.Conditions, *p.end)
		return
	}
	uncounted := p.status.UncountedTerminatedPods
	if len(uncounted.Succeeded)+len(uncounted.Failed) > 0 || len(p.active) > 0 || p.terminating > 0 || slices.ContainsFunc(p.pods, tracked) {
		return
	}
	t := batchv1.JobFailed
	if p.end.Type == batchv1.JobSuccessCriteriaMet {
		t = batchv1.JobComplete
	}
	c := p.reason(t, p.end.Reason, p.end.Message)
	p.status.Conditions = append(p.status.Conditions, *c)
	if t == batchv1.JobFailed {
		p.event = reconcile.NewEvent(Kind, p.job, corev1.EventTypeWarning, c.Reason, "%s", c.Message)
		return
	}
	p.status.CompletionTime = &c.LastTransitionTime
	if start := p.status.StartTime; start != nil && p.status.CompletionTime.Before(start) {
		p.status.CompletionTime = start // another leader's clock was ahead of this one's
	}
	if p.job.Spec.Completions != nil && p.status.Succeeded > *p.job.Spec.Completions {
		p.result.Events = append(p.result.Events, *reconcile.NewEvent(Kind, p.job, corev1.EventTypeWarning, "TooManySucceededPods",
			"Too many succeeded pods running after completion count reached"))
	}
	p.event = reconcile.NewEvent(Kind, p.job, corev1.EventTypeNormal, "Completed", "Job completed")
}

// writeStatus writes the status if it is another than the stored one, and if it is
// worth it now.
func (p *pass) writeStatus() {
	same := func(ready bool) bool { // but for the numbers of pods that run
		s := p.status
		s.Active, s.Terminating, s.Ready = p.job.Status.Active, p.job.Status.Terminating, p.job.Status.Ready
		if ready {
			s.Active, s.Terminating = p.status.Active, p.status.Terminating
		}
		return equality.Semantic.DeepEqual(s, p.job.Status)
	}
	switch {
	case equality.Semantic.DeepEqual(p.status, p.job.Status):
		return
	case p.changes && len(p.in.Failed) == 0 && same(false):
		return // the next pass, which sees the changed pods, reports once instead of twice
	case same(true):
		// Pods of a short Job are ready for a moment only: that is not worth a write each.
		if at, wait := p.readySince(); wait {
			p.result.At(at.Add(readyDelay))
			return
		}
	}
	updated := p.job.DeepCopy()
	updated.Status = p.status
	c := reconcile.UpdateStatus(JobsResource, updated)
	c.Event = p.event
	p.result.Add(c)
}

// readyDelay is how long the number of ready pods must have been what it is to be
// written for its own sake.
const readyDelay = time.Second

// readySince says when a pod became ready or ceased to be last, and whether that is
// less than readyDelay ago.
func (p *pass) readySince() (time.Time, bool) {
	var last time.Time
	for _, pod := range p.active {
		if c := reconcile.PodCondition(pod, corev1.PodReady); c != nil {
			last = reconcile.Latest(last, c.LastTransitionTime.Time)
		}
	}
	return last, !last.After(p.in.Now) && last.Add(readyDelay).After(p.in.Now)
}

func (p *pass) now() *metav1.Time {
	t := metav1.NewTime(p.in.Now).Rfc3339Copy()
	return &t
}

// reason is a condition that is true from now on.
func (p *pass) reason(t batchv1.JobConditionType, reason, message string) *batchv1.JobCondition {
	return &batchv1.JobCondition{
		Type: t, Status: corev1.ConditionTrue, Reason: reason, Message: message,
		LastProbeTime: *p.now(), LastTransitionTime: *p.now(),
	}
}

func (p *pass) suspended() bool { return isTrue(p.job.Spec.Suspend) }

// completions is how many indexes an indexed Job has.
func (p *pass) completions() int {
	if p.job.Spec.Completions == nil {
		return 0
	}
	return int(*p.job.Spec.Completions)
}

// inRange says whether a pod has an index that its Job has, or needs none.
func (p *pass) inRange(pod *corev1.Pod) bool {
	if !indexed(p.job) {
		return true
	}
	i := indexOf(pod)
	return i != none && i < p.completions()
}

func (p *pass) parallelism() int32 {
	if p.job.Spec.Parallelism == nil {
		return 1
	}
	return *p.job.Spec.Parallelism
}

func (p *pass) backoffLimit() int32 {
	if p.job.Spec.BackoffLimit == nil {
		return 6
	}
	return *p.job.Spec.BackoffLimit
}
