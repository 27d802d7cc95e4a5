package job

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/state/objects"
)

// CronJob creates a Job at each time of a schedule. The name of the Job follows from
// the time, so that none is created twice. When a pass sees a Job with such a name that
// the CronJob's status does not hold, then that Job was created by the pass before.
type CronJob struct{}

// rescheduled marks the key of a CronJob whose schedule was changed: times that the
// new schedule would have had before the change are not missed ones, as upstream. Each
// schedule has a key of its own, which waits for its times from when it was set.
func rescheduled(cj *batchv1.CronJob) types.UID {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %s", ptr.Deref(cj.Spec.TimeZone, ""), cj.Spec.Schedule)
	return types.UID(fmt.Sprintf("rescheduled-%x", h.Sum64()))
}

// onTime is how long after a scheduled time a pass over a rescheduled CronJob counts
// as the one that was meant to be at that time.
const onTime = 10 * time.Second

// Name implements Reconciler.
func (CronJob) Name() string { return "cronjob-controller" }

// All implements Reconciler.
func (CronJob) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(CronJobKind, s.CronJobs().All())
}

// Keys implements Reconciler: a CronJob follows itself and its Jobs.
func (CronJob) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case CronJobKind.GroupKind():
		key := CronJobKey(now.Namespace, now.Name)
		if c.Old != nil && c.New != nil {
			old, ok := c.Old.Object.(*batchv1.CronJob)
			cj, ok2 := c.New.Object.(*batchv1.CronJob)
			if ok && ok2 && (old.Spec.Schedule != cj.Spec.Schedule || !equality.Semantic.DeepEqual(old.Spec.TimeZone, cj.Spec.TimeZone)) {
				key.UID = rescheduled(cj)
			}
		}
		return []reconcile.Key{key}
	case Kind.GroupKind():
		var keys []reconcile.Key
		for _, m := range reconcile.Versions(c) {
			if ref := metav1.GetControllerOfNoCopy(m); ref != nil && ref.Kind == CronJobKind.Kind {
				keys = append(keys, CronJobKey(m.Namespace, ref.Name))
			}
		}
		return keys
	}
	return nil
}

// CronJobKey is the key of a CronJob.
func CronJobKey(namespace, name string) reconcile.Key {
	return reconcile.NewKey(CronJobKind, namespace, name)
}

// cronPass is one look at one CronJob.
type cronPass struct {
	in     reconcile.Input
	cj     *batchv1.CronJob // a copy, whose status is to be stored
	jobs   []*batchv1.Job
	result reconcile.Result
}

// Reconcile implements Reconciler.
func (CronJob) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	stored, ok := in.Snapshot.CronJobs().Get(key.Namespace, key.Name)
	if !ok {
		return reconcile.Result{}, nil
	}
	p := cronPass{in: in, cj: stored.DeepCopy()}
	for m := range in.Snapshot.OwnedBy(stored.UID) {
		if job, ok := m.Object.(*batchv1.Job); ok && metav1.IsControlledBy(job, stored) && job.Namespace == stored.Namespace {
			p.jobs = append(p.jobs, job)
		}
	}
	remove := p.history()
	p.observe()
	if key.UID != "" && key.UID != rescheduled(stored) {
		return reconcile.Result{}, nil // it has another schedule by now
	}
	replace, create := p.due(key.UID != "")
	for _, job := range remove {
		p.result.Add(p.delete(job))
	}

	// In this order: the Jobs that are replaced, the status without them, the new Job.
	// The status has that one in the next pass, which sees it.
	var steps []reconcile.Request
	for _, job := range replace {
		steps = append(steps, p.delete(job))
	}
	if !equality.Semantic.DeepEqual(p.cj.Status, stored.Status) {
		steps = append(steps, reconcile.UpdateStatus(CronJobsResource, p.cj))
	}
	if create != nil {
		steps = append(steps, *create)
	}
	switch {
	case len(steps) == 0:
	case len(replace) == 0: // they do not depend on each other
		p.result.Requests = append(p.result.Requests, steps...)
	default:
		steps[0].Then = steps[1:]
		p.result.Add(steps[0])
	}
	return p.result, nil
}

// event tells the CronJob's users something.
func (p *cronPass) event(kind, reason, format string, args ...any) {
	p.result.Events = append(p.result.Events, *reconcile.NewEvent(CronJobKind, p.cj, kind, reason, format, args...))
}

