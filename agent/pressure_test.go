package agent_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"
)

// nodeHas says whether a node has a condition.
func nodeHas(n *corev1.Node, t corev1.NodeConditionType) bool {
	return n != nil && slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == t && c.Status == corev1.ConditionTrue
	})
}

func isEvicted(st *corev1.PodStatus) bool {
	return st.Phase == corev1.PodFailed && st.Reason == "Evicted"
}

func podCondition(st *corev1.PodStatus, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range st.Conditions {
		if st.Conditions[i].Type == t {
			return &st.Conditions[i]
		}
	}
	return nil
}

// evictedInOrder are the pods that were evicted, the first one first.
func (c *controller) evictedInOrder() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, e := range c.events {
		if e.Reason == "Evicted" && e.InvolvedObject.Kind == "Pod" && !strings.Contains(e.Message, "had condition") {
			out = append(out, e.InvolvedObject.Name)
		}
	}
	return out
}

// On a disk that becomes full the pod that takes most of it is evicted, and it
// alone; until a while after that the node takes no others.
func TestAFullDiskEvictsWhoFilledIt(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	require.NoError(t, unix.Mount("tmpfs", n.cfg.DataDir, "tmpfs", 0, "size=700M,mode=0711")) // Cleanup unmounts it
	n.cfg.EvictionHard = "nodefs.available<100Mi"
	n.cfg.EvictionInterval, n.cfg.PressureTransition = 300*time.Millisecond, 5*time.Second
	n.start()
	c.wait("the node to be ready", time.Minute, func() bool { return nodeReady(c.node) })
	c.mu.Lock()
	require.False(t, nodeHas(c.node, corev1.NodeDiskPressure))
	kept := c.node.Status.Capacity.StorageEphemeral().DeepCopy()
	kept.Sub(*c.node.Status.Allocatable.StorageEphemeral())
	c.mu.Unlock()
	require.Equal(t, "100Mi", kept.String())

	write := func(mib string) corev1.Container {
		return shell("app", "dd if=/dev/zero of=/data/f bs=1M count="+mib+"; sleep 1000")
	}
	small := withEmptyDir(newPod("small", write("1")), "1Gi", "")
	within := withEmptyDir(newPod("within", write("60")), "1Gi", "")
	within.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse("200Mi")}
	critical := withEmptyDir(newPod("critical", write("80")), "1Gi", "")
	critical.Spec.Priority = ptr.To[int32](2_000_000_000)
	for _, p := range []*corev1.Pod{small, within, critical} {
		c.set(p)
	}
	for _, p := range []*corev1.Pod{small, within, critical} {
		c.ready(p)
	}
	// One that has ended, and one whose last container but one has.
	done := newPod("done", shell("app", "echo over; dd if=/dev/zero of=/tmp/f bs=1M count=5"))
	done.Spec.RestartPolicy = corev1.RestartPolicyNever
	again := newPod("again", shell("app", "dd if=/dev/zero of=/tmp/f bs=1M count=5; [ -e /data/twice ] || { touch /data/twice; exit 1; }; sleep 1000"))
	withEmptyDir(again, "1Gi", "")
	c.set(done)
	c.set(again)
	ended := c.until(done, "done", time.Minute, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
	restarted := c.until(again, "restarted", time.Minute, func(st *corev1.PodStatus) bool { return isReady(st) && st.ContainerStatuses[0].RestartCount == 1 })
	require.Equal(t, 2, n.inContainerd(done), "its container and its sandbox")
	require.Equal(t, 3, n.inContainerd(again))
	require.Empty(t, c.evictedInOrder())

	// It writes until there is no more room at all.
	hog := withEmptyDir(newPod("hog", shell("app", "while true; do dd if=/dev/zero of=/data/$RANDOM bs=1M count=10; sleep 0.2; done")), "1Gi", "")
	c.set(hog)
	st := c.until(hog, "evicted", 2*time.Minute, isEvicted)
	require.Regexp(t, `^The node was low on resource: ephemeral-storage\. Threshold quantity: 100Mi, available: \d+(Ki|Mi)?\. `, st.Message)
	disrupted := podCondition(st, corev1.DisruptionTarget)
	require.NotNil(t, disrupted)
	require.Equal(t, corev1.PodReasonTerminationByKubelet, disrupted.Reason)
	require.Equal(t, st.Message, disrupted.Message)
	c.wait("the node to say so", time.Minute, func() bool { return nodeHas(c.node, corev1.NodeDiskPressure) })
	require.Eventually(t, func() bool { return len(n.left(hog)) == 0 && n.inContainerd(hog) == 0 }, time.Minute, 50*time.Millisecond)
	c.wait("an event of the node", time.Minute, func() bool {
		return slices.ContainsFunc(c.events, func(e *corev1.Event) bool {
			return e.InvolvedObject.Kind == "Node" && e.Reason == "EvictionThresholdMet" && e.Message == "Attempting to reclaim ephemeral-storage"
		})
	})
	c.wait("the node to be well again", time.Minute, func() bool { return !nodeHas(c.node, corev1.NodeDiskPressure) })
	for _, p := range []*corev1.Pod{small, within, critical} {
		require.Equal(t, corev1.PodRunning, c.ready(p).Phase, p.Name)
	}
	require.Equal(t, []string{"hog"}, c.evictedInOrder())
	require.Zero(t, n.inContainerd(done), "what has ended was removed before anybody was evicted")
	require.Equal(t, 2, n.inContainerd(again))
	c.mu.Lock()
	require.Equal(t, ended, c.statuses[string(done.UID)], "and is told as it was")
	require.Equal(t, restarted.ContainerStatuses, c.statuses[string(again.UID)].ContainerStatuses)
	delete(c.statuses, string(done.UID))
	c.mu.Unlock()
	n.stop()
	n.start()
	require.Equal(t, ended, c.until(done, "done still", time.Minute, func(*corev1.PodStatus) bool { return true }), "by the next agent, too")
	later := newPod("later", shell("app", "sleep 1000"))
	c.set(later)
	c.ready(later)
}

