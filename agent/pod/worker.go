package pod

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/image"
)

const (
	// maxLooks bounds how often one pass asks CRI again right after it acted, maxPlans
	// how often it plans anew: each step ends or is put off, so that more is a mistake.
	maxLooks = 8
	maxPlans = 100
)

// worker runs one pod: it looks, plans and acts, in one goroutine. See doc.go.
type worker struct {
	m      *Manager
	uid    types.UID
	log    *slog.Logger
	wake   chan struct{}
	orphan bool // made from what was found on the node, not from a v1.Pod
	wg     sync.WaitGroup

	// Shared with whoever wants something of the pod, and with what goes on around its
	// containers.
	mu        sync.Mutex
	want      want
	hurry     bool // what is put off may be tried now
	imageWait bool
	giveUp    context.CancelFunc // ends what is being made for a pod that is to end; nil: nothing is
	exits     exits
	around    map[string]*around // by container id
	told      told
	reclaim   chan struct{}     // closed when what has ended was removed; nil: it stays
	status    *corev1.PodStatus // last computed

	// The goroutine's own. Of known others read some, under mu.
	ctx      context.Context
	observer observer
	probes   *prober
	known    known
	waits    waits
	next     time.Time // when to look again without being woken
	reported []byte
}

func newWorker(m *Manager, pod *corev1.Pod) *worker {
	w := &worker{
		m: m, uid: pod.UID, log: m.log.With("pod", pod.Namespace+"/"+pod.Name, "uid", pod.UID),
		wake: make(chan struct{}, 1), want: want{pod: pod, api: pod, shown: 1},
		exits: exits{by: map[string]*exit{}}, around: map[string]*around{}, told: told{said: map[string]string{}},
		observer: observer{runtime: m.cfg.Runtime, uid: pod.UID},
		known:    known{stopped: map[string]bool{}}, waits: waits{},
	}
	w.probes = newProber(w)
	if st, ok := m.cfg.Statuses.Status(pod.UID); ok && wasStarted(st) {
		w.remember(st)
	}
	return w
}

// remember takes over a pod that an agent before this one started.
func (w *worker) remember(st *corev1.PodStatus) {
	w.known.accepted, w.known.over = true, terminal(st.Phase)
	w.want.give(allocate(w.want.api, st))
	w.known.applied = w.want.given
}

func (w *worker) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// change changes what the pod should be, and wakes the worker.
func (w *worker) change(f func(*want)) {
	w.mu.Lock()
	f(&w.want)
	if w.want.ends() && w.giveUp != nil {
		w.giveUp()
	}
	w.mu.Unlock()
	w.wakeUp()
}

// whileWanted returns a context for what may take long to make, which ends when the pod
// is to end and was not when this pass began. done is called once that is made.
func (w *worker) whileWanted(want *want) (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancel(w.ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.want.ends() && !want.ends() {
		cancel()
	}
	w.giveUp = cancel
	return ctx, func() {
		w.mu.Lock()
		w.giveUp = nil
		w.mu.Unlock()
		cancel()
	}
}

// set is what the pod is by now. A change of its own, but of the status, which tells what
// this agent reported, lets all that is put off be tried at once.
func (w *worker) set(pod *corev1.Pod) {
	w.change(func(want *want) {
		if want.set(pod) {
			w.hurry = true
		}
	})
}

// refresh makes the worker look again at what the pod refers to.
func (w *worker) refresh() {
	w.change(func(want *want) {
		want.shown++
		w.hurry = true
	})
}

// ends says whether the pod is to end by now, whatever this pass began with.
func (w *worker) ends() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.want.ends()
}

func (w *worker) name() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.want.pod.Namespace + "/" + w.want.pod.Name
}

func (w *worker) waitsForImage() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.imageWait
}

// snapshot is the pod with its last computed status; nil for an orphan.
func (w *worker) snapshot() *corev1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.orphan {
		return nil
	}
	pod := *w.want.pod
	if w.status != nil {
		pod.Status = *w.status
	}
	return &pod
}

