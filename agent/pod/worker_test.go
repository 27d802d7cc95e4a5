package pod

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
	"timonel/agent/volume"
	"timonel/test/needs"
)

// fakeRuntime has one pod with a ready sandbox and a running container.
type fakeRuntime struct {
	runtimev1.RuntimeServiceClient
	observing func() // called while a worker looks, nil: nothing
}

func (f *fakeRuntime) ListPodSandbox(context.Context, *runtimev1.ListPodSandboxRequest, ...grpc.CallOption) (*runtimev1.ListPodSandboxResponse, error) {
	if f.observing != nil {
		f.observing()
	}
	return &runtimev1.ListPodSandboxResponse{Items: []*runtimev1.PodSandbox{{Id: "s1", CreatedAt: 1, State: runtimev1.PodSandboxState_SANDBOX_READY}}}, nil
}

func (f *fakeRuntime) PodSandboxStatus(context.Context, *runtimev1.PodSandboxStatusRequest, ...grpc.CallOption) (*runtimev1.PodSandboxStatusResponse, error) {
	return &runtimev1.PodSandboxStatusResponse{Status: &runtimev1.PodSandboxStatus{
		State: runtimev1.PodSandboxState_SANDBOX_READY, Network: &runtimev1.PodSandboxNetworkStatus{Ip: "10.0.0.9"},
	}}, nil
}

func (f *fakeRuntime) ListContainers(context.Context, *runtimev1.ListContainersRequest, ...grpc.CallOption) (*runtimev1.ListContainersResponse, error) {
	return &runtimev1.ListContainersResponse{Containers: []*runtimev1.Container{{Id: "c1", PodSandboxId: "s1"}}}, nil
}

func (f *fakeRuntime) ContainerStatus(context.Context, *runtimev1.ContainerStatusRequest, ...grpc.CallOption) (*runtimev1.ContainerStatusResponse, error) {
	return &runtimev1.ContainerStatusResponse{Status: &runtimev1.ContainerStatus{
		Id: "c1", State: runtimev1.ContainerState_CONTAINER_RUNNING, Labels: map[string]string{labelContainerName: "app"},
	}}, nil
}

type nobody struct{ volume.Objects }

func (nobody) RuntimeClass(string) (*nodev1.RuntimeClass, bool)       { return nil, false }
func (nobody) Status(types.UID) (*corev1.PodStatus, bool)             { return nil, false }
func (nobody) SetStatus(types.UID, *corev1.PodStatus)                 {}
func (nobody) ForgetStatus(types.UID)                                 {}
func (nobody) SetPodStatus(pod *corev1.Pod, status *corev1.PodStatus) {}
func (nobody) PodTerminated(*corev1.Pod)                              {}
func (nobody) ForgetPod(*corev1.Pod)                                  {}
func (nobody) Event(*corev1.Event)                                    {}

func testWorker(t *testing.T, rt *fakeRuntime, pod *corev1.Pod) *worker {
	t.Helper()
	m := NewManager(Config{
		Dir: t.TempDir(), Runtime: rt, Objects: nobody{}, Statuses: nobody{}, Reporter: nobody{},
		HostIPs: func() []string { return nil }, Capacity: func() corev1.ResourceList { return nil },
		Node:         func() admission.Node { return admission.Node{} },
		NetworkReady: func() bool { return true }, Logger: slog.New(slog.DiscardHandler),
	})
	m.weights = classWeights(nil, nil) // pods that request nothing change no cgroup
	w := newWorker(m, pod)
	ctx, cancel := context.WithCancel(context.Background())
	w.ctx = ctx
	t.Cleanup(func() { cancel(); w.wg.Wait(); _ = m.volumes.Teardown(context.Background(), pod.UID) })
	return w
}

// passes runs the worker for as long as something wakes it.
func passes(w *worker) {
	for {
		select {
		case <-w.wake:
			w.sync()
		default:
			return
		}
	}
}

func labelled(value string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "u1", Labels: map[string]string{"v": value}},
		Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "app"}},
			Volumes: []corev1.Volume{{Name: "info", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
				Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}}},
			}}}},
		},
	}
}

// A status that comes back does not end what is put off, as each try that fails may have
// another message; a change of the pod itself does.
func TestWhatEndsAWait(t *testing.T) {
	t.Parallel()
	w := testWorker(t, &fakeRuntime{}, labelled("1"))
	put := func() bool {
		w.take()
		_, put := w.waits.held(waitSandbox, w.m.cfg.Now())
		return put
	}
	w.putOff(waitSandbox, reasonCreating, "no runtime")
	require.True(t, put())
	echo := labelled("1")
	echo.ResourceVersion = "7"
	echo.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Message: "no runtime for 1f2e"}}}}
	w.set(echo)
	require.True(t, put())
	w.set(labelled("2"))
	require.False(t, put())
}