// history returns the Jobs that have ended and are more than are to be kept, oldest first.
func (p *cronPass) history() []*batchv1.Job {
	var complete, failed []*batchv1.Job
	for _, job := range p.jobs {
		switch c := Finished(job); {
		case c == nil:
		case c.Type == batchv1.JobComplete:
			complete = append(complete, job)
		default:
			failed = append(failed, job)
		}
	}
	var out []*batchv1.Job
	for _, l := range []struct {
		jobs []*batchv1.Job
		keep *int32
	}{{complete, p.cj.Spec.SuccessfulJobsHistoryLimit}, {failed, p.cj.Spec.FailedJobsHistoryLimit}} {
		if l.keep == nil || len(l.jobs) <= int(*l.keep) {
			continue
		}
		slices.SortFunc(l.jobs, byStart)
		for _, job := range l.jobs[:len(l.jobs)-int(*l.keep)] {
			p.forget(job.UID)
			if job.DeletionTimestamp == nil {
				out = append(out, job)
			}
		}
	}
	return out
}

// byStart orders Jobs by when they started, those that have not last.
func byStart(a, b *batchv1.Job) int {
	x, y := a.Status.StartTime, b.Status.StartTime
	switch {
	case x == nil && y == nil || x.Equal(y):
		return strings.Compare(a.Name, b.Name)
	case x == nil || y != nil && y.Before(x):
		return 1
	}
	return -1
}

