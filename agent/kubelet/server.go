package kubelet

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"timonel/agent/logs"
)

// Pods finds the pods of this node, with their status.
type Pods interface {
	Pods() []*corev1.Pod
	PodByName(namespace, name string) (*corev1.Pod, bool)
}

// Config is what the server answers from.
type Config struct {
	NodeName string
	Runtime  runtimev1.RuntimeServiceClient
	Pods     Pods
	Logs     *logs.Logs
	// Volumes measures the volumes of a pod; nil: nobody does.
	Volumes func(pod *corev1.Pod) []stats.VolumeStats
	// Metrics writes what the node's other parts measure; may be nil.
	Metrics func(io.Writer)
	// Healthy is nil, or why the node is not.
	Healthy func(ctx context.Context) error
	Logger  *slog.Logger
}

// Server is the API of one node.
type Server struct {
	cfg      Config
	log      *slog.Logger
	listener *tunnels
	http     *http.Server
}

// New returns a server that serves what Serve is given once Run runs.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Logger.With("component", "kubelet-api"), listener: newTunnels()}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /pods", s.pods)
	mux.HandleFunc("GET /runningpods/", s.pods)
	mux.HandleFunc("GET /stats/summary", s.summary)
	mux.HandleFunc("GET /metrics/resource", s.resourceMetrics)
	mux.HandleFunc("GET /metrics", s.metrics)
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", s.logs)
	for _, suffix := range []string{"/{namespace}/{pod}/{container}", "/{namespace}/{pod}/{uid}/{container}"} {
		mux.HandleFunc("/exec"+suffix, s.exec)
		mux.HandleFunc("/attach"+suffix, s.attach)
		mux.HandleFunc("POST /run"+suffix, s.run)
	}
	mux.HandleFunc("/portForward/{namespace}/{pod}", s.portForward)
	mux.HandleFunc("/portForward/{namespace}/{pod}/{uid}", s.portForward)
	s.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: 30 * time.Second,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	return s
}

// Serve hands one tunnel's connection to the server, which owns it.
func (s *Server) Serve(conn net.Conn) { s.listener.add(conn) }

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.http.Close() })
	defer stop()
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the kubelet API: %w", err)
	}
	return nil
}

// tunnels is a listener whose connections are handed to it.
type tunnels struct {
	conns  chan net.Conn
	closed chan struct{}
}

