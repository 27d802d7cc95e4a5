package pod

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/resource"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
)

const (
	cpuPeriod = 100_000 // microseconds
	minQuota  = 1_000
	minShares = 2
	maxShares = 262144
)

func cpuShares(milli int64) int64 {
	return min(max(milli*1024/1000, minShares), maxShares)
}

func cpuQuota(milli int64) int64 {
	if milli == 0 {
		return 0
	}
	return max(milli*cpuPeriod/1000, minQuota)
}

// containerResources are one container's limits for its cgroup.
func containerResources(pod *corev1.Pod, c *corev1.Container, capacity corev1.ResourceList) *runtimev1.LinuxContainerResources {
	request, limit := c.Resources.Requests.Cpu(), c.Resources.Limits.Cpu()
	milli := request.MilliValue()
	if _, has := c.Resources.Requests[corev1.ResourceCPU]; !has && !limit.IsZero() {
		milli = limit.MilliValue()
	}
	out := &runtimev1.LinuxContainerResources{
		CpuShares:          cpuShares(milli),
		MemoryLimitInBytes: c.Resources.Limits.Memory().Value(),
		OomScoreAdj:        oomScore(pod, c, capacity),
	}
	if quota := cpuQuota(limit.MilliValue()); quota > 0 {
		out.CpuPeriod, out.CpuQuota = cpuPeriod, quota
	}
	for name, q := range c.Resources.Limits {
		var size string
		if n, err := fmt.Sscanf(string(name), corev1.ResourceHugePagesPrefix+"%s", &size); n == 1 && err == nil {
			out.HugepageLimits = append(out.HugepageLimits, &runtimev1.HugepageLimit{PageSize: size + "B", Limit: uint64(q.Value())})
		}
	}
	return out
}

// oomScore is how willingly the kernel kills a container for want of memory:
// what asked for more memory is killed later.
func oomScore(pod *corev1.Pod, c *corev1.Container, capacity corev1.ResourceList) int64 {
	const guaranteed, bestEffort = -997, 1000
	switch qos.GetPodQOS(pod) {
	case corev1.PodQOSGuaranteed:
		return guaranteed
	case corev1.PodQOSBestEffort:
		return bestEffort
	}
	total := capacity.Memory().Value()
	if total == 0 {
		return bestEffort - 1
	}
	score := bestEffort - bestEffort*c.Resources.Requests.Memory().Value()/total
	return min(max(score, bestEffort+guaranteed), bestEffort-1)
}

// podResources are the limits of the whole pod, as its cgroup has them: of what
// all containers have a limit of, the sum; of cpu requests, the sum.
func podResources(pod *corev1.Pod) *runtimev1.LinuxContainerResources {
	requests := resource.PodRequests(pod, resource.PodResourcesOptions{})
	limits := resource.PodLimits(pod, resource.PodResourcesOptions{})
	out := &runtimev1.LinuxContainerResources{CpuShares: cpuShares(requests.Cpu().MilliValue())}
	cpu, memory := true, true
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if list[i].Resources.Limits.Cpu().IsZero() {
				cpu = false
			}
			if list[i].Resources.Limits.Memory().IsZero() {
				memory = false
			}
		}
	}
	if cpu {
		out.CpuPeriod, out.CpuQuota = cpuPeriod, cpuQuota(limits.Cpu().MilliValue())
	}
	if memory {
		out.MemoryLimitInBytes = limits.Memory().Value()
	}
	return out
}
