package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/cgroup"
	"timonel/agent/containerd"
	"timonel/agent/hostile"
)

func TestRunPodServeLogsAndEnd(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	p := newPod("web", corev1.Container{Name: "app", Image: "timonel/sample", ReadinessProbe: &corev1.Probe{
		PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}},
	}})
	c.set(p)
	st := c.ready(p)
	require.Equal(t, corev1.PodRunning, st.Phase)
	require.NotEmpty(t, st.PodIP)

	resp, err := http.Get(fmt.Sprintf("http://%s:8080/", st.PodIP))
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	resp.Body.Close()
	require.Contains(t, string(body), "pod web")

	code, text := c.get("/containerLogs/default/web/app")
	require.Equal(t, http.StatusOK, code, text)
	require.Contains(t, text, "sample: pod web listens on :8080")

	began := time.Now()
	c.delete(p, 5)
	require.Less(t, time.Since(began), 4*time.Second, "the sample ends on SIGTERM")
}

// ids are the container ids of a status, by name.
func ids(st *corev1.PodStatus) map[string]string {
	out := map[string]string{}
	for _, list := range [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses} {
		for _, cs := range list {
			out[cs.Name] = cs.ContainerID
		}
	}
	return out
}

// A container goes on through the end of the agent, of containerd and of its
// controller, and the next agent adopts it.
func TestContainersOutliveEverythingElse(t *testing.T) {
	n, cs := cluster(t, "c1", "c2")
	n.start()
	p := newPod("steady", shell("app", "while true; do sleep 1; done"))
	connected := func() *controller {
		for _, c := range cs {
			c.mu.Lock()
			on := c.stream != nil
			c.mu.Unlock()
			if on {
				return c
			}
		}
		return nil
	}
	require.Eventually(t, func() bool { return connected() != nil }, 10*time.Second, 10*time.Millisecond)
	for _, c := range cs {
		c.set(p)
	}
	c := connected()
	before := c.ready(p)

	t.Log("the agent is restarted")
	n.stop()
	c.wait("a goodbye", 5*time.Second, func() bool { return cs[0].goodbyes+cs[1].goodbyes == 1 })
	for _, c := range cs {
		c.mu.Lock()
		delete(c.statuses, string(p.UID))
		c.mu.Unlock()
	}
	n.start()
	require.Eventually(t, func() bool { return connected() != nil }, 10*time.Second, 10*time.Millisecond)
	c = connected()
	after := c.ready(p)
	require.Equal(t, ids(before), ids(after))
	require.Equal(t, before.ContainerStatuses[0].State.Running, after.ContainerStatuses[0].State.Running)
	require.Zero(t, after.ContainerStatuses[0].RestartCount)

	t.Log("containerd is killed")
	pid := readPid(t, n.cfg.DataDir)
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	// One that comes back at once leaves the node ready.
	require.Eventually(t, func() bool {
		now, err := containerdPid(n.cfg.DataDir)
		return err == nil && now != pid
	}, 20*time.Second, 10*time.Millisecond)
	c.wait("the node to be ready", 20*time.Second, func() bool { return nodeReady(c.node) })
	second := newPod("second", shell("app", "sleep 1000"))
	c.set(second)
	c.ready(second)
	c.mu.Lock()
	require.Equal(t, ids(before), ids(c.statuses[string(p.UID)]))
	c.mu.Unlock()

	t.Log("the controller dies")
	other := cs[0]
	if other == c {
		other = cs[1]
	}
	other.set(second)
	began := time.Now()
	c.stop()
	other.wait("the stream to move", 5*time.Second, func() bool { return other.stream != nil })
	require.Less(t, time.Since(began), time.Second, "a broken stream moves at once")
	st := other.ready(p)
	require.Equal(t, ids(before), ids(st))
	require.Zero(t, st.ContainerStatuses[0].RestartCount)
}

