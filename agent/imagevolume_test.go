package agent_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/containerd"
	"timonel/agent/hostile"
)

func imageVolume(name, image string, policy corev1.PullPolicy) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: image, PullPolicy: policy}}}
}

// A container sees what an image holds and cannot write to it; what the node keeps for
// that goes with the pod.
func TestImageVolume(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	app := shell("app", "test -x /vol/sample && test -f /one && ! touch /vol/x && ! touch /one && sleep 1000")
	app.VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/vol"}, {Name: "v", MountPath: "/one", SubPath: "sample"}}
	p := newPod("reader", app)
	p.Spec.Volumes = []corev1.Volume{imageVolume("v", "timonel/sample", corev1.PullIfNotPresent)}
	c.set(p)
	st := c.ready(p)

	n.stop()
	n.start()
	c.wait("a stream", 10*time.Second, func() bool { return c.stream != nil })
	require.Equal(t, ids(st), ids(c.ready(p)), "it goes on")
	below := n.cfg.DataDir + "/pods"
	mounts, err := hostile.MountsBelow(below)
	require.NoError(t, err)
	require.Contains(t, strings.Join(mounts, "\n"), "kubernetes.io~image/v")
	images, err := client.New(filepath.Join(n.cfg.DataDir, "containerd", "containerd.sock"), client.WithDefaultNamespace(containerd.Namespace))
	require.NoError(t, err)
	defer images.Close()
	views := func() (ids []string) {
		all, err := images.LeasesService().List(namespaces.WithNamespace(t.Context(), containerd.Namespace))
		require.NoError(t, err)
		for _, l := range all {
			if strings.HasPrefix(l.ID, "timonel-volume-") {
				ids = append(ids, l.ID)
			}
		}
		return ids
	}
	key := "timonel-volume-" + string(p.UID) + "-v"
	require.Equal(t, []string{key}, views())
	kept := func() error {
		_, err := images.SnapshotService("overlayfs").Stat(namespaces.WithNamespace(t.Context(), containerd.Namespace), key)
		return err
	}
	require.NoError(t, kept())

	c.delete(p, 0)
	require.Empty(t, views())
	require.True(t, errdefs.IsNotFound(kept()))
	mounts, err = hostile.MountsBelow(below)
	require.NoError(t, err)
	require.Empty(t, mounts)
}

// What cannot be had, or is not in the image, is said of the containers that want it; the
// others run.
func TestImageVolumeThatCannotBeHad(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	other, missing, never := shell("other", "sleep 1000"), shell("missing", "sleep 1000"), shell("never", "sleep 1000")
	missing.VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/vol", SubPath: "nowhere"}}
	never.VolumeMounts = []corev1.VolumeMount{{Name: "n", MountPath: "/vol"}}
	p := newPod("wants", other, missing, never)
	p.Spec.Volumes = []corev1.Volume{imageVolume("v", "timonel/sample", corev1.PullNever), imageVolume("n", "timonel/nobody", corev1.PullNever)}
	c.set(p)
	waits := func(st *corev1.PodStatus, i int) string {
		if w := st.ContainerStatuses[i].State.Waiting; w != nil {
			return w.Reason + ": " + w.Message
		}
		return ""
	}
	st := c.until(p, "refused", 30*time.Second, func(st *corev1.PodStatus) bool {
		return len(st.ContainerStatuses) == 3 && st.ContainerStatuses[0].State.Running != nil &&
			strings.HasPrefix(waits(st, 1), "CreateContainerConfigError") && strings.HasPrefix(waits(st, 2), "ErrImageNeverPull")
	})
	require.Contains(t, waits(st, 1), `subPath "nowhere"`)
	require.Contains(t, waits(st, 2), `Container image "timonel/nobody" is not present with pull policy of Never`)
	c.delete(p, 0)
}
