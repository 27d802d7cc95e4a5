package agent_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"

	"timonel/agent/containerd"
)

// withLimit gives a container a limit of ephemeral storage.
func withLimit(c corev1.Container, limit string) corev1.Container {
	c.Resources.Limits = corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse(limit)}
	return c
}

// withEmptyDir mounts one of that size at /data.
func withEmptyDir(p *corev1.Pod, limit string, medium corev1.StorageMedium) *corev1.Pod {
	size := resource.MustParse(limit)
	p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &size, Medium: medium}}}}
	for i := range p.Spec.Containers {
		p.Spec.Containers[i].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	}
	return p
}

// left is what a pod has on the node's disk.
func (n *testNode) left(p *corev1.Pod) []string {
	var out []string
	for _, path := range []string{
		filepath.Join(n.cfg.DataDir, "pods", string(p.UID)),
		filepath.Join(n.cfg.DataDir, "logs", p.Namespace+"_"+p.Name+"_"+string(p.UID)),
	} {
		if _, err := os.Lstat(path); err == nil {
			out = append(out, path)
		}
	}
	return out
}

// inContainerd counts a pod's containers and sandboxes.
func (n *testNode) inContainerd(p *corev1.Pod) int {
	n.t.Helper()
	rt, err := containerd.Dial(n.t.Context(), filepath.Join(n.cfg.DataDir, "containerd", "containerd.sock"))
	require.NoError(n.t, err)
	defer rt.Close()
	selector := map[string]string{"io.kubernetes.pod.uid": string(p.UID)}
	cs, err := rt.ListContainers(n.t.Context(), &runtimev1.ListContainersRequest{Filter: &runtimev1.ContainerFilter{LabelSelector: selector}})
	require.NoError(n.t, err)
	boxes, err := rt.ListPodSandbox(n.t.Context(), &runtimev1.ListPodSandboxRequest{Filter: &runtimev1.PodSandboxFilter{LabelSelector: selector}})
	require.NoError(n.t, err)
	return len(cs.Containers) + len(boxes.Items)
}

// addImage gives the node one more image to import: busybox', changed.
func addImage(n *testNode, tag string, change func(*v1.Config)) {
	n.t.Helper()
	dir := n.t.TempDir()
	files, err := filepath.Glob(filepath.Join(n.cfg.ImagesDir, "*.tar"))
	require.NoError(n.t, err)
	for _, file := range files {
		raw, err := os.ReadFile(file)
		require.NoError(n.t, err)
		require.NoError(n.t, os.WriteFile(filepath.Join(dir, filepath.Base(file)), raw, 0o600))
	}
	busybox, err := tarball.ImageFromPath(filepath.Join(dir, "timonel-busybox.tar"), nil)
	require.NoError(n.t, err)
	file, err := busybox.ConfigFile()
	require.NoError(n.t, err)
	config := *file.Config.DeepCopy()
	change(&config)
	image, err := mutate.Config(busybox, config)
	require.NoError(n.t, err)
	ref, err := name.NewTag(tag + ":1")
	require.NoError(n.t, err)
	require.NoError(n.t, tarball.WriteToFile(filepath.Join(dir, tag+".tar"), ref, image))
	n.cfg.ImagesDir = dir
}

