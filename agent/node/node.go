package node

import (
	"fmt"
	"maps"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/csi"
	"timonel/agent/hostile"
)

// KubeletVersion is the Kubernetes version whose kubelet the agent stands for.
const KubeletVersion = "v1.37.2"

// KubeletPort is the kubelet's port (k8s.io/kubernetes/pkg/cluster/ports), that clients name
// when they ask the API for a node's metrics. Nothing listens there: the API reaches the node
// by the agent's stream.
const KubeletPort = 10250

// Facts are what does not change while an agent runs.
type Facts struct {
	Name    string
	IPs     []net.IP // the node's own, the first of each family counts
	Labels  map[string]string
	Taints  []corev1.Taint
	MaxPods int64
	DataDir string // whose file system is the node's ephemeral storage
	// Reserved is what pods cannot have of the capacity.
	Reserved  corev1.ResourceList
	Runtime   string // such as containerd://1.6.20
	GossipAt  string // annotation: where gossip reaches this node
	LocalDir  string // annotation: where the volumes are that are this node's own
	StartedAt time.Time
	// RecursiveReadOnly says whether mounts can be read-only with all below them.
	RecursiveReadOnly bool
	// MapsUsers says whether the kernel can map volumes to pods' user namespaces.
	MapsUsers bool
	// Declared are upstream's names of what the scheduler has to know that the node can.
	Declared []string
}

// Health is what may change.
type Health struct {
	Runtime string // why containerd cannot be used; empty: it can
	Network string // why pods get no network; empty: they do
	// Pressure are the conditions of what the node is short of.
	Pressure []corev1.NodeConditionType
	// Handlers are the runtimes that pods may ask for. GroupsPolicy says whether
	// containerd heeds supplementalGroupsPolicy.
	Handlers     []corev1.NodeRuntimeHandler
	GroupsPolicy bool
	// CSI is what drivers say of this node, and which of their volumes are in use.
	CSI csi.Facts
	// Deleted are volumes that are being deleted and of which nothing is left here.
	Deleted []types.UID
}

// Resources returns the machine's capacity.
func Resources(f *Facts) (corev1.ResourceList, error) {
	memory, _, err := Memory()
	if err != nil {
		return nil, err
	}
	disk, err := FileSystemOf(f.DataDir)
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", f.DataDir, err)
	}
	return corev1.ResourceList{
		corev1.ResourceCPU:              *resource.NewQuantity(int64(cpus()), resource.DecimalSI),
		corev1.ResourceMemory:           *resource.NewQuantity(memory, resource.BinarySI),
		corev1.ResourcePods:             *resource.NewQuantity(f.MaxPods, resource.DecimalSI),
		corev1.ResourceEphemeralStorage: *resource.NewQuantity(disk.Capacity, resource.BinarySI),
	}, nil
}

func cpus() int { return runtime.NumCPU() }

