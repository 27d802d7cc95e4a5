package agent_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"

	"timonel/test/needs"
)

// modern starts a node whose containerd and runc have user namespaces, or skips.
func modern(t *testing.T) (*testNode, *controller) {
	t.Helper()
	n, cs := cluster(t, "c1")
	require.NoError(t, os.Chmod(n.cfg.DataDir, 0o711)) // else a pod's root could not reach its own
	n.start()
	cs[0].wait("the node", 30*time.Second, func() bool { return cs[0].node != nil })
	if !*cs[0].node.Status.RuntimeHandlers[0].Features.UserNamespaces {
		needs.Skip(t, "this machine's containerd, runc or kernel has no user namespaces: make runtime")
	}
	return n, cs[0]
}

const forever = "; trap 'exit 0' TERM; while true; do sleep 1; done"

// log waits for what a pod's container writes as its last line before it goes on.
func (c *controller) log(p *corev1.Pod, until string) string {
	c.t.Helper()
	var text string
	require.Eventually(c.t, func() bool {
		_, text = c.get("/containerLogs/default/" + p.Name + "/app")
		return strings.Contains(text, until)
	}, 20*time.Second, 100*time.Millisecond, "%s says %s", p.Name, text)
	return text
}

// Root of a pod in a user namespace of its own is nobody on the node: what it writes into its
// volumes is there after it, and nothing of the node, of other pods or of the kernel gives way.
func TestUserNamespaces(t *testing.T) {
	n, c := modern(t)
	secret := filepath.Join(t.TempDir(), "hosts")
	require.NoError(t, os.WriteFile(secret, []byte("the node's"), 0o600))
	pod := func(name, script string) *corev1.Pod {
		p := newPod(name, shell("app", script+"; echo done"+forever))
		p.Spec.HostUsers = ptr.To(false)
		p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: ptr.To[int64](2000)}
		p.Spec.Volumes = []corev1.Volume{
			{Name: "disk", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
			{Name: "memory", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: ptr.To(resource.MustParse("1Mi"))}}},
			{Name: "info", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
				Items: []corev1.DownwardAPIVolumeFile{{Path: "name", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}},
			}}},
		}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{
			{Name: "disk", MountPath: "/disk"}, {Name: "memory", MountPath: "/memory"}, {Name: "info", MountPath: "/info"},
			{Name: "disk", MountPath: "/sub", SubPath: "sub"}, {Name: "disk", MountPath: "/sealed", ReadOnly: true, RecursiveReadOnly: ptr.To(corev1.RecursiveReadOnlyEnabled)},
		}
		return p
	}
	// try says what it could do.
	const try = `try() { if (eval "$2") >/dev/null 2>&1; then echo "$1: yes"; else echo "$1: no"; fi; }; `
	p := pod("own", try+`cat /proc/self/uid_map; id -u; stat -c 'root %u' /; cat /info/name; echo; echo "unmasked: $(grep -c ' /proc/' /proc/self/mounts)"
try disk 'echo x > /disk/x && chown 1000:2000 /disk/x && [ "$(stat -c %u:%g /disk/x)" = 1000:2000 ]'
try memory 'echo x > /memory/x'
try sub 'echo x > /sub/x && [ -f /disk/sub/x ]'
try sealed 'echo x > /sealed/x'
try hosts 'cat /etc/hosts && echo "# mine" >> /etc/hosts'
try last 'echo bye > /dev/termination-log'
try mknod 'mknod /disk/kmsg c 1 11 && cat /disk/kmsg'
try mount 'mkdir -p /m && mount -t tmpfs none /m'
try sysctl 'echo 1 > /proc/sys/kernel/panic'
try sysrq 'echo h > /proc/sysrq-trigger'
try kcore 'head -c 1 /proc/kcore | grep -q .'
try hostname 'hostname other'
try swap 'echo 1 > /proc/sys/vm/drop_caches'`)
	c.set(p)
	c.ready(p)
	text := c.log(p, "done")
	var first, of, length uint32
	_, err := fmt.Sscan(text, &of, &first, &length)
	require.NoError(t, err, text)
	require.Equal(t, []uint32{0, 65536}, []uint32{of, length})
	require.Zero(t, first%65536)
	require.GreaterOrEqual(t, first, uint32(1<<29))
	for what, can := range map[string]string{
		"disk": "yes", "memory": "yes", "sub": "yes", "sealed": "no", "hosts": "yes", "last": "yes",
		"mknod": "no", "mount": "no", "sysctl": "no", "sysrq": "no", "kcore": "no", "hostname": "no", "swap": "no",
	} {
		require.Contains(t, text, what+": "+can, text)
	}
	require.Contains(t, text, "\n0\nroot 0\nown\n", "it is root, and its image and volumes are its own")
	require.NotContains(t, text, "unmasked: 0\n")
	owners := map[uint32]int{}
	require.NoError(t, filepath.WalkDir(filepath.Join(n.cfg.DataDir, "pods", string(p.UID)), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "x" {
			st, err := os.Stat(path)
			require.NoError(t, err)
			owners[st.Sys().(*syscall.Stat_t).Uid]++
		}
		return err
	}))
	require.NotZero(t, owners[0])
	require.NotZero(t, owners[1000])
	require.Len(t, owners, 2, "what is on the disk is as in the container")
	folder, err := os.Stat(filepath.Join(n.cfg.DataDir, "pods"))
	require.NoError(t, err)
	require.Zero(t, folder.Mode().Perm()&0o007, "who is not root on the node does not reach it")

	t.Log("even with all that a pod may ask for beside, it is nobody on the node")
	strong := pod("strong", try+`cat /proc/self/uid_map; echo "unmasked: $(grep -c ' /proc/' /proc/self/mounts)"
try kcore 'head -c 1 /proc/kcore | grep -q .'
try kmsg 'head -c 1 /dev/kmsg'
try drop 'echo 1 > /proc/sys/vm/drop_caches'
try sysrq 'echo h > /proc/sysrq-trigger'
try nice 'renice -n -10 $$'
try module 'echo 1 > /proc/sys/kernel/modules_disabled'
try device 'mknod /disk/sda b 8 0'
try read 'cat /node/hosts'
try write 'echo x >> /node/hosts'`)
	// A folder of the node is as in other pods: what its owner may do, root may.
	strong.Spec.Volumes = append(strong.Spec.Volumes, corev1.Volume{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: filepath.Dir(secret)}}})
	strong.Spec.Containers[0].VolumeMounts = append(strong.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "node", MountPath: "/node", ReadOnly: true})
	strong.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{
		Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"ALL"}}, ProcMount: ptr.To(corev1.UnmaskedProcMount),
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeUnconfined},
	}
	c.set(strong)
	c.ready(strong)
	text = c.log(strong, "done")
	require.Contains(t, text, "unmasked: 0\n", "procMount")
	for _, what := range []string{"module", "device", "kcore", "kmsg", "drop", "sysrq"} {
		require.Contains(t, text, what+": no", text)
	}
	require.Contains(t, text, "read: yes")
	require.Contains(t, text, "write: no")
	var other uint32
	_, err = fmt.Sscan(text, &of, &other, &length)
	require.NoError(t, err)
	require.NotEqual(t, first, other, "two pods have the same ids")
	t.Log(text)

	t.Log("after a restart of the agent the pods run on with their ids, and a new one gets others")
	n.stop()
	n.start()
	late := pod("late", "cat /proc/self/uid_map")
	c.set(late)
	c.ready(late)
	var third uint32
	_, err = fmt.Sscan(c.log(late, "done"), &of, &third, &length)
	require.NoError(t, err)
	require.NotContains(t, []uint32{first, other}, third)
	kept, err := os.ReadDir(filepath.Join(n.cfg.DataDir, "userns"))
	require.NoError(t, err)
	require.Len(t, kept, 3)
	for _, p := range []*corev1.Pod{p, strong, late} {
		c.delete(p, 2)
	}
	kept, err = os.ReadDir(filepath.Join(n.cfg.DataDir, "userns"))
	require.NoError(t, err)
	require.Empty(t, kept, "what is gone keeps no ids")
}

