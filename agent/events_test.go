package agent_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/cgroup"
	"timonel/agent/containerd"
	pb "timonel/proto/timonel/v1"
)

// processOf finds the first process of a container or sandbox: of those in its
// cgroup, the one that is number 1 to itself. Others are its children, whose end
// is nothing to the agent.
func processOf(t *testing.T, n *testNode, id string) int {
	t.Helper()
	cfg := n.cfg
	cfg.SetDefaults()
	for _, pid := range cgroup.Processes(cfg.CgroupRoot) {
		raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		if err != nil || !strings.Contains(string(raw), id) {
			continue
		}
		status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
		if err != nil {
			continue // a child that has ended since
		}
		for line := range strings.Lines(string(status)) {
			if numbers, ok := strings.CutPrefix(line, "NSpid:"); ok && strings.HasSuffix(strings.TrimSpace(numbers), "\t1") {
				return pid
			}
		}
	}
	t.Fatalf("no process of %s", id)
	return 0
}

// What happens to containers and sandboxes is seen at once, and put right.
func TestWhatContainerdSaysIsActedUpon(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	p := newPod("struck", shell("app", "while true; do sleep 1; done"))
	c.set(p)
	before := c.ready(p)
	rt := runtimeOf(t, n)

	t.Log("the container's process is killed")
	id := strings.TrimPrefix(before.ContainerStatuses[0].ContainerID, "containerd://")
	began := time.Now()
	require.NoError(t, syscall.Kill(processOf(t, n, id), syscall.SIGKILL))
	st := c.until(p, "restarted", 20*time.Second, func(st *corev1.PodStatus) bool {
		return st.ContainerStatuses[0].RestartCount == 1 && st.ContainerStatuses[0].State.Running != nil
	})
	require.Less(t, time.Since(began), 3*time.Second)
	require.EqualValues(t, 137, st.ContainerStatuses[0].LastTerminationState.Terminated.ExitCode)
	require.Equal(t, before.PodIP, st.PodIP)

	t.Log("the sandbox is killed")
	box := sandboxes(t, rt)[0]
	require.NoError(t, syscall.Kill(processOf(t, n, box), syscall.SIGKILL))
	c.until(p, "in a new sandbox", 30*time.Second, func(st *corev1.PodStatus) bool {
		return st.ContainerStatuses[0].RestartCount == 2 && isReady(st)
	})

	t.Log("a container that wants too much memory is killed for it")
	hog := newPod("hog", corev1.Container{Name: "app", Command: []string{"tail", "-c", "90000000", "/dev/zero"}})
	hog.Spec.RestartPolicy = corev1.RestartPolicyNever
	hog.Spec.Containers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("16Mi")}
	c.set(hog)
	st = c.until(hog, "killed", 30*time.Second, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
	require.Equal(t, "OOMKilled", st.ContainerStatuses[0].State.Terminated.Reason)

	t.Log("a pod on the node's network has its address")
	host := newPod("host", corev1.Container{Name: "app", Image: "timonel/sample", Env: []corev1.EnvVar{{Name: "PORT", Value: "18080"}}})
	host.Spec.HostNetwork = true
	c.set(host)
	require.Equal(t, nodeIP, c.ready(host).PodIP)
	require.Eventually(t, func() bool {
		resp, err := http.Get("http://" + nodeIP + ":18080/healthz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}, 10*time.Second, 50*time.Millisecond)

	t.Log("a pod that is removed without notice ends, too")
	c.mu.Lock()
	delete(c.pods, string(p.UID))
	require.NoError(t, c.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_PodRemove{PodRemove: &pb.PodRemove{
		Namespace: p.Namespace, Name: p.Name, Uid: string(p.UID), Revision: 1000,
	}}}))
	c.mu.Unlock()
	require.Eventually(t, func() bool { return podSandboxes(t, rt, p) == 0 }, 20*time.Second, 50*time.Millisecond)
}

func podSandboxes(t *testing.T, rt *containerd.Runtime, p *corev1.Pod) int {
	t.Helper()
	list, err := rt.ListPodSandbox(context.Background(), &runtimev1.ListPodSandboxRequest{Filter: &runtimev1.PodSandboxFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(p.UID)},
	}})
	require.NoError(t, err)
	return len(list.Items)
}

// What a pod waits for is looked at again when it comes: an image in the
// folder, a ConfigMap.
func TestWaitingEndsWhenWhatIsMissingComes(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	dir := t.TempDir()
	for _, name := range []string{"timonel-pause.tar", "timonel-busybox.tar"} {
		require.NoError(t, os.Link(filepath.Join(n.cfg.ImagesDir, name), filepath.Join(dir, name)))
	}
	all := n.cfg.ImagesDir
	n.cfg.ImagesDir = dir
	n.start()
	p := newPod("patient", corev1.Container{Name: "app", Image: "timonel/sample", ImagePullPolicy: corev1.PullNever})
	c.set(p)
	waits := func(reason string) func(*corev1.PodStatus) bool {
		return func(st *corev1.PodStatus) bool {
			w := st.ContainerStatuses[0].State.Waiting
			return w != nil && w.Reason == reason
		}
	}
	c.until(p, "waiting", 20*time.Second, waits("ErrImageNeverPull"))
	require.NoError(t, os.Link(filepath.Join(all, "timonel-sample.tar"), filepath.Join(dir, "timonel-sample.tar")))
	c.ready(p)

	q := newPod("unset", shell("app", "sleep 1000"))
	q.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "X", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{
		LocalObjectReference: corev1.LocalObjectReference{Name: "late"}, Key: "x",
	}}}}
	c.set(q)
	c.until(q, "waiting", 20*time.Second, waits("CreateContainerConfigError"))
	c.object("ConfigMap", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "late"}, Data: map[string]string{"x": "1"}})
	c.ready(q)
}

// The Node is Ready while an archive takes its time; a pod that needs what is in it waits,
// without a failure, until it is there.
func TestTheNodeDoesNotWaitForImages(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	release := make(chan struct{})
	n.cfg.LoadImages(func(load func(context.Context, string) ([]string, error)) func(context.Context, string) ([]string, error) {
		return func(ctx context.Context, path string) ([]string, error) {
			if filepath.Base(path) == "timonel-sample.tar" {
				select {
				case <-release:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
			return load(ctx, path)
		}
	})
	dir := t.TempDir()
	for _, name := range []string{"timonel-pause.tar", "timonel-busybox.tar", "timonel-sample.tar"} {
		require.NoError(t, os.Link(filepath.Join(n.cfg.ImagesDir, name), filepath.Join(dir, name)))
	}
	n.cfg.ImagesDir = dir
	n.start()
	c.wait("the node to be ready", 20*time.Second, func() bool { return c.node != nil && nodeReady(c.node) })

	waiting := newPod("waiting", corev1.Container{Name: "app", Image: "timonel/sample", ImagePullPolicy: corev1.PullNever})
	c.set(waiting)
	c.until(waiting, "its sandbox is there", 20*time.Second, func(st *corev1.PodStatus) bool { return st.PodIP != "" })
	close(release)
	c.ready(waiting)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.events {
		require.NotEqual(t, corev1.EventTypeWarning, e.Type, "%s: %s", e.Reason, e.Message)
	}
}
