//go:build chaos

package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"timonel/test/harness"
)

// completions is how many pods a Job of TestWorkWhileLeadersDie has, jobsARound how many
// Jobs there are for each kill.
const completions, jobsARound = 3, 8

// TestWorkWhileLeadersDie kills the leader KILLS times (default 10) while Jobs run and a
// Deployment and a StatefulSet are rolled out, and checks that no Job counts a pod twice
// or never, and that no two pods of one identity of the StatefulSet run at once. The test
// stands in for the agents: it says of pods what agents say, and so knows what ran.
func TestWorkWhileLeadersDie(t *testing.T) {
	kills := 10
	if text := os.Getenv("KILLS"); text != "" {
		n, err := strconv.Atoi(text)
		require.NoError(t, err, "KILLS")
		kills = n
	}
	c := harness.Up(t, harness.Options{Controllers: 3})
	client := c.Client(t, "")
	for i := range 3 {
		try(t, "create a Node", func(ctx context.Context) error {
			_, err := client.CoreV1().Nodes().Create(ctx, simulatedNode(fmt.Sprint("sim-", i)), metav1.CreateOptions{})
			return err
		})
	}
	replicas := int32(3)
	set := map[string]string{"app": "work"}
	selector, template := &metav1.LabelSelector{MatchLabels: set}, workTemplate(set)
	try(t, "create the Deployment", func(ctx context.Context) error {
		_, err := client.AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "roll"},
			Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: selector, Template: template}}, metav1.CreateOptions{})
		return err
	})
	identity := map[string]string{"app": "identity"}
	try(t, "create the StatefulSet", func(ctx context.Context) error {
		_, err := client.AppsV1().StatefulSets("default").Create(ctx, &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "identity"},
			Spec: appsv1.StatefulSetSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: identity}, Template: workTemplate(identity)}}, metav1.CreateOptions{})
		return err
	})

	agents := &simulatedAgents{client: client, running: map[string]types.UID{}, succeeded: map[string]map[types.UID]string{}}
	ctx, stop := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	wait.Go(func() { agents.run(ctx) })
	defer wait.Wait()
	defer stop()

	for round := range kills {
		for i := range jobsARound {
			job := workJob(fmt.Sprintf("job-%d-%d", round, i), i%2 == 0)
			try(t, "create a Job", func(ctx context.Context) error {
				_, err := client.BatchV1().Jobs("default").Create(ctx, job, metav1.CreateOptions{})
				return err
			})
		}
		patch := fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{"round":"%d"}}}}}`, round)
		try(t, "roll the Deployment out", func(ctx context.Context) error {
			_, err := client.AppsV1().Deployments("default").Patch(ctx, "roll", types.MergePatchType, patch, metav1.PatchOptions{})
			return err
		})
		try(t, "roll the StatefulSet out", func(ctx context.Context) error {
			_, err := client.AppsV1().StatefulSets("default").Patch(ctx, "identity", types.MergePatchType, patch, metav1.PatchOptions{})
			return err
		})
		// The leader dies at another point of the work each time.
		want := (round*5)%(jobsARound*completions) + round*jobsARound*completions/2
		harness.Eventually(t, 2*time.Minute, fmt.Sprintf("%d pods of Jobs to succeed", want), func() error {
			if n := agents.count(); n < want {
				return fmt.Errorf("%d have", n)
			}
			return nil
		})
		leader := c.Leader(t)
		c.Kill(t, leader, true)
		waitOtherLeader(t, c, leader)
		c.Start(t, leader)
		require.Empty(t, agents.wrong(), "after %s was killed, round %d", leader, round+1)
	}

	harness.Eventually(t, 3*time.Minute, "all Jobs to be complete", func() error {
		list, err := client.BatchV1().Jobs("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		complete := 0
		for _, job := range list.Items {
			for _, condition := range job.Status.Conditions {
				if condition.Type == batchv1.JobComplete && condition.Status == corev1.ConditionTrue {
					complete++
				}
			}
		}
		if complete != kills*jobsARound {
			return fmt.Errorf("%d of %d are", complete, kills*jobsARound)
		}
		return nil
	})
	c.WaitAvailable(t, "roll", replicas, 2*time.Minute)
	harness.Eventually(t, 2*time.Minute, "the StatefulSet's rollout", func() error {
		s, err := client.AppsV1().StatefulSets("default").Get(t.Context(), "identity", metav1.GetOptions{})
		if err == nil && (s.Status.ObservedGeneration < s.Generation || s.Status.UpdatedReplicas != replicas || s.Status.ReadyReplicas != replicas || s.Status.CurrentRevision != s.Status.UpdateRevision) {
			err = fmt.Errorf("status %+v", s.Status)
		}
		return err
	})
	requireJobsCounted(t, client, agents)
	require.Empty(t, agents.wrong())
}

// requireJobsCounted checks that each Job counts the pods that succeeded, each once, and
// that none of them is held any more.
func requireJobsCounted(t *testing.T, client *kubernetes.Clientset, agents *simulatedAgents) {
	t.Helper()
	jobs, err := client.BatchV1().Jobs("default").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	for _, job := range jobs.Items {
		ran := agents.of(job.Name)
		require.EqualValues(t, completions, job.Status.Succeeded, "%s: status.succeeded; %d pods succeeded", job.Name, len(ran))
		require.Len(t, ran, completions, "%s: pods that succeeded", job.Name)
		require.Zero(t, job.Status.Failed, job.Name)
		if u := job.Status.UncountedTerminatedPods; u != nil {
			require.Empty(t, slices.Concat(u.Succeeded, u.Failed), "%s: uncounted", job.Name)
		}
		if *job.Spec.CompletionMode == batchv1.IndexedCompletion {
			require.Equal(t, []string{"0", "1", "2"}, slices.Sorted(maps.Values(ran)), "%s: indexes that succeeded", job.Name)
			require.Equal(t, "0-2", job.Status.CompletedIndexes, job.Name)
		}
	}
	pods, err := client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: batchv1.JobNameLabel})
	require.NoError(t, err)
	for _, pod := range pods.Items {
		require.NotContains(t, pod.Finalizers, batchv1.JobTrackingFinalizer, pod.Name)
	}
}

// try repeats a request while nobody leads. What was created by an attempt whose answer
// was lost is created.
func try(t *testing.T, what string, request func(context.Context) error) {
	t.Helper()
	harness.Eventually(t, time.Minute, what, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := request(ctx); !apierrors.IsAlreadyExists(err) {
			return err
		}
		return nil
	})
}

func simulatedNode(name string) *corev1.Node {
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("64"), corev1.ResourceMemory: resource.MustParse("64Gi"), corev1.ResourcePods: resource.MustParse("1000")}
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}, Status: corev1.NodeStatus{
		Capacity: room, Allocatable: room,
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Simulated", LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}},
	}}
}

// workTemplate is of pods that stay where they are, whatever is held against their Nodes.
func workTemplate(labels map[string]string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
		Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Containers:  []corev1.Container{{Name: "main", Image: "registry.example/simulated:1"}},
	}}
}

func workJob(name string, indexed bool) *batchv1.Job {
	n, parallelism, mode := int32(completions), int32(2), batchv1.NonIndexedCompletion
	if indexed {
		mode = batchv1.IndexedCompletion
	}
	template := workTemplate(nil)
	template.Spec.RestartPolicy = corev1.RestartPolicyNever
	return &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: batchv1.JobSpec{Completions: &n, Parallelism: &parallelism, CompletionMode: &mode, Template: template}}
}

// simulatedAgents report for all pods that have a Node what agents would: that they run,
// that those of Jobs have succeeded, and that those that are being deleted have ended.
type simulatedAgents struct {
	client *kubernetes.Clientset

	mu sync.Mutex
	// running are the pods whose container runs, by name; succeeded, by Job, the pods
	// whose container has ended, with their index.
	running   map[string]types.UID
	succeeded map[string]map[types.UID]string
	problems  []string
}

// run looks at all pods again and again until ctx ends. Whatever the API does not take is
// said again at the next look.
func (a *simulatedAgents) run(ctx context.Context) {
	for ctx.Err() == nil {
		look, cancel := context.WithTimeout(ctx, 5*time.Second)
		if jobs, err := a.client.BatchV1().Jobs("default").List(look, metav1.ListOptions{}); err == nil {
			a.compare(jobs.Items)
		}
		if pods, err := a.client.CoreV1().Pods("default").List(look, metav1.ListOptions{}); err == nil {
			for i := range pods.Items {
				a.report(look, &pods.Items[i])
			}
		}
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// compare notes Jobs that count more pods than have succeeded.
func (a *simulatedAgents) compare(jobs []batchv1.Job) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, job := range jobs {
		if counted, ran := int(job.Status.Succeeded), len(a.succeeded[job.Name]); counted > ran {
			a.problems = append(a.problems, fmt.Sprintf("%s counts %d pods, %d have succeeded", job.Name, counted, ran))
		}
	}
}

// report does what an agent does about one pod.
func (a *simulatedAgents) report(ctx context.Context, pod *corev1.Pod) {
	job := pod.Labels[batchv1.JobNameLabel]
	switch {
	case pod.Spec.NodeName == "":
	case pod.DeletionTimestamp != nil:
		a.ended(pod)
		// An error is met again at the next look.
		_ = a.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64), Preconditions: &metav1.Preconditions{UID: &pod.UID}})
	case pod.Status.Phase == corev1.PodPending:
		a.started(pod)
		a.say(ctx, pod, corev1.PodRunning, corev1.ConditionTrue)
	case pod.Status.Phase == corev1.PodRunning && job != "":
		a.ended(pod)
		a.mu.Lock()
		if a.succeeded[job] == nil {
			a.succeeded[job] = map[types.UID]string{}
		}
		a.succeeded[job][pod.UID] = pod.Labels[batchv1.JobCompletionIndexAnnotation]
		a.mu.Unlock()
		a.say(ctx, pod, corev1.PodSucceeded, corev1.ConditionFalse)
	}
}

// started notes a pod that starts, and a problem if another of its name still runs.
func (a *simulatedAgents) started(pod *corev1.Pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if other, ok := a.running[pod.Name]; ok && other != pod.UID {
		a.problems = append(a.problems, fmt.Sprintf("%s starts as %s, and still runs as %s", pod.Name, pod.UID, other))
	}
	a.running[pod.Name] = pod.UID
}

func (a *simulatedAgents) ended(pod *corev1.Pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running[pod.Name] == pod.UID {
		delete(a.running, pod.Name)
	}
}

func (a *simulatedAgents) say(ctx context.Context, pod *corev1.Pod, phase corev1.PodPhase, ready corev1.ConditionStatus) {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID, "resourceVersion": pod.ResourceVersion},
		"status":   map[string]any{"phase": phase, "conditions": []corev1.PodCondition{{Type: corev1.PodReady, Status: ready, LastTransitionTime: metav1.Now()}}},
	})
	if err == nil {
		// An error is met again at the next look.
		_, _ = a.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	}
}

// count is how many pods of Jobs have succeeded.
func (a *simulatedAgents) count() (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, pods := range a.succeeded {
		n += len(pods)
	}
	return n
}

// of are the pods of a Job that have succeeded, and their indexes.
func (a *simulatedAgents) of(job string) map[types.UID]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.succeeded[job])
}

// wrong is what must not have happened and did.
func (a *simulatedAgents) wrong() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.problems)
}
