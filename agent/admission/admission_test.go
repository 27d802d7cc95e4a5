package admission

import (
	"errors"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/utils/ptr"
)

func list(cpu, memory string) corev1.ResourceList {
	out := corev1.ResourceList{}
	if cpu != "" {
		out[corev1.ResourceCPU] = resource.MustParse(cpu)
	}
	if memory != "" {
		out[corev1.ResourceMemory] = resource.MustParse(memory)
	}
	return out
}

func testNode() *Node {
	allocatable := list("4", "4Gi")
	allocatable[corev1.ResourcePods] = resource.MustParse("3")
	allocatable[corev1.ResourceEphemeralStorage] = resource.MustParse("10Gi")
	return &Node{
		Name: "n", Allocatable: allocatable, Kernel: version.MustParseGeneric("6.1.0"),
		Object: &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"disk": "ssd", corev1.LabelOSStable: "linux"}}},
	}
}

func requests(c *corev1.Container, name corev1.ResourceName, q string) {
	if c.Resources.Requests == nil {
		c.Resources.Requests = corev1.ResourceList{}
	}
	c.Resources.Requests[name] = resource.MustParse(q)
}

func withPort(c *corev1.Container, ip string, protocol corev1.Protocol, port int32) {
	c.Ports = append(c.Ports, corev1.ContainerPort{ContainerPort: 80, HostPort: port, HostIP: ip, Protocol: protocol})
}

// withSubPaths gives a pod one volume and so many mounts that it needs n of the node.
func withSubPaths(p *corev1.Pod, n int) {
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	c := &p.Spec.Containers[0]
	c.VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/whole"}}
	for i := range n - 1 {
		m := corev1.VolumeMount{Name: "v", MountPath: "/" + strconv.Itoa(i), SubPath: "a"}
		if i%2 == 0 {
			m.SubPath, m.SubPathExpr = "", "b"
		}
		c.VolumeMounts = append(c.VolumeMounts, m)
	}
}

