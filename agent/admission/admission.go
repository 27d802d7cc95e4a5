package admission

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
	schedulinghelpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"timonel/agent/eviction"
)

// Reasons of a rejection, as the kubelet's; those of resources are OutOfcpu,
// OutOfmemory, OutOfpods and so on.
const (
	ReasonOSSelector         = "PodOSSelectorNodeLabelDoesNotMatch"
	ReasonOS                 = "PodOSNotSupported"
	ReasonSupplementalGroups = "SupplementalGroupsPolicyNotSupported"
	ReasonSysctl             = "SysctlForbidden"
	ReasonAppArmor           = "AppArmor"
	ReasonUnsupported        = "PodFeatureUnsupported"
	ReasonNodeAffinity       = "NodeAffinity"
	ReasonNodeName           = "NodeName"
	ReasonNodePorts          = "NodePorts"
	ReasonTaint              = "TaintToleration"
	outOf                    = "OutOf"
)

// Node is what a pod is held against.
type Node struct {
	Name string
	// Allocatable is what pods may ask for together.
	Allocatable corev1.ResourceList
	// Object is the Node as the API has it: its labels and taints count. nil
	// while no controller has sent it; what needs it is not checked then.
	Object *corev1.Node
	// Pods are those that the node has accepted and that have not ended.
	Pods []*corev1.Pod
	// Pressure are the conditions of the node for what it is short of.
	Pressure []corev1.NodeConditionType
	// AppArmor is why profiles cannot be enforced, nil when they can.
	AppArmor error
	// SELinux says whether the kernel enforces labels.
	SELinux bool
	// UserNamespaces says whether pods can have user namespaces of their own, and
	// GroupsPolicy whether supplementalGroupsPolicy is heeded.
	UserNamespaces, GroupsPolicy bool
	// Kernel is the kernel's version, on which it depends which sysctls are a
	// pod's own; nil: none but those that always were.
	Kernel *version.Version
	// UnsafeSysctls are names of sysctls, with dots, that pods may set beside the safe
	// ones; PREFIX* is all that begin so.
	UnsafeSysctls []string
}

// idMapping is the first kernel whose tmpfs can be mapped to a user namespace, as upstream
// asks for.
var idMapping = version.MustParseGeneric("6.3")

// MapsUsers says whether the node's kernel can map volumes to pods' user namespaces.
func (n *Node) MapsUsers() bool { return n.Kernel != nil && n.Kernel.AtLeast(idMapping) }

// sealing is the first kernel that makes mounts read-only together with those below them.
var sealing = version.MustParseGeneric("5.12")

// RecursiveReadOnly says whether the node's mounts can be read-only with all below them.
func (n *Node) RecursiveReadOnly() bool { return n.Kernel != nil && n.Kernel.AtLeast(sealing) }

// Rejection is why a node does not take a pod.
type Rejection struct {
	Reason  string
	Message string
}

// Admit says why node cannot take pod, or nil. It changes nothing.
func Admit(pod *corev1.Pod, node *Node) *Rejection {
	if r := pressure(pod, node); r != nil {
		return r
	}
	if r := Refuse(pod, node); r != nil {
		return r
	}
	for _, check := range []func(*corev1.Pod, *Node) *Rejection{fits, affinity, nodeName, ports, taints} {
		if r := check(pod, node); r != nil {
			return r
		}
	}
	return nil
}

// Refuse says which field of pod this node does not carry out, or nil. The
// answer does not depend on what else runs on the node.
func Refuse(pod *corev1.Pod, node *Node) *Rejection {
	for _, check := range []func(*corev1.Pod, *Node) *Rejection{sysctls, osSelector, osField, groupsPolicy, appArmor, declared, unsupported} {
		if r := check(pod, node); r != nil {
			return r
		}
	}
	return nil
}

