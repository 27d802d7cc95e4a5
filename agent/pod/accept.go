package pod

import (
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/admission"
)

// admit decides once, before anything of the pod is started, whether this node
// takes it. A pod that is not taken has failed for good. One that was started
// already, by this agent or one before it, is not asked about again; when it
// has a field that this agent refuses, an event says so and it goes on.
func (w *worker) admit(pod *corev1.Pod, obs *observed) {
	if w.asked || w.verdict != nil || terminal(pod.Status.Phase) || terminal(w.oldStatus(pod).Phase) {
		return
	}
	w.asked = true
	w.mu.Lock()
	accepted := w.accepted
	w.mu.Unlock()
	if accepted || len(obs.sandboxes) > 0 || len(obs.containers) > 0 {
		w.m.take(w, pod)
		node := w.m.cfg.Node()
		if r := admission.Refuse(pod, &node); r != nil {
			w.event(pod, corev1.EventTypeWarning, admission.ReasonUnsupported,
				"The pod was started by an agent that did not refuse this; it goes on without: "+r.Message, "")
		}
		return
	}
	r := w.m.admit(w, pod)
	if r == nil {
		return
	}
	w.verdict = &verdict{reason: r.Reason, message: "Pod was rejected: " + r.Message, rejected: true}
	w.event(pod, corev1.EventTypeWarning, r.Reason, r.Message, "")
}

// admit holds a pod against what the node has and who is there already. Pods
// are admitted one at a time, or two would get the same place.
func (m *Manager) admit(w *worker, pod *corev1.Pod) *admission.Rejection {
	m.admission.Lock()
	defer m.admission.Unlock()
	node := m.cfg.Node()
	node.Pods = m.accepted(w)
	if r := admission.Admit(pod, &node); r != nil {
		return r
	}
	w.accept(pod)
	m.weigh()
	return nil
}

// take accepts a pod that was started before.
func (m *Manager) take(w *worker, pod *corev1.Pod) {
	m.admission.Lock()
	defer m.admission.Unlock()
	w.accept(pod)
	m.weigh()
}

// ended gives back what a pod had of the node, for which others may wait.
func (m *Manager) ended() {
	m.admission.Lock()
	defer m.admission.Unlock()
	m.weigh()
	for _, w := range m.all() {
		w.mu.Lock()
		waits := w.resized
		w.mu.Unlock()
		if waits {
			w.wakeUp()
		}
	}
}

// accepted are the pods that hold a part of the node, without those of but.
func (m *Manager) accepted(but *worker) []*corev1.Pod {
	var out []*corev1.Pod
	for _, w := range m.all() {
		if w == but {
			continue
		}
		w.mu.Lock()
		if w.accepted && !w.orphan && !w.removed && !w.over {
			out = append(out, w.pod)
		}
		w.mu.Unlock()
	}
	return out
}

// accept makes the pod one of the node's, with the resources that it has now.
func (w *worker) accept(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.accepted {
		return
	}
	w.accepted = true
	w.allocated = allocate(pod, nil)
	w.pod, w.resized = w.allocated.apply(w.latest)
}

// wasStarted says whether a status tells of a container that ran or of a
// sandbox.
func wasStarted(st *corev1.PodStatus) bool {
	if st.PodIP != "" {
		return true
	}
	for _, list := range [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses} {
		for i := range list {
			if list[i].ContainerID != "" || list[i].LastTerminationState.Terminated != nil {
				return true
			}
		}
	}
	return false
}