func nodeReady(n *corev1.Node) bool {
	if n == nil {
		return false
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func readPid(t *testing.T, dataDir string) int {
	t.Helper()
	pid, err := containerdPid(dataDir)
	require.NoError(t, err)
	return pid
}

func containerdPid(dataDir string) (pid int, err error) {
	raw, err := os.ReadFile(filepath.Join(dataDir, "containerd", "containerd.pid"))
	if err == nil {
		_, err = fmt.Sscan(string(raw), &pid)
	}
	return pid, err
}

// While no controller is reachable the agent starts its pods from what it last
// knew, and pods that were removed meanwhile go when one is reachable again.
func TestCutOffAndBack(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	stays, goes := newPod("stays", shell("app", "sleep 1000")), newPod("goes", shell("app", "sleep 1000"))
	c.set(stays)
	c.set(goes)
	before := c.ready(stays)
	c.ready(goes)
	n.stop()

	t.Log("the machine reboots while cut off: containers are gone, the agent starts alone")
	reboot(t, n)
	controllers := n.cfg.Controllers
	n.cfg.Controllers = []string{"127.0.0.1:1"}
	n.start()
	rt := runtimeOf(t, n)
	require.Eventually(t, func() bool { return len(running(t, rt)) == 2 }, 30*time.Second, 50*time.Millisecond)
	n.stop()

	t.Log("it comes back; one pod has been removed meanwhile")
	c.mu.Lock()
	delete(c.pods, string(goes.UID))
	delete(c.statuses, string(stays.UID))
	c.mu.Unlock()
	n.cfg.Controllers = controllers
	n.start()
	after := c.ready(stays)
	require.NotEqual(t, ids(before), ids(after))
	require.EqualValues(t, 1, after.ContainerStatuses[0].RestartCount)
	require.Eventually(t, func() bool { return len(running(t, rt)) == 1 }, 30*time.Second, 50*time.Millisecond)
	require.Eventually(t, func() bool {
		list, err := rt.ListPodSandbox(context.Background(), &runtimev1.ListPodSandboxRequest{Filter: &runtimev1.PodSandboxFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(goes.UID)},
		}})
		return err == nil && len(list.Items) == 0
	}, 30*time.Second, 50*time.Millisecond)
	require.Eventually(t, func() bool { // the folder goes after the sandbox
		_, err := os.Stat(filepath.Join(n.cfg.DataDir, "pods", string(goes.UID)))
		return errors.Is(err, os.ErrNotExist)
	}, 30*time.Second, 50*time.Millisecond)
}

