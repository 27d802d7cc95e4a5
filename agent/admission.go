package agent

import (
	"log/slog"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/security/apparmor"
	"k8s.io/kubernetes/pkg/util/kernel"

	"timonel/agent/admission"
	"timonel/agent/containerd"
	"timonel/agent/hostile"
	"timonel/agent/node"
	"timonel/network/feed"
)

// kernelFacts are what this machine's kernel can do for pods.
type kernelFacts struct {
	version  *version.Version
	appArmor error // why profiles cannot be enforced
	seLinux  bool
}

func readKernel(log *slog.Logger) kernelFacts {
	k := kernelFacts{appArmor: apparmor.NewValidator().ValidateHost()}
	var err error
	if k.version, err = kernel.GetVersion(); err != nil {
		log.Warn("the kernel's version is not known: sysctls that depend on it are refused", "error", err)
	}
	_, err = hostile.Stat("/sys/fs/selinux/enforce")
	k.seLinux = err == nil
	return k
}

// runtimeCan is what containerd and its runtimes can do for pods.
type runtimeCan struct {
	handlers     []corev1.NodeRuntimeHandler
	groupsPolicy bool
}

func (a *Agent) runtimeCan(st *runtimev1.StatusResponse) runtimeCan {
	besides := slices.Sorted(maps.Keys(a.cfg.RuntimeHandlers))
	return runtimeCan{
		handlers:     node.Handlers(&a.facts, st.GetRuntimeHandlers(), append(besides, containerd.DefaultHandler)...),
		groupsPolicy: st.GetFeatures().GetSupplementalGroupsPolicy(),
	}
}

func hasUserNamespaces(h corev1.NodeRuntimeHandler) bool { return *h.Features.UserNamespaces }

// userNamespaces says whether pods of a runtime can have user namespaces of their own.
func (a *Agent) userNamespaces(handler string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.can.handlers, func(h corev1.NodeRuntimeHandler) bool { return h.Name == handler && hasUserNamespaces(h) })
}

// setLive takes this node's object as the API has it.
func (a *Agent) setLive(n *corev1.Node) {
	a.mu.Lock()
	old := a.live
	a.live = n
	zone := n.Labels[corev1.LabelTopologyZone]
	a.known.Update(func(t *feed.Txn) { t.SetZone(zone) })
	a.mu.Unlock()
	if old == nil || !slices.Equal(old.Status.VolumesInUse, n.Status.VolumesInUse) || !slices.Equal(old.Status.VolumesAttached, n.Status.VolumesAttached) {
		a.csi.Look()
	}
}

// admissionNode is what new pods are held against. What the machine has is what
// the agent sees; resources of others' making are as the API has them.
func (a *Agent) admissionNode() admission.Node {
	a.mu.Lock()
	defer a.mu.Unlock()
	allocatable := maps.Clone(a.node.Status.Allocatable)
	if a.live != nil {
		for name, q := range a.live.Status.Allocatable {
			if strings.Contains(string(name), "/") {
				allocatable[name] = q
			}
		}
	}
	return admission.Node{
		Name: a.cfg.Name, Allocatable: allocatable, Object: a.live, Pressure: a.evict.Conditions(),
		UserNamespaces: slices.ContainsFunc(a.can.handlers, hasUserNamespaces), GroupsPolicy: a.can.groupsPolicy,
		AppArmor: a.kernel.appArmor, SELinux: a.kernel.seLinux, Kernel: a.kernel.version, UnsafeSysctls: a.cfg.UnsafeSysctls,
	}
}
