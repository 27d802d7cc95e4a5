package pod

import (
	"encoding/json"
	"fmt"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"

	"timonel/agent/admission"
)

// LogDirName is the name of a pod's folder of container logs.
func LogDirName(pod *corev1.Pod) string {
	return pod.Namespace + "_" + pod.Name + "_" + string(pod.UID)
}

// cgroupParent is the cgroup of a pod below the agent's own.
func cgroupParent(root string, pod *corev1.Pod) string {
	class := qos.GetPodQOS(pod)
	if class == corev1.PodQOSGuaranteed {
		return path.Join(root, "pod"+string(pod.UID))
	}
	return path.Join(root, strings.ToLower(string(class)), "pod"+string(pod.UID))
}

// hostname is the pod's host name and domain.
func hostname(pod *corev1.Pod, clusterDomain string) (host, domain string) {
	if pod.Spec.HostnameOverride != nil && !pod.Spec.HostNetwork {
		return *pod.Spec.HostnameOverride, ""
	}
	host = pod.Name
	if pod.Spec.Hostname != "" {
		host = pod.Spec.Hostname
	}
	if len(host) > 63 {
		host = strings.TrimRight(host[:63], "-.")
	}
	if pod.Spec.Subdomain != "" {
		domain = fmt.Sprintf("%s.%s.svc.%s", pod.Spec.Subdomain, pod.Namespace, clusterDomain)
	}
	return host, domain
}

// sandboxConfig is what CRI makes a pod's sandbox from.
func (w *worker) sandboxConfig(pod *corev1.Pod, attempt uint32) (*runtimev1.PodSandboxConfig, error) {
	dns, err := w.m.dnsConfig(pod)
	if err != nil {
		return nil, err
	}
	host, domain := hostname(pod, w.m.cfg.DNS().Domain)
	if pod.Spec.SetHostnameAsFQDN != nil && *pod.Spec.SetHostnameAsFQDN && domain != "" {
		host += "." + domain
		if len(host) > 64 {
			return nil, fmt.Errorf("setHostnameAsFQDN: host name %q is longer than 64 characters", host)
		}
	}
	labels := map[string]string{}
	for k, v := range pod.Labels {
		labels[k] = v
	}
	labels[labelPodName], labels[labelPodNamespace], labels[labelPodUID] = pod.Name, pod.Namespace, string(pod.UID)
	annotations := map[string]string{}
	for k, v := range pod.Annotations {
		annotations[k] = v
	}
	annotations[annotationPodGrace] = strconv.FormatInt(gracePeriod(pod), 10) // whatever the pod says of it
	cfg := &runtimev1.PodSandboxConfig{
		Metadata: &runtimev1.PodSandboxMetadata{Name: pod.Name, Namespace: pod.Namespace, Uid: string(pod.UID), Attempt: attempt},
		Labels:   labels, Annotations: annotations,
		LogDirectory: w.m.LogDir(pod),
		DnsConfig:    dns.DNSConfig,
		Linux: &runtimev1.LinuxPodSandboxConfig{
			CgroupParent:    cgroupParent(w.m.cfg.CgroupRoot, pod),
			SecurityContext: sandboxSecurity(pod),
			Resources:       sandboxResources(pod),
			Overhead:        overhead(pod),
		},
	}
	if cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions, err = w.m.userNamespace(pod); err != nil {
		return nil, err
	}
	if !pod.Spec.HostNetwork {
		cfg.Hostname = host
	}
	if sc := pod.Spec.SecurityContext; sc != nil && len(sc.Sysctls) > 0 {
		cfg.Linux.Sysctls = map[string]string{}
		for _, s := range sc.Sysctls {
			cfg.Linux.Sysctls[admission.SysctlName(s.Name)] = s.Value
		}
	}
	cfg.PortMappings = portMappings(pod)
	return cfg, nil
}

// portMappings are the host ports of what runs together: containers and
// sidecars. On the host's network a container's port is the host's already.
func portMappings(pod *corev1.Pod) []*runtimev1.PortMapping {
	if pod.Spec.HostNetwork {
		return nil
	}
	var out []*runtimev1.PortMapping
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			if p.HostPort != 0 {
				out = append(out, &runtimev1.PortMapping{
					Protocol: protocol(p.Protocol), ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostIp: p.HostIP,
				})
			}
		}
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; sidecar(c) {
			add(c)
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	return out
}

