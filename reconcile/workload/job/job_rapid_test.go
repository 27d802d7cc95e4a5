package job_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload/job"
	"timonel/state/objects"
)

// cluster is one Job, its pods, and what a leader that dies at any moment does to
// them. Of each pod it knows how it was counted when its finalizer was removed.
type cluster struct {
	*storytest.World
	t                 *rapid.T
	parallelism       int
	seed              uint64
	succeeded, failed map[types.UID]bool // as the status held them when their finalizer was removed
	done              map[string]bool    // the same as succeeded, for an indexed Job each index once
	forgotten         map[types.UID]bool // removed uncounted, because they were too many
	created           map[types.UID]string
}

// job returns the Job as it is.
func (c *cluster) job() *batchv1.Job {
	j, ok := c.Snapshot().Jobs().Get("default", "j")
	if !ok {
		c.t.Fatalf("the Job is gone")
	}
	return j
}

func (c *cluster) pods(which func(*corev1.Pod) bool) []*corev1.Pod {
	var out []*corev1.Pod
	for pod := range c.Snapshot().Pods().All() {
		if which(pod) {
			out = append(out, pod)
		}
	}
	return out
}

func tracked(pod *corev1.Pod) bool {
	return slices.Contains(pod.Finalizers, batchv1.JobTrackingFinalizer)
}

func index(pod *corev1.Pod) string { return pod.Annotations[batchv1.JobCompletionIndexAnnotation] }

// before checks what a request may do that was decided on s, just before it is made.
func (c *cluster) before(s *objects.Snapshot, r reconcile.Request) {
	j := c.job()
	switch {
	case r.Verb == reconcile.VerbCreate && r.Resource == reconcile.PodsResource:
		active := c.pods(reconcile.PodActive)
		if n := len(active) + 1; n > c.parallelism {
			c.t.Fatalf("%s: %d pods run, %d may", r, n, c.parallelism)
		}
		if i := index(r.Object.(*corev1.Pod)); i != "" {
			for _, pod := range c.pods(func(pod *corev1.Pod) bool { return index(pod) == i }) {
				// One that is deleted, or was about to be, is replaced, and may still succeed.
				seen, ok := s.Pods().Get(pod.Namespace, pod.Name)
				if reconcile.PodActive(pod) || ok && seen.Status.Phase == corev1.PodSucceeded && seen.DeletionTimestamp == nil && !c.forgotten[pod.UID] {
					c.t.Fatalf("%s: index %s has pod %s, %s", r, i, pod.Name, pod.Status.Phase)
				}
			}
			if slices.Contains(expand(j.Status.CompletedIndexes), i) {
				c.t.Fatalf("%s: index %s is done", r, i)
			}
		}
	case r.Verb == reconcile.VerbPatch && strings.Contains(string(r.Patch), "deleteFromPrimitiveList"):
		pod, ok := c.Snapshot().Pods().Get(r.Namespace, r.Name)
		if !ok || !tracked(pod) {
			return
		}
		var uncounted batchv1.UncountedTerminatedPods
		if u := j.Status.UncountedTerminatedPods; u != nil {
			uncounted = *u
		}
		switch {
		case slices.Contains(uncounted.Failed, pod.UID):
			c.failed[pod.UID] = true
		case slices.Contains(uncounted.Succeeded, pod.UID),
			pod.Status.Phase == corev1.PodSucceeded && index(pod) != "" && slices.Contains(expand(j.Status.CompletedIndexes), index(pod)):
			c.succeeded[pod.UID] = true
			c.done[cmp.Or(index(pod), string(pod.UID))] = true
		default:
			c.forgotten[pod.UID] = true
		}
	}
}

// expand lists the indexes of a status.
func expand(s string) []string {
	var out []string
	for part := range strings.SplitSeq(s, ",") {
		var from, to int
		if n, _ := fmt.Sscanf(part, "%d-%d", &from, &to); n == 1 {
			to = from
		} else if n == 0 {
			continue
		}
		for i := from; i <= to; i++ {
			out = append(out, fmt.Sprint(i))
		}
	}
	return out
}

