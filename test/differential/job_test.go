package differential

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/cronjob"
	upstreamjob "k8s.io/kubernetes/pkg/controller/job"
	"k8s.io/kubernetes/pkg/controller/ttlafterfinished"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/reconcile/workload/job"
)

var jobFamily = family{
	name: "job", seeds: 400, nodes: 2, slack: 2 * time.Second, ours: []reconcile.Reconciler{job.Job{}, job.TTL{}},
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		j, err := upstreamjob.NewController(ctx, c, f.Core().V1().Pods(), f.Batch().V1().Jobs(), nil, nil)
		if err != nil {
			return nil, err
		}
		t := ttlafterfinished.New(ctx, f.Batch().V1().Jobs(), c)
		return []func(context.Context){func(ctx context.Context) { j.Run(ctx, 1) }, func(ctx context.Context) { t.Run(ctx, 1) }}, nil
	},
	scenario: jobs,
}

var cronJobFamily = family{
	name: "cronjob", seeds: 60, nodes: 1, ours: []reconcile.Reconciler{job.CronJob{}},
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		j, err := cronjob.NewControllerV2(ctx, f.Batch().V1().Jobs(), f.Batch().V1().CronJobs(), c)
		if err != nil {
			return nil, err
		}
		return []func(context.Context){func(ctx context.Context) { j.Run(ctx, 1) }}, nil
	},
	scenario: cronJobs,
}

// jobPodSteps are what happens to the pods of Jobs beside what happens to all.
var jobPodSteps = []func(r *rand.Rand) step{
	func(r *rand.Rand) step {
		exit := int32(1 + r.IntN(4))
		return onPods(r, fmt.Sprint("exit ", exit), func(p *corev1.Pod) bool { return running(p) || bound(p) }, func(s *side, p *corev1.Pod) {
			s.end(p, corev1.PodFailed, exit)
		})
	},
	func(r *rand.Rand) step {
		return onPods(r, "succeed", func(p *corev1.Pod) bool { return running(p) || bound(p) }, func(s *side, p *corev1.Pod) { s.end(p, corev1.PodSucceeded, 0) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "are disrupted", running, func(s *side, p *corev1.Pod) {
			s.report(p, corev1.PodFailed, false, func(status *corev1.PodStatus) {
				status.Conditions = append(status.Conditions, corev1.PodCondition{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: "PreemptionByScheduler", LastTransitionTime: metav1.NewTime(time.Now())})
			})
		})
	},
	func(r *rand.Rand) step {
		return onPods(r, "stop as failed", func(p *corev1.Pod) bool {
			return terminating(p) && p.Status.Phase != corev1.PodFailed && p.Status.Phase != corev1.PodSucceeded
		}, func(s *side, p *corev1.Pod) {
			s.end(p, corev1.PodFailed, 143)
		})
	},
}

// failurePolicy returns a policy for pods that fail, or nil.
func failurePolicy(r *rand.Rand, indexed bool) *batchv1.PodFailurePolicy {
	if r.IntN(2) == 0 {
		return nil
	}
	actions := []batchv1.PodFailurePolicyAction{batchv1.PodFailurePolicyActionCount, batchv1.PodFailurePolicyActionIgnore, batchv1.PodFailurePolicyActionFailJob}
	if indexed {
		actions = append(actions, batchv1.PodFailurePolicyActionFailIndex)
	}
	out := &batchv1.PodFailurePolicy{}
	for range 1 + r.IntN(3) {
		rule := batchv1.PodFailurePolicyRule{Action: actions[r.IntN(len(actions))]}
		switch r.IntN(3) {
		case 0:
			rule.OnPodConditions = []batchv1.PodFailurePolicyOnPodConditionsPattern{{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue}}
		case 1:
			rule.OnExitCodes = &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: batchv1.PodFailurePolicyOnExitCodesOpIn, Values: []int32{1, 2}}
		default:
			rule.OnExitCodes = &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: batchv1.PodFailurePolicyOnExitCodesOpNotIn, Values: []int32{2, 3}}
		}
		out.Rules = append(out.Rules, rule)
	}
	return out
}