// What a node has and what runs there already, with the kubelet's words.
func TestAdmit(t *testing.T) {
	t.Parallel()
	sidecar := func(c corev1.Container) corev1.Container {
		c.RestartPolicy = ptr.To(corev1.ContainerRestartPolicyAlways)
		return c
	}
	other := func(change func(*corev1.Pod)) *corev1.Pod {
		p := testPod()
		p.Name, p.UID = "other", "other"
		change(p)
		return p
	}
	big := other(func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = list("3", "1Gi") })
	onPort := other(func(p *corev1.Pod) { withPort(&p.Spec.Containers[0], "", corev1.ProtocolTCP, 8080) })
	sidecarOnPort := other(func(p *corev1.Pod) {
		c := corev1.Container{Name: "s"}
		withPort(&c, "10.0.0.1", corev1.ProtocolTCP, 8080)
		p.Spec.InitContainers = []corev1.Container{sidecar(c)}
	})
	for _, tc := range []struct {
		name    string
		pods    []*corev1.Pod
		node    func(*Node)
		change  func(*corev1.Pod)
		reason  string
		message string
	}{
		{name: "a pod", change: func(*corev1.Pod) {}},
		{name: "cpu", pods: []*corev1.Pod{big}, change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "cpu", "1001m") },
			reason: "OutOfcpu", message: "Node didn't have enough resource: cpu, requested: 1001, used: 3000, capacity: 4000"},
		{name: "cpu, exactly", pods: []*corev1.Pod{big}, change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "cpu", "1") }},
		{name: "a limit alone is a request by defaulting only", pods: []*corev1.Pod{big}, change: func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Limits = list("9", "") }},
		{name: "memory", pods: []*corev1.Pod{big}, change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "memory", "4Gi") },
			reason: "OutOfmemory", message: "Node didn't have enough resource: memory, requested: 4294967296, used: 1073741824, capacity: 4294967296"},
		{name: "disk", change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "ephemeral-storage", "11Gi") }, reason: "OutOfephemeral-storage", message: "ephemeral-storage"},
		{name: "number of pods", pods: []*corev1.Pod{onPort, onPort, onPort}, change: func(*corev1.Pod) {},
			reason: "OutOfpods", message: "Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3"},
		{name: "an init container's peak", change: func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{{Name: "i", Resources: corev1.ResourceRequirements{Requests: list("5", "")}}}
		}, reason: "OutOfcpu", message: "requested: 5000"},
		{name: "sidecars add up", change: func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{sidecar(corev1.Container{Name: "s", Resources: corev1.ResourceRequirements{Requests: list("2", "")}})}
			requests(&p.Spec.Containers[0], "cpu", "3")
		}, reason: "OutOfcpu", message: "requested: 5000"},
		{name: "the pod's own request", change: func(p *corev1.Pod) { p.Spec.Resources = &corev1.ResourceRequirements{Requests: list("5", "")} }, reason: "OutOfcpu", message: "requested: 5000"},
		{name: "overhead", change: func(p *corev1.Pod) { p.Spec.Overhead = list("5", "") }, reason: "OutOfcpu", message: "requested: 5000"},
		{name: "huge pages", change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "hugepages-2Mi", "2Mi") }, reason: "OutOfhugepages-2Mi", message: "capacity: 0"},
		{name: "a resource that is no node's", change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "example.com/token", "1") }},
		{name: "a resource of the node's", node: func(n *Node) { n.Allocatable["example.com/gpu"] = resource.MustParse("1") },
			change: func(p *corev1.Pod) { requests(&p.Spec.Containers[0], "example.com/gpu", "2") }, reason: "OutOfexample.com/gpu", message: "requested: 2, used: 0, capacity: 1"},

		{name: "selector", change: func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "hdd"} },
			reason: "NodeAffinity", message: "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"},
		{name: "selector that matches", change: func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "ssd"} }},
		{name: "selector before the node is known", node: func(n *Node) { n.Object = nil }, change: func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "hdd"} }},
		{name: "affinity", change: func(p *corev1.Pod) {
			p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "disk", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"ssd"}}}}},
			}}}
		}, reason: "NodeAffinity", message: "affinity/selector"},
		{name: "affinity by name", change: func(p *corev1.Pod) {
			p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"n"}}}}},
			}}}
		}},
		{name: "somebody else's pod", change: func(p *corev1.Pod) { p.Spec.NodeName = "m" }, reason: "NodeName", message: "Predicate NodeName failed: node(s) didn't match the requested node name"},

		{name: "port", pods: []*corev1.Pod{onPort}, change: func(p *corev1.Pod) { withPort(&p.Spec.Containers[0], "", "", 8080) },
			reason: "NodePorts", message: "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"},
		{name: "port of a sidecar", pods: []*corev1.Pod{onPort}, change: func(p *corev1.Pod) {
			c := corev1.Container{Name: "s"}
			withPort(&c, "", corev1.ProtocolTCP, 8080)
			p.Spec.InitContainers = []corev1.Container{sidecar(c)}
		}, reason: "NodePorts", message: "free ports"},
		{name: "port of a sidecar of another's", pods: []*corev1.Pod{sidecarOnPort}, change: func(p *corev1.Pod) { withPort(&p.Spec.Containers[0], "", corev1.ProtocolTCP, 8080) }, reason: "NodePorts", message: "free ports"},
		{name: "port on every address of both families", pods: []*corev1.Pod{sidecarOnPort}, change: func(p *corev1.Pod) { withPort(&p.Spec.Containers[0], "::", corev1.ProtocolTCP, 8080) }, reason: "NodePorts", message: "free ports"},
		{name: "port on another address", pods: []*corev1.Pod{sidecarOnPort}, change: func(p *corev1.Pod) { withPort(&p.Spec.Containers[0], "10.0.0.2", corev1.ProtocolTCP, 8080) }},
		{name: "port of another protocol", pods: []*corev1.Pod{onPort}, change: func(p *corev1.Pod) { withPort(&p.Spec.Containers[0], "", corev1.ProtocolUDP, 8080) }},
		{name: "port of an init container that is over by then", pods: []*corev1.Pod{onPort}, change: func(p *corev1.Pod) {
			c := corev1.Container{Name: "i"}
			withPort(&c, "", corev1.ProtocolTCP, 8080)
			p.Spec.InitContainers = []corev1.Container{c}
		}},

		{name: "taint", node: func(n *Node) {
			n.Object.Spec.Taints = []corev1.Taint{{Key: "k", Value: "v", Effect: corev1.TaintEffectNoSchedule}, {Key: "k", Value: "v", Effect: corev1.TaintEffectNoExecute}}
		}, change: func(*corev1.Pod) {}, reason: "TaintToleration", message: "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate"},
		{name: "taint that is tolerated", node: func(n *Node) {
			n.Object.Spec.Taints = []corev1.Taint{{Key: "k", Value: "v", Effect: corev1.TaintEffectNoExecute}}
		}, change: func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Key: "k", Operator: corev1.TolerationOpEqual, Value: "v", Effect: corev1.TaintEffectNoExecute}}
		}},
		{name: "taint that is the scheduler's", node: func(n *Node) {
			n.Object.Spec.Taints = []corev1.Taint{{Key: "k", Effect: corev1.TaintEffectNoSchedule}}
		}, change: func(*corev1.Pod) {}},

		{name: "label of another system", change: func(p *corev1.Pod) { p.Labels = map[string]string{corev1.LabelOSStable: "windows"} },
			reason: "PodOSSelectorNodeLabelDoesNotMatch", message: "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label"},
		{name: "another system", change: func(p *corev1.Pod) { p.Spec.OS = &corev1.PodOS{Name: corev1.Windows} },
			reason: "PodOSNotSupported", message: "Failed to admit pod as the OS field doesn't match node OS"},
		{name: "strict groups", change: func(p *corev1.Pod) {
			p.Spec.SecurityContext.SupplementalGroupsPolicy = ptr.To(corev1.SupplementalGroupsPolicyStrict)
		}, reason: "SupplementalGroupsPolicyNotSupported", message: "SupplementalGroupsPolicy=Strict is not supported in this node"},
		{name: "unsafe sysctl", change: func(p *corev1.Pod) {
			p.Spec.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "kernel.msgmax", Value: "1"}}
		},
			reason: "SysctlForbidden", message: `forbidden sysctl: "kernel.msgmax" not allowlisted`},
		{name: "sysctl of the host's network", change: func(p *corev1.Pod) {
			p.Spec.HostNetwork, p.Spec.SecurityContext.Sysctls = true, []corev1.Sysctl{{Name: "net/ipv4/tcp_syncookies", Value: "1"}}
		}, reason: "SysctlForbidden", message: `forbidden sysctl: "net.ipv4.tcp_syncookies" not allowed with host Net enabled`},
		{name: "sysctl of a newer kernel", node: func(n *Node) { n.Kernel = version.MustParseGeneric("4.14") },
			change: func(p *corev1.Pod) {
				p.Spec.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "net.ipv4.tcp_rmem", Value: "1"}}
			},
			reason: "SysctlForbidden", message: "not allowlisted"},
		{name: "a pattern is no sysctl", change: func(p *corev1.Pod) {
			p.Spec.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "net.ipv4.*", Value: "1"}}
		}, reason: "SysctlForbidden", message: "not allowlisted"},
		{name: "as many mounts as there may be", change: func(p *corev1.Pod) { withSubPaths(p, maxMounts) }},
		{name: "mounts that would take all of the node's", change: func(p *corev1.Pod) { withSubPaths(p, maxMounts+1) },
			reason: "PodFeatureUnsupported", message: "1025 volumes and mounts with a subPath or recursiveReadOnly (1024 at most)"},
		{name: "users of its own on the node's network", change: func(p *corev1.Pod) { p.Spec.HostUsers, p.Spec.HostNetwork = ptr.To(false), true },
			reason: "PodFeatureUnsupported", message: "Pod requires node features that are not available: UserNamespacesHostNetworkSupport"},
		{name: "users of its own", change: func(p *corev1.Pod) { p.Spec.HostUsers = ptr.To(false) },
			reason: "PodFeatureUnsupported", message: "Pod requires node features that are not available: spec.hostUsers: false"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod, node := testPod(), testNode()
			node.Pods = tc.pods
			if tc.node != nil {
				tc.node(node)
			}
			tc.change(pod)
			r := Admit(pod, node)
			if tc.reason == "" {
				require.Nil(t, r)
				return
			}
			require.NotNil(t, r)
			require.Equal(t, tc.reason, r.Reason)
			require.Contains(t, r.Message, tc.message)
		})
	}
}

