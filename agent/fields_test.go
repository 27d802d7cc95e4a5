package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"

	"timonel/agent/cgroup"
	"timonel/agent/pod"
	pb "timonel/proto/timonel/v1"
)

// nodeSet tells the agent of its own node as the API would.
func (c *controller) nodeSet(labels map[string]string, taints ...corev1.Taint) {
	c.t.Helper()
	c.wait("the agent", 30*time.Second, func() bool { return c.stream != nil })
	n := &corev1.Node{Spec: corev1.NodeSpec{Taints: taints}}
	n.Name, n.Labels = "a1", labels
	raw, err := n.Marshal()
	require.NoError(c.t, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	require.NoError(c.t, c.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_NodeSet{NodeSet: &pb.NodeSet{Node: raw}}}))
}

// said are the events of a pod with a reason.
func (c *controller) said(p *corev1.Pod, reason string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, e := range c.events {
		if e.InvolvedObject.UID == p.UID && e.Reason == reason {
			out = append(out, e.Message)
		}
	}
	return out
}

func failed(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed }

// Pods that a node does not take fail with the kubelet's reasons, once and for
// good, whatever becomes of the agent; those it took are not asked about again.
func TestNodeRefusesPods(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	c.nodeSet(map[string]string{"disk": "ssd"})
	sleep := func() corev1.Container { return shell("app", "trap 'exit 0' TERM; while true; do sleep 1; done") }
	taken := newPod("taken", sleep())
	taken.Spec.NodeSelector = map[string]string{"disk": "ssd"}
	taken.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 80, HostPort: 18080, Protocol: corev1.ProtocolTCP}}
	c.set(taken)
	before := c.ready(taken)

	type refusal struct {
		pod             *corev1.Pod
		reason, message string
	}
	var refusals []refusal
	refuse := func(name, reason, message string, change func(*corev1.Pod)) {
		p := newPod(name, sleep())
		p.Spec.SecurityContext = &corev1.PodSecurityContext{}
		change(p)
		refusals = append(refusals, refusal{p, reason, message})
		c.set(p)
	}
	refuse("cpu", "OutOfcpu", "requested: 100000,", func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = quantities("100", "1Mi") })
	refuse("selector", "NodeAffinity", "affinity/selector", func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "hdd"} })
	refuse("port", "NodePorts", "free ports", func(p *corev1.Pod) {
		s := sleep()
		s.Name, s.RestartPolicy = "side", ptr.To(corev1.ContainerRestartPolicyAlways)
		s.Image, s.ImagePullPolicy = "timonel/busybox", corev1.PullIfNotPresent
		s.Ports = []corev1.ContainerPort{{ContainerPort: 81, HostPort: 18080, Protocol: corev1.ProtocolTCP}}
		p.Spec.InitContainers = []corev1.Container{s}
	})
	refuse("windows", "PodOSNotSupported", "OS field", func(p *corev1.Pod) { p.Spec.OS = &corev1.PodOS{Name: corev1.Windows} })
	refuse("groups", "SupplementalGroupsPolicyNotSupported", "Loose", func(p *corev1.Pod) {
		p.Spec.SecurityContext.SupplementalGroupsPolicy = ptr.To(corev1.SupplementalGroupsPolicy("Loose"))
	})
	refuse("sysctl", "SysctlForbidden", "kernel.msgmax", func(p *corev1.Pod) {
		p.Spec.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "kernel.msgmax", Value: "1"}}
	})
	windows := &corev1.WindowsSecurityContextOptions{HostProcess: ptr.To(true)}
	refuse("process", "PodFeatureUnsupported", "windowsOptions", func(p *corev1.Pod) { p.Spec.SecurityContext.WindowsOptions = windows })
	refuse("nfs", "PodFeatureUnsupported", "nfs", func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{Server: "a", Path: "/"}}}}
	})
	check := func() {
		t.Helper()
		for _, r := range refusals {
			st := c.until(r.pod, "refused", 20*time.Second, failed)
			require.Equal(t, r.reason, st.Reason, r.pod.Name)
			require.True(t, strings.HasPrefix(st.Message, "Pod was rejected: "), st.Message)
			require.Contains(t, st.Message, r.message)
			require.Empty(t, st.ContainerStatuses, r.pod.Name)
			c.wait("an event about "+r.pod.Name, 10*time.Second, func() bool {
				return slices.ContainsFunc(c.events, func(e *corev1.Event) bool { return e.InvolvedObject.UID == r.pod.UID && e.Reason == r.reason })
			})
		}
		require.Len(t, running(t, runtimeOf(t, n)), 1, "something of a refused pod runs")
	}
	check()

	t.Log("the agent starts anew, and now the node is such that it would not have taken the first pod either")
	n.stop()
	c.mu.Lock()
	c.statuses, c.history = map[string]*corev1.PodStatus{}, map[string][]corev1.PodStatus{}
	old := *taken
	old.Spec.SecurityContext = &corev1.PodSecurityContext{WindowsOptions: windows} // as if an agent had run it that ignored this
	c.pods[string(taken.UID)] = &old
	c.mu.Unlock()
	raw, err := old.Marshal()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(n.cfg.DataDir, "desired", "pods", string(taken.UID)), raw, 0o600))
	n.start()
	c.nodeSet(map[string]string{"disk": "hdd"}, corev1.Taint{Key: "k", Effect: corev1.TaintEffectNoExecute})
	after := c.ready(taken)
	require.Equal(t, ids(before), ids(after))
	check()
	for _, r := range refusals {
		require.Len(t, c.said(r.pod, r.reason), 1, "told of %s more than once", r.pod.Name)
	}
	c.wait("a warning about the pod that goes on", 10*time.Second, func() bool {
		return slices.ContainsFunc(c.events, func(e *corev1.Event) bool {
			return e.InvolvedObject.UID == taken.UID && e.Reason == "PodFeatureUnsupported" && strings.Contains(e.Message, "windowsOptions")
		})
	})
	late := newPod("late", sleep())
	c.set(late)
	require.Equal(t, "TaintToleration", c.until(late, "refused", 20*time.Second, failed).Reason)

	c.delete(refusals[0].pod, 5)
	c.delete(taken, 5)
	// What it had is free again.
	c.nodeSet(nil)
	port := newPod("port-2", sleep())
	port.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 80, HostPort: 18080, Protocol: corev1.ProtocolTCP}}
	c.set(port)
	c.ready(port)
}

