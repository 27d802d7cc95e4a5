package harness

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/internal/cluster"
)

// WaitServing waits until a controller's /readyz answers.
func (c *Cluster) WaitServing(t testing.TB, name string, timeout time.Duration) time.Duration {
	t.Helper()
	client := c.Client(t, name)
	return Eventually(t, timeout, name+" is ready", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// WaitNode waits until a node is Ready, or not Ready, and returns how long that
// took.
func (c *Cluster) WaitNode(t testing.TB, name string, ready bool, timeout time.Duration) time.Duration {
	t.Helper()
	client := c.Client(t, "")
	return Eventually(t, timeout, fmt.Sprintf("node %s Ready=%t", name, ready), func() error {
		node, err := client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if is, why := NodeReady(node); is != ready {
			return fmt.Errorf("Ready=%t: %s", is, why)
		}
		return nil
	})
}

// NodeReady returns whether a node is Ready, and the condition's reason.
func NodeReady(node *corev1.Node) (bool, string) {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue, c.Reason + ": " + c.Message
		}
	}
	return false, "no condition"
}

// Deploy creates a Deployment of the sample image, called name, and waits until
// it is available.
func (c *Cluster) Deploy(t testing.TB, name string, replicas int32, change ...func(*corev1.PodSpec)) time.Duration {
	t.Helper()
	d := cluster.SampleDeployment(replicas)
	labels := map[string]string{"app": name}
	d.Name, d.Labels, d.Spec.Selector.MatchLabels, d.Spec.Template.Labels = name, labels, labels, labels
	for _, f := range change {
		f(&d.Spec.Template.Spec)
	}
	_, err := c.Client(t, "").AppsV1().Deployments("default").Create(t.Context(), d, metav1.CreateOptions{})
	require.NoError(t, err)
	return c.WaitAvailable(t, name, replicas, 90*time.Second)
}

// WaitAvailable waits until a Deployment has exactly that many replicas, all of
// the newest template and available.
func (c *Cluster) WaitAvailable(t testing.TB, name string, replicas int32, timeout time.Duration) time.Duration {
	t.Helper()
	client := c.Client(t, "")
	return Eventually(t, timeout, fmt.Sprintf("%d replicas of %s", replicas, name), func() error {
		d, err := client.AppsV1().Deployments("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		s := d.Status
		if s.ObservedGeneration < d.Generation || s.Replicas != replicas || s.UpdatedReplicas != replicas || s.AvailableReplicas != replicas {
			return fmt.Errorf("observed %d of %d, %d replicas, %d updated, %d available",
				s.ObservedGeneration, d.Generation, s.Replicas, s.UpdatedReplicas, s.AvailableReplicas)
		}
		return nil
	})
}

// Scale sets a Deployment's replicas, trying again while nobody leads. It
// returns when the API has taken it.
func (c *Cluster) Scale(t testing.TB, name string, replicas int32) {
	t.Helper()
	client := c.Client(t, "")
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas)
	Eventually(t, 20*time.Second, "scale "+name, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := client.AppsV1().Deployments("default").Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
		return err
	})
}

