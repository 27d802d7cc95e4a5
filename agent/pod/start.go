package pod

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/hostile"
	"timonel/agent/image"
	"timonel/agent/volume"
)

// Waiting reasons, as the kubelet's.
const (
	reasonCreating     = "ContainerCreating"
	reasonInitializing = "PodInitializing"
	reasonCrashLoop    = "CrashLoopBackOff"
	reasonConfigError  = "CreateContainerConfigError"
	reasonCreateError  = "CreateContainerError"
	reasonRunError     = "RunContainerError"
	reasonUnsupported  = "UnsupportedVolume"
	reasonSandboxError = "FailedCreatePodSandBox"
)

const (
	firstRestart = 10 * time.Second
	maxRestart   = 300 * time.Second
	// stable is how long a container has to run for its back-off to be forgotten.
	stable = 10 * time.Minute
)

// retry is when a step that failed may be tried again.
type retry struct {
	at    time.Time
	delay time.Duration
	why   waiting
}

// put off a step that failed: for 1 s, and longer each time.
func (w *worker) putOff(step string, why waiting) {
	r := w.retry[step]
	if r == nil {
		r = &retry{delay: 500 * time.Millisecond}
		w.retry[step] = r
	}
	r.delay = min(r.delay*2, 30*time.Second)
	r.at, r.why = w.m.cfg.Now().Add(r.delay), why
	w.again(r.at)
}

// deferred says whether a step is put off, and why.
func (w *worker) deferred(step string) (waiting, bool) {
	r := w.retry[step]
	if r == nil || !w.m.cfg.Now().Before(r.at) {
		return waiting{}, false
	}
	w.again(r.at)
	return r.why, true
}

// backOff is how long one container waits before it is started once more.
type backOff struct {
	delay time.Duration // of the next restart
}

// restartDelay is the wait after the end of previous. The first restart is at
// once, the next after 10 s, and each one twice that, up to 5 minutes.
func (w *worker) restartDelay(name string, previous *container) (*backOff, time.Duration) {
	b := w.restart[name]
	if b == nil {
		b = &backOff{}
		// A new agent goes on from what the container's record says.
		if n := previous.restarts; n > 0 {
			b.delay = min(firstRestart<<min(n-1, 5), maxRestart)
		}
		w.restart[name] = b
	}
	if previous.finished.Sub(previous.started) >= stable {
		b.delay = 0
	}
	return b, b.delay
}

func (b *backOff) grow() { b.delay = min(max(firstRestart, b.delay*2), maxRestart) }

// act does the steps of a plan. It says whether anything changed that has to be
// looked at again right away.
func (w *worker) act(pod *corev1.Pod, obs *observed, a actions, shown uint64) bool {
	w.mu.Lock()
	w.imageWait = false
	w.mu.Unlock()
	for _, k := range a.kill {
		w.kill(pod, k.container, k.spec, k.message, killGrace(pod, k))
	}
	ready := w.ensureVolumes(pod, obs, shown)
	if !ready {
		return false
	}
	if a.newSandbox {
		return w.startSandbox(pod, a.attempt)
	}
	box, refused := obs.current(), w.refusedEphemeral(pod)
	if box != nil && !w.police(pod, box) {
		return false
	}
	started := false
	for _, s := range a.start {
		if w.ending() { // there may be thousands to start
			return true
		}
		if _, bad := refused[s.spec.Name]; bad {
			continue
		}
		if w.startContainer(pod, obs, box, s) {
			started = true
		}
	}
	return started
}

// ending says whether the pod is to end by now, whatever this pass began with.
func (w *worker) ending() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.removed || w.pod.DeletionTimestamp != nil || w.evicted != nil
}

// makeLogDir makes the folder of a pod's logs, or of one of its containers in it.
func makeLogDir(dir, container string) error {
	logs, err := hostile.MakeRoot(filepath.Dir(dir), 0o755)
	if err != nil {
		return err
	}
	defer logs.Close()
	made, err := logs.MkdirAll(filepath.Join(filepath.Base(dir), container), 0o755, -1, -1)
	if err != nil {
		return err
	}
	return made.Close()
}

// everyContainer sets why no container of the pod can start. Where there are init
// containers, all wait for them, as upstream says.
func (w *worker) everyContainer(pod *corev1.Pod, why waiting) {
	if len(pod.Spec.InitContainers) > 0 && why.reason == reasonCreating {
		why.reason = reasonInitializing
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			w.waiting[list[i].Name] = why
		}
	}
}