// A running pod is resized in place. It gets ephemeral containers, once each, but for those with fields that the node refuses. All of it is
// so after a restart of the agent too.
func TestChangesOfRunningPods(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	app := shell("app", "trap 'exit 0' TERM; cat /sub/file; while true; do sleep 1; done")
	app.Resources.Requests = quantities("100m", "16Mi")
	app.Env = []corev1.EnvVar{{Name: "NAME", Value: "mine"}}
	app.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/sub", SubPathExpr: "$(NAME)-$(NAME)"}}
	p := newPod("changes", app)
	p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	c.set(p)
	before := c.ready(p)
	require.Equal(t, "100m", before.ContainerStatuses[0].AllocatedResources.Cpu().String())
	require.DirExists(t, filepath.Join(n.cfg.DataDir, "pods", string(p.UID), "volumes", "kubernetes.io~empty-dir", "data", "mine-mine"))

	asked := p.DeepCopy()
	asked.Generation = 2
	asked.Spec.Containers[0].Resources.Requests = quantities("200m", "16Mi")
	added := func(name, script string) corev1.EphemeralContainerCommon {
		c := shell(name, script)
		c.Image = "timonel/busybox"
		return corev1.EphemeralContainerCommon(c)
	}
	asked.Spec.EphemeralContainers = []corev1.EphemeralContainer{
		{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "refused", Image: "timonel/busybox",
			SecurityContext: &corev1.SecurityContext{WindowsOptions: &corev1.WindowsSecurityContextOptions{HostProcess: ptr.To(true)}},
		}},
		{EphemeralContainerCommon: added("debug", "cat /proc/1/cmdline | tr '\\0' ' '; echo; exec sleep 1000"), TargetContainerName: "app"},
		{EphemeralContainerCommon: added("once", "exit 3")},
	}
	c.set(asked)
	answered := func(st *corev1.PodStatus) bool {
		return st.ContainerStatuses[0].Resources.Requests.Cpu().String() == "200m" && !slices.ContainsFunc(st.Conditions, func(cond corev1.PodCondition) bool {
			return cond.Type == corev1.PodResizePending || cond.Type == corev1.PodResizeInProgress
		}) && len(st.EphemeralContainerStatuses) == 3 && st.EphemeralContainerStatuses[1].State.Running != nil && st.EphemeralContainerStatuses[2].State.Terminated != nil
	}
	st := c.until(p, "resized", 20*time.Second, answered)
	require.Equal(t, "PodFeatureUnsupported", st.EphemeralContainerStatuses[0].State.Terminated.Reason)
	require.Equal(t, int32(3), st.EphemeralContainerStatuses[2].State.Terminated.ExitCode)
	debug := st.EphemeralContainerStatuses[1].ContainerID
	require.True(t, isReady(st))
	require.Equal(t, ids(before), ids(st))
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		log, err := os.ReadFile(filepath.Join(n.cfg.DataDir, "logs", pod.LogDirName(p), "debug", "0.log"))
		require.NoError(t, err)
		require.Contains(t, string(log), "trap 'exit 0' TERM", "it sees the processes of its target")
	}, 20*time.Second, 50*time.Millisecond)
	c.wait("events", 10*time.Second, func() bool {
		seen := map[string]string{}
		for _, e := range c.events {
			seen[e.Reason] = e.InvolvedObject.FieldPath
		}
		_, resized := seen["ResizeCompleted"]
		return resized && seen["PodFeatureUnsupported"] == "spec.ephemeralContainers{refused}"
	})

	n.stop()
	c.mu.Lock()
	delete(c.statuses, string(p.UID))
	c.mu.Unlock()
	n.start()
	st = c.until(p, "still resized", 20*time.Second, answered)
	require.Equal(t, ids(before), ids(st))
	require.Equal(t, "200m", st.ContainerStatuses[0].AllocatedResources.Cpu().String())
	require.Equal(t, debug, st.EphemeralContainerStatuses[1].ContainerID)
	require.Zero(t, st.EphemeralContainerStatuses[2].RestartCount)
	require.Len(t, c.said(p, "ResizeCompleted"), 1)

	// What the node can never give is refused, and what others have is waited for.
	refusedFor := func(reason string) func(*corev1.PodStatus) bool {
		return func(st *corev1.PodStatus) bool {
			return slices.ContainsFunc(st.Conditions, func(cond corev1.PodCondition) bool {
				return cond.Type == corev1.PodResizePending && cond.Reason == reason
			})
		}
	}
	huge := asked.DeepCopy()
	huge.Generation = 3
	huge.Spec.Containers[0].Resources.Requests = quantities("1000", "16Mi")
	c.set(huge)
	st = c.until(p, "refused", 20*time.Second, refusedFor(corev1.PodReasonInfeasible))
	require.Equal(t, "200m", st.ContainerStatuses[0].AllocatedResources.Cpu().String())
	require.Equal(t, ids(before), ids(st))
	require.Len(t, c.said(p, "PodFeatureUnsupported"), 1)

	back := asked.DeepCopy()
	back.Generation = 3
	back.Spec.Containers[0].Resources.Requests = quantities("100m", "16Mi")
	c.set(back)
	c.until(p, "as it was", 20*time.Second, func(st *corev1.PodStatus) bool { return st.ObservedGeneration == 3 && !answered(st) && isReady(st) })
}

