package agent_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/hostile"
)

// What is mounted in a volume is read-only in a container as the volume is, where a mount
// asks for it, and else it is not. The volume itself stays as it is, on the node and when
// the pod is gone.
func TestRecursiveReadOnly(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	vol := t.TempDir()
	inner := filepath.Join(vol, "sub", "inner")
	require.NoError(t, os.MkdirAll(inner, 0o755))
	require.NoError(t, unix.Mount("tmpfs", inner, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(inner, 0)) })

	app := shell("app", `set -e
		touch /ro/sub/inner/ro /off/sub/inner/off
		test -f /on/sub/inner/off
		for f in /ro /off /ro/sub /on /on/sub /on/sub/inner /maybe /maybe/sub/inner /part /part/inner; do
			test -d $f
			if touch $f/x; then echo "$f can be written to" >/dev/termination-log; exit 1; fi
		done`)
	mode := func(path, sub string, m corev1.RecursiveReadOnlyMode) corev1.VolumeMount {
		return corev1.VolumeMount{Name: "v", MountPath: path, SubPath: sub, ReadOnly: true, RecursiveReadOnly: &m}
	}
	app.VolumeMounts = []corev1.VolumeMount{
		{Name: "v", MountPath: "/ro", ReadOnly: true}, mode("/off", "", corev1.RecursiveReadOnlyDisabled),
		mode("/on", "", corev1.RecursiveReadOnlyEnabled), mode("/maybe", "", corev1.RecursiveReadOnlyIfPossible), mode("/part", "sub", corev1.RecursiveReadOnlyEnabled),
	}
	p := newPod("sealed", app)
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: vol}}}}
	c.set(p)
	st := c.until(p, "through", 30*time.Second, func(st *corev1.PodStatus) bool { return failed(st) || st.Phase == corev1.PodSucceeded })
	require.Equal(t, corev1.PodSucceeded, st.Phase, "%v", st.ContainerStatuses)
	var modes []corev1.RecursiveReadOnlyMode
	for _, m := range st.ContainerStatuses[0].VolumeMounts {
		modes = append(modes, *m.RecursiveReadOnly)
	}
	on, off := corev1.RecursiveReadOnlyEnabled, corev1.RecursiveReadOnlyDisabled
	require.Equal(t, []corev1.RecursiveReadOnlyMode{off, off, on, on, on}, modes)

	c.delete(p, 0)
	mounts, err := hostile.MountsBelow(filepath.Join(n.cfg.DataDir, "pods"))
	require.NoError(t, err)
	require.Empty(t, mounts)
	require.FileExists(t, filepath.Join(inner, "ro"))
	require.NoError(t, os.WriteFile(filepath.Join(inner, "after"), nil, 0o600))
}
