package pod

import (
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/userns"
)

// userNamespace is the user namespace that CRI is to make for a pod: none, or one whose ids
// are no other pod's and none of the machine's users. Nothing of the pod may run before its
// ids are kept, so this comes before the sandbox.
func (m *Manager) userNamespace(pod *corev1.Pod) (*runtimev1.UserNamespace, error) {
	if pod.Spec.HostUsers == nil || *pod.Spec.HostUsers {
		return nil, nil
	}
	handler, err := m.runtimeHandler(pod)
	if err != nil {
		return nil, err
	}
	if m.cfg.Users == nil || m.cfg.UserNamespaces == nil || !m.cfg.UserNamespaces(handler) {
		if handler != "" {
			return nil, fmt.Errorf("can't set `spec.hostUsers: false`, RuntimeClass handler %q does not support user namespaces", handler)
		}
		return nil, errors.New("can't set `spec.hostUsers: false`, runtime does not support user namespaces")
	}
	r, err := m.cfg.Users.Range(pod.UID)
	if err != nil {
		return nil, fmt.Errorf("create user namespace: %w", err)
	}
	ids := func() []*runtimev1.IDMapping {
		return []*runtimev1.IDMapping{{HostId: r.First, ContainerId: 0, Length: userns.Length}}
	}
	return &runtimev1.UserNamespace{Mode: runtimev1.NamespaceMode_POD, Uids: ids(), Gids: ids()}, nil
}

// mapUsers puts a container into its pod's user namespace, and shows it what is mounted with
// the owners that it has on the machine's disk: what root in the container writes is root's
// there, in folders that only root can reach. What an image holds is on overlayfs, which
// cannot be mapped.
func (m *Manager) mapUsers(pod *corev1.Pod, c *corev1.Container, cfg *runtimev1.ContainerConfig) error {
	users, err := m.userNamespace(pod)
	if err != nil || users == nil {
		return err
	}
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = users
	images := map[string]bool{}
	for _, v := range pod.Spec.Volumes {
		if v.Image != nil {
			images[v.Name] = true
		}
	}
	for i, mount := range cfg.Mounts { // the volumes' come first, in their order
		if i < len(c.VolumeMounts) && images[c.VolumeMounts[i].Name] {
			continue
		}
		mount.UidMappings, mount.GidMappings = users.Uids, users.Gids
	}
	return nil
}
