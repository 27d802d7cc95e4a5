package pod

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/apimachinery/pkg/api/resource"
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

// limitOf is a container's limit or, where it has none, its pod's.
func limitOf(pod *corev1.Pod, c *corev1.Container, name corev1.ResourceName) resourceapi.Quantity {
	limit := c.Resources.Limits[name]
	if limit.IsZero() && pod.Spec.Resources != nil {
		limit = pod.Spec.Resources.Limits[name]
	}
	return limit
}

// containerResources are one container's limits for its cgroup.
func containerResources(pod *corev1.Pod, c *corev1.Container, capacity corev1.ResourceList) *runtimev1.LinuxContainerResources {
	cpu, memory := limitOf(pod, c, corev1.ResourceCPU), limitOf(pod, c, corev1.ResourceMemory)
	milli := c.Resources.Requests.Cpu().MilliValue()
	if _, has := c.Resources.Requests[corev1.ResourceCPU]; !has && !cpu.IsZero() {
		milli = cpu.MilliValue()
	}
	out := &runtimev1.LinuxContainerResources{
		CpuShares:          cpuShares(milli),
		MemoryLimitInBytes: memory.Value(),
		OomScoreAdj:        oomScore(pod, c, capacity),
	}
	if quota := cpuQuota(cpu.MilliValue()); quota > 0 {
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
// what asked for more memory is killed later. What the pod requests beyond its
// containers counts for each of them in equal parts, and a sidecar is not killed
// before those that it serves.
func oomScore(pod *corev1.Pod, c *corev1.Container, capacity corev1.ResourceList) int64 {
	const guaranteed, bestEffort = -997, 1000
	if pod.Spec.PriorityClassName == nodeCritical {
		return guaranteed
	}
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
	asked := c.Resources.Requests.Memory().Value()
	if sidecar(c) && len(pod.Spec.Containers) > 0 {
		least := pod.Spec.Containers[0].Resources.Requests.Memory().Value()
		for i := range pod.Spec.Containers {
			least = min(least, pod.Spec.Containers[i].Resources.Requests.Memory().Value())
		}
		asked = max(asked, least)
	}
	score := bestEffort - bestEffort*(asked+sharedMemory(pod))/total
	return min(max(score, bestEffort+guaranteed), bestEffort-1)
}

// nodeCritical is the priority class of what a node cannot do without.
const nodeCritical = "system-node-critical"

// sharedMemory is each container's part of what a pod's own memory request has
// beyond those of its containers.
func sharedMemory(pod *corev1.Pod) int64 {
	if pod.Spec.Resources == nil || pod.Spec.Resources.Requests.Memory().IsZero() {
		return 0
	}
	rest, n := pod.Spec.Resources.Requests.Memory().Value(), int64(0)
	add := func(c *corev1.Container) {
		rest -= c.Resources.Requests.Memory().Value()
		n++
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; sidecar(c) {
			add(c)
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	return max(rest, 0) / max(n, 1)
}

// podResources are the limits of the whole pod, as its cgroup has them: the
// pod's own, else of what all containers have a limit of, the sum; of cpu
// requests, the sum.
func podResources(pod *corev1.Pod) *runtimev1.LinuxContainerResources {
	return sumResources(pod, resource.PodResourcesOptions{})
}

// sandboxResources are the same without what running the pod takes besides: the runtime is
// told of both.
func sandboxResources(pod *corev1.Pod) *runtimev1.LinuxContainerResources {
	return sumResources(pod, resource.PodResourcesOptions{ExcludeOverhead: true})
}

func sumResources(pod *corev1.Pod, opts resource.PodResourcesOptions) *runtimev1.LinuxContainerResources {
	requests, limits := resource.PodRequests(pod, opts), resource.PodLimits(pod, opts)
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
	if own := pod.Spec.Resources; own != nil {
		cpu = cpu || !own.Limits.Cpu().IsZero()
		memory = memory || !own.Limits.Memory().IsZero()
	}
	if cpu {
		out.CpuPeriod, out.CpuQuota = cpuPeriod, cpuQuota(limits.Cpu().MilliValue())
	}
	if memory {
		out.MemoryLimitInBytes = limits.Memory().Value()
	}
	return out
}

// overhead is what running the pod takes besides, for the runtime to know.
func overhead(pod *corev1.Pod) *runtimev1.LinuxContainerResources {
	if len(pod.Spec.Overhead) == 0 {
		return nil
	}
	cpu, memory := pod.Spec.Overhead.Cpu().MilliValue(), pod.Spec.Overhead.Memory().Value()
	out := &runtimev1.LinuxContainerResources{CpuShares: cpuShares(cpu), MemoryLimitInBytes: memory}
	if quota := cpuQuota(cpu); quota > 0 {
		out.CpuPeriod, out.CpuQuota = cpuPeriod, quota
	}
	return out
}
