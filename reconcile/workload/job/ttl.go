package job

import (
	"time"

	batchv1 "k8s.io/api/batch/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// TTL deletes Jobs, with their pods, as long after they have ended as they say.
type TTL struct{}

// Name implements Reconciler.
func (TTL) Name() string { return "ttl-after-finished-controller" }

// All implements Reconciler.
func (TTL) All(s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for job := range s.Jobs().All() {
		if expires(job) {
			keys = append(keys, Key(job.Namespace, job.Name))
		}
	}
	return keys
}

// Keys implements Reconciler.
func (TTL) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if c.New == nil {
		return nil
	}
	if job, ok := c.New.Object.(*batchv1.Job); ok && expires(job) {
		return []reconcile.Key{Key(job.Namespace, job.Name)}
	}
	return nil
}

// expires says whether a Job is to be deleted some time.
func expires(job *batchv1.Job) bool {
	return job.Spec.TTLSecondsAfterFinished != nil && job.DeletionTimestamp == nil && Finished(job) != nil
}

// Reconcile implements Reconciler.
func (TTL) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	job, ok := in.Snapshot.Jobs().Get(key.Namespace, key.Name)
	if !ok || !expires(job) {
		return result, nil
	}
	at := Finished(job).LastTransitionTime.Add(time.Duration(*job.Spec.TTLSecondsAfterFinished) * time.Second)
	if at.After(in.Now) {
		result.At(at)
		return result, nil
	}
	c := reconcile.Delete(JobsResource, job)
	c.Preconditions.ResourceVersion = &job.ResourceVersion // somebody may give it more time right now
	foreground := metav1.DeletePropagationForeground
	c.Propagation = &foreground
	result.Add(c)
	return result, nil
}
