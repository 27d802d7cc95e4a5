package pod

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/eviction"
	"timonel/agent/image"
	"timonel/test/needs"
)

// listener keeps events.
type listener struct {
	nobody
	mu     sync.Mutex
	events []*corev1.Event
}

func (r *listener) Event(e *corev1.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// TestEventsOfAPodAreFew: a probe that prints the time, for ever, is no write to the
// log each second.
func TestEventsOfAPodAreFew(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}}
	now, heard := time.Unix(1000, 0), &listener{}
	w := testWorker(t, &fakeRuntime{}, pod)
	w.m.cfg.Reporter, w.m.cfg.Now = heard, func() time.Time { return now }
	for i := range 1000 {
		w.eventOnce(pod, corev1.EventTypeWarning, "Unhealthy", fmt.Sprintf("%d %s", i, strings.Repeat("é", 20<<10)), "c")
	}
	require.Len(t, heard.events, 25)
	for _, e := range heard.events {
		require.LessOrEqual(t, len(e.Message), maxEventMessage)
		require.True(t, utf8.ValidString(e.Message))
	}
	now = now.Add(10*time.Minute + time.Second)
	for i := range 1000 {
		w.event(pod, corev1.EventTypeWarning, "Unhealthy", strconv.Itoa(i), "c")
	}
	require.Len(t, heard.events, 27, "one more each five minutes")
	now = now.Add(100 * time.Hour)
	for i := range 1000 {
		w.event(pod, corev1.EventTypeWarning, "Unhealthy", strconv.Itoa(i), "c")
	}
	require.Len(t, heard.events, 27+25)
}

// server answers on an address of its own.
func server(t *testing.T, address string, h http.HandlerFunc) (host string, port int) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	require.NoError(t, err)
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	a := l.Addr().(*net.TCPAddr)
	return a.IP.String(), a.Port
}

// TestAHookLeadsNowhereElse: the node follows nobody to another host.
func TestAHookLeadsNowhereElse(t *testing.T) {
	t.Parallel()
	var reached atomic.Bool
	otherHost, otherPort := server(t, "127.0.0.2:0", func(http.ResponseWriter, *http.Request) { reached.Store(true) })
	host, port := server(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("http://%s:%d/", otherHost, otherPort), http.StatusFound)
	})
	w := &worker{}
	h := &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/", Port: intstr.FromInt(port), Scheme: corev1.URISchemeHTTP}}
	require.NoError(t, w.runHandlerAt(t.Context(), nil, &corev1.Container{}, h, "id", []string{host}), "as upstream: who answers that is alive")
	require.False(t, reached.Load())
}

// TestAHookEndsWithItsContainer: it may wait for somebody who never answers.
func TestAHookEndsWithItsContainer(t *testing.T) {
	t.Parallel()
	hang, arrived := make(chan struct{}), make(chan struct{})
	host, port := server(t, "127.0.0.1:0", func(http.ResponseWriter, *http.Request) {
		close(arrived)
		<-hang
	})
	t.Cleanup(func() { close(hang) })
	spec := &corev1.Container{Name: "c", Lifecycle: &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{
		HTTPGet: &corev1.HTTPGetAction{Path: "/", Port: intstr.FromInt(port), Scheme: corev1.URISchemeHTTP},
	}}}
	w := testWorker(t, &fakeRuntime{}, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}})
	w.beginHook("id", spec)
	w.runPostStart(w.want.pod, spec, "id", []string{host})
	<-arrived
	w.stopHook("id")
	ended := make(chan struct{})
	go func() { w.wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the hook goes on")
	}
}

// starts is a runtime that makes containers, and tells after how many.
type starts struct {
	fakeRuntime
	runtimev1.ImageServiceClient
	made   int
	after  int
	delete func()
}

func (s *starts) ImageStatus(context.Context, *runtimev1.ImageStatusRequest, ...grpc.CallOption) (*runtimev1.ImageStatusResponse, error) {
	return &runtimev1.ImageStatusResponse{Image: &runtimev1.Image{Id: "i"}}, nil
}

func (s *starts) CreateContainer(context.Context, *runtimev1.CreateContainerRequest, ...grpc.CallOption) (*runtimev1.CreateContainerResponse, error) {
	if s.made++; s.made == s.after {
		s.delete()
	}
	return &runtimev1.CreateContainerResponse{ContainerId: strconv.Itoa(s.made)}, nil
}

