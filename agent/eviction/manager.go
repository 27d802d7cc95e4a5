package eviction

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Interval is how often a node looks, as upstream's.
const Interval = 10 * time.Second

// restFactor is how much longer than it took a measuring waits for the next one
// of the same pod: what makes itself large to measure is measured less often.
const restFactor = 5

// Eviction is a pod to be ended.
type Eviction struct {
	Pod     *corev1.Pod
	Message string
	// Annotations are the event's.
	Annotations map[string]string
	// Disruption says that the pod did nothing that it may not.
	Disruption bool
}

// Pods are those of a node.
type Pods interface {
	// Active are those that hold a part of the node.
	Active() []*corev1.Pod
	// Running are the containers that run.
	Running(context.Context) (Running, error)
	// MeasureDisk measures what a pod takes of the node's disk.
	MeasureDisk(context.Context, *corev1.Pod, []Container, Stop) (Usage, error)
	// MeasureMemory adds to a usage what a pod takes of memory and process ids.
	MeasureMemory(*corev1.Pod, []Container, *Usage) error
	// RemoveEnded removes containers that have ended, where nothing is lost but
	// their logs.
	RemoveEnded(context.Context) error
	// Evict ends a pod. It does not wait.
	Evict(Eviction)
	// Gone says whether nothing is left of a pod that was evicted.
	Gone(types.UID) bool
}

// Node is what the pods are on.
type Node interface {
	// Observe sees how much of everything is left, of what can be seen, and whether
	// images and containers' layers are on a file system of their own.
	Observe(context.Context) (seen Observations, ownImages bool)
	// RemoveImages removes images that no pod uses.
	RemoveImages(context.Context) error
	// Changed is called when the node's conditions have.
	Changed()
	// Event tells the cluster about the node.
	Event(eventType, reason, message string)
}

// Config is what a manager works with.
type Config struct {
	Pods Pods
	Node Node
	// Thresholds say of how little being left is too little; none: nothing is
	// evicted for the node's sake.
	Thresholds []Threshold
	// Transition is for how long a condition stays after it was seen last.
	Transition time.Duration
	// Interval is how often it looks. Default: Interval.
	Interval time.Duration
	Logger   *slog.Logger
}

// Manager sees to it that pods take no more of a node than they may.
type Manager struct {
	cfg   Config
	log   *slog.Logger
	pacer *pacer
	wg    sync.WaitGroup

	mu         sync.Mutex
	measured   map[types.UID]*measuring
	conditions []corev1.NodeConditionType
	ownImages  bool

	// The rest belongs to Run.
	measureTime time.Duration // measureTime but in tests
	pressure    Pressure
	ending      map[types.UID]time.Time // evicted for the node's sake, when
	told        time.Time               // when the cluster was told of what
	toldOf      Signal
}

// measuring is that of one pod that has limits.
type measuring struct {
	running bool
	next    time.Time
	seen    bool // it is one of the node's, in this pass
}

// New returns a manager that does nothing until Run.
func New(cfg Config) *Manager {
	if cfg.Interval == 0 {
		cfg.Interval = Interval
	}
	return &Manager{
		cfg: cfg, log: cfg.Logger.With("component", "eviction"), pacer: newPacer(), measured: map[types.UID]*measuring{},
		ending: map[types.UID]time.Time{}, measureTime: measureTime,
	}
}

// Run works until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { m.enforceAll(ctx) })
	for sleep(ctx, m.cfg.Interval) == nil {
		m.relieve(ctx)
	}
	return nil
}

// enforceAll enforces pods' own limits until ctx ends.
func (m *Manager) enforceAll(ctx context.Context) {
	defer m.wg.Wait()
	for sleep(ctx, m.cfg.Interval) == nil {
		if err := m.enforce(ctx); err != nil && ctx.Err() == nil {
			m.log.Warn("measure what pods take of the disk", "error", err)
		}
	}
}

// enforce measures pods that have limits, and evicts those that are over one.
// Each is measured by a goroutine of its own, which no other waits for.
func (m *Manager) enforce(ctx context.Context) error {
	now := time.Now()
	var due []*corev1.Pod
	m.mu.Lock()
	for _, pod := range m.cfg.Pods.Active() {
		if Critical(pod) || LimitsOf(pod) == nil {
			continue
		}
		w := m.measured[pod.UID]
		if w == nil {
			w = &measuring{}
			m.measured[pod.UID] = w
		}
		w.seen = true
		if !w.running && !now.Before(w.next) {
			due = append(due, pod)
		}
	}
	for uid, w := range m.measured {
		if !w.seen && !w.running {
			delete(m.measured, uid)
		}
		w.seen = false
	}
	m.mu.Unlock()
	if len(due) == 0 {
		return nil
	}
	running, err := m.cfg.Pods.Running(ctx)
	if err != nil {
		return err
	}
	for _, pod := range due {
		m.mu.Lock()
		m.measured[pod.UID].running = true
		m.mu.Unlock()
		m.wg.Go(func() { m.enforceOne(ctx, pod, running[pod.UID]) })
	}
	return nil
}

func (m *Manager) enforceOne(ctx context.Context, pod *corev1.Pod, containers []Container) {
	began := time.Now()
	var u Usage
	var err error
	limits := LimitsOf(pod)
	if workErr := m.pacer.work(ctx, func(pause func() error) {
		began = time.Now()
		u, err = m.cfg.Pods.MeasureDisk(ctx, pod, containers, limits.stop(pause))
	}); workErr != nil {
		err = workErr
	}
	took := time.Since(began)
	m.mu.Lock()
	m.measured[pod.UID].running = false
	m.measured[pod.UID].next = time.Now().Add(restFactor*took - m.cfg.Interval)
	m.mu.Unlock()
	if err != nil {
		if ctx.Err() != nil {
			return
		}
		// What was measured is there at least.
		m.log.Warn("measure what a pod takes of the disk", "pod", pod.Namespace+"/"+pod.Name, "uid", pod.UID, "error", err)
	}
	m.mu.Lock()
	ownImages := m.ownImages
	m.mu.Unlock()
	if message, over := OverLimit(pod, &u, ownImages); over {
		m.cfg.Pods.Evict(Eviction{Pod: pod, Message: message})
	}
}

// stop is when enough is known of a pod that has these limits.
func (l *Limits) stop(pause func() error) Stop {
	s := Stop{Volumes: map[string]int64{}, Containers: map[string]int64{}, Pause: pause}
	for name, q := range l.Volumes {
		s.Volumes[name] = q.Value()
	}
	for name, q := range l.Containers {
		s.Containers[name] = q.Value()
	}
	if l.Pod != nil {
		s.Pod = max(l.Pod.Value(), 1)
	}
	return s
}
