package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// TestAContainerDoesNotReachTheHostByItsTokenVolume is the attack that was
// found: a link to a file of the host in place of the token, and a change that
// makes the agent write the volume again. One container has it by a mount that
// asks to be writable, one is privileged and makes it so.
func TestAContainerDoesNotReachTheHostByItsTokenVolume(t *testing.T) {
	n, controllers := cluster(t, "c1")
	c := controllers[0]
	n.start()
	secret := filepath.Join(t.TempDir(), "host-secret")
	require.NoError(t, os.WriteFile(secret, []byte("HOST SECRET"), 0o600))

	yes := true
	plain := shell("plain", `rm -f /p/token; ln -sf `+secret+` /p/token; ln -s / /p/root; touch /p/new; cat /p/token; echo; echo tried; sleep 1000`)
	plain.VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/p", ReadOnly: false}}
	privileged := shell("privileged", `mount -o remount,rw /p && rm -f /p/token && ln -s `+secret+` /p/token && mkdir /p/foreign &&
		rm -rf /p/..data && ln -s /etc /p/..data && echo planted
		while [ ! -e /p/say ] || [ "$(cat /p/say)" != more ]; do sleep 0.1; done; echo; cat /p/token /p/..data/token; ls -a /p; echo seen; sleep 1000`)
	privileged.SecurityContext = &corev1.SecurityContext{Privileged: &yes}
	privileged.VolumeMounts = plain.VolumeMounts
	p := newPod("attacker", plain, privileged)
	p.Annotations = map[string]string{"say": "one"}
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}},
		{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "say", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.annotations['say']"}}}}},
	}}}}}
	c.set(p)
	c.ready(p)
	logs := func(container, until string) string {
		var text string
		require.Eventually(t, func() bool {
			_, text = c.get("/containerLogs/default/attacker/" + container)
			return strings.Contains(text, until)
		}, 20*time.Second, 50*time.Millisecond, "%s", &text)
		return text
	}
	text := logs("plain", "tried")
	require.Contains(t, text, "Read-only file system")
	require.NotContains(t, text, "HOST SECRET")
	text = logs("privileged", "planted")
	require.NotContains(t, text, "Read-only", "a privileged container can make it writable: this tries the writer")

	changed := p.DeepCopy()
	changed.Annotations = map[string]string{"say": "more"}
	c.set(changed)
	text = logs("privileged", "seen")
	require.NotContains(t, text, "HOST SECRET")
	require.NotContains(t, text, "foreign")
	require.Equal(t, 2, strings.Count(text, "token-for-default"), text)
	raw, err := os.ReadFile(secret)
	require.NoError(t, err)
	require.Equal(t, "HOST SECRET", string(raw))
	c.delete(changed, 0)
	points, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(points), string(p.UID), "nothing of the pod stays mounted")
}

// TestTheLastWordsOfAHostileContainer: as long as a file can be, of a container
// that may not even be root, of many at once; and a file that is no file.
func TestTheLastWordsOfAHostileContainer(t *testing.T) {
	n, controllers := cluster(t, "c1")
	c := controllers[0]
	n.start()
	var containers []corev1.Container
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		containers = append(containers, shell(name, `truncate -s 8T /dev/termination-log || dd if=/dev/zero of=/dev/termination-log bs=1 count=1 seek=8796093022207; printf END >> /dev/termination-log; exit 1`))
	}
	p := newPod("words", containers...)
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	user, group := int64(65534), int64(65534)
	p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, RunAsGroup: &group}
	c.set(p)
	st := c.until(p, "failed", 60*time.Second, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
	total := 0
	for _, cs := range st.ContainerStatuses {
		total += len(cs.State.Terminated.Message)
		require.LessOrEqual(t, len(cs.State.Terminated.Message), 4096)
	}
	require.LessOrEqual(t, total, 12<<10)
	require.Positive(t, total)
	n.stop()
	n.start() // reads them again
	c.delete(p, 0)
}

// TestASubPathThatIsAFIFO keeps its own container from starting, and nothing
// else: it is said in an event, and the pod can be deleted.
func TestASubPathThatIsAFIFO(t *testing.T) {
	n, controllers := cluster(t, "c1")
	c := controllers[0]
	n.start()
	prepare := shell("prepare", `mkfifo /v/fifo; mknod /v/device c 1 5; ln -s /etc /v/out; mkdir /v/fine; echo fine > /v/fine/file; sleep 1000`)
	always := corev1.ContainerRestartPolicyAlways
	prepare.RestartPolicy = &always // it is there to swap things
	mount := corev1.VolumeMount{Name: "v", MountPath: "/v"}
	prepare.VolumeMounts = []corev1.VolumeMount{mount}
	prepare.StartupProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 30, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-e", "/v/fine/file"}}}}
	var containers []corev1.Container
	for _, sub := range []string{"fifo", "device", "out", "out/passwd", "fine/file"} {
		name := strings.ReplaceAll(sub, "/", "-")
		one := shell(name, "cat /sub; sleep 1000")
		one.VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/sub", SubPath: sub}}
		containers = append(containers, one)
	}
	p := newPod("subpaths", containers...)
	for i := range containers {
		p.Spec.Containers[i].Image = "timonel/busybox"
	}
	prepare.Image, prepare.ImagePullPolicy = "timonel/busybox", corev1.PullIfNotPresent
	p.Spec.InitContainers = []corev1.Container{prepare}
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	c.set(p)
	c.until(p, "half started", 60*time.Second, func(st *corev1.PodStatus) bool {
		waiting, running := 0, 0
		for _, cs := range st.ContainerStatuses {
			if w := cs.State.Waiting; w != nil && w.Reason == "CreateContainerConfigError" && strings.Contains(w.Message, "subPath") {
				waiting++
			}
			if cs.State.Running != nil {
				running++
			}
		}
		return waiting == 4 && running == 1
	})
	c.wait("an event that says why", 10*time.Second, func() bool {
		for _, e := range c.events {
			if e.Reason == "Failed" && strings.Contains(e.Message, "FIFO") {
				return true
			}
		}
		return false
	})
	c.delete(p, 0)
	require.NoDirExists(t, filepath.Join(n.cfg.DataDir, "pods", string(p.UID)))
}
