package pod

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/admission"
	"timonel/agent/desired"
	"timonel/agent/eviction"
	"timonel/agent/volume"
)

// maxSteps bounds how often one pass looks again right after it acted.
const maxSteps = 8

// exitPatience is for how long CRI is asked again about a container that has
// ended by containerd's word and still runs by CRI's.
const exitPatience = 5 * time.Second

// worker runs one pod. Fields below mu are shared; the rest belongs to run.
type worker struct {
	m      *Manager
	uid    types.UID
	log    *slog.Logger
	wake   chan struct{}
	orphan bool // made from what was found on the node, not from a v1.Pod
	wg     sync.WaitGroup

	mu           sync.Mutex
	latest       *corev1.Pod // as the API has it
	pod          *corev1.Pod // latest, with the resources that were allocated
	accepted     bool        // it holds a part of the node
	allocated    *allocation // nil until it is accepted
	resized      bool        // latest asks for other resources
	over         bool        // nothing of it runs any more
	removed      bool
	shown        uint64 // counts what volumes show: changes of the pod or of what it refers to
	imageWait    bool
	hurry        bool // what is put off may be tried now
	expected     map[string]*expectation
	expectations uint64 // made so far
	kills        map[string]*killing
	hooks        map[string]*hook
	said         map[string]string // last message of an event that would repeat
	events       allowance         // how many may be told
	evicted      *eviction.Eviction
	reclaim      chan struct{}     // closed when what has ended was removed; nil: it stays
	swept        bool              // it has ended, and what it had on the node was removed
	status       *corev1.PodStatus // last computed

	ctx       context.Context
	observer  observer
	probes    *prober
	volumes   volume.Mounts
	written   uint64 // shown, of what the volumes were last made from
	refreshAt time.Time
	retry     map[string]*retry
	restart   map[string]*backOff
	waiting   map[string]waiting
	reported  []byte
	verdict   *verdict
	asked     bool // whether this node takes it
	// applied is what the pod's cgroups have; nil: nothing of it runs yet.
	applied       *allocation
	refusedResize *admission.Rejection // why it does not get what it asks for now
	resizing      bool                 // what it was given is not in force yet
	resizeError   string               // why not
	stopped       map[string]bool      // sandboxes that were stopped
	cleaned       bool
	next          time.Time // when to look again without being woken
	policed       string    // sandbox that Policies was told of
}

// expectation is an exit that CRI has not confirmed yet.
type expectation struct {
	number uint64
	until  time.Time
	delay  time.Duration
}

func newWorker(m *Manager, pod *corev1.Pod) *worker {
	w := &worker{
		m: m, uid: pod.UID, log: m.log.With("pod", pod.Namespace+"/"+pod.Name, "uid", pod.UID),
		wake: make(chan struct{}, 1), latest: pod, pod: pod, shown: 1,
		expected: map[string]*expectation{}, kills: map[string]*killing{}, hooks: map[string]*hook{},
		observer: observer{runtime: m.cfg.Runtime, uid: pod.UID},
		retry:    map[string]*retry{}, restart: map[string]*backOff{}, waiting: map[string]waiting{},
		stopped: map[string]bool{}, said: map[string]string{},
	}
	w.probes = newProber(w)
	if st, ok := m.cfg.Statuses.Status(pod.UID); ok && wasStarted(st) {
		w.accepted, w.over = true, terminal(st.Phase)
		w.allocated = allocate(pod, st)
		w.applied = w.allocated
		w.pod, w.resized = w.allocated.apply(pod)
	}
	return w
}

func (w *worker) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *worker) set(pod *corev1.Pod) {
	w.mu.Lock()
	old := w.pod
	w.latest = pod
	w.pod, w.resized = w.allocated.apply(pod)
	if !maps.Equal(old.Labels, pod.Labels) || !maps.Equal(old.Annotations, pod.Annotations) || old.Generation != pod.Generation {
		w.shown++
	}
	w.mu.Unlock()
	w.wakeUp()
}

func (w *worker) remove() {
	w.mu.Lock()
	w.removed = true
	w.mu.Unlock()
	w.wakeUp()
}

// refresh makes the worker look again at what the pod refers to.
func (w *worker) refresh() {
	w.mu.Lock()
	w.shown++
	w.hurry = true
	w.mu.Unlock()
	w.wakeUp()
}

func (w *worker) name() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pod.Namespace + "/" + w.pod.Name
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
	pod := *w.pod
	if w.status != nil {
		pod.Status = *w.status
	}
	return &pod
}

