package pod

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/probe"
	grpcprobe "k8s.io/kubernetes/pkg/probe/grpc"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	tcpprobe "k8s.io/kubernetes/pkg/probe/tcp"
)

const (
	probeStartup   = "startup"
	probeLiveness  = "liveness"
	probeReadiness = "readiness"
	// failedPostStart is no probe: a hook that ends its container like one.
	failedPostStart = "postStart"
)

func insecureTransport() *http.Transport {
	return &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true, Proxy: nil, //nolint:gosec // probes do not authenticate the container, as upstream's
	}
}

// prober runs the probes of one pod's containers and keeps their verdicts.
type prober struct {
	w *worker

	mu      sync.Mutex
	running map[string]*probed // by container id
}

// probed is one running container under probes.
type probed struct {
	cancel  context.CancelFunc // all of them
	spare   context.CancelFunc // those that would have it stopped
	startup bool               // has passed, or there is none
	ready   bool
	failed  string // kind of the probe that failed for good
}

func newProber(w *worker) *prober { return &prober{w: w, running: map[string]*probed{}} }

// update starts probes for containers that run and stops those of others. Of a pod that
// ends, nothing is asked any more but whether it is ready still: who is sent on to it as
// long as it is would lose what it has begun.
func (p *prober) update(pod *corev1.Pod, s *seen, ending bool) {
	alive := map[string]bool{}
	ip := first(s.addresses(s.current()))
	for _, c := range s.running() {
		spec := specOf(pod, c.name)
		if spec == nil {
			continue
		}
		alive[c.id] = true
		switch {
		case ending:
			p.spare(c.id)
		case s.beside[c.id].stopBy.IsZero():
			p.start(pod, spec, c, ip, oldStatus(s.old, c.name))
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, r := range p.running {
		if !alive[id] {
			r.cancel()
			delete(p.running, id)
		}
	}
}

func (p *prober) start(pod *corev1.Pod, spec *corev1.Container, c *container, ip string, old *corev1.ContainerStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running[c.id] != nil {
		return
	}
	ctx, cancel := context.WithCancel(p.w.ctx)
	vital, spare := context.WithCancel(ctx)
	r := &probed{cancel: cancel, spare: spare}
	r.startup, r.ready = unprobed(spec, c, old)
	p.running[c.id] = r
	for kind, probe := range map[string]*corev1.Probe{
		probeStartup: spec.StartupProbe, probeLiveness: spec.LivenessProbe, probeReadiness: spec.ReadinessProbe,
	} {
		if probe == nil || kind == probeStartup && r.startup {
			continue
		}
		ctx := ctx
		if kind != probeReadiness {
			ctx = vital
		}
		run := &probeRun{p: p, r: r, pod: pod, spec: spec, id: c.id, kind: kind, probe: probe, ip: ip, started: c.started}
		p.w.wg.Add(1)
		go func() {
			defer p.w.wg.Done()
			run.loop(ctx)
		}()
	}
}

// spare ends the probes of a container that would have it stopped: it is being stopped.
func (p *prober) spare(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.running[id]; r != nil {
		r.spare()
	}
}

// stop ends the probes of a container that is gone.
func (p *prober) stop(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.running[id]; r != nil {
		r.cancel()
		delete(p.running, id)
	}
}

func (p *prober) stopAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, r := range p.running {
		r.cancel()
		delete(p.running, id)
	}
}

func (p *prober) get(id string) (probed, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.running[id]; r != nil {
		return *r, true
	}
	return probed{}, false
}

// unprobed is what a container is before its probes have begun: what needs none has
// started and is ready, and what an earlier agent found so stays so until they say
// otherwise.
func unprobed(spec *corev1.Container, c *container, old *corev1.ContainerStatus) (started, ready bool) {
	same := old != nil && old.ContainerID == containerID(c) && old.State.Running != nil
	return spec == nil || spec.StartupProbe == nil || same && isTrue(old.Started),
		spec == nil || spec.ReadinessProbe == nil || same && old.Ready
}

// seeBeside looks at what goes on around the containers that run.
func (w *worker) seeBeside(pod *corev1.Pod, s *seen) {
	s.beside = map[string]beside{}
	for _, c := range s.running() {
		var b beside
		if r, ok := w.probes.get(c.id); ok {
			b.started, b.ready, b.failed = r.startup, r.ready, r.failed
		} else {
			b.started, b.ready = unprobed(specOf(pod, c.name), c, oldStatus(s.old, c.name))
		}
		w.mu.Lock()
		if a := w.around[c.id]; a != nil {
			if a.stop != nil {
				b.stopBy = a.stop.deadline
			}
			if h := a.hook; h != nil && (!h.done || h.err != nil) {
				b.started = false
				if h.done {
					b.failed = failedPostStart
				}
			}
		}
		w.mu.Unlock()
		s.beside[c.id] = b
	}
}

// probeRun is one probe of one container.
type probeRun struct {
	p       *prober
	r       *probed
	pod     *corev1.Pod
	spec    *corev1.Container
	id      string
	kind    string
	probe   *corev1.Probe
	ip      string
	started time.Time
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// loop probes at the probe's period until ctx ends or the verdict is final.
func (r *probeRun) loop(ctx context.Context) {
	period := max(seconds(r.probe.PeriodSeconds), time.Second)
	delay := time.Until(r.started.Add(seconds(r.probe.InitialDelaySeconds)))
	if delay < 0 {
		// After a restart of the agent, probes do not all fire at once.
		delay = 0
		if time.Since(r.started) > period {
			delay = rand.N(period)
		}
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	streak, last := 0, probe.Unknown
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		timer.Reset(period)
		if r.kind != probeStartup && !r.startupPassed() {
			timer.Reset(min(period, time.Second))
			continue
		}
		result, output := r.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if result == probe.Warning {
			result = probe.Success
		}
		if result == probe.Unknown {
			continue
		}
		if result == last {
			streak++
		} else {
			streak, last = 1, result
		}
		if result == probe.Failure {
			// Told once, not at every period: each event is a write to the log.
			r.p.w.eventOnce(r.pod, corev1.EventTypeWarning, "Unhealthy",
				fmt.Sprintf("%s probe failed: %s", map[string]string{probeStartup: "Startup", probeLiveness: "Liveness", probeReadiness: "Readiness"}[r.kind], output), r.spec.Name)
		}
		if result == probe.Failure && streak < int(max(r.probe.FailureThreshold, 1)) ||
			result == probe.Success && streak < int(max(r.probe.SuccessThreshold, 1)) {
			continue
		}
		if r.decide(result == probe.Success) {
			return
		}
	}
}

func (r *probeRun) startupPassed() bool {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	return r.r.startup
}

// decide records a verdict and wakes the worker when it is news. It says
// whether this probe is done.
func (r *probeRun) decide(ok bool) (done bool) {
	r.p.mu.Lock()
	news := false
	switch r.kind {
	case probeReadiness:
		news = r.r.ready != ok
		r.r.ready = ok
	case probeStartup:
		news, done = true, true
		r.r.startup = ok
	case probeLiveness:
		news, done = !ok, !ok
	}
	if !ok && r.kind != probeReadiness {
		r.r.failed = r.kind
	}
	r.p.mu.Unlock()
	if news {
		r.p.w.wakeUp()
	}
	return done
}

// once probes once.
func (r *probeRun) once(ctx context.Context) (probe.Result, string) {
	timeout := max(seconds(r.probe.TimeoutSeconds), time.Second)
	h := &r.probe.ProbeHandler
	var result probe.Result
	var output string
	var err error
	switch {
	case h.Exec != nil:
		ctx, cancel := context.WithTimeout(ctx, timeout+time.Second)
		defer cancel()
		text, code, execErr := r.p.w.exec(ctx, r.id, h.Exec.Command, timeout)
		switch {
		case execErr != nil && ctx.Err() == nil && isUnavailable(execErr):
			return probe.Unknown, execErr.Error()
		case execErr != nil:
			return probe.Failure, execErr.Error()
		case code != 0:
			return probe.Failure, text
		}
		return probe.Success, text
	case h.HTTPGet != nil:
		req, reqErr := httpprobe.NewRequestForHTTPGetAction(h.HTTPGet, r.spec, r.ip, "probe")
		if reqErr != nil {
			return probe.Unknown, reqErr.Error()
		}
		result, output, err = httpprobe.New(false).Probe(req.WithContext(ctx), timeout)
	case h.TCPSocket != nil:
		port, portErr := probe.ResolveContainerPort(h.TCPSocket.Port, r.spec)
		if portErr != nil {
			return probe.Unknown, portErr.Error()
		}
		host := h.TCPSocket.Host
		if host == "" {
			host = r.ip
		}
		result, output, err = tcpprobe.New().Probe(host, port, timeout)
	case h.GRPC != nil:
		service := ""
		if h.GRPC.Service != nil {
			service = *h.GRPC.Service
		}
		result, output, err = grpcprobe.New().Probe(r.ip, service, int(h.GRPC.Port), timeout, grpcprobe.ProbeOptions{})
	default:
		return probe.Success, ""
	}
	if err != nil {
		return probe.Failure, err.Error()
	}
	return result, output
}

// isUnavailable tells a containerd that is away from a command that failed.
func isUnavailable(err error) bool {
	return status.Code(err) == codes.Unavailable
}