// Short of memory, a node evicts one pod at a time in upstream's order, never
// critical ones, and takes no pod that does not say what it needs.
func TestShortOfMemoryPodsGoInOrder(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.cfg.EvictionInterval = 300 * time.Millisecond
	n.start()
	hold := func(mib string) corev1.Container {
		return shell("app", "dd if=/dev/zero of=/data/f bs=1M count="+mib+"; sleep 1000") // in memory
	}
	make := func(name, mib string, priority int32, request string) *corev1.Pod {
		p := withEmptyDir(newPod(name, hold(mib)), "200Mi", corev1.StorageMediumMemory)
		p.Spec.Priority = &priority
		if request != "" {
			p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(request)}
		}
		return p
	}
	// Against what comes by name, by creation, or by bytes alone.
	within := make("a-within", "60", 0, "300Mi")
	high := make("b-high", "90", 10, "")
	little := make("c-little", "10", 0, "")
	much := make("d-much", "50", 0, "")
	critical := make("e-critical", "90", 2_000_000_000, "")
	all := []*corev1.Pod{within, high, little, much, critical}
	for _, p := range all {
		c.set(p)
	}
	for _, p := range all {
		c.ready(p)
	}
	n.stop()
	n.cfg.EvictionHard = "memory.available<99.9%" // more than there ever is
	n.start()
	c.wait("the node to say so", time.Minute, func() bool { return nodeHas(c.node, corev1.NodeMemoryPressure) })
	effort := newPod("effort", shell("app", "sleep 1000"))
	c.set(effort)
	st := c.until(effort, "refused", time.Minute, isEvicted)
	require.Equal(t, "Pod was rejected: The node had condition: [MemoryPressure]. ", st.Message)
	require.Empty(t, st.ContainerStatuses)
	for _, p := range []*corev1.Pod{much, little, high, within} {
		st := c.until(p, "evicted", 2*time.Minute, isEvicted)
		require.Contains(t, st.Message, "The node was low on resource: memory. Threshold quantity: ")
		require.NotNil(t, podCondition(st, corev1.DisruptionTarget))
	}
	require.Equal(t, []string{"d-much", "c-little", "b-high", "a-within"}, c.evictedInOrder())
	require.Contains(t, c.until(high, "told", time.Minute, isEvicted).Message, "Container app was using ")
	require.NotContains(t, c.until(within, "told", time.Minute, isEvicted).Message, "Container app was using ")
	require.Equal(t, corev1.PodRunning, c.ready(critical).Phase)
}
