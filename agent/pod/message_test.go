package pod

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"timonel/test/needs"
)

// TestHostileTerminationMessages has everything but a short text where the
// message file is, or its folder.
func TestHostileTerminationMessages(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "termination-0"), []byte("SECRET"), 0o600))
	for _, tc := range []struct {
		name  string
		make  func(path string) error
		check func(t *testing.T, message string)
	}{
		{"huge", func(path string) error { return os.Truncate(path, 8<<40) },
			func(t *testing.T, m string) { require.Len(t, m, maxMessage) }},
		{"long", func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("x", 5000)+"END"), 0o600) },
			func(t *testing.T, m string) {
				require.Len(t, m, maxMessage)
				require.True(t, strings.HasSuffix(m, "xEND"), "the end of it, as upstream")
			}},
		{"not text", func(path string) error { return os.WriteFile(path, []byte("a\xff\xfeb\xe2\x82"), 0o600) },
			func(t *testing.T, m string) { require.Equal(t, "ab", m) }},
		{"fifo", func(path string) error { return unix.Mkfifo(path, 0o666) }, refused},
		{"device", func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }, refused},
		{"link", func(path string) error { return os.Symlink(filepath.Join(outside, "termination-0"), path) }, refused},
		{"folder", func(path string) error { return os.Mkdir(path, 0o755) }, refused},
		{"link for its folder", func(path string) error {
			if err := os.RemoveAll(filepath.Dir(path)); err != nil {
				return err
			}
			return os.Symlink(outside, filepath.Dir(path))
		}, refused},
		{"gone", func(string) error { return nil }, func(t *testing.T, m string) { require.Equal(t, "cri", m) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if tc.name == "device" {
				needs.Root(t, "makes a device")
			}
			path := filepath.Join(t.TempDir(), "pods", "uid", "containers", "c", "termination-0")
			require.NoError(t, makeMessageFile(path))
			require.NoError(t, makeMessageFile(path), "of an attempt that failed")
			if tc.name != "huge" {
				require.NoError(t, os.Remove(path))
			}
			require.NoError(t, tc.make(path))
			done := make(chan string, 1)
			go func() {
				done <- terminationMessage(&container{messageFile: path, message: "cri"})
			}()
			select {
			case m := <-done:
				require.NotContains(t, m, "SECRET")
				tc.check(t, m)
			case <-time.After(20 * time.Second):
				t.Fatal("blocks")
			}
			done2 := make(chan error, 1)
			go func() { done2 <- removeFile(path, messageDepth) }()
			select {
			case <-done2:
			case <-time.After(20 * time.Second):
				t.Fatal("removing blocks")
			}
			require.FileExists(t, filepath.Join(outside, "termination-0"))
		})
	}
}

func refused(t *testing.T, m string) { require.Contains(t, m, "Error on reading termination log") }

func TestContainersShareWhatAPodMaySay(t *testing.T) {
	t.Parallel()
	long := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Message: strings.Repeat("é", maxMessage/2)}}
	st := corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{{State: long}}}
	for range 6 {
		st.ContainerStatuses = append(st.ContainerStatuses, corev1.ContainerStatus{State: long, LastTerminationState: long})
	}
	shareMessages(&st)
	for _, cs := range append(st.InitContainerStatuses, st.ContainerStatuses...) {
		require.LessOrEqual(t, len(cs.State.Terminated.Message), maxPodMessages/7)
		require.Equal(t, "é", strings.Trim(cs.State.Terminated.Message, "é")+"é", "cut between characters")
	}
	require.Len(t, long.Terminated.Message, maxMessage, "what is shared is not changed")
}

// TestAStatusIsSmall: what is wrong with a pod's volumes is said of each of its
// containers, and what it says is its author's.
func TestAStatusIsSmall(t *testing.T) {
	t.Parallel()
	const many = 800
	pod := &corev1.Pod{}
	wait := map[string]waiting{}
	for i := range many {
		name := fmt.Sprintf("c%d", i)
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{Name: "i" + name})
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: name})
		wait[name] = waiting{reasonCreating, "MountVolume failed: " + strings.Repeat("é", 100<<10)}
		wait["i"+name] = wait[name]
	}
	for _, tc := range []struct {
		name string
		old  corev1.PodStatus
		v    *verdict
	}{
		{"waits", corev1.PodStatus{}, nil},
		{"is ended", corev1.PodStatus{}, &verdict{reason: "Evicted", message: strings.Repeat("é", 1<<20)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			st := makeStatus(statusInput{want: want{pod: pod}, seen: &seen{known: &known{verdict: tc.v}, old: &tc.old}, pass: pass{waiting: wait}})
			require.Less(t, st.Size(), 1<<20)
			for _, cs := range st.ContainerStatuses {
				require.True(t, strings.HasPrefix(cs.State.Waiting.Message, "MountVolume failed: é"), "still says why")
				require.True(t, utf8.ValidString(cs.State.Waiting.Message))
			}
		})
	}
}

func TestAPIVolumesAreMountedReadOnly(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{Spec: corev1.PodSpec{Volumes: []corev1.Volume{
		{Name: "configMap", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{}}},
		{Name: "secret", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{}}},
		{Name: "downwardAPI", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{}}},
		{Name: "projected", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{}}},
		{Name: "emptyDir", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "hostPath", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{}}},
	}}}
	for _, v := range pod.Spec.Volumes {
		w := &worker{m: &Manager{}, known: known{volumes: map[string]string{v.Name: "/x"}}}
		mounts, err := w.mounts(pod, &corev1.Container{VolumeMounts: []corev1.VolumeMount{{Name: v.Name, MountPath: "/v"}}}, nil, nil)
		require.NoError(t, err)
		require.Equal(t, v.Name != "emptyDir" && v.Name != "hostPath", mounts[0].Readonly, v.Name)
	}
}