// A pod that wants its own groups alone has none of those that its image gives its user.
func TestStrictGroups(t *testing.T) {
	_, c := modern(t)
	require.True(t, *c.node.Status.Features.SupplementalGroupsPolicy)
	for policy, want := range map[corev1.SupplementalGroupsPolicy][]int64{"Strict": {60001}, "Merge": {0, 60001}} {
		p := newPod(strings.ToLower(string(policy)), shell("app", "echo groups $(id -G); echo done"+forever))
		p.Spec.SecurityContext = &corev1.PodSecurityContext{SupplementalGroups: []int64{60001}, SupplementalGroupsPolicy: &policy}
		c.set(p)
		st := c.ready(p)
		require.NotNil(t, st.ContainerStatuses[0].User)
		require.Equal(t, want, st.ContainerStatuses[0].User.Linux.SupplementalGroups, policy)
		require.Contains(t, c.log(p, "done"), "60001")
	}
}

// A profile from a file of the node's holds a container; one that is not there, or is no
// regular file of a profile's size, keeps it from starting, and says why.
func TestSeccompFromAFile(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	dir := filepath.Join(n.cfg.DataDir, "seccomp")
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "team"), 0o755))
	profile := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}`
	require.NoError(t, os.WriteFile(filepath.Join(dir, "team", "nomkdir.json"), []byte(profile), 0o644))
	require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "text"), []byte("not a profile"), 0o644))
	large, err := os.Create(filepath.Join(dir, "large"))
	require.NoError(t, err)
	require.NoError(t, large.Truncate(1<<40))
	require.NoError(t, large.Close())
	n.start()
	from := func(name, file string, container bool) *corev1.Pod {
		p := newPod(name, shell("app", "mkdir /x; echo mkdir $?; echo done"+forever))
		seccomp := &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeLocalhost, LocalhostProfile: &file}
		if container {
			p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{SeccompProfile: seccomp}
		} else {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{SeccompProfile: seccomp}
		}
		c.set(p)
		return p
	}
	for i, held := range []*corev1.Pod{from("of-pod", "team/nomkdir.json", false), from("of-container", "team/nomkdir.json", true)} {
		c.ready(held)
		require.Contains(t, c.log(held, "done"), "mkdir 1\n", "%d", i)
	}
	for file, want := range map[string]string{
		"missing": "no such file", "team": "a folder", "fifo": "a FIFO", "link": "link", "text": "not JSON", "large": "longer than",
	} {
		p := from("with-"+file, file, true)
		st := c.until(p, "refused", 20*time.Second, func(st *corev1.PodStatus) bool {
			return len(st.ContainerStatuses) > 0 && st.ContainerStatuses[0].State.Waiting != nil && st.ContainerStatuses[0].State.Waiting.Reason == "CreateContainerError"
		})
		require.Contains(t, st.ContainerStatuses[0].State.Waiting.Message, "cannot load seccomp profile")
		require.Contains(t, st.ContainerStatuses[0].State.Waiting.Message, want, file)
	}
}