func protocol(p corev1.Protocol) runtimev1.Protocol {
	switch p {
	case corev1.ProtocolUDP:
		return runtimev1.Protocol_UDP
	case corev1.ProtocolSCTP:
		return runtimev1.Protocol_SCTP
	}
	return runtimev1.Protocol_TCP
}

// containerConfig is what CRI makes one container from. Its errors are about
// the pod's spec and what that refers to.
func (w *worker) containerConfig(pod *corev1.Pod, s start, imageID string, podIPs []string) (*runtimev1.ContainerConfig, error) {
	c := s.spec
	env, err := w.m.environment(pod, c, podIPs)
	if err != nil {
		return nil, err
	}
	mounts, err := w.mounts(pod, c, env, podIPs)
	if err != nil {
		return nil, err
	}
	devices, err := w.devices(pod, c)
	if err != nil {
		return nil, err
	}
	security, err := w.containerSecurity(pod, c, imageID)
	if err != nil {
		return nil, err
	}
	if s.target != "" {
		security.NamespaceOptions.Pid, security.NamespaceOptions.TargetId = runtimev1.NamespaceMode_TARGET, s.target
	}
	command, args, err := commandLine(c, env)
	if err != nil {
		return nil, err
	}
	messageFile, err := w.messageFile(pod, c, s.restarts)
	if err != nil {
		return nil, err
	}
	cfg := &runtimev1.ContainerConfig{
		Metadata: &runtimev1.ContainerMetadata{Name: c.Name, Attempt: uint32(s.restarts)},
		Image:    &runtimev1.ImageSpec{Image: imageID, UserSpecifiedImage: c.Image},
		Command:  command, Args: args, WorkingDir: c.WorkingDir,
		Labels: map[string]string{
			labelPodName: pod.Name, labelPodNamespace: pod.Namespace, labelPodUID: string(pod.UID), labelContainerName: c.Name,
		},
		Annotations: map[string]string{
			annotationHash:          hashContainer(c),
			annotationRestartCount:  strconv.Itoa(int(s.restarts)),
			annotationMessagePath:   c.TerminationMessagePath,
			annotationMessagePolicy: string(c.TerminationMessagePolicy),
			annotationMessageFile:   messageFile,
			annotationPodGrace:      strconv.FormatInt(gracePeriod(pod), 10),
		},
		LogPath: filepath.Join(c.Name, fmt.Sprintf("%d.log", s.restarts)),
		Stdin:   c.Stdin, StdinOnce: c.StdinOnce, Tty: c.TTY,
		Mounts: mounts, Devices: devices,
		Linux: &runtimev1.LinuxContainerConfig{Resources: containerResources(pod, c, w.m.cfg.Capacity()), SecurityContext: security},
	}
	if len(c.Ports) > 0 {
		if raw, err := json.Marshal(c.Ports); err == nil {
			cfg.Annotations["io.kubernetes.container.ports"] = string(raw)
		}
	}
	for _, e := range env {
		cfg.Envs = append(cfg.Envs, &runtimev1.KeyValue{Key: e.name, Value: []byte(e.value)})
	}
	if messageFile != "" {
		cfg.Mounts = append(cfg.Mounts, &runtimev1.Mount{HostPath: messageFile, ContainerPath: c.TerminationMessagePath})
	}
	return cfg, w.m.mapUsers(pod, c, cfg)
}

// commandLine is a container's command and arguments with $(VAR)s replaced.
func commandLine(c *corev1.Container, env environment) (command, args []string, err error) {
	lookup, left := expansion.MappingFuncFor(env.values()), room{maxText}
	expand := func(in []string) (out []string, err error) {
		for _, s := range in {
			if s, err = left.expand(s, lookup); err != nil {
				return nil, fmt.Errorf("command and arguments: %w", err)
			}
			out = append(out, s)
		}
		return out, nil
	}
	if command, err = expand(c.Command); err != nil {
		return nil, nil, err
	}
	args, err = expand(c.Args)
	return command, args, err
}

func gracePeriod(pod *corev1.Pod) int64 {
	if pod.DeletionGracePeriodSeconds != nil {
		return *pod.DeletionGracePeriodSeconds
	}
	if pod.Spec.TerminationGracePeriodSeconds != nil {
		return *pod.Spec.TerminationGracePeriodSeconds
	}
	return corev1.DefaultTerminationGracePeriodSeconds
}