// anyJob returns the spec of a Job that the API accepts, and how it reads.
func anyJob(r *rand.Rand) (batchv1.JobSpec, string) {
	spec := batchv1.JobSpec{Parallelism: ptr.To(int32(r.IntN(4))), Template: template("v1")}
	spec.Template.Spec.RestartPolicy = corev1.RestartPolicyNever
	text := []string{fmt.Sprint(*spec.Parallelism, " at a time")}
	add := func(what string, v any) { text = append(text, fmt.Sprint(what, " ", v)) }
	indexed := r.IntN(2) == 0
	if indexed || r.IntN(4) > 0 {
		spec.Completions = ptr.To(int32(r.IntN(5)))
		add("completions", *spec.Completions)
	}
	if indexed {
		spec.CompletionMode = ptr.To(batchv1.IndexedCompletion)
		text = append(text, "indexed")
	}
	if spec.PodFailurePolicy = failurePolicy(r, false); spec.PodFailurePolicy == nil && r.IntN(4) == 0 {
		spec.Template.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
		text = append(text, "restarted by their node")
	}
	if indexed && spec.Template.Spec.RestartPolicy == corev1.RestartPolicyNever && r.IntN(2) == 0 {
		spec.BackoffLimitPerIndex = ptr.To(int32(r.IntN(3)))
		add("failures for each index", *spec.BackoffLimitPerIndex)
		if r.IntN(2) == 0 {
			spec.MaxFailedIndexes = ptr.To(int32(r.IntN(3)))
			add("failed indexes", *spec.MaxFailedIndexes)
		}
		spec.PodFailurePolicy = failurePolicy(r, true)
	} else {
		spec.BackoffLimit = ptr.To(int32(r.IntN(5)))
		add("failures", *spec.BackoffLimit)
	}
	if p := spec.PodFailurePolicy; p != nil {
		for _, rule := range p.Rules {
			if c := rule.OnExitCodes; c != nil {
				add(string(rule.Action), fmt.Sprint("on exit ", c.Operator, c.Values))
			} else {
				add(string(rule.Action), "on disruption")
			}
		}
		spec.PodReplacementPolicy = ptr.To(batchv1.Failed)
	} else if r.IntN(3) == 0 {
		spec.PodReplacementPolicy = ptr.To(batchv1.Failed)
		text = append(text, "replaced once failed")
	}
	if indexed && *spec.Completions > 0 && r.IntN(3) == 0 {
		rule := batchv1.SuccessPolicyRule{}
		if r.IntN(2) == 0 {
			rule.SucceededIndexes = ptr.To(fmt.Sprint("0-", *spec.Completions-1))
			if *spec.Completions == 1 {
				rule.SucceededIndexes = ptr.To("0")
			}
		}
		if rule.SucceededIndexes == nil || r.IntN(2) == 0 {
			rule.SucceededCount = ptr.To(int32(1 + r.IntN(int(*spec.Completions))))
			add("success by count of", *rule.SucceededCount)
		}
		if rule.SucceededIndexes != nil {
			add("success by indexes", *rule.SucceededIndexes)
		}
		spec.SuccessPolicy = &batchv1.SuccessPolicy{Rules: []batchv1.SuccessPolicyRule{rule}}
	}
	if r.IntN(4) == 0 {
		spec.ActiveDeadlineSeconds = ptr.To(int64(20 + r.IntN(100)))
		add("deadline", *spec.ActiveDeadlineSeconds)
	}
	if r.IntN(4) == 0 {
		spec.TTLSecondsAfterFinished = ptr.To(int32(r.IntN(60)))
		add("TTL", *spec.TTLSecondsAfterFinished)
	}
	if r.IntN(5) == 0 {
		spec.Suspend = ptr.To(true)
		text = append(text, "suspended")
	}
	if r.IntN(20) == 0 {
		spec.ManagedBy = ptr.To("example.org/other")
		text = append(text, "managed by another")
	}
	return spec, strings.Join(text, ", ")
}

// admit does what the API does to a new Job.
func admit(j *batchv1.Job) *batchv1.Job {
	j.UID = types.UID(fmt.Sprintf("job-%s-%d", j.Name, int(time.Since(begin).Seconds())))
	set := map[string]string{
		batchv1.ControllerUidLabel: string(j.UID), batchv1.JobNameLabel: j.Name, "controller-uid": string(j.UID), "job-name": j.Name,
	}
	for k, v := range set {
		j.Spec.Template.Labels[k] = v
	}
	j.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{batchv1.ControllerUidLabel: string(j.UID)}}
	return j
}