func (w *worker) refersTo(kind, namespace, name string) bool {
	w.mu.Lock()
	pod := w.pod
	w.mu.Unlock()
	if kind == desired.KindVolume { // the claims that it may be of are the pod's
		return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return volume.ClaimOf(pod, &v) != "" })
	}
	if kind == desired.KindTrustBundle {
		return volume.ShowsBundle(pod, name)
	}
	if pod.Namespace != namespace {
		return false
	}
	if kind == desired.KindPodCertificate {
		return volume.AskedFor(pod, name)
	}
	if kind == desired.KindServiceAccount {
		return pod.Spec.ServiceAccountName == name
	}
	for i := range pod.Spec.ImagePullSecrets {
		if kind == desired.KindSecret && pod.Spec.ImagePullSecrets[i].Name == name {
			return true
		}
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i].VolumeSource
		if kind == desired.KindClaim && volume.ClaimOf(pod, &pod.Spec.Volumes[i]) == name {
			return true
		}
		if v.ConfigMap != nil && kind == desired.KindConfigMap && v.ConfigMap.Name == name ||
			v.Secret != nil && kind == desired.KindSecret && v.Secret.SecretName == name {
			return true
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ConfigMap != nil && kind == desired.KindConfigMap && s.ConfigMap.Name == name ||
				s.Secret != nil && kind == desired.KindSecret && s.Secret.Name == name {
				return true
			}
		}
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if envRefersTo(&list[i], kind, name) {
				return true
			}
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if envRefersTo(asContainer(&pod.Spec.EphemeralContainers[i]), kind, name) {
			return true
		}
	}
	return false
}

func envRefersTo(c *corev1.Container, kind, name string) bool {
	for _, f := range c.EnvFrom {
		if f.ConfigMapRef != nil && kind == desired.KindConfigMap && f.ConfigMapRef.Name == name ||
			f.SecretRef != nil && kind == desired.KindSecret && f.SecretRef.Name == name {
			return true
		}
	}
	for _, e := range c.Env {
		if s := e.ValueFrom; s != nil {
			if s.ConfigMapKeyRef != nil && kind == desired.KindConfigMap && s.ConfigMapKeyRef.Name == name ||
				s.SecretKeyRef != nil && kind == desired.KindSecret && s.SecretKeyRef.Name == name {
				return true
			}
		}
	}
	return false
}

// expectExit notes that CRI should soon say that id has ended.
func (w *worker) expectExit(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expectations++
	w.expected[id] = &expectation{number: w.expectations, until: w.m.cfg.Now().Add(exitPatience), delay: 2 * time.Millisecond}
}

// again asks for another look at t, if nothing wakes the worker before.
func (w *worker) again(t time.Time) {
	if w.next.IsZero() || t.Before(w.next) {
		w.next = t
	}
}

