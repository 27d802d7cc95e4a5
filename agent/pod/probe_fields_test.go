package pod

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/probe"
	"k8s.io/utils/ptr"
)

// Every field of a probe's and a hook's handler is used against a real server.
func TestHandlersUseTheirFields(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	seen := http.Header{}
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen = r.Header.Clone()
		mu.Unlock()
		switch r.URL.Path {
		case "/hang":
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		case "/healthy":
		default:
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	require.NoError(t, err)
	httpPort, err := strconv.Atoi(u.Port())
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g := grpc.NewServer()
	checks := health.NewServer()
	checks.SetServingStatus("bad", healthv1.HealthCheckResponse_NOT_SERVING)
	healthv1.RegisterHealthServer(g, checks)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	grpcPort := l.Addr().(*net.TCPAddr).Port

	w := &worker{m: &Manager{log: slog.New(slog.DiscardHandler)}}
	spec := &corev1.Container{Name: "c", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: int32(httpPort)}}}
	get := func(path string, port intstr.IntOrString, host string) *corev1.HTTPGetAction {
		return &corev1.HTTPGetAction{Path: path, Port: port, Host: host, Scheme: corev1.URISchemeHTTP, HTTPHeaders: []corev1.HTTPHeader{{Name: "X-Mine", Value: "v"}}}
	}
	const elsewhere = "127.0.0.9" // nothing listens there
	for _, tc := range []struct {
		name string
		h    corev1.ProbeHandler
		ip   string
		want probe.Result
	}{
		{"http", corev1.ProbeHandler{HTTPGet: get("/healthy", intstr.FromInt(httpPort), "")}, "127.0.0.1", probe.Success},
		{"http by the port's name, at its host", corev1.ProbeHandler{HTTPGet: get("/healthy", intstr.FromString("web"), "127.0.0.1")}, elsewhere, probe.Success},
		{"http at another path", corev1.ProbeHandler{HTTPGet: get("/other", intstr.FromInt(httpPort), "")}, "127.0.0.1", probe.Failure},
		{"http that takes too long", corev1.ProbeHandler{HTTPGet: get("/hang", intstr.FromInt(httpPort), "")}, "127.0.0.1", probe.Failure},
		{"tcp", corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(httpPort)}}, "127.0.0.1", probe.Success},
		{"tcp at its host", corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(httpPort), Host: "127.0.0.1"}}, elsewhere, probe.Success},
		{"tcp where nobody is", corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(httpPort)}}, elsewhere, probe.Failure},
		{"grpc", corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: int32(grpcPort)}}, "127.0.0.1", probe.Success},
		{"grpc of a service", corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: int32(grpcPort), Service: ptr.To("bad")}}, "127.0.0.1", probe.Failure},
	} {
		t.Run("probe "+tc.name, func(t *testing.T) {
			r := &probeRun{p: &prober{w: w}, spec: spec, ip: tc.ip, probe: &corev1.Probe{ProbeHandler: tc.h, TimeoutSeconds: 1}}
			got, text := r.once(t.Context())
			require.Equal(t, tc.want, got, text)
			if tc.h.HTTPGet != nil {
				mu.Lock()
				defer mu.Unlock()
				require.Equal(t, "v", seen.Get("X-Mine"))
			}
		})
	}
	for _, tc := range []struct {
		name string
		h    corev1.LifecycleHandler
		bad  bool
	}{
		{"http", corev1.LifecycleHandler{HTTPGet: get("/healthy", intstr.FromInt(httpPort), "")}, false},
		{"http that fails", corev1.LifecycleHandler{HTTPGet: get("/other", intstr.FromInt(httpPort), "")}, true},
		{"tcp", corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(httpPort)}}, false},
		{"tcp where nobody is", corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(httpPort), Host: elsewhere}}, true},
	} {
		t.Run("hook "+tc.name, func(t *testing.T) {
			err := w.runHandlerAt(t.Context(), nil, spec, &tc.h, "id", []string{"127.0.0.1"})
			require.Equal(t, tc.bad, err != nil, err)
		})
	}
}

func TestSleepHook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, began := &worker{}, time.Now()
		h := &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 7}}
		require.NoError(t, w.runHandlerAt(t.Context(), nil, &corev1.Container{}, h, "id", nil))
		require.Equal(t, 7*time.Second, time.Since(began))
	})
}

// execs is a runtime whose commands do what a list says, and when they ran.
type execs struct {
	Runtime
	mu    sync.Mutex
	codes []int32
	began time.Time
	at    []time.Duration
}

func (e *execs) times() []time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.at)
}

func (e *execs) ExecSync(context.Context, *runtimev1.ExecSyncRequest, ...grpc.CallOption) (*runtimev1.ExecSyncResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.at = append(e.at, time.Since(e.began))
	if len(e.codes) == 0 {
		return nil, errors.New("no more")
	}
	code := e.codes[0]
	e.codes = e.codes[1:]
	return &runtimev1.ExecSyncResponse{ExitCode: code}, nil
}

