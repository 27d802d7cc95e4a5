package pod

import (
	"context"
	"fmt"
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

// reclaimTime is how long RemoveEnded waits for the pods' workers.
const reclaimTime = 20 * time.Second

// RemoveEnded removes containers that have ended: all of pods that have, and of
// others those that are not the newest of their name. Only their logs are lost.
func (m *Manager) RemoveEnded(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reclaimTime)
	defer cancel()
	var waits []chan struct{}
	for _, w := range m.all() {
		w.mu.Lock()
		if w.reclaim == nil {
			w.reclaim = make(chan struct{})
		}
		waits = append(waits, w.reclaim)
		w.mu.Unlock()
		w.wakeUp()
	}
	for i, done := range waits {
		select {
		case <-done:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d pods have not answered: %w", len(waits)-i, len(waits), ctx.Err())
		}
	}
	return nil
}

// reclaimed takes that containers which have ended are to be removed now; done is
// to be called when they are.
func (w *worker) reclaimed() (wanted bool, done func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.reclaim == nil {
		return false, func() {}
	}
	ch := w.reclaim
	w.reclaim = nil
	return true, func() { close(ch) }
}

// removeEnded removes the containers and sandboxes of a pod that has ended.
func (w *worker) removeEnded(obs *observed) {
	for _, c := range flatten(obs) {
		if c.running() || !w.removeContainer(c) {
			return
		}
	}
	for _, s := range obs.sandboxes {
		w.removeSandbox(s.id)
	}
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