// reboot ends what the end of a machine ends: all processes, mounts and devices.
func reboot(t *testing.T, n *testNode) {
	t.Helper()
	cfg := n.cfg
	cfg.SetDefaults()
	_ = syscall.Kill(readPid(t, cfg.DataDir), syscall.SIGKILL)
	raw, err := exec.Command("pgrep", "-f", "containerd-shim.* -address "+filepath.Join(cfg.DataDir, "containerd", "containerd.sock")).Output()
	require.NoError(t, err)
	for _, f := range strings.Fields(string(raw)) {
		pid, err := strconv.Atoi(f)
		require.NoError(t, err)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	require.Eventually(t, func() bool {
		left := cgroup.Processes(cfg.CgroupRoot)
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(left) == 0
	}, 10*time.Second, 20*time.Millisecond)
	require.NoError(t, hostile.Unmount(cfg.DataDir))
	link, err := netlink.LinkByName("timonel0")
	require.NoError(t, err)
	require.NoError(t, netlink.LinkDel(link))
}

func runtimeOf(t *testing.T, n *testNode) *containerd.Runtime {
	t.Helper()
	rt, err := containerd.Dial(t.Context(), filepath.Join(n.cfg.DataDir, "containerd", "containerd.sock"))
	require.NoError(t, err)
	t.Cleanup(func() { rt.Close() })
	return rt
}

func sandboxes(t *testing.T, rt *containerd.Runtime) []string {
	t.Helper()
	list, err := rt.ListPodSandbox(context.Background(), &runtimev1.ListPodSandboxRequest{})
	require.NoError(t, err)
	var out []string
	for _, s := range list.Items {
		out = append(out, s.Id)
	}
	return out
}

func running(t *testing.T, rt *containerd.Runtime) []string {
	t.Helper()
	list, err := rt.ListContainers(context.Background(), &runtimev1.ListContainersRequest{Filter: &runtimev1.ContainerFilter{
		State: &runtimev1.ContainerStateValue{State: runtimev1.ContainerState_CONTAINER_RUNNING},
	}})
	require.NoError(t, err)
	var out []string
	for _, c := range list.Containers {
		out = append(out, c.Id)
	}
	return out
}

func quantities(cpu, memory string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
}

// podCgroups are the folders of a burstable pod's cgroup.
func podCgroups(n *testNode, p *corev1.Pod) []string {
	cfg := n.cfg
	cfg.SetDefaults()
	path := filepath.Join(cfg.CgroupRoot, "burstable", "pod"+string(p.UID))
	if cgroup.V2() {
		return []string{filepath.Join(cgroup.Root, path)}
	}
	return []string{filepath.Join(cgroup.Root, "memory", path), filepath.Join(cgroup.Root, "cpu", path), filepath.Join(cgroup.Root, "pids", path)}
}

// Init containers, environment, volumes, users and limits, as a container sees
// them.
func TestWhatAContainerSees(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	c.object("ConfigMap", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "settings"}, Data: map[string]string{"color": "red", "size": "9"}})
	c.object("Secret", &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "secret"}, Data: map[string][]byte{"key": []byte("s3cret")}})
	always := corev1.ContainerRestartPolicyAlways
	user, group, readOnly := int64(1000), int64(2000), true
	app := shell("app", `
		exec > /out/report
		echo color=$COLOR prefixed=$CFG_size secret=$KEY expanded=$BOTH
		echo pod=$POD ip=$IP host=$HOST cpu=$CPU api=$KUBERNETES_SERVICE_HOST
		echo args="$0 $1"
		echo file=$(cat /settings/color) token=$(cat /var/run/secrets/tokens/token) label=$(cat /podinfo/labels)
		echo sub=$(cat /sub/color)
		echo id=$(id -u):$(id -g):$(id -G)
		echo init=$(cat /out/init) sidecar=$(cat /out/sidecar)
		echo hostname=$(hostname) alias=$(grep -c friend.example /etc/hosts)
		touch /nope 2>/dev/null && echo root=writable || echo root=readonly
		df -m /mem | tail -n 1 | awk '{print "mem=" $2}'
		mv /out/report /out/done
		trap 'exit 0' TERM
		while true; do sleep 1; done`)
	app.Command = append(app.Command, "$(GREETING)", "$$(KEPT)")
	app.Env = []corev1.EnvVar{
		{Name: "COLOR", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}, Key: "color"}}},
		{Name: "KEY", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "secret"}, Key: "key"}}},
		{Name: "BOTH", Value: "$(COLOR)-$(KEY)-$(MISSING)"},
		{Name: "GREETING", Value: "hello"},
		{Name: "POD", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}},
		{Name: "IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}},
		{Name: "HOST", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.hostIP"}}},
		{Name: "CPU", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.cpu", Divisor: resource.MustParse("1m")}}},
	}
	app.EnvFrom = []corev1.EnvFromSource{{Prefix: "CFG_", ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}
	app.Resources = corev1.ResourceRequirements{Limits: quantities("250m", "64Mi"), Requests: quantities("100m", "32Mi")}
	app.SecurityContext = &corev1.SecurityContext{ReadOnlyRootFilesystem: &readOnly}
	app.VolumeMounts = []corev1.VolumeMount{
		{Name: "out", MountPath: "/out"}, {Name: "mem", MountPath: "/mem"}, {Name: "settings", MountPath: "/settings"},
		{Name: "tokens", MountPath: "/var/run/secrets/tokens"}, {Name: "podinfo", MountPath: "/podinfo"},
		{Name: "settings", MountPath: "/sub/color", SubPath: "color"},
	}
	app.ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 60, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-e", "/out/done"}}}}
	p := newPod("everything", app)
	p.Labels = map[string]string{"tier": "front"}
	size := resource.MustParse("8Mi")
	p.Spec.Volumes = []corev1.Volume{
		{Name: "out", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "mem", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: &size}}},
		{Name: "settings", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}},
		{Name: "podinfo", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}},
		}}}},
		{Name: "tokens", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}},
		}}}},
	}
	initC, side := shell("init", "echo first > /out/init"), shell("side", "cat /out/init > /out/sidecar; trap 'exit 0' TERM; while true; do sleep 1; done")
	side.RestartPolicy = &always
	side.StartupProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 30, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-s", "/out/sidecar"}}}}
	for _, ic := range []*corev1.Container{&initC, &side} {
		ic.Image, ic.ImagePullPolicy = "timonel/busybox:latest", corev1.PullNever
		ic.VolumeMounts = []corev1.VolumeMount{{Name: "out", MountPath: "/out"}}
	}
	p.Spec.InitContainers = []corev1.Container{initC, side}
	p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, RunAsGroup: &group, FSGroup: &group}
	p.Spec.HostAliases = []corev1.HostAlias{{IP: "10.9.8.7", Hostnames: []string{"friend.example"}}}
	c.set(p)
	st := c.ready(p)
	require.Equal(t, corev1.PodQOSBurstable, st.QOSClass)

	raw, err := os.ReadFile(filepath.Join(n.cfg.DataDir, "pods", string(p.UID), "volumes", "kubernetes.io~empty-dir", "out", "done"))
	require.NoError(t, err)
	report := string(raw)
	for _, want := range []string{
		"color=red prefixed=9 secret=s3cret expanded=red-s3cret-$(MISSING)",
		"pod=everything ip=" + st.PodIP + " host=" + nodeIP + " cpu=250 api=10.96.0.1",
		"args=hello $(KEPT)",
		"file=red token=token-for-default label=tier=\"front\"",
		"sub=red",
		"id=1000:2000:2000",
		"init=first sidecar=first",
		"hostname=everything alias=1",
		"root=readonly",
		"mem=8",
	} {
		require.Contains(t, report, want)
	}

	for _, dir := range podCgroups(n, p) {
		require.DirExists(t, dir)
		if raw, err := os.ReadFile(filepath.Join(dir, "pids.max")); err == nil {
			require.Equal(t, "4096", strings.TrimSpace(string(raw)))
		}
	}
	if !cgroup.V2() {
		id := strings.TrimPrefix(st.ContainerStatuses[0].ContainerID, "containerd://")
		cfg := n.cfg
		cfg.SetDefaults()
		for file, want := range map[string]string{
			"memory/%s/burstable/pod%s/%s/memory.limit_in_bytes": "67108864",
			"cpu/%s/burstable/pod%s/%s/cpu.cfs_quota_us":         "25000",
			"cpu/%s/burstable/pod%s/%s/cpu.shares":               "102",
		} {
			raw, err := os.ReadFile(filepath.Join(cgroup.Root, fmt.Sprintf(file, cfg.CgroupRoot, p.UID, id)))
			require.NoError(t, err)
			require.Equal(t, want, strings.TrimSpace(string(raw)), file)
		}
	}

	t.Log("a changed ConfigMap shows in the volume")
	c.object("ConfigMap", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "settings"}, Data: map[string]string{"color": "blue"}})
	code, text := 0, ""
	require.Eventually(t, func() bool {
		resp, err := c.http().Post("http://kubelet/run/default/everything/app?command=cat&command=/settings/color", "", nil)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		raw, _ := io.ReadAll(resp.Body)
		code, text = resp.StatusCode, string(raw)
		return text == "blue"
	}, 10*time.Second, 50*time.Millisecond, "%d %s", code, text)

	c.delete(p, 5)
	require.NoDirExists(t, filepath.Join(n.cfg.DataDir, "pods", string(p.UID)))
	for _, dir := range podCgroups(n, p) {
		require.NoDirExists(t, dir)
	}
}