// pass looks at the Job, or a pod, as it was when s was taken, and makes the
// requests in any order while the rest of the world goes on. A leader may die between any two.
func (c *cluster) pass(s *objects.Snapshot, key reconcile.Key, dies bool) {
	c.seed++
	result, err := job.Job{}.Reconcile(reconcile.Input{Now: c.Now, Seed: c.seed, Snapshot: s}, key)
	if err != nil {
		c.t.Fatalf("%s: %v", key, err)
	}
	requests := result.Requests
	for len(requests) > 0 {
		if dies && rapid.IntRange(0, 3).Draw(c.t, "dies") == 0 {
			return
		}
		i := rapid.IntRange(0, len(requests)-1).Draw(c.t, "request")
		r := requests[i]
		requests = slices.Delete(slices.Clone(requests), i, i+1)
		c.before(s, r)
		if err := c.Write(c.t.Context(), r); err == nil {
			requests = append(requests, r.Then...)
		}
		if dies {
			c.life()
		}
	}
}

// keys are what there is to do: a pass over the Job and over each pod that no Job counts.
func (c *cluster) keys(s *objects.Snapshot) []reconcile.Key { return job.Job{}.All(s) }

// life is what agents, nodes and users do to one pod.
func (c *cluster) life() {
	pods := c.pods(func(*corev1.Pod) bool { return true })
	for _, pod := range pods {
		c.created[pod.UID] = pod.Name
	}
	if len(pods) == 0 {
		return
	}
	pod := pods[rapid.IntRange(0, len(pods)-1).Draw(c.t, "pod")]
	switch rapid.IntRange(0, 7).Draw(c.t, "life") {
	case 0, 1:
		if pod.Spec.NodeName == "" && pod.DeletionTimestamp == nil {
			c.Edit(reconcile.PodsResource, pod.Namespace, pod.Name, func(obj map[string]any) {
				obj["spec"].(map[string]any)["nodeName"] = "n"
			})
			c.RunPod(pod.Namespace, pod.Name)
		}
	case 2, 3:
		if pod.Status.Phase == corev1.PodRunning {
			c.FinishPod(pod.Namespace, pod.Name, corev1.PodSucceeded, 0)
		}
	case 4:
		if pod.Status.Phase == corev1.PodRunning {
			c.FinishPod(pod.Namespace, pod.Name, corev1.PodFailed, 1)
		}
	case 5: // a user deletes it, whatever its phase
		_ = c.Write(c.t.Context(), reconcile.Delete(reconcile.PodsResource, pod))
	case 6: // its node is gone
		c.end(pod)
	case 7:
		if pod.DeletionTimestamp != nil {
			c.end(pod)
		}
	}
}

// end is what an agent, or the pod collector in its stead, does to a pod that is to go:
// it fails unless it has ended, and is removed once nothing tracks it.
func (c *cluster) end(pod *corev1.Pod) {
	if !objects.PodEnded(pod) {
		c.FinishPod(pod.Namespace, pod.Name, corev1.PodFailed, 137)
	}
	c.EndPod(pod.Namespace, pod.Name)
}

