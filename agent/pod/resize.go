package pod

import (
	"context"
	"fmt"
	"maps"
	"path"

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

// resize gives the pod the other resources that it asks for, once the node has them. It
// says whether the pod is another one now. What the node cannot give yet, or ever, is
// said in a condition and an event, and the pod keeps what it has.
func (w *worker) resize(pod *corev1.Pod) bool {
	w.mu.Lock()
	latest, resized, accepted := w.latest, w.resized, w.accepted
	w.mu.Unlock()
	if !resized || !accepted {
		w.refusedResize = nil
		return false
	}
	r := w.m.resize(w, pod, latest)
	w.refusedResize = r
	if r != nil {
		w.eventOnce(pod, corev1.EventTypeWarning, "Resize"+r.Reason, fmt.Sprintf("Pod resize %s: %s (generation %d)", r.Reason, r.Message, latest.Generation), "")
		return false
	}
	w.event(pod, corev1.EventTypeNormal, "ResizeStarted", fmt.Sprintf("Pod resize started (generation %d)", latest.Generation), "")
	return true
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
	w.allocated = allocate(latest, nil)
	w.pod, w.resized = w.allocated.apply(w.latest)
	w.mu.Unlock()
	m.weigh()
	return nil
}

// actuate gives what runs of a pod the resources that it was accepted with.
func (w *worker) actuate(pod *corev1.Pod, obs *observed) {
	want := allocate(pod, nil)
	if w.applied == nil || want.equal(w.applied) {
		w.applied, w.resizing, w.resizeError = want, false, ""
		return
	}
	w.resizing = true
	if _, put := w.deferred("resize"); put {
		return
	}
	done, err := w.applyResize(pod, obs)
	if err != nil {
		if w.ctx.Err() == nil {
			w.resizeError = rpcText(err)
			w.eventOnce(pod, corev1.EventTypeWarning, "ResizeError", "Pod resize error: "+w.resizeError, "")
			w.putOff("resize", waiting{})
		}
		return
	}
	delete(w.retry, "resize")
	w.resizeError = ""
	if done {
		w.applied, w.resizing = want, false
		w.event(pod, corev1.EventTypeNormal, "ResizeCompleted", fmt.Sprintf("Pod resize completed (generation %d)", pod.Generation), "")
	}
}

// applyResize does what can be done now. It says whether that is all: a container that
// has to be started anew is stopped first.
func (w *worker) applyResize(pod *corev1.Pod, obs *observed) (done bool, err error) {
	before, _ := w.applied.apply(pod)
	now, was := podResources(pod), podResources(before)
	cgroupPath := cgroupParent(w.m.cfg.CgroupRoot, pod)
	if err := checkMemory("pod", cgroupPath, was.MemoryLimitInBytes, now.MemoryLimitInBytes); err != nil {
		return false, err
	}
	// While its containers change, the pod's own cgroup is as wide as before and after.
	if err := w.limitPod(cgroupPath, widest(was, now)); err != nil {
		return false, err
	}
	done = true
	for _, c := range obs.running() {
		spec, old := specOf(pod, c.name), specOf(before, c.name)
		if spec == nil || old == nil || equality.Semantic.DeepEqual(spec.Resources, old.Resources) {
			continue
		}
		if restartsToResize(spec, old) {
			w.restart[c.name] = &backOff{} // it did not fail
			k := kill{container: c, spec: spec, message: fmt.Sprintf("Container %s resize requires restart", c.name)}
			w.kill(pod, c, spec, k.message, killGrace(pod, k))
			done = false
			continue
		}
		if err := w.updateContainer(pod, before, spec, old, c); err != nil {
			return false, fmt.Errorf("container %s: %w", c.name, err)
		}
		w.applied = w.applied.with(c.name, spec.Resources)
	}
	if !done {
		return false, nil
	}
	return true, w.limitPod(cgroupPath, now)
}

// with is a, but for what one container has.
func (a *allocation) with(name string, r corev1.ResourceRequirements) *allocation {
	out := &allocation{pod: a.pod, containers: maps.Clone(a.containers)}
	out.containers[name] = r
	return out
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
	if r := in.refusedResize; r != nil {
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