// Containers that fail are started again with back-off, and what they said
// before stays readable.
func TestCrashLoopAndPreviousLogs(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	p := newPod("crash", shell("app", "echo attempt on $(date +%s); echo because > /dev/termination-log; exit 3"))
	c.set(p)
	st := c.until(p, "in a crash loop", 30*time.Second, func(st *corev1.PodStatus) bool {
		w := st.ContainerStatuses[0].State.Waiting
		return w != nil && w.Reason == "CrashLoopBackOff" && st.ContainerStatuses[0].RestartCount == 1
	})
	require.Contains(t, st.ContainerStatuses[0].State.Waiting.Message, "back-off 10s restarting failed container=app")
	last := st.ContainerStatuses[0].LastTerminationState.Terminated
	require.NotNil(t, last)
	require.EqualValues(t, 3, last.ExitCode)
	require.Equal(t, "Error", last.Reason)
	require.Equal(t, "because\n", last.Message)
	require.Equal(t, corev1.PodRunning, st.Phase)
	for _, path := range []string{"/containerLogs/default/crash/app", "/containerLogs/default/crash/app?previous=true"} {
		code, text := c.get(path)
		require.Equal(t, http.StatusOK, code, text)
		require.Contains(t, text, "attempt on")
	}
	c.until(p, "started a third time", 20*time.Second, func(st *corev1.PodStatus) bool { return st.ContainerStatuses[0].RestartCount == 2 })
	c.delete(p, 5)

	never := newPod("never", shell("good", "exit 0"), shell("bad", "exit 7"))
	never.Spec.RestartPolicy = corev1.RestartPolicyNever
	c.set(never)
	st = c.until(never, "failed", 20*time.Second, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
	require.Equal(t, "Completed", st.ContainerStatuses[0].State.Terminated.Reason)
	done := newPod("done", shell("good", "exit 0"))
	done.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
	c.set(done)
	c.until(done, "succeeded", 20*time.Second, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
}

// A container that ignores SIGTERM is killed when its grace period ends, after
// its preStop hook has run.
func TestGracePeriodAndHooks(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	dir := t.TempDir()
	app := shell("app", "trap '' TERM; touch /host/started; while true; do sleep 1; done")
	app.VolumeMounts = []corev1.VolumeMount{{Name: "host", MountPath: "/host"}}
	app.Lifecycle = &corev1.Lifecycle{
		PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"touch", "/host/post"}}},
		PreStop:   &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"touch", "/host/pre"}}},
	}
	p := newPod("stubborn", app)
	kind := corev1.HostPathDirectory
	p.Spec.Volumes = []corev1.Volume{{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: dir, Type: &kind}}}}
	c.set(p)
	c.ready(p)
	require.FileExists(t, filepath.Join(dir, "post"))
	began := time.Now()
	c.delete(p, 3)
	took := time.Since(began)
	require.FileExists(t, filepath.Join(dir, "pre"))
	require.Greater(t, took, 2*time.Second)
	require.Less(t, took, 8*time.Second)
	st := c.history[string(p.UID)][len(c.history[string(p.UID)])-1]
	require.EqualValues(t, 137, st.ContainerStatuses[0].State.Terminated.ExitCode)
}