// Memory is how much there is, in bytes, and how much of it can be had without
// swapping: what is free, and what the kernel can give up.
func Memory() (total, available int64, err error) {
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

// Handlers are the runtimes that pods may ask for, by what CRI says of them, in order of
// name; the default one has none. A containerd of before 2.0 says nothing: it has those
// named besides.
func Handlers(f *Facts, said []*runtimev1.RuntimeHandler, besides ...string) []corev1.NodeRuntimeHandler {
	if len(said) == 0 {
		for _, name := range append([]string{""}, besides...) {
			said = append(said, &runtimev1.RuntimeHandler{Name: name})
		}
	}
	out := make([]corev1.NodeRuntimeHandler, 0, len(said))
	for _, h := range said {
		out = append(out, corev1.NodeRuntimeHandler{Name: h.Name, Features: &corev1.NodeRuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: new(f.RecursiveReadOnly), // the agent's doing
			UserNamespaces:          new(f.MapsUsers && h.GetFeatures().GetUserNamespaces()),
		}})
	}
	slices.SortFunc(out, func(a, b corev1.NodeRuntimeHandler) int { return strings.Compare(a.Name, b.Name) })
	return out
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
	maps.Copy(labels, h.CSI.Labels)
	maps.Copy(labels, f.Labels)
	n := &corev1.Node{
		TypeMeta:   metav1.TypeMeta{Kind: "Node", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: f.Name, Labels: labels},
		Spec:       corev1.NodeSpec{Taints: f.Taints},
		Status: corev1.NodeStatus{
			Capacity: capacity, Allocatable: allocatable(capacity, f.Reserved), NodeInfo: systemInfo(f),
			VolumesInUse:     h.CSI.InUse,
			DaemonEndpoints:  corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: KubeletPort}},
			DeclaredFeatures: f.Declared, RuntimeHandlers: h.Handlers, Features: &corev1.NodeFeatures{SupplementalGroupsPolicy: new(h.GroupsPolicy)},
		},
	}
	n.Annotations = map[string]string{
		"timonel.io/deleted-volumes": joined(h.Deleted), csi.NodeIDs: h.CSI.NodeIDs,
		// Volumes are attached by the controllers, never by a node.
		"volumes.kubernetes.io/controller-managed-attach-detach": "true",
	}
	if f.GossipAt != "" {
		n.Annotations["timonel.io/gossip-address"] = f.GossipAt
	}
	if f.LocalDir != "" {
		n.Annotations["timonel.io/local-volumes"] = f.LocalDir
	}
	for _, ip := range f.IPs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip.String()})
	}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: f.Name})
	n.Status.Conditions = conditions(h, old, now)
	return n, nil
}

func joined(uids []types.UID) string {
	var b strings.Builder
	for i, uid := range uids {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(string(uid))
	}
	return b.String()
}

// Pids is how many process ids the kernel gives, and how many are given.
func Pids() (most, used int64, err error) {
	if most, err = strconv.ParseInt(text("/proc/sys/kernel/pid_max"), 10, 64); err != nil {
		return 0, 0, fmt.Errorf("number of process ids: %w", err)
	}
	if threads, err := strconv.ParseInt(text("/proc/sys/kernel/threads-max"), 10, 64); err == nil {
		most = min(most, threads)
	}
	// 0.20 0.18 0.12 1/80 11206: of 80 that there are, 1 runs
	fields := strings.Fields(text("/proc/loadavg"))
	if len(fields) < 4 {
		return 0, 0, fmt.Errorf("number of processes: /proc/loadavg has %d fields", len(fields))
	}
	_, all, _ := strings.Cut(fields[3], "/")
	if used, err = strconv.ParseInt(all, 10, 64); err != nil {
		return 0, 0, fmt.Errorf("number of processes: %w", err)
	}
	return most, used, nil
}

// allocatable is what pods may have of the capacity.
func allocatable(capacity, reserved corev1.ResourceList) corev1.ResourceList {
	out := capacity.DeepCopy()
	for name, q := range reserved {
		if left, ok := out[name]; ok {
			left.Sub(q)
			if left.Sign() < 0 {
				left.Set(0)
			}
			out[name] = left
		}
	}
	return out
}

func conditions(h Health, old *corev1.Node, now time.Time) []corev1.NodeCondition {
	has := func(t corev1.NodeConditionType) bool { return slices.Contains(h.Pressure, t) }
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
		cond(corev1.NodeMemoryPressure, has(corev1.NodeMemoryPressure), "KubeletHasInsufficientMemory", "kubelet has insufficient memory available",
			"KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
		cond(corev1.NodeDiskPressure, has(corev1.NodeDiskPressure), "KubeletHasDiskPressure", "kubelet has disk pressure",
			"KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
		cond(corev1.NodePIDPressure, has(corev1.NodePIDPressure), "KubeletHasInsufficientPID", "kubelet has insufficient PID available",
			"KubeletHasSufficientPID", "kubelet has sufficient PID available"),
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
