package pod

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/hostile"
	"timonel/agent/volume"
)

const (
	etcHosts = "/etc/hosts"
	// maxHosts bounds the node's own hosts file.
	maxHosts = 1 << 20
	// maxPath is how long a path may be.
	maxPath = 4096
)

// mounts are a container's: its volumes and /etc/hosts.
func (w *worker) mounts(pod *corev1.Pod, c *corev1.Container, env environment, podIPs []string) ([]*runtimev1.Mount, error) {
	var out []*runtimev1.Mount
	hosts, values := true, env.values()
	for i, vm := range c.VolumeMounts {
		path, ok := w.known.volumes[vm.Name]
		if !ok {
			return nil, fmt.Errorf("volume %q of mount %s is not ready", vm.Name, vm.MountPath)
		}
		sub := vm.SubPath
		if vm.SubPathExpr != "" {
			var bad string
			var err error
			left := room{maxPath}
			sub, err = left.expand(vm.SubPathExpr, func(name string) string {
				v, ok := values[name]
				if !ok {
					bad = name
				}
				return v
			})
			if bad != "" {
				return nil, fmt.Errorf("subPathExpr %q of mount %s: no environment variable %s", vm.SubPathExpr, vm.MountPath, bad)
			}
			if err != nil {
				return nil, fmt.Errorf("subPathExpr of mount %s: it is longer than a path can be", vm.MountPath)
			}
		}
		if sub != "" {
			var err error
			if path, err = w.m.volumes.SubPath(pod, c.Name, i, path, sub); err != nil {
				return nil, fmt.Errorf("mount %s: %w", vm.MountPath, err)
			}
		}
		if isSealed(&vm, w.m.cfg.RecursiveReadOnly) {
			var err error
			if path, err = w.m.volumes.Sealed(pod, c.Name, i, path); err != nil {
				return nil, fmt.Errorf("mount %s: %w", vm.MountPath, err)
			}
		}
		target := vm.MountPath
		if !filepath.IsAbs(target) {
			target = "/" + target
		}
		if filepath.Clean(target) == etcHosts {
			hosts = false
		}
		m := &runtimev1.Mount{ContainerPath: target, HostPath: path, Readonly: vm.ReadOnly || readOnlyVolume(pod, vm.Name)}
		if vm.MountPropagation != nil {
			switch *vm.MountPropagation {
			case corev1.MountPropagationHostToContainer:
				m.Propagation = runtimev1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
			case corev1.MountPropagationBidirectional:
				m.Propagation = runtimev1.MountPropagation_PROPAGATION_BIDIRECTIONAL
			}
		}
		out = append(out, m)
	}
	if hosts && (len(podIPs) > 0 || pod.Spec.HostNetwork) {
		path, err := w.hostsFile(pod, podIPs)
		if err != nil {
			return nil, err
		}
		out = append(out, &runtimev1.Mount{ContainerPath: etcHosts, HostPath: path})
	}
	return out, nil
}

// devices are a container's block volumes.
func (w *worker) devices(pod *corev1.Pod, c *corev1.Container) ([]*runtimev1.Device, error) {
	var out []*runtimev1.Device
	for _, d := range c.VolumeDevices {
		path, ok := w.known.volumes[d.Name]
		if !ok {
			return nil, fmt.Errorf("volume %q of device %s is not ready", d.Name, d.DevicePath)
		}
		access := "mrw"
		if readOnlyVolume(pod, d.Name) {
			access = "r"
		}
		out = append(out, &runtimev1.Device{HostPath: path, ContainerPath: d.DevicePath, Permissions: access})
	}
	return out, nil
}

// isSealed says whether a mount is read-only with all that is mounted below it.
func isSealed(m *corev1.VolumeMount, possible bool) bool {
	return possible && m.ReadOnly && m.RecursiveReadOnly != nil && *m.RecursiveReadOnly != corev1.RecursiveReadOnlyDisabled
}

// mountStatuses is what a container's status says of its mounts.
func mountStatuses(c *corev1.Container, possible bool) []corev1.VolumeMountStatus {
	var out []corev1.VolumeMountStatus
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		st := corev1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := corev1.RecursiveReadOnlyDisabled
			if isSealed(m, possible) {
				mode = corev1.RecursiveReadOnlyEnabled
			}
			st.RecursiveReadOnly = &mode
		}
		out = append(out, st)
	}
	return out
}

// readOnlyVolume says whether a volume can be read only, whatever the mount says.
func readOnlyVolume(pod *corev1.Pod, name string) bool {
	return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == name && volume.ReadOnly(&v) })
}

// hostsFile writes the pod's /etc/hosts, which its containers share.
func (w *worker) hostsFile(pod *corev1.Pod, podIPs []string) (string, error) {
	path := filepath.Join(w.m.volumes.PodDir(pod.UID), "etc-hosts")
	var b bytes.Buffer
	if pod.Spec.HostNetwork {
		b.WriteString("# Kubernetes-managed hosts file (host network).\n")
		if raw, err := hostile.ReadRegular(etcHosts, maxHosts); err == nil {
			b.Write(raw)
		}
	} else {
		b.WriteString("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n")
		host, domain := hostname(pod, w.m.cfg.DNS().Domain)
		for _, ip := range podIPs {
			if domain != "" {
				fmt.Fprintf(&b, "%s\t%s.%s\t%s\n", ip, host, domain, host)
			} else {
				fmt.Fprintf(&b, "%s\t%s\n", ip, host)
			}
		}
	}
	if len(pod.Spec.HostAliases) > 0 {
		b.WriteString("\n# Entries added by HostAliases.\n")
		for _, a := range pod.Spec.HostAliases {
			fmt.Fprintf(&b, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
		}
	}
	pods, err := hostile.MakeRoot(filepath.Dir(filepath.Dir(path)), 0o750)
	if err != nil {
		return "", err
	}
	defer pods.Close()
	dir, err := pods.MkdirAll(string(pod.UID), 0o750, -1, -1)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	// Written in place: running containers have this very file mounted, and may
	// have written to it.
	if err := dir.Overwrite("etc-hosts", b.Bytes(), 0o644); err != nil {
		return "", fmt.Errorf("write the pod's hosts file: %w", err)
	}
	return path, nil
}
