//go:build chaos

package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/test/harness"
)

// The limits for a node.
const (
	notReadyWithin = 5 * time.Second // after its power is cut, or it is cut off
	readyWithin    = 5 * time.Second // after it is back
)

// quick makes pods leave an unreachable node after seconds instead of 30.
func quick(seconds int64) func(*corev1.PodSpec) {
	return func(spec *corev1.PodSpec) {
		for _, key := range []string{corev1.TaintNodeUnreachable, corev1.TaintNodeNotReady} {
			spec.Tolerations = append(spec.Tolerations, corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists,
				Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &seconds})
		}
	}
}

// TestNodes breaks agents and their machines.
func TestNodes(t *testing.T) {
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 3})
	const tolerated = 5 * time.Second
	c.Deploy(t, "web", 6, quick(int64(tolerated.Seconds())))
	c.Deploy(t, "patient", 3)
	all := c.Containers(t, "web")

	t.Run("an agent killed and started evicts nothing", func(t *testing.T) {
		c.Kill(t, "a1", true)
		c.Start(t, "a1")
		harness.For(t, 2*tolerated, "pods after an agent's restart", func() error { return sameContainers(t, c, all) })
	})

	t.Run("an agent stopped in order and started evicts nothing", func(t *testing.T) {
		require.NoError(t, c.Spec.Stop(t.Context(), "a1"))
		c.Start(t, "a1")
		harness.For(t, tolerated, "pods after an agent's restart", func() error { return sameContainers(t, c, all) })
	})

	t.Run("the agent's controller killed: it moves, nothing is touched", func(t *testing.T) {
		stream := streamOf(t, c, "a1")
		c.Kill(t, stream, false)
		harness.Eventually(t, 15*time.Second, "a1 has a stream to another controller", func() error {
			if now := streamOf(t, c, "a1"); now == "" || now == stream {
				return fmt.Errorf("stream to %q", now)
			}
			return nil
		})
		c.Start(t, stream)
		harness.For(t, tolerated, "pods after the stream moved", func() error { return sameContainers(t, c, all) })
	})

	t.Run("most nodes lost at once evict nothing", func(t *testing.T) {
		c.Run(t, "partition", "a1", "a2")
		for _, name := range []string{"a1", "a2"} {
			c.WaitNode(t, name, false, 30*time.Second)
		}
		harness.For(t, 3*tolerated, "pods while most nodes are lost", func() error { return sameContainers(t, c, all) })
		c.Run(t, "partition", "a1", "a2", "--heal")
		for _, name := range []string{"a1", "a2"} {
			t.Logf("%s Ready %s after it was healed", name, ms(c.WaitNode(t, name, true, 30*time.Second)))
		}
		harness.For(t, tolerated, "pods after the nodes are back", func() error { return sameContainers(t, c, all) })
	})

	t.Run("a node cut off: its pods are replaced, and cleaned up when it is back", func(t *testing.T) {
		patient := c.Containers(t, "patient")
		loseNode(t, c, "a2", tolerated, func() { c.Run(t, "partition", "a2") })
		require.Equal(t, patient, c.Containers(t, "patient"), "pods with the default toleration stay for 30 s")
		c.Run(t, "partition", "a2", "--heal")
		back := c.WaitNode(t, "a2", true, 30*time.Second)
		t.Logf("a2 Ready %s after it was healed", ms(back))
		require.LessOrEqual(t, back, readyWithin)
		took := harness.Eventually(t, time.Minute, "a2 runs only what is bound to it", func() error {
			want := podsOn(t, c, "a2")
			have := samplesOn(t, c, "a2")
			if have != want {
				return fmt.Errorf("%d containers, %d pods", have, want)
			}
			return nil
		})
		t.Logf("a2 cleaned up %s after that", ms(took))
		c.RequireUntouched(t, "patient", patient)
	})

	t.Run("power of a machine cut: its pods are replaced", func(t *testing.T) {
		loseNode(t, c, "a3", tolerated, func() { c.Kill(t, "a3", false) })
		begin := time.Now()
		require.NoError(t, c.Spec.Start(t.Context(), "a3"))
		c.WaitNode(t, "a3", true, time.Minute)
		t.Logf("a3 Ready %s after it was turned on", ms(time.Since(begin)))
		c.WaitAvailable(t, "web", 6, time.Minute)
		c.WaitAvailable(t, "patient", 3, time.Minute)
	})

	t.Run("in the end all is at rest", func(t *testing.T) { requireRest(t, c, 10*time.Second) })
}

// loseNode loses a node and checks when it is NotReady and when its pods are
// replaced.
func loseNode(t *testing.T, c *harness.Cluster, name string, tolerated time.Duration, lose func()) {
	t.Helper()
	var lost []string
	for _, pod := range c.Pods(t, "web") {
		if pod.Spec.NodeName == name {
			lost = append(lost, pod.Name)
		}
	}
	require.NotEmpty(t, lost, "no pod to lose on %s", name)
	begin := time.Now()
	lose()
	c.WaitNode(t, name, false, time.Minute)
	notReady := time.Since(begin)
	early := time.Duration(0)
	harness.Eventually(t, time.Minute, "pods of "+name+" are replaced", func() error {
		there := map[string]bool{}
		available := 0
		for _, pod := range c.Pods(t, "web") {
			there[pod.Name] = true
			if pod.Spec.NodeName != name && podReady(&pod) {
				available++
			}
		}
		for _, pod := range lost {
			if !there[pod] && early == 0 {
				early = time.Since(begin)
			}
		}
		if available < 6 {
			return fmt.Errorf("%d of 6 are ready elsewhere", available)
		}
		return nil
	})
	t.Logf("%s lost: NotReady after %s, first pod deleted after %s, all replaced after %s",
		name, ms(notReady), ms(early), ms(time.Since(begin)))
	require.LessOrEqual(t, notReady, notReadyWithin)
	require.GreaterOrEqual(t, early, tolerated, "pods were deleted before their toleration was over")
}

func podReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func streamOf(t *testing.T, c *harness.Cluster, node string) string {
	t.Helper()
	for _, n := range c.Status(t).Nodes {
		if n.Name == node {
			return n.StreamTo
		}
	}
	return ""
}

func podsOn(t *testing.T, c *harness.Cluster, node string) int {
	t.Helper()
	count := 0
	for _, app := range []string{"web", "patient"} {
		for _, pod := range c.Pods(t, app) {
			if pod.Spec.NodeName == node {
				count++
			}
		}
	}
	return count
}

// samplesOn counts the containers of the sample image that really run on a
// machine.
func samplesOn(t *testing.T, c *harness.Cluster, name string) int {
	t.Helper()
	pids, err := c.Spec.Machine(name).Pids()
	require.NoError(t, err)
	count := 0
	for _, pid := range pids {
		cmdline, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		if err == nil && bytes.HasPrefix(cmdline, []byte("/sample\x00")) {
			count++
		}
	}
	return count
}
