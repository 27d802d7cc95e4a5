package node

import (
	"fmt"
	"maps"
	"net"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/agent/hostile"
)

// KubeletVersion is the Kubernetes version whose kubelet the agent stands for.
const KubeletVersion = "v1.37.2"

// Facts are what does not change while an agent runs.
type Facts struct {
	Name      string
	IPs       []net.IP // the node's own, the first of each family counts
	Labels    map[string]string
	Taints    []corev1.Taint
	MaxPods   int64
	DataDir   string // whose file system is the node's ephemeral storage
	Runtime   string // such as containerd://1.6.20
	GossipAt  string // annotation: where gossip reaches this node
	StartedAt time.Time
}

// Health is what may change.
type Health struct {
	Runtime string // why containerd cannot be used; empty: it can
	Network string // why pods get no network; empty: they do
}

// thresholds of the pressure conditions, as the kubelet's hard evictions.
const (
	minMemory     = 100 << 20
	minDiskShare  = 0.10
	minInodeShare = 0.05
)

// Resources returns the machine's capacity.
func Resources(f *Facts) (corev1.ResourceList, error) {
	memory, _, err := memoryBytes()
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(f.DataDir, &st); err != nil {
		return nil, fmt.Errorf("size of %s: %w", f.DataDir, err)
	}
	return corev1.ResourceList{
		corev1.ResourceCPU:              *resource.NewQuantity(int64(cpus()), resource.DecimalSI),
		corev1.ResourceMemory:           *resource.NewQuantity(memory, resource.BinarySI),
		corev1.ResourcePods:             *resource.NewQuantity(f.MaxPods, resource.DecimalSI),
		corev1.ResourceEphemeralStorage: *resource.NewQuantity(int64(st.Blocks)*st.Bsize, resource.BinarySI),
	}, nil
}

func cpus() int { return runtime.NumCPU() }

func memoryBytes() (total, available int64, err error) {
	raw, err := hostile.ReadRegular("/proc/meminfo", hostile.MaxOwn)
	if err != nil {
		return 0, 0, fmt.Errorf("size of memory: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kb, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			continue
		}
		switch fields[0] {
		case "MemTotal:":
			total = kb << 10
		case "MemAvailable:":
			available = kb << 10
		}
	}
	if total == 0 {
		return 0, 0, fmt.Errorf("size of memory: no MemTotal in /proc/meminfo")
	}
	return total, available, nil
}

// Make builds the node object. old is the one before, whose transition times
// are kept; nil at first.
func Make(f *Facts, h Health, old *corev1.Node, now time.Time) (*corev1.Node, error) {
	capacity, err := Resources(f)
	if err != nil {
		return nil, err
	}
	labels := map[string]string{
		corev1.LabelHostname: f.Name, corev1.LabelOSStable: "linux", corev1.LabelArchStable: runtime.GOARCH,
		"beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": runtime.GOARCH,
	}
	maps.Copy(labels, f.Labels)
	n := &corev1.Node{
		TypeMeta:   metav1.TypeMeta{Kind: "Node", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: f.Name, Labels: labels},
		Spec:       corev1.NodeSpec{Taints: f.Taints},
		Status: corev1.NodeStatus{
			Capacity: capacity, Allocatable: capacity.DeepCopy(), NodeInfo: systemInfo(f),
		},
	}
	if f.GossipAt != "" {
		n.Annotations = map[string]string{"timonel.io/gossip-address": f.GossipAt}
	}
	for _, ip := range f.IPs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip.String()})
	}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: f.Name})
	n.Status.Conditions = conditions(f, h, old, now)
	return n, nil
}

