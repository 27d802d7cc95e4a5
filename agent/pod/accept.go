package pod

import (
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/admission"
)

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
	if w.known.applied == nil {
		w.known.applied = w.want.given
	}
	m.weigh()
}

// ended gives back what a pod had of the node, for which others may wait.
func (m *Manager) ended() {
	m.admission.Lock()
	defer m.admission.Unlock()
	m.weigh()
	for _, w := range m.all() {
		w.mu.Lock()
		waits := w.want.resized
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
		if w.known.accepted && !w.orphan && !w.want.removed && !w.known.over {
			out = append(out, w.want.pod)
		}
		w.mu.Unlock()
	}
	return out
}

// accept makes the pod one of the node's, with the resources that it has now.
func (w *worker) accept(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known.accepted {
		return
	}
	w.known.accepted = true
	w.want.give(allocate(pod, nil))
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