func reject(reason, format string, args ...any) *Rejection {
	return &Rejection{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// pressure refuses pods while the node is short of something: any but critical
// ones, and for want of memory alone only those that request none of anything.
func pressure(pod *corev1.Pod, node *Node) *Rejection {
	if len(node.Pressure) == 0 || eviction.Critical(pod) {
		return nil
	}
	if len(node.Pressure) == 1 && node.Pressure[0] == corev1.NodeMemoryPressure {
		taint := &corev1.Taint{Key: corev1.TaintNodeMemoryPressure, Effect: corev1.TaintEffectNoSchedule}
		if qos.GetPodQOS(pod) != corev1.PodQOSBestEffort ||
			schedulinghelpers.TolerationsTolerateTaint(klog.Background(), pod.Spec.Tolerations, taint, false) {
			return nil
		}
	}
	return reject(eviction.Reason, "The node had condition: %v. ", node.Pressure)
}

// predicate is a rejection by a check that is the scheduler's, too.
func predicate(name, why string) *Rejection {
	return reject(name, "Predicate %s failed: %s", name, why)
}

func osSelector(pod *corev1.Pod, _ *Node) *Rejection {
	if want, ok := pod.Labels[corev1.LabelOSStable]; ok && want != runtime.GOOS {
		return reject(ReasonOSSelector, "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label")
	}
	return nil
}

func osField(pod *corev1.Pod, _ *Node) *Rejection {
	if pod.Spec.OS != nil && string(pod.Spec.OS.Name) != runtime.GOOS {
		return reject(ReasonOS, "Failed to admit pod as the OS field doesn't match node OS")
	}
	return nil
}

func groupsPolicy(pod *corev1.Pod, node *Node) *Rejection {
	sc := pod.Spec.SecurityContext
	if sc == nil || sc.SupplementalGroupsPolicy == nil {
		return nil
	}
	switch policy := *sc.SupplementalGroupsPolicy; {
	case policy == corev1.SupplementalGroupsPolicyMerge, policy == corev1.SupplementalGroupsPolicyStrict && node.GroupsPolicy:
	default:
		return reject(ReasonSupplementalGroups, "SupplementalGroupsPolicy=%s is not supported in this node", *sc.SupplementalGroupsPolicy)
	}
	return nil
}

// appArmor is upstream's check, but every annotation counts: there, one that
// says unconfined may hide the others.
func appArmor(pod *corev1.Pod, node *Node) *Rejection {
	var profiles []*corev1.AppArmorProfile
	if sc := pod.Spec.SecurityContext; sc != nil {
		profiles = append(profiles, sc.AppArmorProfile)
	}
	for c := range containers(pod) {
		if c.SecurityContext != nil {
			profiles = append(profiles, c.SecurityContext.AppArmorProfile)
		}
	}
	needed := false
	for _, p := range profiles {
		if p == nil || p.Type == corev1.AppArmorProfileTypeUnconfined {
			continue
		}
		needed = true
		if p.Type == corev1.AppArmorProfileTypeLocalhost && (p.LocalhostProfile == nil || strings.TrimSpace(*p.LocalhostProfile) == "") {
			return reject(ReasonAppArmor, "Cannot enforce AppArmor: invalid empty AppArmor profile name")
		}
	}
	for key, value := range pod.Annotations {
		if strings.HasPrefix(key, corev1.DeprecatedAppArmorBetaContainerAnnotationKeyPrefix) && value != corev1.DeprecatedAppArmorBetaProfileNameUnconfined {
			needed = true
		}
	}
	if needed && node.AppArmor != nil {
		return reject(ReasonAppArmor, "Cannot enforce AppArmor: %v", node.AppArmor)
	}
	return nil
}

func affinity(pod *corev1.Pod, node *Node) *Rejection {
	if node.Object == nil {
		return nil
	}
	if ok, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node.Object); err != nil || !ok {
		return predicate(ReasonNodeAffinity, "node(s) didn't match Pod's node affinity/selector")
	}
	return nil
}

func nodeName(pod *corev1.Pod, node *Node) *Rejection {
	if pod.Spec.NodeName != "" && pod.Spec.NodeName != node.Name {
		return predicate(ReasonNodeName, "node(s) didn't match the requested node name")
	}
	return nil
}

// taints looks at NoExecute alone: what else keeps pods away is the scheduler's.
func taints(pod *corev1.Pod, node *Node) *Rejection {
	if node.Object == nil {
		return nil
	}
	noExecute := func(t *corev1.Taint) bool { return t.Effect == corev1.TaintEffectNoExecute }
	if _, bad := schedulinghelpers.FindMatchingUntoleratedTaint(klog.Background(), node.Object.Spec.Taints, pod.Spec.Tolerations, noExecute, false); bad {
		return predicate(ReasonTaint, "node(s) had taints that the pod didn't tolerate")
	}
	return nil
}

// hostPort is one port of the node's that a pod asks for.
type hostPort struct {
	ip       string
	protocol corev1.Protocol
	port     int32
}

// hostPorts are those of the pod's containers and sidecars: what runs together.
func hostPorts(pod *corev1.Pod) []hostPort {
	var out []hostPort
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			if p.HostPort <= 0 {
				continue
			}
			h := hostPort{ip: p.HostIP, protocol: p.Protocol, port: p.HostPort}
			if h.ip == "" || h.ip == "::" {
				h.ip = anyIP
			}
			if h.protocol == "" {
				h.protocol = corev1.ProtocolTCP
			}
			out = append(out, h)
		}
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	return out
}

const anyIP = "0.0.0.0"

func (h hostPort) conflicts(o hostPort) bool {
	return h.port == o.port && h.protocol == o.protocol && (h.ip == o.ip || h.ip == anyIP || o.ip == anyIP)
}

func ports(pod *corev1.Pod, node *Node) *Rejection {
	want := hostPorts(pod)
	if len(want) == 0 {
		return nil
	}
	for _, other := range node.Pods {
		for _, taken := range hostPorts(other) {
			if slices.ContainsFunc(want, taken.conflicts) {
				return predicate(ReasonNodePorts, "node(s) didn't have free ports for the requested pod ports")
			}
		}
	}
	return nil
}