// TestEachPodIsCountedOnce lets leaders die in the middle of passes that look at an
// outdated state, while pods run, end, fail, vanish with their nodes and are deleted.
// No pod is counted twice or never, no more run than may, no index is done twice, and
// in the end as many have succeeded as are wanted.
func TestEachPodIsCountedOnce(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := &cluster{
			World: storytest.NewWorld(t), t: t,
			succeeded: map[types.UID]bool{}, done: map[string]bool{}, failed: map[types.UID]bool{}, forgotten: map[types.UID]bool{}, created: map[types.UID]string{},
		}
		completions := int32(rapid.IntRange(1, 6).Draw(t, "completions"))
		parallelism := int32(rapid.IntRange(1, 4).Draw(t, "parallelism"))
		c.parallelism = int(parallelism)
		limit := int32(1 << 20)
		uid := map[string]string{batchv1.ControllerUidLabel: "j"}
		j := &batchv1.Job{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "j", UID: "j"},
			Spec: batchv1.JobSpec{
				Completions: &completions, Parallelism: &parallelism, BackoffLimit: &limit,
				Selector: &metav1.LabelSelector{MatchLabels: uid},
				Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: uid}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c"}}}},
			},
		}
		if rapid.Bool().Draw(t, "indexed") {
			mode := batchv1.IndexedCompletion
			j.Spec.CompletionMode = &mode
			if rapid.Bool().Draw(t, "limit per index") {
				j.Spec.BackoffLimitPerIndex = &limit
			}
		}
		if rapid.Bool().Draw(t, "replace ended only") {
			policy := batchv1.Failed
			j.Spec.PodReplacementPolicy = &policy
		}
		c.Add(j)

		own := c.Snapshot() // a leader sees at least what it has done itself
		for range rapid.IntRange(10, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0:
				c.Now = c.Now.Add(time.Duration(rapid.IntRange(1, 700).Draw(t, "seconds")) * time.Second)
			case 1:
				c.Edit(job.JobsResource, "default", "j", func(obj map[string]any) {
					obj["spec"].(map[string]any)["suspend"] = rapid.IntRange(0, 3).Draw(t, "suspend") == 0
				})
			case 2, 3:
				s := own
				if rapid.Bool().Draw(t, "newest") {
					s = c.Snapshot()
				}
				keys := c.keys(s)
				c.pass(s, keys[rapid.IntRange(0, len(keys)-1).Draw(t, "key")], true)
				own = c.Snapshot()
			default:
				c.life()
			}
		}

		// Then all goes well.
		c.Edit(job.JobsResource, "default", "j", func(obj map[string]any) { obj["spec"].(map[string]any)["suspend"] = false })
		for range 400 {
			if job.Finished(c.job()) != nil {
				break
			}
			c.Now = c.Now.Add(time.Minute)
			for _, key := range c.keys(c.Snapshot()) {
				c.pass(c.Snapshot(), key, false)
			}
			for _, pod := range c.pods(func(*corev1.Pod) bool { return true }) {
				c.created[pod.UID] = pod.Name
				switch {
				case pod.DeletionTimestamp != nil:
					c.end(pod)
				case !objects.PodEnded(pod):
					c.FinishPod(pod.Namespace, pod.Name, corev1.PodSucceeded, 0)
				}
			}
		}
		for _, key := range c.keys(c.Snapshot()) {
			c.pass(c.Snapshot(), key, false)
		}
		c.check(completions)
	})
}

// check compares the counts of a Job that has ended with what became of its pods.
func (c *cluster) check(completions int32) {
	j := c.job()
	end := job.Finished(j)
	if end == nil || end.Type != batchv1.JobComplete {
		var pods []string
		for _, pod := range c.pods(func(*corev1.Pod) bool { return true }) {
			pods = append(pods, fmt.Sprintf("%s %s deleted=%v %v %v", pod.Name, pod.Status.Phase, pod.DeletionTimestamp, pod.Finalizers, pod.Annotations))
		}
		c.t.Fatalf("the Job does not complete: %+v\n%s", j.Status, strings.Join(pods, "\n"))
	}
	if j.Status.Succeeded < completions {
		c.t.Fatalf("complete with %d of %d", j.Status.Succeeded, completions)
	}
	if len(c.done) != int(j.Status.Succeeded) || len(c.failed) != int(j.Status.Failed) {
		c.t.Fatalf("%d succeeded and %d failed, the status says %d and %d", len(c.done), len(c.failed), j.Status.Succeeded, j.Status.Failed)
	}
	if j.Spec.CompletionMode != nil && len(expand(j.Status.CompletedIndexes)) != int(completions) {
		c.t.Fatalf("completed indexes %s of %d", j.Status.CompletedIndexes, completions)
	}
	if left := c.pods(tracked); len(left) > 0 {
		c.t.Fatalf("pod %s is still tracked", left[0].Name)
	}
	for uid, name := range c.created {
		if !c.succeeded[uid] && !c.failed[uid] && !c.forgotten[uid] {
			c.t.Fatalf("pod %s was lost", name)
		}
	}
}
