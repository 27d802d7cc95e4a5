package pod

import (
	"context"
	"fmt"
	"maps"
	"path"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
	"timonel/agent/cgroup"
)

// allocation is the resources that a pod was accepted with, or those that its cgroups
// have. The latter are in the pod's status, and so outlive the agent: a resize that one
// did not end is begun anew by the next.
type allocation struct {
	pod        *corev1.ResourceRequirements
	containers map[string]corev1.ResourceRequirements
}

// allocate is what pod asks for or, of a pod that runs, what its status says
// that it has.
func allocate(pod *corev1.Pod, st *corev1.PodStatus) *allocation {
	a := &allocation{pod: pod.Spec.Resources, containers: map[string]corev1.ResourceRequirements{}}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			a.containers[list[i].Name] = list[i].Resources
		}
	}
	if st == nil {
		return a
	}
	if st.Resources != nil {
		a.pod = st.Resources
	}
	for _, list := range [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses} {
		for i := range list {
			if have := list[i].Resources; have != nil {
				own := a.containers[list[i].Name]
				own.Requests, own.Limits = have.Requests, have.Limits
				a.containers[list[i].Name] = own
			}
		}
	}
	return a
}

// apply returns pod with the resources of a, and whether it asks for others.
func (a *allocation) apply(pod *corev1.Pod) (*corev1.Pod, bool) {
	if a == nil {
		return pod, false
	}
	same := equality.Semantic.DeepEqual(a.pod, pod.Spec.Resources)
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			same = same && equality.Semantic.DeepEqual(a.containers[list[i].Name], list[i].Resources)
		}
	}
	if same {
		return pod, false
	}
	out := *pod // shared with the store, which nobody changes
	out.Spec.Resources = a.pod
	replace := func(list []corev1.Container) []corev1.Container {
		list = append([]corev1.Container(nil), list...)
		for i := range list {
			list[i].Resources = a.containers[list[i].Name]
		}
		return list
	}
	out.Spec.InitContainers, out.Spec.Containers = replace(pod.Spec.InitContainers), replace(pod.Spec.Containers)
	return &out, true
}

func (a *allocation) equal(b *allocation) bool {
	return equality.Semantic.DeepEqual(a.pod, b.pod) && equality.Semantic.DeepEqual(a.containers, b.containers)
}

// with is a, but for what one container has.
func (a *allocation) with(name string, r corev1.ResourceRequirements) *allocation {
	out := &allocation{pod: a.pod, containers: maps.Clone(a.containers)}
	out.containers[name] = r
	return out
}

// resize holds what a pod asks for now against what the node has and who is there.
func (m *Manager) resize(w *worker, pod, latest *corev1.Pod) *admission.Rejection {
	m.admission.Lock()
	defer m.admission.Unlock()
	node := m.cfg.Node()
	node.Pods = m.accepted(w)
	if r := admission.Resize(pod, latest, &node); r != nil {
		return r
	}
	w.mu.Lock()
	w.want.give(allocate(latest, nil))
	w.mu.Unlock()
	m.weigh()
	return nil
}

// resizing says whether what the pod was given is not in force yet.
func resizing(w want, s *seen) bool {
	return s.applied != nil && w.given != nil && s.applied != w.given && !w.given.equal(s.applied)
}

// planResize gives what runs of a pod the resources that it was given, and says whether
// there is something to do for that now. What has to be started anew is stopped first,
// and waited for.
func planResize(w want, s *seen, b waits, now time.Time, p *pass) bool {
	if !p.resizing {
		return false
	}
	if e, put := b.held(waitResize, now); put {
		p.wakeAt(e.until)
		return false
	}
	before, _ := s.applied.apply(w.pod)
	r := resize{last: true}
	var kills []step
	for _, c := range s.running() {
		spec, old := specOf(w.pod, c.name), specOf(before, c.name)
		switch {
		case spec == nil || old == nil || equality.Semantic.DeepEqual(spec.Resources, old.Resources):
		case !restartsToResize(spec, old):
			r.containers = append(r.containers, c)
		default:
			r.last = false
			if s.beside[c.id].stopBy.IsZero() {
				k := kill{container: c, spec: spec, message: fmt.Sprintf("Container %s resize requires restart", c.name), forgive: true}
				k.grace = killGrace(w.pod, k)
				kills = append(kills, k)
			}
		}
	}
	if len(r.containers)+len(kills) == 0 && !r.last {
		return false
	}
	p.do(r)
	p.do(kills...)
	return true
}

