package admission

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/component-helpers/node/util/sysctl"
	"k8s.io/kubernetes/pkg/util/kernel"
)

// safeSysctls are those that a pod may set: they are its own namespace's and do
// nothing to other pods. The value is the first kernel where that is so, empty
// for all.
var safeSysctls = map[string]string{
	"kernel.shm_rmid_forced":              "",
	"net.ipv4.ip_local_port_range":        "",
	"net.ipv4.tcp_syncookies":             "",
	"net.ipv4.ping_group_range":           "",
	"net.ipv4.ip_unprivileged_port_start": "",
	"net.ipv4.ip_local_reserved_ports":    kernel.IPLocalReservedPortsNamespacedKernelVersion,
	"net.ipv4.tcp_keepalive_time":         kernel.TCPKeepAliveTimeNamespacedKernelVersion,
	"net.ipv4.tcp_fin_timeout":            kernel.TCPFinTimeoutNamespacedKernelVersion,
	"net.ipv4.tcp_keepalive_intvl":        kernel.TCPKeepAliveIntervalNamespacedKernelVersion,
	"net.ipv4.tcp_keepalive_probes":       kernel.TCPKeepAliveProbesNamespacedKernelVersion,
	"net.ipv4.tcp_rmem":                   kernel.TCPReceiveMemoryNamespacedKernelVersion,
	"net.ipv4.tcp_wmem":                   kernel.TCPTransmitMemoryNamespacedKernelVersion,
	"net.ipv4.tcp_slow_start_after_idle":  kernel.TCPSlowStartAfterIdleNamespacedKernelVersion,
	"net.ipv4.tcp_notsent_lowat":          kernel.TCPNotSentLowatNamespacedKernelVersion,
}

// SysctlName is a sysctl's name with dots, as it is checked and as CRI gets it.
func SysctlName(name string) string { return sysctl.NormalizeName(name) }

func sysctls(pod *corev1.Pod, node *Node) *Rejection {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	for _, s := range pod.Spec.SecurityContext.Sysctls {
		if err := checkSysctl(SysctlName(s.Name), pod, node); err != nil {
			return reject(ReasonSysctl, "forbidden sysctl: %v", err)
		}
	}
	return nil
}

// CheckUnsafeSysctls names what is not a pattern of sysctls that pods may be allowed: such
// as are of a namespace of the pod's own, for others would be the whole machine's.
func CheckUnsafeSysctls(patterns []string) error {
	for _, p := range patterns {
		ns, _, _ := sysctl.GetNamespace(strings.TrimSuffix(p, "*"))
		if name := strings.TrimSuffix(p, "*"); SysctlName(name) != name || strings.Contains(name, "*") || name == "" || ns == "" {
			return fmt.Errorf("%q: want a sysctl's name with dots, or its beginning and a star, below kernel.shm, kernel.msg, kernel.sem, fs.mqueue. or net.", p)
		}
	}
	return nil
}

// allowed says whether a name is one of patterns.
func allowed(name string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, many := strings.CutSuffix(p, "*")
		return name == p || many && strings.HasPrefix(name, prefix)
	})
}

func checkSysctl(name string, pod *corev1.Pod, node *Node) error {
	since, safe := safeSysctls[name]
	safe = safe && (since == "" || node.Kernel != nil && node.Kernel.AtLeast(version.MustParseGeneric(since)))
	if !safe && !allowed(name, node.UnsafeSysctls) {
		return fmt.Errorf("%q not allowlisted", name)
	}
	ns, _, _ := sysctl.GetNamespace(name)
	if ns == sysctl.IPCNamespace && pod.Spec.HostIPC || ns == sysctl.NetNamespace && pod.Spec.HostNetwork {
		return fmt.Errorf("%q not allowed with host %s enabled", name, ns)
	}
	return nil
}