// A change of the pod that comes while a pass works on the copy it took shows in
// the volumes after the next.
func TestChangeDuringAPass(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("volumes are made by root")
	}
	rt := &fakeRuntime{}
	w := testWorker(t, rt, labelled("1"))
	shown := func() string {
		raw, err := os.ReadFile(filepath.Join(w.known.volumes["info"], "labels"))
		require.NoError(t, err)
		return string(raw)
	}
	w.wakeUp()
	passes(w)
	require.Equal(t, `v="1"`, shown())
	rt.observing = func() { rt.observing = nil; w.set(labelled("3")) }
	w.set(labelled("2"))
	passes(w)
	require.Equal(t, `v="3"`, shown())
	rt.observing = func() { rt.observing = nil; w.set(labelled("4")) }
	w.wakeUp()
	passes(w)
	require.Equal(t, `v="4"`, shown())
}

// An exit that containerd tells of while a pass looks is not settled by what that
// pass saw.
func TestExitDuringAPass(t *testing.T) {
	t.Parallel()
	w := testWorker(t, &fakeRuntime{}, labelled("1"))
	w.expectExit("old")
	taken := w.exits.made
	w.expectExit("c9") // made after obs was seen
	w.register(&observed{}, taken)
	require.NotContains(t, w.exits.by, "old")
	require.Contains(t, w.exits.by, "c9")
	require.False(t, w.next.IsZero(), "CRI is asked again about it")
	w.register(&observed{}, w.exits.made)
	require.Empty(t, w.exits.by)
}

// A sandbox that ends before CRI has given its id is looked at again.
func TestExitBeforeItsOwner(t *testing.T) {
	t.Parallel()
	w := testWorker(t, &fakeRuntime{}, labelled("1"))
	w.m.workers[w.uid] = w
	w.m.TaskChanged("s9", true)
	w.m.own("s9", w.uid)
	require.Contains(t, w.exits.by, "s9")
	select {
	case <-w.wake:
	case <-time.After(time.Minute):
		t.Fatal("the worker was not woken")
	}
	for i := range 3 * straysKept {
		w.m.TaskChanged(string(rune(i)), true)
	}
	require.LessOrEqual(t, len(w.m.strays), straysKept)
}

// A pod that is deleted while its volumes are made does not wait for a controller that
// does not answer, or for millions of files.
func TestVolumesOfAPodThatIsDeleted(t *testing.T) {
	t.Parallel()
	needs.Root(t, "volumes")
	pod := labelled("1")
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}}},
	}}})
	w := testWorker(t, &fakeRuntime{}, pod)
	asked := make(chan struct{})
	w.m.volumes = volume.New(volume.Config{Dir: filepath.Join(w.m.cfg.Dir, "pods"), Objects: nobody{}, Logger: slog.New(slog.DiscardHandler),
		Tokens: func(ctx context.Context, _, _ string, _ *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			close(asked)
			<-ctx.Done()
			return nil, ctx.Err()
		}})
	want, _ := w.take()
	s, made := &seen{known: &w.known}, make(chan struct{})
	go func() { defer close(made); w.makeVolumes(&want, s) }()
	<-asked
	deleted := pod.DeepCopy()
	deleted.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	w.set(deleted)
	select {
	case <-made:
	case <-time.After(5 * time.Second):
		t.Error("it waits")
		<-made
	}
	_, put := w.waits.held(waitVolumes, w.m.cfg.Now())
	require.False(t, put, "it did not fail")
}

// views are images whose views cannot be removed for now.
type views struct {
	volume.Images
	refuse error
}

func (v *views) RemoveView(context.Context, string) error { return v.refuse }

// hearer keeps events.
type hearer struct {
	nobody
	events []*corev1.Event
}

func (l *hearer) Event(e *corev1.Event) { l.events = append(l.events, e) }

// What of a deleted pod cannot be removed keeps it, and the cluster is told why, once.
func TestWhatCannotBeRemovedIsTold(t *testing.T) {
	t.Parallel()
	needs.Root(t, "volumes")
	pod := labelled("1")
	pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "some/image"}}}}
	w := testWorker(t, &fakeRuntime{}, pod)
	hears, images := &hearer{}, &views{refuse: errors.New("a file is in use")}
	w.m.cfg.Reporter = hears
	w.m.volumes = volume.New(volume.Config{Dir: filepath.Join(w.m.cfg.Dir, "pods"), Objects: nobody{}, Images: images, Logger: slog.New(slog.DiscardHandler)})
	_, _, err := w.m.volumes.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	want, _ := w.take()
	s := &seen{known: &w.known}
	for range 4 {
		w.step(&want, s, &pass{}, clean{})
		require.False(t, s.cleaned)
	}
	require.Len(t, hears.events, 1)
	require.Equal(t, "FailedKillPod", hears.events[0].Reason)
	require.Contains(t, hears.events[0].Message, "error killing pod: ")
	require.Contains(t, hears.events[0].Message, "a file is in use")
	images.refuse = nil
	require.NoError(t, w.m.volumes.Teardown(t.Context(), pod.UID))
}