// Pods lists the pods of a Deployment that are not being deleted.
func (c *Cluster) Pods(t testing.TB, app string) []corev1.Pod {
	t.Helper()
	var pods *corev1.PodList
	client := c.Client(t, "")
	Eventually(t, 20*time.Second, "list pods", func() (err error) {
		pods, err = client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
		return err
	})
	live := slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	slices.SortFunc(live, func(a, b corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	return live
}

// Containers says of each pod's container which one it is and since when it
// runs: what must stay the same when the control plane breaks.
func (c *Cluster) Containers(t testing.TB, app string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, pod := range c.Pods(t, app) {
		for _, s := range pod.Status.ContainerStatuses {
			started := "not running"
			if s.State.Running != nil {
				started = s.State.Running.StartedAt.UTC().Format(time.RFC3339)
			}
			found[pod.Name+"/"+s.Name] = fmt.Sprintf("%s on %s since %s, %d restarts", s.ContainerID, pod.Spec.NodeName, started, s.RestartCount)
		}
	}
	return found
}

// RequireUntouched fails the test when one of the containers is not what it was.
// New ones are fine.
func (c *Cluster) RequireUntouched(t testing.TB, app string, before map[string]string) {
	t.Helper()
	after := c.Containers(t, app)
	for name, was := range before {
		require.Equal(t, was, after[name], "container %s was touched; all: %v", name, slices.Sorted(maps.Values(after)))
	}
}

// Writer writes ConfigMaps one after the other until it is stopped, and keeps
// count of what was acknowledged.
type Writer struct {
	namespace string
	cancel    context.CancelFunc
	done      chan struct{}
	cluster   *Cluster

	mu           sync.Mutex
	acknowledged []string
	failures     int
	longest      time.Duration
}

// Written is what a Writer did.
type Written struct {
	Acknowledged []string
	Failures     int
	LongestGap   time.Duration // between two acknowledged writes
}

// perWrite bounds one write of a Writer, so that a request to a controller that
// is gone costs no more than what clients commonly wait for.
const perWrite = 500 * time.Millisecond

// Write starts a Writer, in a namespace of its own, through the load balancer
// or on one controller.
func (c *Cluster) Write(t testing.TB, on string) *Writer {
	t.Helper()
	client := c.Client(t, on)
	space, err := client.CoreV1().Namespaces().Create(t.Context(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "writer-"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	w := &Writer{namespace: space.Name, cancel: cancel, done: make(chan struct{}), cluster: c}
	t.Cleanup(cancel)
	maps := client.CoreV1().ConfigMaps(space.Name)
	go func() {
		defer close(w.done)
		last := time.Now()
		for i := 0; ctx.Err() == nil; {
			name := fmt.Sprintf("w-%06d", i)
			attempt, cancel := context.WithTimeout(ctx, perWrite)
			_, err := maps.Create(attempt, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name},
				Data: map[string]string{"at": time.Now().Format(time.RFC3339Nano)}}, metav1.CreateOptions{})
			cancel()
			if err != nil && !apierrors.IsAlreadyExists(err) { // that one was taken before, its answer was lost
				w.mu.Lock()
				if ctx.Err() == nil {
					w.failures++
				}
				w.mu.Unlock()
				select { // a client that fails does not spin
				case <-ctx.Done():
				case <-time.After(5 * time.Millisecond):
				}
				continue
			}
			now := time.Now()
			w.mu.Lock()
			w.longest = max(w.longest, now.Sub(last))
			w.acknowledged = append(w.acknowledged, name)
			w.mu.Unlock()
			last = now
			i++
		}
	}()
	return w
}

func (w *Writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acknowledged)
}

// Stop waits for one more write, so that the last gap counts too, stops the
// writer and checks that every controller has every write that was acknowledged.
func (w *Writer) Stop(t testing.TB) Written {
	t.Helper()
	so := w.count()
	Eventually(t, 30*time.Second, "one more write", func() error {
		if w.count() == so {
			return errors.New("none was acknowledged")
		}
		return nil
	})
	w.cancel()
	<-w.done
	require.NotEmpty(t, w.acknowledged, "no write was acknowledged")
	for _, name := range w.cluster.Spec.ControllerNames() {
		w.requireAll(t, name)
	}
	return Written{Acknowledged: w.acknowledged, Failures: w.failures, LongestGap: w.longest}
}

// requireAll checks that a controller, if it runs, has every acknowledged write.
func (w *Writer) requireAll(t testing.TB, controller string) {
	t.Helper()
	state, err := w.cluster.Spec.Machine(controller).State(t.Context())
	require.NoError(t, err)
	if !state.Up() || state.Paused {
		return
	}
	client := w.cluster.Client(t, controller)
	var list *corev1.ConfigMapList
	Eventually(t, 30*time.Second, "list on "+controller, func() (err error) {
		list, err = client.CoreV1().ConfigMaps(w.namespace).List(t.Context(), metav1.ListOptions{})
		return err
	})
	have := map[string]bool{}
	for _, item := range list.Items {
		have[item.Name] = true
	}
	for _, name := range w.acknowledged {
		require.True(t, have[name], "%s lost the acknowledged write %s/%s", controller, w.namespace, name)
	}
}