func (s *starts) StartContainer(context.Context, *runtimev1.StartContainerRequest, ...grpc.CallOption) (*runtimev1.StartContainerResponse, error) {
	return &runtimev1.StartContainerResponse{}, nil
}

// TestNothingIsStartedOfAPodThatEnds: one of a thousand containers ends in its time.
func TestNothingIsStartedOfAPodThatEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*worker){
		"deleted": func(w *worker) {
			pod := w.want.pod.DeepCopy()
			pod.DeletionTimestamp = &metav1.Time{Time: time.Now()}
			w.set(pod)
		},
		"removed": func(w *worker) { w.change(func(want *want) { want.removed = true }) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u", Name: "p", Namespace: "ns"}}
			var p pass
			for i := range 50 {
				pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", i), Image: "i", ImagePullPolicy: corev1.PullNever})
			}
			for i := range pod.Spec.Containers {
				p.do(start{spec: &pod.Spec.Containers[i]})
			}
			rt := &starts{after: 3}
			w := testWorker(t, &rt.fakeRuntime, pod)
			w.m = NewManager(withRuntime(w.m.cfg, rt))
			rt.delete = func() { end(w) }
			s := &seen{observed: observed{sandboxes: []sandbox{{id: "s", ready: true, ips: []string{"10.0.0.1"}}}}, known: &w.known, images: map[string]image.Result{}}
			require.Equal(t, look, w.do(&w.want, s, &p))
			require.Equal(t, 3, rt.made)
		})
	}
}

func withRuntime(cfg Config, rt *starts) Config {
	cfg.Runtime, cfg.Images = rt, rt
	return cfg
}

// strangers is a runtime with the sandbox of a pod that nobody knows.
type strangers struct {
	fakeRuntime
	annotations map[string]string
}

func (s *strangers) ListPodSandbox(context.Context, *runtimev1.ListPodSandboxRequest, ...grpc.CallOption) (*runtimev1.ListPodSandboxResponse, error) {
	return &runtimev1.ListPodSandboxResponse{Items: []*runtimev1.PodSandbox{{
		Id: "s", Labels: map[string]string{labelPodUID: "gone", labelPodNamespace: "ns", labelPodName: "p"}, Annotations: s.annotations,
	}}}, nil
}

func (s *strangers) ListContainers(context.Context, *runtimev1.ListContainersRequest, ...grpc.CallOption) (*runtimev1.ListContainersResponse, error) {
	return &runtimev1.ListContainersResponse{}, nil
}

// TestAPodThatWasRemovedEndsSoon: what a pod says of itself does not keep it running
// after it was removed while its agent was away.
func TestAPodThatWasRemovedEndsSoon(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u", Annotations: map[string]string{annotationPodGrace: "999999999", "mine": "x"}}}
	seven := int64(7)
	pod.Spec.TerminationGracePeriodSeconds = &seven
	w := testWorker(t, &fakeRuntime{}, pod)
	box, err := w.sandboxConfig(pod, 0)
	require.NoError(t, err)
	require.Equal(t, "7", box.Annotations[annotationPodGrace])
	require.Equal(t, "x", box.Annotations["mine"])
	for said, want := range map[string]int64{"7": 7, "0": 0, "999999999": 30, "9223372036854775807": 30, "-5": 0, "": 30, "x": 30} {
		m := NewManager(w.m.cfg)
		m.cfg.Runtime = &strangers{annotations: map[string]string{annotationPodGrace: said}}
		require.NoError(t, m.Collect(t.Context()))
		require.Len(t, m.workers, 1)
		require.Equal(t, want, gracePeriod(m.workers["gone"].want.pod), said)
	}
}

// secrets has one of every name.
type secrets struct{ nobody }

func (secrets) Secret(_, name string) (*corev1.Secret, bool) {
	return &corev1.Secret{Data: map[string][]byte{"k": make([]byte, 1<<20)}}, true
}

// TestVolumesInMemoryAreThePods: who fills the node's memory by his volumes is found.
func TestVolumesInMemoryAreThePods(t *testing.T) {
	t.Parallel()
	needs.Root(t, "mounts")
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}}
	pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s"}}}}
	w := testWorker(t, &fakeRuntime{}, pod)
	cfg := w.m.cfg
	cfg.Objects, cfg.CgroupRoot = secrets{}, "/timonel-none"
	m := NewManager(cfg)
	_, _, err := m.volumes.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	var u eviction.Usage
	require.NoError(t, m.MeasureMemory(pod, nil, &u))
	require.InDelta(t, 1<<20, u.Memory, 64<<10)
}
