package pod

import (
	"path"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"timonel/agent/cgroup"
)

// weights are the CPU shares of the cgroups that classes of pods are in.
// Guaranteed pods are beside them, each with its own.
type weights struct {
	all, burstable, bestEffort int64
}

// classWeights are upstream's: all best-effort pods together have the least
// that there is, all burstable ones what they request, and all pods what the
// node has. Without that, what no pod asked for would weigh as much as what
// somebody did.
func classWeights(pods []*corev1.Pod, capacity corev1.ResourceList) weights {
	var burstable int64
	for _, p := range pods {
		if qos.GetPodQOS(p) == corev1.PodQOSBurstable {
			requests := resource.PodRequests(p, resource.PodResourcesOptions{})
			burstable += requests.Cpu().MilliValue()
		}
	}
	return weights{all: cpuShares(capacity.Cpu().MilliValue()), burstable: cpuShares(burstable), bestEffort: minShares}
}

// weigh brings the classes' weights up to date. m.admission is held.
func (m *Manager) weigh() {
	want := classWeights(m.accepted(nil), m.cfg.Capacity())
	if m.weights == want {
		return
	}
	root := m.cfg.CgroupRoot
	for _, c := range []struct {
		path   string
		shares int64
	}{
		{root, want.all}, {path.Join(root, "burstable"), want.burstable}, {path.Join(root, "besteffort"), want.bestEffort},
	} {
		if err := cgroup.Weigh(c.path, c.shares); err != nil {
			m.log.Warn("set the CPU weight of a class of pods; trying again with the next pod", "cgroup", c.path, "error", err)
			return
		}
	}
	m.weights = want
}
