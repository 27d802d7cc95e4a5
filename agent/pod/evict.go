package pod

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/eviction"
)

// evictGrace is for how long containers of an evicted pod may take to end, as
// upstream's: what they hold is needed.
const evictGrace = time.Second

// Active are the pods that hold a part of the node, with their last status.
func (m *Manager) Active() []*corev1.Pod {
	var out []*corev1.Pod
	for _, w := range m.all() {
		w.mu.Lock()
		active := w.accepted && !w.orphan && !w.over
		w.mu.Unlock()
		if pod := w.snapshot(); active && pod != nil {
			out = append(out, pod)
		}
	}
	return out
}

// Evict ends a pod for what it takes of the node: it is Failed for good, and
// what it has on the node is removed. It does not wait.
func (m *Manager) Evict(e eviction.Eviction) {
	m.mu.Lock()
	w := m.workers[e.Pod.UID]
	m.mu.Unlock()
	if w == nil {
		return
	}
	w.mu.Lock()
	if w.evicted == nil {
		w.evicted = &e
	}
	w.mu.Unlock()
	w.wakeUp()
}

// Gone says whether nothing is left of a pod that was evicted.
func (m *Manager) Gone(uid types.UID) bool {
	m.mu.Lock()
	w := m.workers[uid]
	m.mu.Unlock()
	if w == nil {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.swept
}

// checkEvicted makes the verdict of a pod that is evicted.
func (w *worker) checkEvicted(pod *corev1.Pod) {
	w.mu.Lock()
	e := w.evicted
	w.mu.Unlock()
	if e == nil || w.verdict != nil || terminal(pod.Status.Phase) || terminal(w.oldStatus(pod).Phase) {
		return
	}
	w.verdict = &verdict{reason: eviction.Reason, message: e.Message, disruption: e.Disruption, grace: evictGrace}
	w.log.Warn("evicting the pod", "message", e.Message)
	w.annotatedEvent(pod, corev1.EventTypeWarning, eviction.Reason, e.Message, "", e.Annotations)
}

// sweep frees what a pod that has ended, and is not deleted yet, has on the
// node: its volumes, and of one that was evicted, which is to free room, its
// containers and their logs too.
func (w *worker) sweep(pod *corev1.Pod, obs *observed) {
	w.mu.Lock()
	swept := w.swept
	w.mu.Unlock()
	if swept {
		return
	}
	if w.oldStatus(pod).Reason == eviction.Reason {
		if !w.clean(pod, obs) {
			return
		}
	} else if err := w.m.volumes.Release(w.ctx, w.uid); err != nil {
		w.log.Warn("remove the volumes of a pod that has ended", "error", err)
		w.again(w.m.cfg.Now().Add(10 * time.Second))
		return
	}
	w.mu.Lock()
	w.swept = true
	w.mu.Unlock()
}