func jobs(r *rand.Rand) []step {
	make := func(r *rand.Rand) step {
		spec, text := anyJob(r)
		return step{what: "Job web: " + text, do: func(s *side) {
			if s.Find(job.JobsResource, ns, "web") == nil {
				s.create(admit(&batchv1.Job{ObjectMeta: named("web"), Spec: *spec.DeepCopy()}))
			}
		}}
	}
	change := func(what string, do func(*batchv1.Job)) step {
		return step{what: what, do: func(s *side) { edit(s, job.JobsResource, "web", do) }}
	}
	serve := func(*rand.Rand) step { return step{what: "pods get on", do: (*side).serve} }
	own := []func(r *rand.Rand) step{make, serve, serve, serve,
		func(r *rand.Rand) step {
			n := int32(r.IntN(5))
			return change(fmt.Sprintf("%d at a time", n), func(j *batchv1.Job) { j.Spec.Parallelism = &n })
		},
		func(r *rand.Rand) step {
			suspend := r.IntN(2) == 0
			return change(fmt.Sprint("suspended ", suspend), func(j *batchv1.Job) { j.Spec.Suspend = &suspend })
		},
		func(r *rand.Rand) step {
			n := int32(1 + r.IntN(4))
			return change(fmt.Sprintf("resized to %d", n), func(j *batchv1.Job) { // as the API allows for indexed ones
				if j.Spec.CompletionMode != nil && *j.Spec.CompletionMode == batchv1.IndexedCompletion && j.Spec.SuccessPolicy == nil {
					j.Spec.Completions, j.Spec.Parallelism = ptr.To(n), ptr.To(n)
				}
			})
		},
		func(r *rand.Rand) step { return deletion(r, job.JobsResource, "web") },
	}
	out := leaveOut(scenario(r, make(r), slices.Concat(own, jobPodSteps, jobPodSteps)), "controllers may not delete", "jobs web is deleted, Foreground")
	for i := range out {
		out[i].wait = max(out[i].wait, 7*time.Second)
		for _, gone := range []string{"are deleted", "vanish", "stop", "the controllers", "there are other", "controllers may"} {
			if strings.HasPrefix(out[i].what, gone) {
				out[i].wait = calm // see the allowance
			}
		}
	}
	return out
}