func (p *cronPass) delete(job *batchv1.Job) reconcile.Request {
	c := reconcile.Delete(JobsResource, job)
	background := metav1.DeletePropagationBackground
	c.Propagation = &background
	c.Event = reconcile.NewEvent(CronJobKind, p.cj, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted job %v", job.Name)
	c.FailEvent = reconcile.NewEvent(CronJobKind, p.cj, corev1.EventTypeWarning, "FailedDelete", "Deleted job")
	return c
}

// active says whether the status holds a Job.
func (p *cronPass) active(uid types.UID) bool {
	return slices.ContainsFunc(p.cj.Status.Active, func(r corev1.ObjectReference) bool { return r.UID == uid })
}

// forget takes a Job out of the status.
func (p *cronPass) forget(uid types.UID) {
	p.cj.Status.Active = slices.DeleteFunc(p.cj.Status.Active, func(r corev1.ObjectReference) bool { return r.UID == uid })
	if len(p.cj.Status.Active) == 0 {
		p.cj.Status.Active = nil
	}
}

// observe brings the status up to what its Jobs show.
func (p *cronPass) observe() {
	status := &p.cj.Status
	there := map[types.UID]bool{}
	for _, job := range p.jobs {
		there[job.UID] = true
		end := Finished(job)
		if at, ours := p.startedAt(job); ours && !p.active(job.UID) && (status.LastScheduleTime == nil || status.LastScheduleTime.Time.Before(at)) {
			status.LastScheduleTime = &metav1.Time{Time: at}
			if end == nil {
				status.Active = append(status.Active, corev1.ObjectReference{
					APIVersion: Kind.GroupVersion().String(), Kind: Kind.Kind,
					Namespace: job.Namespace, Name: job.Name, UID: job.UID, ResourceVersion: job.ResourceVersion,
				})
			}
		}
		switch found := p.active(job.UID); {
		case end == nil && !found && job.DeletionTimestamp == nil:
			p.event(corev1.EventTypeWarning, "UnexpectedJob", "Saw a job that the controller did not create or forgot: %s", job.Name)
		case end != nil && found:
			p.forget(job.UID)
			p.event(corev1.EventTypeNormal, "SawCompletedJob", "Saw completed job: %s, condition: %v", job.Name, end.Type)
		}
		if t := job.Status.CompletionTime; end != nil && end.Type == batchv1.JobComplete && t != nil && (status.LastSuccessfulTime == nil || status.LastSuccessfulTime.Before(t)) {
			status.LastSuccessfulTime = t
		}
	}
	for _, ref := range slices.Clone(status.Active) {
		// One that is there and has another owner, or none, is not missing.
		if job, ok := p.in.Snapshot.Jobs().Get(p.cj.Namespace, ref.Name); !there[ref.UID] && (!ok || job.UID != ref.UID) {
			p.event(corev1.EventTypeNormal, "MissingJob", "Active job went missing: %v", ref.Name)
			p.forget(ref.UID)
		}
	}
}

// startedAt returns the scheduled time of a Job that this reconciler created.
func (p *cronPass) startedAt(job *batchv1.Job) (time.Time, bool) {
	at, err := time.Parse(time.RFC3339, job.Annotations[batchv1.CronJobScheduledTimestampAnnotation])
	return at, err == nil && job.Name == jobName(p.cj, at)
}

// jobName is the name of the Job of a scheduled time.
func jobName(cj *batchv1.CronJob, at time.Time) string {
	return fmt.Sprintf("%s-%d", cj.Name, at.Unix()/60)
}

// due returns the Jobs to delete and the one to create, if it is time for one, and
// asks for a pass at the next time.
func (p *cronPass) due(onlyOnTime bool) (replace []*batchv1.Job, create *reconcile.Request) {
	cj := p.cj
	if cj.DeletionTimestamp != nil {
		return nil, nil
	}
	location, err := zone(cj)
	if err != nil {
		p.event(corev1.EventTypeWarning, "UnknownTimeZone", "invalid timeZone: %q: %s", *cj.Spec.TimeZone, err)
		return nil, nil
	}
	if isTrue(cj.Spec.Suspend) {
		return nil, nil
	}
	if namesZone(cj.Spec.Schedule) {
		p.event(corev1.EventTypeWarning, "UnsupportedSchedule", "CRON_TZ or TZ used in schedule %q is not officially supported, see https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details", cj.Spec.Schedule)
	}
	schedule, err := parseSchedule(cj)
	if err != nil {
		p.event(corev1.EventTypeWarning, "UnparseableSchedule", "unparseable schedule: %q : %s", cj.Spec.Schedule, err)
		return nil, nil
	}
	m, err := missedTimes(cj, schedule, p.in.Now, true)
	if err != nil {
		p.event(corev1.EventTypeWarning, "InvalidSchedule", "invalid schedule: %s : %s", cj.Spec.Schedule, err)
		return nil, nil
	}
	p.result.At(nextLook(cj, schedule, p.in.Now))
	at := m.last
	if at.IsZero() || onlyOnTime && (p.in.Since.IsZero() || !at.After(p.in.Since) || p.in.Now.Sub(at) > onTime) {
		return nil, nil // the first pass, which sees the new schedule, only asks for the next time
	}
	if m.count > tooMany {
		p.event(corev1.EventTypeWarning, "TooManyMissedTimes", "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew")
	}
	if d := cj.Spec.StartingDeadlineSeconds; d != nil && at.Add(time.Duration(*d)*time.Second).Before(p.in.Now) {
		p.event(corev1.EventTypeWarning, "MissSchedule", "Missed scheduled time to start a job: %s", at.UTC().Format(time.RFC1123Z))
		return nil, nil
	}
	name := jobName(cj, at)
	if _, exists := p.in.Snapshot.Jobs().Get(cj.Namespace, name); exists || cj.Status.LastScheduleTime != nil && cj.Status.LastScheduleTime.Time.Equal(at) {
		return nil, nil // this time has its Job
	}
	switch {
	case len(cj.Status.Active) == 0:
	case cj.Spec.ConcurrencyPolicy == batchv1.ForbidConcurrent:
		p.event(corev1.EventTypeNormal, "JobAlreadyActive", "Not starting job because prior execution is running and concurrency policy is Forbid")
		return nil, nil
	case cj.Spec.ConcurrencyPolicy == batchv1.ReplaceConcurrent:
		for _, job := range p.jobs {
			if p.active(job.UID) {
				p.forget(job.UID)
				replace = append(replace, job)
			}
		}
	}
	c := p.create(name, at.In(location))
	return replace, &c
}

// create returns the request for the Job of a scheduled time.
func (p *cronPass) create(name string, at time.Time) reconcile.Request {
	template := p.cj.Spec.JobTemplate.DeepCopy()
	annotations := map[string]string{}
	maps.Copy(annotations, template.Annotations)
	annotations[batchv1.CronJobScheduledTimestampAnnotation] = at.Format(time.RFC3339)
	c := reconcile.Create(JobsResource, &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.cj.Namespace, Name: name, Labels: template.Labels, Annotations: annotations,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(p.cj, CronJobKind)},
		},
		Spec: template.Spec,
	})
	c.Event = reconcile.NewEvent(CronJobKind, p.cj, corev1.EventTypeNormal, "SuccessfulCreate", "Created job %v", name)
	c.FailEvent = reconcile.NewEvent(CronJobKind, p.cj, corev1.EventTypeWarning, "FailedCreate", "Error creating job")
	return c
}