func (w *worker) refersTo(kind, namespace, name string) bool {
	w.mu.Lock()
	want := w.want
	w.mu.Unlock()
	return want.refersTo(kind, namespace, name)
}

// expectExit notes that CRI should soon say that id has ended.
func (w *worker) expectExit(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.exits.expect(id, w.m.cfg.Now())
}

// again asks for another look at t, if nothing wakes the worker before.
func (w *worker) again(t time.Time) { w.next = sooner(w.next, t) }

// run works until the pod is gone or ctx ends.
func (w *worker) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer w.wg.Wait()
	defer cancel()
	defer w.answer()
	w.ctx = ctx
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-timer.C:
		}
		w.next = time.Time{}
		if gone := w.sync(); gone {
			return
		}
		if w.next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(max(0, w.next.Sub(w.m.cfg.Now())))
		}
	}
}

// sync does what is due and reports. It says whether the pod is gone for good.
func (w *worker) sync() (gone bool) {
	var want want
	var s *seen
	for out, looks, plans := look, 0, 0; plans < maxPlans; plans++ {
		if out == look {
			if looks++; looks > maxLooks {
				break
			}
			if want, s = w.look(); s == nil {
				return false
			}
		}
		w.seeBeside(want.pod, s)
		p := plan(want, s, w.waits, w.m.cfg.Now())
		out = w.do(&want, s, &p)
		if w.ctx.Err() != nil {
			return false
		}
		if out == rest {
			w.again(p.wake)
			return s.cleaned && want.removed
		}
	}
	w.again(w.m.cfg.Now().Add(100 * time.Millisecond))
	return false
}

// take is what the pod should be by now. Exits beyond the number are expected by nobody
// yet.
func (w *worker) take() (want want, expected uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hurry {
		w.hurry = false
		w.waits.hurry()
	}
	w.imageWait = false
	want = w.want
	want.short = w.reclaim != nil
	return want, w.exits.made
}

// look asks what there is of the pod. What it should be is taken before: what changes
// from here on is the next pass's, which it wakes. It returns nil when CRI does not say.
func (w *worker) look() (want, *seen) {
	want, expected := w.take()
	s := &seen{
		known: &w.known, images: map[string]image.Result{}, hostIPs: w.m.cfg.HostIPs(), old: w.oldStatus(want.pod),
		refused: w.m.refusedEphemeral(want.pod), sealing: w.m.cfg.RecursiveReadOnly,
	}
	if w.known.cleaned { // there is nothing any more
		return want, s
	}
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	obs, err := w.observer.observe(ctx)
	if err != nil {
		if w.ctx.Err() == nil {
			w.log.Warn("cannot see the pod's containers; trying again", "error", rpcText(err))
			w.again(w.m.cfg.Now().Add(500 * time.Millisecond))
		}
		return want, nil
	}
	s.observed = *obs
	w.register(obs, expected)
	return want, s
}

// register tells the manager which ids are this pod's, and settles or repeats the wait
// for exits that CRI has not seen.
func (w *worker) register(obs *observed, expected uint64) {
	running := map[string]bool{}
	for _, s := range obs.sandboxes {
		w.m.own(s.id, w.uid)
		running[s.id] = s.ready
	}
	for _, list := range obs.containers {
		for _, c := range list {
			w.m.own(c.id, w.uid)
			running[c.id] = c.running()
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.again(w.exits.settle(running, expected, w.m.cfg.Now()))
}

// oldStatus is the status computed last, by this agent, the one before it, or
// as the API has it.
func (w *worker) oldStatus(pod *corev1.Pod) *corev1.PodStatus {
	w.mu.Lock()
	st := w.status
	w.mu.Unlock()
	if st != nil {
		return st
	}
	if st, ok := w.m.cfg.Statuses.Status(w.uid); ok {
		return st
	}
	return &pod.Status
}