// ensureVolumes makes the pod's volumes, or brings them up to date when
// something that they show has changed. shown is the count of such changes as it
// was when pod was taken.
func (w *worker) ensureVolumes(pod *corev1.Pod, obs *observed, shown uint64) bool {
	now := w.m.cfg.Now()
	dirty := shown != w.written
	due := dirty || w.volumes == nil || !w.refreshAt.IsZero() && !now.Before(w.refreshAt)
	w.written = shown // one that fails is put off, and tried again for that reason
	if !due {
		if !w.refreshAt.IsZero() {
			w.again(w.refreshAt)
		}
		return true
	}
	if why, put := w.deferred("volumes"); put && !dirty {
		w.everyContainer(pod, why)
		return w.volumes != nil
	}
	var ips []string
	if s := obs.current(); s != nil {
		ips = s.ips
	}
	ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
	defer cancel()
	mounts, refresh, err := w.m.volumes.Setup(ctx, pod, ips)
	if err != nil {
		if w.ctx.Err() != nil {
			return false
		}
		text := strings.ReplaceAll(rpcText(err), "\n", "; ")
		why := waiting{reasonCreating, "MountVolume failed: " + text}
		if errors.Is(err, volume.ErrUnsupported) {
			why.reason = reasonUnsupported
		}
		w.eventOnce(pod, corev1.EventTypeWarning, "FailedMount", "MountVolume failed: "+text, "")
		w.putOff("volumes", why)
		if w.volumes != nil {
			w.refreshAt = w.retry["volumes"].at
			return true // what was mounted before stays as it is
		}
		w.everyContainer(pod, why)
		return false
	}
	delete(w.retry, "volumes")
	w.volumes, w.refreshAt = mounts, refresh
	if !refresh.IsZero() {
		w.again(refresh)
	}
	return true
}

