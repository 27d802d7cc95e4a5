package job_test

import (
	"fmt"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/reconcile"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload/job"
	"timonel/state/objects"
)

// many returns a world of Jobs with pods that run.
func many(b *testing.B, jobs, pods int) *objects.Snapshot {
	w := storytest.NewWorld(b)
	n, limit := int32(pods), int32(6)
	start := metav1.NewTime(w.Now)
	for i := range jobs {
		name := fmt.Sprintf("j%05d", i)
		uid := map[string]string{batchv1.ControllerUidLabel: name}
		j := &batchv1.Job{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name)},
			Spec: batchv1.JobSpec{
				Completions: &n, Parallelism: &n, BackoffLimit: &limit, Selector: &metav1.LabelSelector{MatchLabels: uid},
				Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: uid}},
			},
			Status: batchv1.JobStatus{StartTime: &start, Active: n},
		}
		w.Add(j)
		for k := range pods {
			w.Add(&corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{
					Namespace: "default", Name: fmt.Sprintf("%s-%05d", name, k), Labels: uid, Finalizers: []string{batchv1.JobTrackingFinalizer},
					OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(j, job.Kind)},
				},
				Status: corev1.PodStatus{Phase: corev1.PodRunning},
			})
		}
	}
	return w.Snapshot()
}

// BenchmarkPass measures one pass over one Job, and finding the keys of one changed
// pod. The number of other Jobs and pods is to make no difference.
func BenchmarkPass(b *testing.B) {
	for _, c := range []struct{ jobs, pods int }{{100, 1}, {10000, 1}, {1, 3000}} {
		s := many(b, c.jobs, c.pods)
		in := reconcile.Input{Snapshot: s}
		b.Run(fmt.Sprintf("%d Jobs of %d pods", c.jobs, c.pods), func(b *testing.B) {
			for b.Loop() {
				if _, err := (job.Job{}).Reconcile(in, job.Key("default", "j00000")); err != nil {
					b.Fatal(err)
				}
			}
		})
		var m *objects.Meta
		for m = range s.OwnedBy("j00000") {
			break
		}
		b.Run(fmt.Sprintf("keys of %d Jobs", c.jobs), func(b *testing.B) {
			for b.Loop() {
				if keys := (job.Job{}).Keys(objects.Changed{Old: m, New: m}, s); len(keys) == 0 {
					b.Fatal("no keys")
				}
			}
		})
	}
}