// Liveness probes restart, startup probes hold the others back, and a deadline
// ends a pod.
func TestProbesAndDeadline(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	app := shell("app", "sleep 2; touch /tmp/up; sleep 3; rm /tmp/up; trap 'exit 0' TERM; while true; do sleep 1; done")
	check := corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-e", "/tmp/up"}}}
	app.StartupProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 30, ProbeHandler: check}
	app.LivenessProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 1, ProbeHandler: check}
	p := newPod("flaky", app)
	deadline := int64(3)
	short := newPod("short", shell("app", "sleep 1000"))
	short.Spec.ActiveDeadlineSeconds, short.Spec.TerminationGracePeriodSeconds = &deadline, new(int64)
	c.set(p)
	c.set(short)
	st := c.until(p, "running and not started", 20*time.Second, func(st *corev1.PodStatus) bool { return st.ContainerStatuses[0].State.Running != nil })
	require.False(t, *st.ContainerStatuses[0].Started)
	require.False(t, isReady(st))
	c.ready(p)
	c.until(p, "restarted", 30*time.Second, func(st *corev1.PodStatus) bool { return st.ContainerStatuses[0].RestartCount == 1 })
	st = c.until(short, "failed", 20*time.Second, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
	require.Equal(t, "DeadlineExceeded", st.Reason)
}