// What a pod writes beyond its limits ends it, wherever it writes it, and what is
// left of it is removed. What only looks large does not.
func TestPodsOverTheirDiskLimitsAreEvicted(t *testing.T) {
	n, cs := cluster(t, "c1")
	n.cfg.EvictionInterval = 200 * time.Millisecond
	c := cs[0]
	addImage(n, "volume", func(c *v1.Config) { c.Volumes = map[string]struct{}{"/data": {}} })
	n.start()
	const (
		volume = `Usage of EmptyDir volume "data" exceeds the limit "10Mi". `
		whole  = `Pod ephemeral local storage usage exceeds the total limit of containers 10Mi. `
	)
	fill := func(path string) corev1.Container {
		return shell("app", "dd if=/dev/zero of="+path+" bs=1M count=30; sync; sleep 1000")
	}
	// Deeper than any path is long, where only those that never name it see it.
	deep := "d=$(printf 'd%.0s' $(seq 200)); p=$d; for i in $(seq 12); do p=$p/$d; done; " +
		"mkdir -p a/$p b/$p && dd if=/dev/zero of=b/$p/f bs=1M count=30 && mv b a/$p/ && sync; sleep 1000"
	imageVolume := withLimit(fill("/data/f"), "10Mi")
	imageVolume.Image = "volume:1"
	two := newPod("container", withLimit(fill("/tmp/f"), "10Mi"), withLimit(shell("other", "sleep 1000"), "100Mi"))
	links := withEmptyDir(newPod("links", shell("app",
		"dd if=/dev/zero of=/data/f bs=1M count=4; i=0; while [ $i -lt 50 ]; do ln /data/f /data/l$i; i=$((i+1)); done; "+
			"ln -s / /data/root; dd if=/dev/zero of=/data/sparse bs=1 count=1 seek=1G; sync; sleep 1000")), "10Mi", "")
	critical := withEmptyDir(newPod("critical", fill("/data/f")), "10Mi", "")
	critical.Spec.Priority = ptr.To[int32](2_000_000_000)
	stay := []*corev1.Pod{
		links, critical,
		withEmptyDir(newPod("memory", shell("app", "dd if=/dev/zero of=/data/f bs=1M count=30; sleep 1000")), "10Mi", corev1.StorageMediumMemory),
		newPod("small", withLimit(shell("app", "dd if=/dev/zero of=/tmp/f bs=1M count=5; sync; sleep 1000"), "10Mi")),
	}
	evicted := map[*corev1.Pod]string{
		withEmptyDir(newPod("volume", fill("/data/f")), "10Mi", ""):                                                                              volume,
		withEmptyDir(newPod("many", shell("app", "i=0; while [ $i -lt 4000 ]; do echo x > /data/$i; i=$((i+1)); done; sleep 1000")), "10Mi", ""): volume,
		withEmptyDir(newPod("deep-volume", shell("app", "cd /data; "+deep)), "10Mi", ""):                                                         volume,
		newPod("deep-layer", withLimit(shell("app", "cd /tmp; "+deep), "10Mi")):                                                                  whole,
		two: `Container app exceeded its local ephemeral storage limit "10Mi". `,
		newPod("log", withLimit(shell("app", "yes 0123456789012345678901234567890123456789 | head -c 20000000; sleep 1000"), "10Mi")): whole,
		newPod("message", withLimit(fill("/dev/termination-log"), "10Mi")):                                                            whole,
		newPod("resolv", withLimit(fill("/etc/resolv.conf"), "10Mi")):                                                                 whole,
		newPod("image-volume", imageVolume):                                                                                           whole,
		withEmptyDir(newPod("pod", withLimit(fill("/data/f"), "10Mi")), "1Gi", ""):                                                    whole,
	}
	for _, p := range stay {
		c.set(p)
	}
	for p := range evicted {
		c.set(p)
	}
	for p, message := range evicted {
		st := c.until(p, "evicted", 2*time.Minute, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
		require.Equal(t, "Evicted", st.Reason, p.Name)
		require.Equal(t, message, st.Message, p.Name)
		require.NotNil(t, st.ContainerStatuses[0].State.Terminated, p.Name)
		for _, cond := range st.Conditions {
			require.NotEqual(t, corev1.DisruptionTarget, cond.Type, "%s broke its own limit", p.Name)
		}
		c.mu.Lock()
		found := false
		for _, e := range c.events {
			found = found || e.InvolvedObject.UID == p.UID && e.Reason == "Evicted" && e.Type == corev1.EventTypeWarning && e.Message+" " == message
		}
		c.mu.Unlock()
		require.True(t, found, "an event says so of %s", p.Name)
		require.Eventually(t, func() bool { return len(n.left(p)) == 0 && n.inContainerd(p) == 0 }, time.Minute, 50*time.Millisecond,
			"%s leaves nothing: %v", p.Name, n.left(p))
	}
	for _, p := range stay {
		require.True(t, isReady(c.ready(p)), p.Name)
	}
	// The next agent leaves them as they are.
	before := map[*corev1.Pod]*corev1.PodStatus{}
	c.mu.Lock()
	for p := range evicted {
		before[p] = c.statuses[string(p.UID)]
		delete(c.statuses, string(p.UID))
	}
	c.mu.Unlock()
	n.stop()
	n.start()
	for p := range evicted {
		st := c.until(p, "evicted still", time.Minute, func(st *corev1.PodStatus) bool { return true })
		require.Equal(t, before[p], st, p.Name)
		require.Zero(t, n.inContainerd(p))
	}
	for _, p := range stay {
		require.Equal(t, corev1.PodRunning, c.ready(p).Phase)
	}
	for p := range evicted {
		c.delete(p, 1)
	}
}

// A pod that has ended keeps its containers' logs and last words until it is
// deleted, and not its volumes.
func TestVolumesGoWhenAPodEnds(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	p := withEmptyDir(newPod("done", shell("app", "echo said; echo last > /dev/termination-log; dd if=/dev/zero of=/data/f bs=1M count=2")), "10Mi", "")
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	c.set(p)
	st := c.until(p, "done", time.Minute, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
	require.Equal(t, "last\n", st.ContainerStatuses[0].State.Terminated.Message)
	volumes := filepath.Join(n.cfg.DataDir, "pods", string(p.UID), "volumes")
	require.Eventually(t, func() bool { _, err := os.Lstat(volumes); return os.IsNotExist(err) }, time.Minute, 20*time.Millisecond)
	n.stop()
	c.mu.Lock()
	delete(c.statuses, string(p.UID))
	c.mu.Unlock()
	n.start()
	again := c.until(p, "done still", time.Minute, func(*corev1.PodStatus) bool { return true })
	require.Equal(t, st.ContainerStatuses, again.ContainerStatuses)
	code, text := c.get("/containerLogs/default/done/app")
	require.Equal(t, 200, code, text)
	require.Contains(t, text, "said")
	c.delete(p, 1)
}