// startSandbox makes the pod's sandbox: its namespaces, network and cgroup.
func (w *worker) startSandbox(pod *corev1.Pod, attempt uint32) bool {
	if why, put := w.deferred("sandbox"); put {
		w.everyContainer(pod, why)
		return false
	}
	fail := func(err error) bool {
		text := rpcText(err)
		message := "Failed to create pod sandbox: " + text
		w.eventOnce(pod, corev1.EventTypeWarning, reasonSandboxError, message, "")
		w.log.Warn("create sandbox", "error", text)
		why := waiting{reasonCreating, message}
		w.putOff("sandbox", why)
		w.everyContainer(pod, why)
		return false
	}
	if !pod.Spec.HostNetwork && !w.m.cfg.NetworkReady() {
		return fail(errors.New("the pod network is not ready: this node has no pod CIDR yet"))
	}
	cfg, err := w.sandboxConfig(pod, attempt)
	if err == nil {
		err = w.tellDNS(pod)
	}
	if err != nil {
		return fail(err)
	}
	if err := makeLogDir(cfg.LogDirectory, ""); err != nil {
		return fail(err)
	}
	if err := w.applyCgroup(pod); err != nil {
		return fail(err)
	}
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	if attempt > 0 {
		w.event(pod, corev1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.", "")
	}
	resp, err := w.m.cfg.Runtime.RunPodSandbox(ctx, &runtimev1.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		if w.ctx.Err() != nil {
			return false
		}
		return fail(err)
	}
	delete(w.retry, "sandbox")
	w.m.own(resp.PodSandboxId, w.uid)
	w.mu.Lock()
	w.shown++ // the pod has an address now, which some volumes show
	w.mu.Unlock()
	return true
}

func (w *worker) applyCgroup(pod *corev1.Pod) error {
	return w.limitPod(cgroupParent(w.m.cfg.CgroupRoot, pod), podResources(pod))
}

// startContainer starts one container, or sets why it has to wait. It says
// whether it was started.
func (w *worker) startContainer(pod *corev1.Pod, obs *observed, box *sandbox, s start) bool {
	name, now := s.spec.Name, w.m.cfg.Now()
	w.mu.Lock()
	stopping := false
	for id := range w.kills {
		for _, c := range obs.containers[name] {
			stopping = stopping || c.id == id && c.running()
		}
	}
	w.mu.Unlock()
	if stopping {
		return false
	}
	wait := func(reason, message string) bool {
		w.waiting[name] = waiting{reason, message}
		return false
	}
	if s.previous.exited() {
		_, delay := w.restartDelay(name, s.previous)
		if due := s.previous.finished.Add(delay); now.Before(due) {
			w.again(due)
			message := fmt.Sprintf("back-off %s restarting failed container=%s pod=%s_%s(%s)", delay, name, pod.Name, pod.Namespace, pod.UID)
			w.eventOnce(pod, corev1.EventTypeWarning, "BackOff", fmt.Sprintf("Back-off restarting failed container %s in pod %s_%s(%s)", name, pod.Name, pod.Namespace, pod.UID), name)
			return wait(reasonCrashLoop, message)
		}
	}
	if why, put := w.deferred(name); put {
		return wait(why.reason, why.message)
	}
	box2, err := w.sandboxConfig(pod, box.attempt)
	if err != nil {
		return wait(reasonConfigError, err.Error())
	}
	if ready, why := w.imageVolumes(pod, s.spec, box2); !ready {
		if why.reason == "" && s.previous == nil {
			return false
		}
		return wait(cmp.Or(why.reason, reasonCreating), why.message)
	}
	w.setImageWait() // before it is looked for: one that appears in between wakes this worker
	res := w.m.images.Ensure(w.ctx, image.Request{
		Pod: pod, Container: s.spec, Secrets: w.pullSecrets(pod), Sandbox: box2, Changed: w.wakeUp,
		Event: func(kind, reason, message string) { w.eventOnce(pod, kind, reason, message, name) },
	})
	switch res.State {
	case image.Pulling:
		if s.previous == nil {
			return false
		}
		return wait(reasonCreating, "")
	case image.Failed:
		if !res.Retry.IsZero() {
			w.again(res.Retry)
		}
		return wait(res.Reason, res.Message)
	}
	ips := box.ips
	if box.hostNet {
		ips = w.m.cfg.HostIPs()
	}
	fail := func(reason string, err error) bool {
		text := rpcText(err)
		w.eventOnce(pod, corev1.EventTypeWarning, "Failed", "Error: "+text, name)
		w.putOff(name, waiting{reason, text})
		return wait(reason, text)
	}
	if s.ephemeral != nil {
		if s.target, err = targetOf(s.ephemeral, obs); err != nil {
			return fail(reasonConfigError, err)
		}
	}
	cfg, err := w.containerConfig(pod, s, res.ID, ips)
	if err != nil {
		return fail(reasonConfigError, err)
	}
	if err := makeLogDir(box2.LogDirectory, name); err != nil {
		return fail(reasonCreateError, err)
	}
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	// What was made and never started, by an agent that died in between, is in
	// the way of its own name.
	for _, c := range obs.containers[name] {
		if c.state == runtimev1.ContainerState_CONTAINER_CREATED || c.state == runtimev1.ContainerState_CONTAINER_UNKNOWN {
			if _, err := w.m.cfg.Runtime.RemoveContainer(ctx, &runtimev1.RemoveContainerRequest{ContainerId: c.id}); err != nil && !notFound(err) {
				return fail(reasonCreateError, err)
			}
		}
	}
	made, err := w.m.cfg.Runtime.CreateContainer(ctx, &runtimev1.CreateContainerRequest{PodSandboxId: box.id, Config: cfg, SandboxConfig: box2})
	if err != nil {
		if w.ctx.Err() != nil {
			return false
		}
		return fail(reasonCreateError, err)
	}
	id := made.ContainerId
	w.m.own(id, w.uid)
	w.event(pod, corev1.EventTypeNormal, "Created", "Container created", name)
	w.beginHook(id, s.spec)
	if _, err := w.m.cfg.Runtime.StartContainer(ctx, &runtimev1.StartContainerRequest{ContainerId: id}); err != nil {
		w.endHook(id, nil)
		if w.ctx.Err() != nil {
			return false
		}
		fail(reasonRunError, err)
	} else {
		delete(w.retry, name)
		w.event(pod, corev1.EventTypeNormal, "Started", "Container started", name)
		w.runPostStart(pod, s.spec, id, ips)
	}
	if s.previous.exited() {
		b, _ := w.restartDelay(name, s.previous)
		b.grow()
	}
	return true
}

func (w *worker) setImageWait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.imageWait = true
}

// pullSecrets are the pod's and its service account's that exist.
func (w *worker) pullSecrets(pod *corev1.Pod) []*corev1.Secret {
	var out []*corev1.Secret
	for _, ref := range pod.Spec.ImagePullSecrets {
		if s, ok := w.m.cfg.Objects.Secret(pod.Namespace, ref.Name); ok {
			out = append(out, s)
		}
	}
	return out
}

// collect removes containers that nobody will ask for any more: of each name,
// the newest and the one before it stay, or the newest alone when room is short.
func (w *worker) collect(obs *observed, short bool) {
	keep := 2
	if short {
		keep = 1
	}
	for _, list := range obs.containers {
		for _, c := range list[min(keep, len(list)):] {
			if c.exited() {
				w.removeContainer(c)
			}
		}
	}
	// A sandbox that was replaced is stopped when nothing runs in it any more,
	// and goes when its last container has gone.
	for _, s := range obs.sandboxes[min(1, len(obs.sandboxes)):] {
		inside := slices.DeleteFunc(flatten(obs), func(c *container) bool { return c.sandbox != s.id })
		if slices.ContainsFunc(inside, (*container).running) || !w.stopSandbox(s.id) || len(inside) > 0 {
			continue
		}
		w.removeSandbox(s.id)
	}
}

func flatten(obs *observed) []*container {
	var out []*container
	for _, list := range obs.containers {
		out = append(out, list...)
	}
	return out
}
