package job

import (
	"slices"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"timonel/reconcile"
	"timonel/state/objects"
)

// The resources and kinds of batch/v1.
var (
	JobsResource     = batchv1.SchemeGroupVersion.WithResource("jobs")
	CronJobsResource = batchv1.SchemeGroupVersion.WithResource("cronjobs")
	Kind             = batchv1.SchemeGroupVersion.WithKind("Job")
	CronJobKind      = batchv1.SchemeGroupVersion.WithKind("CronJob")
)

// Job runs pods until as many have succeeded as each Job asks for.
//
// Its keys are Jobs, and pods that a Job could adopt or that a Job which is gone or
// has ended has left its finalizer on.
type Job struct{}

// Name implements Reconciler.
func (Job) Name() string { return "job-controller" }

// All implements Reconciler.
func (Job) All(s *objects.Snapshot) []reconcile.Key {
	keys := reconcile.KeysOf(Kind, s.Jobs().All())
	for pod := range s.Pods().All() {
		if stray(s, pod) {
			keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
		}
	}
	return keys
}

// Keys implements Reconciler: a Job follows itself and its pods.
func (Job) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	now := c.Meta()
	switch now.GVK.GroupKind() {
	case Kind.GroupKind():
		keys := []reconcile.Key{Key(now.Namespace, now.Name)}
		if c.New == nil {
			for m := range s.OwnedBy(now.UID) {
				if pod, ok := m.Object.(*corev1.Pod); ok && tracked(pod) {
					keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
				}
			}
		}
		if job, ok := now.Object.(*batchv1.Job); ok && c.Old == nil && isTrue(job.Spec.ManualSelector) {
			// It alone can select pods that were there before it.
			for pod := range s.OrphanPods(job.Namespace) {
				if reconcile.Selects(job.Spec.Selector, pod.Labels) {
					keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
				}
			}
		}
		return keys
	case reconcile.PodKind.GroupKind():
		var keys []reconcile.Key
		for _, m := range reconcile.Versions(c) {
			if ref := metav1.GetControllerOfNoCopy(m); ref != nil && isJob(ref) {
				keys = append(keys, Key(m.Namespace, ref.Name))
			}
		}
		if c.New != nil {
			if pod, ok := c.New.Object.(*corev1.Pod); ok && stray(s, pod) {
				keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
			}
		}
		return keys
	}
	return nil
}

// Key is the key of a Job.
func Key(namespace, name string) reconcile.Key {
	return reconcile.NewKey(Kind, namespace, name)
}

// Reconcile implements Reconciler.
func (Job) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	if key.Kind == reconcile.PodKind.Kind {
		return reconcileStray(in, key), nil
	}
	job, ok := in.Snapshot.Jobs().Get(key.Namespace, key.Name)
	if !ok || managedElsewhere(job) {
		return reconcile.Result{}, nil
	}
	if Finished(job) != nil {
		var result reconcile.Result
		for pod := range reconcile.OwnedPods(in.Snapshot, job) {
			if tracked(pod) && metav1.IsControlledBy(pod, job) {
				result.Add(untrack(pod))
			}
		}
		return result, nil
	}
	p, err := newPass(in, job)
	if err != nil {
		return reconcile.Result{}, err
	}
	return p.run(), nil
}

// Finished returns the condition by which a Job is Complete or Failed, or nil.
func Finished(job *batchv1.Job) *batchv1.JobCondition {
	if c := condition(job.Status.Conditions, batchv1.JobComplete); c != nil {
		return c
	}
	return condition(job.Status.Conditions, batchv1.JobFailed)
}

// condition returns the condition of a type if it is true, else nil.
func condition(list []batchv1.JobCondition, t batchv1.JobConditionType) *batchv1.JobCondition {
	for i := range list {
		if list[i].Type == t && list[i].Status == corev1.ConditionTrue {
			return &list[i]
		}
	}
	return nil
}

func managedElsewhere(job *batchv1.Job) bool {
	return job.Spec.ManagedBy != nil && *job.Spec.ManagedBy != batchv1.JobControllerName
}

func indexed(job *batchv1.Job) bool {
	return job.Spec.CompletionMode != nil && *job.Spec.CompletionMode == batchv1.IndexedCompletion
}

func isTrue(b *bool) bool { return b != nil && *b }

func isJob(ref *metav1.OwnerReference) bool {
	return ref.Kind == Kind.Kind && ref.APIVersion == Kind.GroupVersion().String()
}

// tracked says whether a pod is not yet counted in its Job's status, or was not when
// it was looked at last.
func tracked(pod *corev1.Pod) bool {
	return slices.Contains(pod.Finalizers, batchv1.JobTrackingFinalizer)
}