// The first probe comes after the initial delay, the next ones a period apart,
// and a readiness verdict after as many successes as are asked for.
func TestProbeTimes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		e := &execs{began: began, codes: []int32{1, 0, 0, 0}}
		w := &worker{
			m: &Manager{cfg: Config{Runtime: e, Now: time.Now}, log: slog.New(slog.DiscardHandler)}, wake: make(chan struct{}, 1),
			told: told{said: map[string]string{}}, orphan: true,
		}
		p := newProber(w)
		state := &probed{startup: true}
		r := &probeRun{p: p, r: state, pod: &corev1.Pod{}, spec: &corev1.Container{Name: "c"}, kind: probeReadiness, started: began, probe: &corev1.Probe{
			ProbeHandler:        corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"ready"}}},
			InitialDelaySeconds: 30, PeriodSeconds: 5, SuccessThreshold: 3, FailureThreshold: 1,
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.loop(ctx)
		}()
		ready := func(at time.Duration) bool {
			time.Sleep(time.Until(began.Add(at)))
			synctest.Wait()
			p.mu.Lock()
			defer p.mu.Unlock()
			return state.ready
		}
		require.False(t, ready(29*time.Second))
		require.Empty(t, e.times())
		require.False(t, ready(41*time.Second)) // failed at 30, succeeded at 35 and 40
		require.True(t, ready(46*time.Second))
		require.Equal(t, []time.Duration{30 * time.Second, 35 * time.Second, 40 * time.Second, 45 * time.Second},
			e.times())
		cancel()
		<-done
	})
}

// byCommand is a runtime whose commands do what is said, and that counts them.
type byCommand struct {
	Runtime
	mu    sync.Mutex
	codes map[string]int32
	ran   map[string]int
}

func (e *byCommand) ExecSync(_ context.Context, req *runtimev1.ExecSyncRequest, _ ...grpc.CallOption) (*runtimev1.ExecSyncResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ran[req.Cmd[0]]++
	return &runtimev1.ExecSyncResponse{ExitCode: e.codes[req.Cmd[0]]}, nil
}

// TestReadinessGoesOnToTheEnd: of a container that is being stopped, and of others of its
// pod, liveness is not asked any more, and readiness until they have ended.
func TestReadinessGoesOnToTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		exec := func(command string) *corev1.Probe {
			return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{command}}}, PeriodSeconds: 1, FailureThreshold: 1, SuccessThreshold: 1}
		}
		e := &byCommand{codes: map[string]int32{}, ran: map[string]int{}}
		pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{
			{Name: "app", LivenessProbe: exec("app-live"), ReadinessProbe: exec("app-ready")},
			{Name: "other", LivenessProbe: exec("other-live"), ReadinessProbe: exec("other-ready")},
		}}}
		m := &Manager{cfg: Config{Runtime: e, Now: time.Now, Statuses: noStatuses{}}, log: slog.New(slog.DiscardHandler)}
		w := newWorker(m, pod)
		w.orphan, w.ctx = true, t.Context()
		s := &seen{observed: observed{containers: map[string][]*container{}}, known: &w.known, old: &corev1.PodStatus{}}
		for _, name := range []string{"app", "other"} {
			s.containers[name] = []*container{{id: name, name: name, state: runtimev1.ContainerState_CONTAINER_RUNNING, started: time.Now()}}
		}
		// ran is what is asked in five seconds.
		ran := func() map[string]bool {
			e.mu.Lock()
			clear(e.ran)
			e.mu.Unlock()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			e.mu.Lock()
			defer e.mu.Unlock()
			out := map[string]bool{}
			for command := range e.ran {
				out[command] = true
			}
			return out
		}
		ready := func(id string) bool { r, _ := w.probes.get(id); return r.ready }

		w.probes.update(pod, s, false)
		require.Equal(t, map[string]bool{"app-live": true, "app-ready": true, "other-live": true, "other-ready": true}, ran())
		w.probes.spare("app")
		require.Equal(t, map[string]bool{"app-ready": true, "other-live": true, "other-ready": true}, ran())
		require.True(t, ready("app"), "who is sent to it goes on")
		w.probes.update(pod, s, true)
		require.Equal(t, map[string]bool{"app-ready": true, "other-ready": true}, ran())
		e.mu.Lock()
		e.codes["app-ready"] = 1
		e.mu.Unlock()
		ran()
		require.False(t, ready("app"))
		require.True(t, ready("other"))
		s.containers["app"][0].state = runtimev1.ContainerState_CONTAINER_EXITED
		w.probes.update(pod, s, true)
		require.Equal(t, map[string]bool{"other-ready": true}, ran())
		s.containers["other"][0].state = runtimev1.ContainerState_CONTAINER_EXITED
		w.probes.update(pod, s, true)
		w.wg.Wait()
	})
}
