//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"timonel/internal/cluster"
	"timonel/internal/machines"
	"timonel/test/harness"
)

// TestCluster walks through what a new user does with a cluster, on real
// containers.
func TestCluster(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2, Sample: true})

	t.Run("the kubeconfig has a context for all and one for each controller", func(t *testing.T) {
		config, err := clientcmd.LoadFromFile(c.Spec.Kubeconfig())
		require.NoError(t, err)
		require.Equal(t, c.Spec.Name, config.CurrentContext)
		require.Len(t, config.Contexts, 4)
		info, err := os.Stat(c.Spec.Kubeconfig())
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
		for name := range config.Contexts {
			require.NoError(t, c.Client(t, name).Discovery().RESTClient().Get().AbsPath("/readyz").Do(t.Context()).Error(), name)
		}
	})

	t.Run("two agents are Ready", func(t *testing.T) {
		out := c.Run(t, "kubectl", "get", "nodes", "--no-headers")
		require.Equal(t, 2, strings.Count(out, " Ready "), out)
	})

	t.Run("up again changes nothing", func(t *testing.T) {
		before := c.Status(t)
		c.Run(t, "up")
		after := c.Status(t)
		for i, name := range c.Spec.ControllerNames() {
			require.Equal(t, before.Controllers[i].Pid, after.Controllers[i].Pid, name)
		}
	})

	t.Run("a Deployment of six is available and spread", func(t *testing.T) {
		t.Logf("available after %s", c.Deploy(t, "web", 6))
		nodes := map[string]int{}
		for _, pod := range c.Pods(t, "web") {
			nodes[pod.Spec.NodeName]++
		}
		require.Equal(t, map[string]int{"a1": 3, "a2": 3}, nodes)
	})

	t.Run("each pod answers on its address", func(t *testing.T) {
		for _, pod := range c.Pods(t, "web") {
			require.Contains(t, get(t, pod.Status.PodIP), "pod "+pod.Name)
		}
	})

	t.Run("logs and exec work, on any controller", func(t *testing.T) {
		pod := c.Pods(t, "web")[0]
		for _, on := range c.Spec.ControllerNames() {
			require.Contains(t, c.Run(t, "kubectl", "--context", on, "logs", pod.Name), "listens on", on)
		}
		require.Len(t, strings.Split(strings.TrimSpace(c.Run(t, "kubectl", "logs", pod.Name, "--tail=1")), "\n"), 1)
		shell := runShell(t, c)
		for _, on := range c.Spec.ControllerNames() {
			out := c.Run(t, "kubectl", "--context", on, "exec", shell, "--", "sh", "-c", "echo in $(hostname)")
			require.Equal(t, "in "+shell+"\n", out, on)
		}
		out, err := c.Try(t.Context(), "kubectl", "exec", shell, "--", "sh", "-c", "exit 3")
		require.Error(t, err)
		require.Contains(t, out, "exit code 3")
	})

	t.Run("kill -9 of the leader loses no write and touches no container", func(t *testing.T) {
		before := c.Containers(t, "web")
		require.Len(t, before, 6)
		w := c.Write(t, "")
		leader := c.Leader(t)
		c.Kill(t, leader, true)
		harness.Eventually(t, 20*time.Second, "another leader", func() error {
			if now := c.Leader(t); now == leader {
				return io.ErrNoProgress
			}
			return nil
		})
		c.Start(t, leader)
		written := w.Stop(t)
		t.Logf("%d writes acknowledged, %d failed, longest gap %s", len(written.Acknowledged), written.Failures, written.LongestGap)
		c.RequireUntouched(t, "web", before)
	})

	t.Run("rollout restart and undo replace the pods", func(t *testing.T) {
		first := c.Pods(t, "web")[0].Name
		c.Run(t, "kubectl", "rollout", "restart", "deployment/web")
		c.Run(t, "kubectl", "rollout", "status", "deployment/web", "--timeout=90s")
		require.NotEqual(t, first, c.Pods(t, "web")[0].Name)
		require.Contains(t, c.Run(t, "kubectl", "rollout", "history", "deployment/web"), "2")
		c.Run(t, "kubectl", "rollout", "undo", "deployment/web")
		c.Run(t, "kubectl", "rollout", "status", "deployment/web", "--timeout=90s")
	})

	t.Run("scale up and down", func(t *testing.T) {
		c.Run(t, "kubectl", "scale", "deployment/web", "--replicas=8")
		c.WaitAvailable(t, "web", 8, time.Minute)
		c.Run(t, "kubectl", "scale", "deployment/web", "--replicas=1")
		c.WaitAvailable(t, "web", 1, time.Minute)
		harness.Eventually(t, time.Minute, "one pod", func() error { return countPods(t, c, "web", 1) })
	})

	t.Run("delete removes the pods", func(t *testing.T) {
		c.Run(t, "kubectl", "delete", "deployment/web", "--timeout=60s")
		harness.Eventually(t, time.Minute, "no pod", func() error { return countPods(t, c, "web", 0) })
		_, err := c.Client(t, "").AppsV1().Deployments("default").Get(t.Context(), "web", metav1.GetOptions{})
		require.True(t, apierrors.IsNotFound(err), err)
	})

	t.Run("status tells who leads", func(t *testing.T) {
		status := c.Status(t)
		require.NotEmpty(t, status.Leader)
		require.Len(t, status.Controllers, 3)
		require.Len(t, status.Nodes, 2)
		for _, controller := range status.Controllers {
			require.Equal(t, status.Leader, controller.Leader)
			require.Equal(t, status.Term, controller.Term)
			require.Positive(t, controller.Memory.Resident)
		}
		require.Contains(t, c.Run(t, "status"), status.Leader+" leads in term")
	})

	t.Run("down leaves nothing", func(t *testing.T) {
		c.Run(t, "down")
		network := c.Spec.Network()
		require.Empty(t, network.Leftovers(c.Spec.Names()))
		mounts, err := machines.MountsBelow(c.Spec.Run)
		require.NoError(t, err)
		require.Empty(t, mounts)
		pids, err := machines.ProcessesNaming(c.Spec.Run + string(filepath.Separator))
		require.NoError(t, err)
		require.Empty(t, pids)
		for _, name := range c.Spec.AgentNames() {
			require.Empty(t, machines.Cgroups(c.Spec.CgroupRoot(name)))
		}
		_, err = cluster.Load(c.Spec.Run)
		require.ErrorIs(t, err, cluster.ErrNone)
	})
}

