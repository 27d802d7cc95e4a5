package pod

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"

	"timonel/agent/userns"
)

func usersManager(t *testing.T) *Manager {
	t.Helper()
	users, err := userns.Open(t.TempDir())
	require.NoError(t, err)
	return &Manager{cfg: Config{Objects: objects{}, Users: users, UserNamespaces: func(handler string) bool { return handler != "of-old" }}}
}

// The sandbox, its containers and what they mount are in one user namespace; what an image
// volume holds cannot be mapped.
func TestUserNamespaceOfAPod(t *testing.T) {
	t.Parallel()
	m := usersManager(t)
	pod := fieldPod()
	for _, hosts := range []*bool{nil, ptr.To(true)} {
		pod.Spec.HostUsers = hosts
		got, err := m.userNamespace(pod)
		require.NoError(t, err)
		require.Nil(t, got)
	}
	require.Empty(t, m.cfg.Users.Pods())
	pod.Spec.HostUsers = ptr.To(false)
	box, err := m.userNamespace(pod)
	require.NoError(t, err)
	require.Equal(t, runtimev1.NamespaceMode_POD, box.Mode)
	require.Len(t, box.Uids, 1)
	require.Equal(t, box.Uids, box.Gids)
	require.EqualValues(t, 65536, box.Uids[0].Length)
	require.Zero(t, box.Uids[0].ContainerId)

	pod.Spec.Volumes = []corev1.Volume{{Name: "disk"}, {Name: "image", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{}}}}
	c := &pod.Spec.Containers[0]
	c.VolumeMounts = []corev1.VolumeMount{{Name: "image"}, {Name: "disk"}}
	cfg := &runtimev1.ContainerConfig{
		Mounts: []*runtimev1.Mount{{ContainerPath: "image"}, {ContainerPath: "disk"}, {ContainerPath: "/etc/hosts"}},
		Linux:  &runtimev1.LinuxContainerConfig{SecurityContext: &runtimev1.LinuxContainerSecurityContext{NamespaceOptions: &runtimev1.NamespaceOption{}}},
	}
	require.NoError(t, m.mapUsers(pod, c, cfg))
	require.Equal(t, box.String(), cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions.String())
	require.Empty(t, cfg.Mounts[0].UidMappings)
	for _, mount := range cfg.Mounts[1:] {
		require.Equal(t, box.Uids[0].HostId, mount.UidMappings[0].HostId, mount.ContainerPath)
		require.Equal(t, box.Gids[0].HostId, mount.GidMappings[0].HostId, mount.ContainerPath)
	}
}

// Nothing of a pod runs as the node's users because there is no namespace to be had.
func TestNoUserNamespaceNoSandbox(t *testing.T) {
	t.Parallel()
	m := usersManager(t)
	pod := fieldPod()
	pod.Spec.HostUsers = ptr.To(false)
	pod.Spec.RuntimeClassName = ptr.To("old")
	_, err := m.userNamespace(pod)
	require.EqualError(t, err, "can't set `spec.hostUsers: false`, RuntimeClass handler \"of-old\" does not support user namespaces")
	pod.Spec.RuntimeClassName = ptr.To("unknown")
	_, err = m.userNamespace(pod)
	require.ErrorContains(t, err, "not found")
	pod.Spec.RuntimeClassName = nil
	m.cfg.Users = nil
	_, err = m.userNamespace(pod)
	require.EqualError(t, err, "can't set `spec.hostUsers: false`, runtime does not support user namespaces")
}