func cronJobs(r *rand.Rand) []step {
	// How often, and how long nothing happens: no more than some hundred runs.
	paces := []struct {
		schedules []string
		waits     []time.Duration
	}{
		{[]string{"* * * * *", "*/2 * * * *", "*/15 * * * *"}, []time.Duration{2 * time.Second, 20 * time.Second, time.Minute, 3 * time.Minute, 17 * time.Minute}},
		{[]string{"0 * * * *", "@hourly", "5 1,13 * * *", "30 */3 * * *"}, []time.Duration{2 * time.Second, 17 * time.Minute, 3 * time.Hour, 40 * time.Hour}},
		{[]string{"30 3 * * *", "0 0 * * 0", "@daily", "0 12 31 * *"}, []time.Duration{2 * time.Second, 17 * time.Minute, 3 * time.Hour, 40 * time.Hour, 11 * 24 * time.Hour}},
	}
	pace := paces[r.IntN(len(paces))]
	schedules := pace.schedules
	zones := []*string{nil, nil, ptr.To("Etc/UTC"), ptr.To("Europe/Madrid"), ptr.To("America/New_York"), ptr.To("Asia/Kolkata")}
	policies := []batchv1.ConcurrencyPolicy{batchv1.AllowConcurrent, batchv1.ForbidConcurrent, batchv1.ReplaceConcurrent}
	make := func(r *rand.Rand) step {
		spec := batchv1.CronJobSpec{
			Schedule: schedules[r.IntN(len(schedules))], TimeZone: zones[r.IntN(len(zones))], ConcurrencyPolicy: policies[r.IntN(3)],
			SuccessfulJobsHistoryLimit: ptr.To(int32(r.IntN(3))), FailedJobsHistoryLimit: ptr.To(int32(r.IntN(3))),
		}
		text := fmt.Sprintf("%q in %v, %s, keeps %d and %d", spec.Schedule, ptr.Deref(spec.TimeZone, "no zone"), spec.ConcurrencyPolicy, *spec.SuccessfulJobsHistoryLimit, *spec.FailedJobsHistoryLimit)
		if r.IntN(3) == 0 {
			spec.StartingDeadlineSeconds = ptr.To(int64([]int{5, 30, 200, 4000}[r.IntN(4)]))
			text += fmt.Sprint(", within ", *spec.StartingDeadlineSeconds)
		}
		spec.JobTemplate.Spec.Template = template("v1")
		spec.JobTemplate.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyNever
		spec.JobTemplate.Labels = map[string]string{"job": "web"}
		spec.JobTemplate.Annotations = map[string]string{"note": "web"}
		return step{what: "CronJob web: " + text, do: func(s *side) {
			if s.Find(job.CronJobsResource, ns, "web") == nil {
				s.create(&batchv1.CronJob{ObjectMeta: named("web"), Spec: *spec.DeepCopy()})
			}
		}}
	}
	change := func(what string, do func(*batchv1.CronJob)) step {
		return step{what: what, do: func(s *side) { edit(s, job.CronJobsResource, "web", do) }}
	}
	finish := func(r *rand.Rand) step {
		at, n, failed := r.IntN(4), 1+r.IntN(3), r.IntN(3) == 0
		return step{what: fmt.Sprintf("%d Jobs from %d end, failed %v", n, at, failed), do: func(s *side) {
			var names []string
			for _, obj := range s.All(job.JobsResource, ns) {
				var j batchv1.Job
				if decode(obj, &j); job.Finished(&j) == nil {
					names = append(names, j.Name)
				}
			}
			for i := range min(n, len(names)) {
				edit(s, job.JobsResource, names[(at+i)%len(names)], func(j *batchv1.Job) {
					c := batchv1.JobCondition{Type: batchv1.JobComplete, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(time.Now())}
					if failed {
						c.Type = batchv1.JobFailed
					} else {
						j.Status.CompletionTime = &c.LastTransitionTime
					}
					j.Status.Conditions = append(j.Status.Conditions, c)
				})
			}
		}}
	}
	steps := []func(r *rand.Rand) step{finish, finish, finish, make,
		func(r *rand.Rand) step {
			suspend := r.IntN(2) == 0
			return change(fmt.Sprint("suspended ", suspend), func(c *batchv1.CronJob) { c.Spec.Suspend = &suspend })
		},
		func(r *rand.Rand) step {
			schedule := schedules[r.IntN(len(schedules))]
			return change("schedule "+schedule, func(c *batchv1.CronJob) { c.Spec.Schedule = schedule })
		},
		func(r *rand.Rand) step {
			zone := zones[r.IntN(len(zones))]
			return change("zone "+ptr.Deref(zone, "none"), func(c *batchv1.CronJob) { c.Spec.TimeZone = zone })
		},
		func(r *rand.Rand) step {
			policy := policies[r.IntN(3)]
			return change(string(policy), func(c *batchv1.CronJob) { c.Spec.ConcurrencyPolicy = policy })
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(3))
			return change(fmt.Sprint("keeps ", n), func(c *batchv1.CronJob) {
				c.Spec.SuccessfulJobsHistoryLimit, c.Spec.FailedJobsHistoryLimit = &n, &n
			})
		},
		func(r *rand.Rand) step { return deletion(r, job.CronJobsResource, "web") },
		func(r *rand.Rand) step {
			at := r.IntN(4)
			return step{what: fmt.Sprintf("Job %d is deleted", at), do: func(s *side) {
				if all := s.All(job.JobsResource, ns); len(all) > 0 {
					s.remove(job.JobsResource, all[at%len(all)]["metadata"].(map[string]any)["name"].(string), metav1.DeletePropagationBackground)
				}
			}}
		},
		disturbances[0], disturbances[1], disturbances[1], disturbances[2],
	}
	first := make(r)
	first.wait = pause(r)
	out := []step{first}
	for range 4 + r.IntN(12) {
		s := steps[r.IntN(len(steps))](r)
		s.wait = pace.waits[r.IntN(len(pace.waits))]
		out = append(out, s)
	}
	return out
}