func newTunnels() *tunnels {
	return &tunnels{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (t *tunnels) add(conn net.Conn) {
	go func() { // ends when the server accepts or closes
		select {
		case t.conns <- conn:
		case <-t.closed:
			conn.Close()
		}
	}()
}

func (t *tunnels) Accept() (net.Conn, error) {
	select {
	case c := <-t.conns:
		return c, nil
	case <-t.closed:
		return nil, net.ErrClosed
	}
}

func (t *tunnels) Close() error {
	select {
	case <-t.closed:
	default:
		close(t.closed)
	}
	return nil
}

func (t *tunnels) Addr() net.Addr { return address{} }

type address struct{}

func (address) Network() string { return "tunnel" }
func (address) String() string  { return "tunnel" }

func (s *Server) healthz(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Healthy != nil {
		if err := s.cfg.Healthy(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	fmt.Fprint(w, "ok")
}

func (s *Server) pods(w http.ResponseWriter, _ *http.Request) {
	list := &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: []corev1.Pod{}}
	for _, p := range s.cfg.Pods.Pods() {
		list.Items = append(list.Items, *p)
	}
	writeJSON(w, list)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the reader may have gone
}

// apiError is an error with the status that a client should see.
type apiError struct {
	code int
	text string
}

func (e *apiError) Error() string { return e.text }

func fail(w http.ResponseWriter, err error) {
	var ae *apiError
	if errors.As(err, &ae) {
		http.Error(w, ae.text, ae.code)
		return
	}
	if st, ok := status.FromError(err); ok {
		code := http.StatusInternalServerError
		if st.Code() == codes.NotFound {
			code = http.StatusNotFound
		}
		http.Error(w, st.Message(), code)
		return
	}
	http.Error(w, err.Error(), http.StatusInternalServerError)
}

// pod finds the request's pod.
func (s *Server) pod(r *http.Request) (*corev1.Pod, error) {
	pod, ok := s.cfg.Pods.PodByName(r.PathValue("namespace"), r.PathValue("pod"))
	if !ok || r.PathValue("uid") != "" && r.PathValue("uid") != string(pod.UID) {
		return nil, &apiError{http.StatusNotFound, fmt.Sprintf("pod %q does not run on node %s", r.PathValue("namespace")+"/"+r.PathValue("pod"), s.cfg.NodeName)}
	}
	return pod, nil
}

// containers lists the request's container by CRI, the newest first.
func (s *Server) containers(ctx context.Context, pod *corev1.Pod, name string) ([]*runtimev1.Container, error) {
	resp, err := s.cfg.Runtime.ListContainers(ctx, &runtimev1.ListContainersRequest{Filter: &runtimev1.ContainerFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(pod.UID), "io.kubernetes.container.name": name},
	}})
	if err != nil {
		return nil, err
	}
	list := resp.Containers
	slices.SortFunc(list, func(a, b *runtimev1.Container) int { return cmp.Compare(b.CreatedAt, a.CreatedAt) })
	return list, nil
}

// running finds the id of the request's container, which has to run.
func (s *Server) running(r *http.Request) (string, error) {
	pod, err := s.pod(r)
	if err != nil {
		return "", err
	}
	name := r.PathValue("container")
	list, err := s.containers(r.Context(), pod, name)
	if err != nil {
		return "", err
	}
	for _, c := range list {
		if c.State == runtimev1.ContainerState_CONTAINER_RUNNING {
			return c.Id, nil
		}
	}
	return "", &apiError{http.StatusNotFound, fmt.Sprintf("container %q of pod %s/%s is not running", name, pod.Namespace, pod.Name)}
}

func boolParam(q url.Values, names ...string) bool {
	for _, n := range names {
		if v, err := strconv.ParseBool(q.Get(n)); err == nil && v {
			return true
		}
	}
	return false
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	id, err := s.running(r)
	if err != nil {
		fail(w, err)
		return
	}
	q := r.URL.Query()
	tty := boolParam(q, "tty")
	resp, err := s.cfg.Runtime.Exec(r.Context(), &runtimev1.ExecRequest{
		ContainerId: id, Cmd: q["command"], Tty: tty,
		Stdin: boolParam(q, "input", "stdin"), Stdout: boolParam(q, "output", "stdout"), Stderr: boolParam(q, "error", "stderr") && !tty,
	})
	if err != nil {
		fail(w, err)
		return
	}
	s.proxy(w, r, resp.Url)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	id, err := s.running(r)
	if err != nil {
		fail(w, err)
		return
	}
	q := r.URL.Query()
	// Whether there is a terminal is the container's own choice.
	tty := false
	if pod, err := s.pod(r); err == nil {
		for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
			for i := range list {
				tty = tty || list[i].Name == r.PathValue("container") && list[i].TTY
			}
		}
		for i := range pod.Spec.EphemeralContainers {
			c := &pod.Spec.EphemeralContainers[i]
			tty = tty || c.Name == r.PathValue("container") && c.TTY
		}
	}
	resp, err := s.cfg.Runtime.Attach(r.Context(), &runtimev1.AttachRequest{
		ContainerId: id, Tty: tty,
		Stdin: boolParam(q, "input", "stdin"), Stdout: boolParam(q, "output", "stdout"), Stderr: boolParam(q, "error", "stderr") && !tty,
	})
	if err != nil {
		fail(w, err)
		return
	}
	s.proxy(w, r, resp.Url)
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	pod, err := s.pod(r)
	if err != nil {
		fail(w, err)
		return
	}
	boxes, err := s.cfg.Runtime.ListPodSandbox(r.Context(), &runtimev1.ListPodSandboxRequest{Filter: &runtimev1.PodSandboxFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(pod.UID)},
		State:         &runtimev1.PodSandboxStateValue{State: runtimev1.PodSandboxState_SANDBOX_READY},
	}})
	if err != nil {
		fail(w, err)
		return
	}
	if len(boxes.Items) == 0 {
		fail(w, &apiError{http.StatusNotFound, fmt.Sprintf("pod %s/%s has no sandbox: it is not running", pod.Namespace, pod.Name)})
		return
	}
	req := &runtimev1.PortForwardRequest{PodSandboxId: boxes.Items[0].Id}
	for _, p := range r.URL.Query()["port"] {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			fail(w, &apiError{http.StatusBadRequest, fmt.Sprintf("port %q is not a port number", p)})
			return
		}
		req.Port = append(req.Port, int32(n))
	}
	resp, err := s.cfg.Runtime.PortForward(r.Context(), req)
	if err != nil {
		fail(w, err)
		return
	}
	s.proxy(w, r, resp.Url)
}

// proxy passes the request, an upgrade to SPDY or WebSocket most of the time,
// to containerd's streaming server, and carries the bytes both ways after.
func (s *Server) proxy(w http.ResponseWriter, r *http.Request, target string) {
	u, err := url.Parse(target)
	if err != nil {
		fail(w, fmt.Errorf("containerd's streaming URL: %w", err))
		return
	}
	p := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL = u
			pr.Out.Host = u.Host
			pr.Out.Header.Del("Authorization")
		},
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "containerd's streaming server: "+err.Error(), http.StatusBadGateway)
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	p.ServeHTTP(w, r)
}

// run executes a command and answers with what it printed.
func (s *Server) run(w http.ResponseWriter, r *http.Request) {
	id, err := s.running(r)
	if err != nil {
		fail(w, err)
		return
	}
	q := r.URL.Query()
	cmd := q["command"]
	if len(cmd) == 0 {
		cmd = q["cmd"]
	}
	if len(cmd) == 0 {
		fail(w, &apiError{http.StatusBadRequest, "parameter command is missing"})
		return
	}
	resp, err := s.cfg.Runtime.ExecSync(r.Context(), &runtimev1.ExecSyncRequest{ContainerId: id, Cmd: cmd})
	if err != nil {
		fail(w, err)
		return
	}
	if resp.ExitCode != 0 {
		w.WriteHeader(http.StatusInternalServerError)
	}
	_, _ = w.Write(append(resp.Stdout, resp.Stderr...))
}