// untrack is the request that lets a pod go.
func untrack(pod *corev1.Pod) reconcile.Request {
	c := reconcile.MergePatch(reconcile.PodsResource, pod, "", map[string]any{"metadata": map[string]any{
		"uid":                                 string(pod.UID),
		"$deleteFromPrimitiveList/finalizers": []string{batchv1.JobTrackingFinalizer},
	}})
	c.PatchType = types.StrategicMergePatchType
	return c
}

// track is the request that makes a pod count after all that runs and has no
// finalizer: a leader died when it was about to delete it, or a user took it off.
func track(pod *corev1.Pod) reconcile.Request {
	meta := reconcile.Pinned(pod)
	meta["finalizers"] = append(slices.Clone(pod.Finalizers), batchv1.JobTrackingFinalizer)
	return reconcile.MergePatch(reconcile.PodsResource, pod, "", map[string]any{"metadata": meta})
}

// owner returns the Job that a pod names as its controller, or nil if there is none.
func owner(s *objects.Snapshot, pod *corev1.Pod) *batchv1.Job {
	ref := metav1.GetControllerOfNoCopy(pod)
	if ref == nil {
		return nil
	}
	job, ok := s.Jobs().Get(pod.Namespace, ref.Name)
	if !ok || job.UID != ref.UID {
		return nil
	}
	return job
}

// adopter returns the Job that selects a pod without a controller, or nil. A Job
// whose selector the API has made is found by the label that it selects.
func adopter(s *objects.Snapshot, pod *corev1.Pod) *batchv1.Job {
	if pod.DeletionTimestamp != nil {
		return nil
	}
	adopts := func(job *batchv1.Job) bool {
		return job.DeletionTimestamp == nil && Finished(job) == nil && !managedElsewhere(job) && reconcile.Selects(job.Spec.Selector, pod.Labels)
	}
	if m, ok := s.Metas().ByUID(types.UID(pod.Labels[batchv1.ControllerUidLabel])); ok {
		if job, ok := m.Object.(*batchv1.Job); ok && job.Namespace == pod.Namespace && adopts(job) {
			return job
		}
	}
	for job := range s.Jobs().InNamespace(pod.Namespace) {
		if isTrue(job.Spec.ManualSelector) && adopts(job) {
			return job
		}
	}
	return nil
}

// stray says whether a pod is to be looked at by itself, not with its Job.
func stray(s *objects.Snapshot, pod *corev1.Pod) bool {
	if ref := metav1.GetControllerOfNoCopy(pod); ref != nil {
		return tracked(pod) && isJob(ref) && owner(s, pod) == nil
	}
	return tracked(pod) || adopter(s, pod) != nil
}

// reconcileStray gives a pod without a controller to the Job that selects it, or takes
// the finalizer of a Job that does not exist off it.
func reconcileStray(in reconcile.Input, key reconcile.Key) reconcile.Result {
	var result reconcile.Result
	pod, ok := in.Snapshot.Pods().Get(key.Namespace, key.Name)
	if !ok || !stray(in.Snapshot, pod) {
		return result
	}
	var job *batchv1.Job
	if metav1.GetControllerOfNoCopy(pod) == nil {
		job = adopter(in.Snapshot, pod)
	}
	if job == nil {
		result.Add(untrack(pod))
		return result
	}
	meta := reconcile.Pinned(pod)
	meta["ownerReferences"] = append(slices.DeleteFunc(slices.Clone(pod.OwnerReferences), func(r metav1.OwnerReference) bool {
		return r.UID == job.UID
	}), *metav1.NewControllerRef(job, Kind))
	if !tracked(pod) {
		meta["finalizers"] = append(slices.Clone(pod.Finalizers), batchv1.JobTrackingFinalizer)
	}
	result.Add(reconcile.MergePatch(reconcile.PodsResource, pod, "", map[string]any{"metadata": meta}))
	return result
}

// claim returns the Job's pods, and releases those that its selector does not match.
func claim(in reconcile.Input, job *batchv1.Job, selector labels.Selector) ([]*corev1.Pod, []reconcile.Request) {
	c := reconcile.Claim{Owner: job, OwnerKind: Kind, Resource: reconcile.PodsResource, Selector: selector}
	var pods []*corev1.Pod
	for pod := range reconcile.OwnedPods(in.Snapshot, job) {
		if metav1.IsControlledBy(pod, job) && c.Claims(pod) {
			pods = append(pods, pod)
		}
	}
	return pods, c.Requests
}