func (w *worker) updateContainer(pod, before *corev1.Pod, spec, old *corev1.Container, c *container) error {
	now, was := containerResources(pod, spec, w.m.cfg.Capacity()), containerResources(before, old, w.m.cfg.Capacity())
	if err := checkMemory("container "+c.name, path.Join(cgroupParent(w.m.cfg.CgroupRoot, pod), c.id), was.MemoryLimitInBytes, now.MemoryLimitInBytes); err != nil {
		return err
	}
	// Zero leaves a limit as it is.
	if now.MemoryLimitInBytes == 0 {
		now.MemoryLimitInBytes = -1
	}
	if now.CpuQuota == 0 {
		now.CpuPeriod, now.CpuQuota = cpuPeriod, -1
	}
	now.OomScoreAdj, now.HugepageLimits = 0, nil // of a running process they stay
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	_, err := w.m.cfg.Runtime.UpdateContainerResources(ctx, &runtimev1.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: now})
	return err
}

// checkMemory refuses a limit below what is used: the kernel would kill for it.
func checkMemory(what, path string, was, now int64) error {
	if now == 0 || was != 0 && now >= was {
		return nil
	}
	used, err := cgroup.UsageOf(path)
	if err != nil {
		return fmt.Errorf("unable to read memory usage of %s: %w", what, err)
	}
	if used.Memory >= now {
		return fmt.Errorf("attempting to set %s memory limit (%d) below current usage (%d)", what, now, used.Memory)
	}
	return nil
}

func (w *worker) limitPod(path string, r *runtimev1.LinuxContainerResources) error {
	return cgroup.Apply(path, cgroup.Limits{
		CPUShares: r.CpuShares, CPUQuota: r.CpuQuota, CPUPeriod: r.CpuPeriod, Memory: r.MemoryLimitInBytes, Pids: w.m.cfg.MaxPids,
	})
}

// widest is what neither of two sets of limits is beyond; zero is no limit.
func widest(a, b *runtimev1.LinuxContainerResources) *runtimev1.LinuxContainerResources {
	limit := func(a, b int64) int64 {
		if a == 0 || b == 0 {
			return 0
		}
		return max(a, b)
	}
	return &runtimev1.LinuxContainerResources{
		CpuShares: max(a.CpuShares, b.CpuShares), CpuPeriod: cpuPeriod, CpuQuota: limit(a.CpuQuota, b.CpuQuota),
		MemoryLimitInBytes: limit(a.MemoryLimitInBytes, b.MemoryLimitInBytes),
	}
}

// restartsToResize says whether a container wants to be started anew for what changed.
func restartsToResize(spec, old *corev1.Container) bool {
	for _, p := range spec.ResizePolicy {
		if p.RestartPolicy != corev1.RestartContainer {
			continue
		}
		for _, lists := range [][2]corev1.ResourceList{{spec.Resources.Requests, old.Resources.Requests}, {spec.Resources.Limits, old.Resources.Limits}} {
			now, was := lists[0][p.ResourceName], lists[1][p.ResourceName]
			if now.Cmp(was) != 0 {
				return true
			}
		}
	}
	return false
}

// resizeConditions say what is still to be done of a resize, or why it will not be.
func resizeConditions(in statusInput) []corev1.PodCondition {
	var out []corev1.PodCondition
	if r := in.refusedResize; r != nil && in.resized {
		out = append(out, corev1.PodCondition{Type: corev1.PodResizePending, Status: corev1.ConditionTrue, Reason: r.Reason, Message: r.Message})
	}
	if in.resizing {
		c := corev1.PodCondition{Type: corev1.PodResizeInProgress, Status: corev1.ConditionTrue}
		if in.resizeError != "" {
			c.Reason, c.Message = corev1.PodReasonError, in.resizeError
		}
		out = append(out, c)
	}
	return out
}