func get(t *testing.T, address string) string {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get("http://" + net.JoinHostPort(address, "8080") + "/")
	require.NoError(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	return string(body)
}

func countPods(t *testing.T, c *harness.Cluster, app string, want int) error {
	pods, err := c.Client(t, "").CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		return err
	}
	if len(pods.Items) != want {
		var there []string
		for _, pod := range pods.Items {
			there = append(there, fmt.Sprintf("%s (%s)", pod.Name, pod.Status.Phase))
		}
		return fmt.Errorf("want %d pods, there are %s", want, strings.Join(there, ", "))
	}
	return nil
}

// runShell runs a pod with a shell in it and returns its name.
func runShell(t *testing.T, c *harness.Cluster) string {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "shell"}, Spec: corev1.PodSpec{
		TerminationGracePeriodSeconds: new(int64),
		Containers: []corev1.Container{{Name: "shell", Image: "docker.io/timonel/busybox:latest",
			ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"sleep", "3600"}}}}}
	client := c.Client(t, "").CoreV1().Pods("default")
	_, err := client.Create(t.Context(), pod, metav1.CreateOptions{})
	require.NoError(t, err)
	c.Run(t, "kubectl", "wait", "--for=condition=Ready", "pod/shell", "--timeout=60s")
	return pod.Name
}