func conditions(f *Facts, h Health, old *corev1.Node, now time.Time) []corev1.NodeCondition {
	_, available, err := memoryBytes()
	lowMemory := err == nil && available < minMemory
	disk := diskPressure(f.DataDir)
	pids := pidPressure()
	cond := func(t corev1.NodeConditionType, bad bool, badReason, badText, goodReason, goodText string) corev1.NodeCondition {
		c := corev1.NodeCondition{Type: t, Status: corev1.ConditionFalse, Reason: goodReason, Message: goodText}
		if bad {
			c.Status, c.Reason, c.Message = corev1.ConditionTrue, badReason, badText
		}
		return c
	}
	ready := corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", Message: "the agent is connected and runs pods"}
	switch {
	case h.Runtime != "":
		ready.Status, ready.Reason, ready.Message = corev1.ConditionFalse, "KubeletNotReady", "container runtime is not ready: "+h.Runtime
	case h.Network != "":
		ready.Status, ready.Reason, ready.Message = corev1.ConditionFalse, "KubeletNotReady", "container runtime network not ready: "+h.Network
	}
	network := cond(corev1.NodeNetworkUnavailable, h.Network != "", "NoPodNetwork", h.Network, "PodNetworkReady", "pods get addresses and routes")
	list := []corev1.NodeCondition{
		network,
		cond(corev1.NodeMemoryPressure, lowMemory, "KubeletHasInsufficientMemory", "less than 100 MiB of memory are available", "KubeletHasSufficientMemory", "there is enough memory"),
		cond(corev1.NodeDiskPressure, disk != "", "KubeletHasDiskPressure", disk, "KubeletHasNoDiskPressure", "there is enough disk space"),
		cond(corev1.NodePIDPressure, pids, "KubeletHasInsufficientPID", "few process ids are left", "KubeletHasSufficientPID", "there are enough process ids"),
		ready,
	}
	stamp := metav1.NewTime(now).Rfc3339Copy()
	for i := range list {
		c := &list[i]
		c.LastHeartbeatTime, c.LastTransitionTime = stamp, stamp
		if old == nil {
			continue
		}
		for _, o := range old.Status.Conditions {
			if o.Type != c.Type {
				continue
			}
			if o.Status == c.Status {
				c.LastTransitionTime = o.LastTransitionTime
			}
			if o.Status == c.Status && o.Reason == c.Reason && o.Message == c.Message {
				c.LastHeartbeatTime = o.LastHeartbeatTime // no write for a heartbeat's sake
			}
		}
	}
	return list
}

func diskPressure(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return ""
	}
	if st.Blocks > 0 && float64(st.Bavail)/float64(st.Blocks) < minDiskShare {
		return fmt.Sprintf("%s has less than %d %% of its space left", dir, int(minDiskShare*100))
	}
	if st.Files > 0 && float64(st.Ffree)/float64(st.Files) < minInodeShare {
		return fmt.Sprintf("%s has less than %d %% of its inodes left", dir, int(minInodeShare*100))
	}
	return ""
}

func pidPressure() bool {
	limit, err := hostile.ReadRegular("/proc/sys/kernel/pid_max", hostile.MaxOwn)
	if err != nil {
		return false
	}
	most, err := strconv.ParseInt(strings.TrimSpace(string(limit)), 10, 64)
	if err != nil {
		return false
	}
	var info unix.Sysinfo_t
	return unix.Sysinfo(&info) == nil && int64(info.Procs) > most*9/10
}

func systemInfo(f *Facts) corev1.NodeSystemInfo {
	info := corev1.NodeSystemInfo{
		MachineID:               text("/etc/machine-id"),
		SystemUUID:              text("/sys/class/dmi/id/product_uuid"),
		BootID:                  text("/proc/sys/kernel/random/boot_id"),
		OSImage:                 osName(),
		ContainerRuntimeVersion: f.Runtime,
		KubeletVersion:          KubeletVersion,
		OperatingSystem:         "linux",
		Architecture:            runtime.GOARCH,
	}
	if info.SystemUUID == "" {
		info.SystemUUID = info.MachineID
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		info.KernelVersion = unix.ByteSliceToString(u.Release[:])
	}
	return info
}

func text(path string) string {
	raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

func osName() string {
	for line := range strings.Lines(text("/etc/os-release")) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			return strings.Trim(name, `"`)
		}
	}
	return "Linux"
}

// Same says whether two node objects say the same, heartbeats aside.
func Same(a, b *corev1.Node) bool {
	if a == nil || b == nil {
		return a == b
	}
	x, err1 := a.Marshal()
	y, err2 := b.Marshal()
	return err1 == nil && err2 == nil && string(x) == string(y)
}