// The cgroups of classes of pods weigh what their pods ask for together, while
// pods come and go.
func TestClassesWeighWhatTheirPodsRequest(t *testing.T) {
	if cgroup.V2() {
		t.Skip("reads cgroup v1's files; those of v2 are agent/cgroup's test")
	}
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	shares := func(class string) string {
		cfg := n.cfg
		cfg.SetDefaults()
		raw, err := os.ReadFile(filepath.Join(cgroup.Root, "cpu", cfg.CgroupRoot, class, "cpu.shares"))
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(string(raw))
	}
	pod := func(name, request, limit string) *corev1.Pod {
		p := newPod(name, shell("app", "trap 'exit 0' TERM; while true; do sleep 1; done"))
		r := &p.Spec.Containers[0].Resources
		if request != "" {
			r.Requests = quantities(request, "16Mi")
		}
		if limit != "" {
			r.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(limit), corev1.ResourceMemory: resource.MustParse("16Mi")}
		}
		return p
	}
	idle, some, more, sure := pod("idle", "", ""), pod("some", "250m", ""), pod("more", "250m", "1"), pod("sure", "500m", "500m")
	for _, p := range []*corev1.Pod{idle, some, more, sure} {
		c.set(p)
	}
	for _, p := range []*corev1.Pod{idle, some, more, sure} {
		c.ready(p)
	}
	require.Equal(t, "2", shares("besteffort"))
	require.Equal(t, "512", shares("burstable"))
	require.Equal(t, "512", shares("pod"+string(sure.UID)))
	c.delete(more, 5)
	require.Eventually(t, func() bool { return shares("burstable") == "256" }, 10*time.Second, 20*time.Millisecond, shares("burstable"))
	n.stop()
	n.start()
	c.ready(some)
	require.Equal(t, "256", shares("burstable"))
}