// An image comes from a registry that wants a password, by the pod's pull
// secret; what cannot be had says why and backs off.
func TestPullImages(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	addr := n.serveRegistry(t, "pat", "s3cret")
	n.start()

	image := addr + "/team/app:1"
	pushSample(t, n, image, "pat", "s3cret")
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "pull"}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: fmt.Appendf(nil, `{"auths":{%q:{"username":"pat","password":"s3cret"}}}`, addr)},
	}
	waitingFor := func(reason string) func(*corev1.PodStatus) bool {
		return func(st *corev1.PodStatus) bool {
			w := st.ContainerStatuses[0].State.Waiting
			return w != nil && w.Reason == reason
		}
	}
	without := newPod("without", corev1.Container{Name: "app", Image: image, ImagePullPolicy: corev1.PullAlways})
	c.set(without)
	st := c.until(without, "refused", 20*time.Second, waitingFor("ErrImagePull"))
	require.Contains(t, st.ContainerStatuses[0].State.Waiting.Message, "authorization failed")
	c.until(without, "backing off", 20*time.Second, waitingFor("ImagePullBackOff"))

	c.object("Secret", secret)
	with := newPod("with", corev1.Container{Name: "app", Image: image, ImagePullPolicy: corev1.PullAlways})
	with.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}}
	c.set(with)
	st = c.ready(with)
	require.Contains(t, st.ContainerStatuses[0].ImageID, "sha256:")

	never := newPod("never", corev1.Container{Name: "app", Image: "nowhere/to:be", ImagePullPolicy: corev1.PullNever})
	c.set(never)
	c.until(never, "refused", 20*time.Second, waitingFor("ErrImageNeverPull"))
	bad := newPod("bad", corev1.Container{Name: "app", Image: "UPPER/:", ImagePullPolicy: corev1.PullNever})
	c.set(bad)
	c.until(bad, "refused", 20*time.Second, waitingFor("InvalidImageName"))
}

// serveRegistry serves a registry that wants a password, and has the node know of it.
func (n *testNode) serveRegistry(t *testing.T, user, password string) (addr string) {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); !ok || u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	n.cfg.RegistryDir = t.TempDir()
	addr = strings.TrimPrefix(s.URL, "http://")
	host := filepath.Join(n.cfg.RegistryDir, addr)
	require.NoError(t, os.MkdirAll(host, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(host, "hosts.toml"), []byte("server = \"http://"+addr+"\"\n"), 0o644))
	return addr
}

func pushSample(t *testing.T, n *testNode, ref, user, password string) {
	t.Helper()
	img, err := tarball.ImageFromPath(filepath.Join(n.cfg.ImagesDir, "timonel-sample.tar"), nil)
	require.NoError(t, err)
	tag, err := name.NewTag(ref, name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(tag, img, remote.WithAuth(&authn.Basic{Username: user, Password: password})))
}