// Where the kernel has no AppArmor a profile is refused however it is asked for;
// upstream's check stops at the first annotation, in the order of a map.
func TestAppArmorAnnotations(t *testing.T) {
	t.Parallel()
	const prefix = corev1.DeprecatedAppArmorBetaContainerAnnotationKeyPrefix
	for _, tc := range []struct {
		annotations map[string]string
		refused     bool
	}{
		{map[string]string{prefix + "c": "unconfined"}, false},
		{map[string]string{prefix + "c": "runtime/default"}, true},
		{map[string]string{prefix + "a": "unconfined", prefix + "b": "unconfined", prefix + "c": "localhost/x", prefix + "d": "unconfined"}, true},
		{map[string]string{prefix + "c": "anything else"}, true},
	} {
		pod, node := testPod(), testNode()
		pod.Annotations = tc.annotations
		require.Nil(t, Admit(pod, node))
		node.AppArmor = errors.New("AppArmor is not enabled on the host")
		for range 20 {
			r := Admit(pod, node)
			require.Equal(t, tc.refused, r != nil, tc.annotations)
			if r != nil {
				require.Equal(t, Rejection{"AppArmor", "Cannot enforce AppArmor: AppArmor is not enabled on the host"}, *r)
			}
		}
	}
	pod := testPod()
	pod.Spec.Containers[0].SecurityContext.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeLocalhost, LocalhostProfile: ptr.To(" ")}
	require.Equal(t, "AppArmor", Admit(pod, testNode()).Reason)
}
