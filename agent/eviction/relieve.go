package eviction

import (
	"context"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// measureTime bounds the measuring of all pods before one is evicted. Of what
	// is larger than can be measured in it, what was counted until then counts.
	measureTime = 20 * time.Second
	// cleanupTime is how long it waits for what an evicted pod had before it looks
	// for another one, as upstream's.
	cleanupTime = 30 * time.Second
	// tellAgain is how long the cluster is not told the same again.
	tellAgain = time.Minute
)

// Conditions are those that the Node has for what it is short of.
func (m *Manager) Conditions() []corev1.NodeConditionType {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conditions
}

// Look sees how the node is, and does nothing about it. Call it before Run, so
// that the first thing that is said of the node is true.
func (m *Manager) Look(ctx context.Context) {
	m.look(ctx)
}

func (m *Manager) look(ctx context.Context) (Decision, Observations) {
	seen, ownImages := m.cfg.Node.Observe(ctx)
	var d Decision
	m.pressure, d = m.pressure.Next(m.cfg.Thresholds, seen, m.cfg.Transition, time.Now())
	m.mu.Lock()
	changed := !slices.Equal(m.conditions, d.Conditions)
	m.conditions, m.ownImages = d.Conditions, ownImages
	m.mu.Unlock()
	if changed {
		m.log.Warn("what the node is short of has changed", "conditions", d.Conditions)
		m.cfg.Node.Changed()
	}
	return d, seen
}

// relieve looks at the node, and when it is short of something frees what can be
// freed without harm, or else evicts one pod. It waits until that is gone.
func (m *Manager) relieve(ctx context.Context) {
	d, seen := m.look(ctx)
	if len(d.Short) == 0 || ctx.Err() != nil {
		return
	}
	at := d.Short[0]
	if now := time.Now(); at.Signal != m.toldOf || now.Sub(m.told) >= tellAgain {
		m.told, m.toldOf = now, at.Signal
		m.cfg.Node.Event(corev1.EventTypeWarning, "EvictionThresholdMet", "Attempting to reclaim "+string(at.Signal.resource()))
	}
	m.mu.Lock()
	ownImages := m.ownImages
	m.mu.Unlock()
	if m.free(ctx, at.Signal, ownImages) {
		return
	}
	pods := m.candidates()
	usage, err := m.measure(ctx, pods, at.Signal)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		m.log.Warn("measure what pods take; evicting by what is known", "error", err)
	}
	ranked := Rank(at.Signal, pods, usage, ownImages)
	if len(ranked) == 0 {
		m.log.Error("the node is short of something and has no pod that could be evicted", "signal", at.Signal, "available", seen[at.Signal].Available)
		return
	}
	e := Starved(ranked[0], usage[ranked[0].UID], at, d.Short, seen)
	m.cfg.Pods.Evict(e)
	m.ending[e.Pod.UID] = time.Now()
	m.awaitGone(ctx, e.Pod.UID)
}

// free frees what can be freed without evicting anybody, and says whether that
// was enough.
func (m *Manager) free(ctx context.Context, signal Signal, ownImages bool) bool {
	// Where images are on a file system of their own, nothing but pods is on the
	// other one.
	if !signal.disk() || ownImages && (signal == NodeFsAvailable || signal == NodeFsInodesFree) {
		return false
	}
	if err := m.cfg.Pods.RemoveEnded(ctx); err != nil {
		m.log.Warn("remove containers that have ended", "error", err)
	}
	if err := m.cfg.Node.RemoveImages(ctx); err != nil {
		m.log.Warn("remove images that no pod uses", "error", err)
	}
	seen, _ := m.cfg.Node.Observe(ctx)
	return Relieved(m.cfg.Thresholds, seen)
}

// candidates are the pods of which one may be evicted: not those that are being
// evicted already and take long to end.
func (m *Manager) candidates() []*corev1.Pod {
	for uid := range m.ending {
		if m.cfg.Pods.Gone(uid) {
			delete(m.ending, uid)
		}
	}
	return slices.DeleteFunc(slices.Clone(m.cfg.Pods.Active()), func(p *corev1.Pod) bool {
		_, ending := m.ending[p.UID]
		return ending
	})
}

// measure measures what the ranking by a signal needs to know of pods.
func (m *Manager) measure(ctx context.Context, pods []*corev1.Pod, signal Signal) (map[types.UID]*Usage, error) {
	running, firstErr := m.cfg.Pods.Running(ctx)
	ctx, cancel := context.WithTimeout(ctx, m.measureTime)
	defer cancel()
	out := make(map[types.UID]*Usage, len(pods))
	var mu sync.Mutex
	var wg sync.WaitGroup
	keep := func(pod *corev1.Pod, u *Usage, err error) {
		mu.Lock()
		defer mu.Unlock()
		out[pod.UID] = u
		if err != nil && firstErr == nil && ctx.Err() == nil {
			firstErr = err
		}
	}
	for _, pod := range pods {
		containers := running[pod.UID]
		if !signal.disk() {
			u := &Usage{UID: pod.UID}
			if err := m.cfg.Pods.MeasureMemory(pod, containers, u); err != nil {
				firstErr = err
				continue // upstream: what is not known comes first
			}
			out[pod.UID] = u
			continue
		}
		wg.Go(func() {
			var u Usage // if its turn never comes, nothing of it is known to be large
			var err error
			if workErr := m.pacer.work(ctx, func(pause func() error) {
				u, err = m.cfg.Pods.MeasureDisk(ctx, pod, containers, Stop{Pause: pause})
			}); workErr != nil {
				err = workErr
			}
			keep(pod, &u, err)
		})
	}
	wg.Wait()
	return out, firstErr
}

// awaitGone waits until nothing is left of a pod, for a while.
func (m *Manager) awaitGone(ctx context.Context, uid types.UID) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTime)
	defer cancel()
	for !m.cfg.Pods.Gone(uid) {
		if sleep(ctx, 100*time.Millisecond) != nil {
			return
		}
	}
}
