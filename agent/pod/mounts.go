package pod

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

const (
	etcHosts = "/etc/hosts"
	// maxMessage is how much of a termination message is reported, as upstream.
	maxMessage     = 4096
	maxMessageLogs = 2048
)

// mounts are a container's: its volumes and /etc/hosts.
func (w *worker) mounts(pod *corev1.Pod, c *corev1.Container, env environment, podIPs []string) ([]*runtimev1.Mount, error) {
	var out []*runtimev1.Mount
	hosts := true
	for i, vm := range c.VolumeMounts {
		path, ok := w.volumes[vm.Name]
		if !ok {
			return nil, fmt.Errorf("volume %q of mount %s is not ready", vm.Name, vm.MountPath)
		}
		sub := vm.SubPath
		if vm.SubPathExpr != "" {
			var bad string
			values := env.values()
			sub = expansion.Expand(vm.SubPathExpr, func(name string) string {
				v, ok := values[name]
				if !ok {
					bad = name
				}
				return v
			})
			if bad != "" {
				return nil, fmt.Errorf("subPathExpr %q of mount %s: no environment variable %s", vm.SubPathExpr, vm.MountPath, bad)
			}
		}
		if sub != "" {
			var err error
			if path, err = w.m.volumes.SubPath(pod, c.Name, i, path, sub); err != nil {
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
		m := &runtimev1.Mount{ContainerPath: target, HostPath: path, Readonly: vm.ReadOnly}
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

// hostsFile writes the pod's /etc/hosts, which its containers share.
func (w *worker) hostsFile(pod *corev1.Pod, podIPs []string) (string, error) {
	path := filepath.Join(w.m.volumes.PodDir(pod.UID), "etc-hosts")
	var b bytes.Buffer
	if pod.Spec.HostNetwork {
		b.WriteString("# Kubernetes-managed hosts file (host network).\n")
		if raw, err := os.ReadFile(etcHosts); err == nil {
			b.Write(raw)
		}
	} else {
		b.WriteString("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n")
		host, domain := hostname(pod, w.m.cfg.ClusterDomain)
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
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return "", err
	}
	// Written in place: running containers have this very file mounted.
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		return "", fmt.Errorf("write the pod's hosts file: %w", err)
	}
	return path, os.Chmod(path, 0o644)
}

// messageFile makes the file that a container writes its last words to.
func (w *worker) messageFile(pod *corev1.Pod, c *corev1.Container, restarts int32) (string, error) {
	if c.TerminationMessagePath == "" {
		return "", nil
	}
	path := filepath.Join(w.m.volumes.PodDir(pod.UID), "containers", c.Name, fmt.Sprintf("termination-%d", restarts))
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return "", err
	}
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		return "", fmt.Errorf("make the termination message file: %w", err)
	}
	return path, os.Chmod(path, 0o666) // whatever user the container has
}

// terminationMessage is what a container left to say: its message file, else
// the end of its log when it failed and its policy says so, else CRI's words.
func terminationMessage(c *container) string {
	if c.messageFile != "" {
		if raw, err := os.ReadFile(c.messageFile); err == nil && len(raw) > 0 {
			return string(raw[:min(len(raw), maxMessage)])
		}
		if c.messagePolicy == string(corev1.TerminationMessageFallbackToLogsOnError) && c.exitCode != 0 && c.logPath != "" {
			if text := logTail(c.logPath); text != "" {
				return text
			}
		}
	}
	return c.message
}

// logTail is the end of a CRI log: 80 lines at most, without their prefixes.
func logTail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	raw := make([]byte, min(info.Size(), 16<<10))
	if _, err := f.ReadAt(raw, info.Size()-int64(len(raw))); err != nil {
		return ""
	}
	var out []byte
	lines := bytes.SplitAfter(raw, []byte("\n"))
	for _, line := range lines[max(0, len(lines)-81):] {
		parts := bytes.SplitN(line, []byte(" "), 4) // time, stream, tags, text
		if len(parts) == 4 {
			text := parts[3]
			if string(parts[2]) == "P" {
				text = bytes.TrimSuffix(text, []byte("\n"))
			}
			out = append(out, text...)
		}
	}
	return string(out[max(0, len(out)-maxMessageLogs):])
}
