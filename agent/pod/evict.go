package pod

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/eviction"
)

// Active are the pods that hold a part of the node, with their last status.
func (m *Manager) Active() []*corev1.Pod {
	var out []*corev1.Pod
	for _, w := range m.all() {
		w.mu.Lock()
		active := w.known.accepted && !w.orphan && !w.known.over
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
	if w.want.evicted == nil {
		w.want.evicted = &e
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
	return w.known.swept
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