// run works until the pod is gone or ctx ends.
func (w *worker) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer w.wg.Wait()
	defer cancel()
	defer func() {
		_, done := w.reclaimed()
		done()
	}()
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
		if done := w.sync(); done {
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
func (w *worker) sync() bool {
	for range maxSteps {
		w.mu.Lock()
		// A mark is taken together with what it is about: what changes from here on
		// is the next pass's, which it wakes.
		pod, removed, shown, expectations := w.pod, w.removed, w.shown, w.expectations
		if w.hurry {
			w.hurry = false
			maps.DeleteFunc(w.retry, func(step string, _ *retry) bool { return !strings.HasPrefix(step, "stop/") })
		}
		w.mu.Unlock()
		ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
		obs, err := w.observer.observe(ctx)
		cancel()
		if err != nil {
			if w.ctx.Err() == nil {
				w.log.Warn("cannot see the pod's containers; trying again", "error", rpcText(err))
				w.again(w.m.cfg.Now().Add(500 * time.Millisecond))
			}
			return false
		}
		w.register(obs, expectations)
		w.checkDeadline(pod)
		w.checkEvicted(pod)

		if removed || pod.DeletionTimestamp != nil {
			_, done := w.reclaimed() // all of it goes
			done()
			if w.cleaned {
				w.finalReport(pod, removed)
				return removed
			}
			ended := w.end(pod, obs)
			w.report(pod, obs, true, ended)
			if !ended {
				return false
			}
			w.hasEnded()
			if !w.clean(pod, obs) {
				return false
			}
			w.cleaned = true
			continue
		}
		w.admit(pod, obs)
		if w.verdict == nil && !terminal(w.oldStatus(pod).Phase) && w.resize(pod) {
			continue
		}
		w.actuate(pod, obs)
		a := plan(pod, obs, w)
		if w.verdict != nil || a.finished || terminal(w.oldStatus(pod).Phase) {
			ended := w.end(pod, obs)
			if ended {
				w.hasEnded()
			}
			w.report(pod, obs, true, ended)
			if ended {
				w.sweep(pod, obs)
				if wanted, done := w.reclaimed(); wanted {
					w.removeEnded(obs)
					done()
				}
			}
			return false
		}
		w.waiting = map[string]waiting{}
		acted := w.act(pod, obs, a, shown)
		if acted && w.ctx.Err() == nil {
			continue
		}
		w.probes.update(pod, obs)
		w.report(pod, obs, false, false)
		wanted, done := w.reclaimed()
		w.collect(obs, wanted)
		done()
		return false
	}
	w.again(w.m.cfg.Now().Add(100 * time.Millisecond))
	return false
}

// hasEnded gives back what the pod had of the node.
func (w *worker) hasEnded() {
	w.mu.Lock()
	was := w.over
	w.over = true
	w.mu.Unlock()
	if !was {
		w.m.ended()
	}
}

// register tells the manager which ids are this pod's, and settles or repeats
// the wait for exits that CRI has not seen.
//
// Expectations beyond the given number were made after obs was seen: it says
// nothing of them.
func (w *worker) register(obs *observed, expectations uint64) {
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
	now := w.m.cfg.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, e := range w.expected {
		if e.number <= expectations && !running[id] || now.After(e.until) {
			delete(w.expected, id)
			continue
		}
		w.again(now.Add(e.delay))
		e.delay = min(e.delay*2, 250*time.Millisecond)
	}
}

// checkDeadline ends a pod that has been active for longer than it may.
func (w *worker) checkDeadline(pod *corev1.Pod) {
	if pod.Spec.ActiveDeadlineSeconds == nil || w.verdict != nil || terminal(pod.Status.Phase) {
		return
	}
	old := w.oldStatus(pod)
	if old.StartTime == nil {
		return
	}
	end := old.StartTime.Add(time.Duration(*pod.Spec.ActiveDeadlineSeconds) * time.Second)
	if now := w.m.cfg.Now(); now.Before(end) {
		w.again(end)
		return
	}
	const message = "Pod was active on the node longer than the specified deadline"
	w.verdict = &verdict{reason: "DeadlineExceeded", message: message}
	w.event(pod, corev1.EventTypeWarning, "DeadlineExceeded", message, "")
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

// report computes the status and sends it when it has changed.
func (w *worker) report(pod *corev1.Pod, obs *observed, ending, stopped bool) {
	if w.orphan {
		return
	}
	old := w.oldStatus(pod)
	refused := w.refusedEphemeral(pod)
	w.sayEphemeral(pod, old, refused)
	st := *old
	if !terminal(old.Phase) || len(old.ContainerStatuses) == 0 || len(obs.containers) > 0 || len(obs.sandboxes) > 0 {
		st = makeStatus(statusInput{
			pod: pod, obs: obs, old: old, refusedResize: w.refusedResize, resizing: w.resizing, resizeError: w.resizeError, applied: w.applied, waiting: w.waiting, ready: w.probes.readiness(), facts: w,
			hostIPs: w.m.cfg.HostIPs(), verdict: w.verdict, refused: refused, ending: ending, stopped: stopped, now: w.m.cfg.Now(),
		})
	} // else what ended was removed: its last status tells more than is left
	w.mu.Lock()
	w.status = &st
	w.mu.Unlock()
	raw, err := st.Marshal()
	if err != nil {
		w.log.Error("encode the pod's status", "error", err)
		return
	}
	if w.reported != nil && bytes.Equal(raw, w.reported) {
		return
	}
	w.reported = raw
	w.m.cfg.Statuses.SetStatus(w.uid, &st)
	w.m.cfg.Reporter.SetPodStatus(pod, &st)
}

// finalReport says that the pod is gone from this node.
func (w *worker) finalReport(pod *corev1.Pod, removed bool) {
	w.m.cfg.Statuses.ForgetStatus(w.uid)
	if removed {
		w.m.cfg.Reporter.ForgetPod(pod)
		return
	}
	w.m.cfg.Reporter.PodTerminated(pod)
}
