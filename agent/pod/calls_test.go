package pod

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
	"timonel/agent/cgroup"
	"timonel/test/needs"
)

// calling is a CRI that does what it is told at once, and keeps what it was asked.
type calling struct {
	runtimev1.RuntimeServiceClient
	runtimev1.ImageServiceClient
	calls []string   // but for stops, which are made in the background
	mu    sync.Mutex // of made
	boxes []*runtimev1.PodSandbox
	made  []*runtimev1.ContainerStatus
}

func (c *calling) ListPodSandbox(context.Context, *runtimev1.ListPodSandboxRequest, ...grpc.CallOption) (*runtimev1.ListPodSandboxResponse, error) {
	c.calls = append(c.calls, "list sandboxes")
	return &runtimev1.ListPodSandboxResponse{Items: c.boxes}, nil
}

func (c *calling) PodSandboxStatus(context.Context, *runtimev1.PodSandboxStatusRequest, ...grpc.CallOption) (*runtimev1.PodSandboxStatusResponse, error) {
	c.calls = append(c.calls, "sandbox status")
	return &runtimev1.PodSandboxStatusResponse{Status: &runtimev1.PodSandboxStatus{
		State: runtimev1.PodSandboxState_SANDBOX_READY, Network: &runtimev1.PodSandboxNetworkStatus{Ip: "10.0.0.9"},
	}}, nil
}

func (c *calling) ListContainers(context.Context, *runtimev1.ListContainersRequest, ...grpc.CallOption) (*runtimev1.ListContainersResponse, error) {
	c.calls = append(c.calls, "list containers")
	c.mu.Lock()
	defer c.mu.Unlock()
	out := &runtimev1.ListContainersResponse{}
	for _, st := range c.made {
		out.Containers = append(out.Containers, &runtimev1.Container{Id: st.Id, PodSandboxId: "s0"})
	}
	return out, nil
}

func (c *calling) ContainerStatus(_ context.Context, req *runtimev1.ContainerStatusRequest, _ ...grpc.CallOption) (*runtimev1.ContainerStatusResponse, error) {
	c.calls = append(c.calls, "container status")
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range c.made {
		if st.Id == req.ContainerId {
			return &runtimev1.ContainerStatusResponse{Status: st}, nil
		}
	}
	return nil, fmt.Errorf("no container %s", req.ContainerId)
}

func (c *calling) RunPodSandbox(context.Context, *runtimev1.RunPodSandboxRequest, ...grpc.CallOption) (*runtimev1.RunPodSandboxResponse, error) {
	c.calls = append(c.calls, "RUN SANDBOX")
	c.boxes = []*runtimev1.PodSandbox{{Id: "s0", State: runtimev1.PodSandboxState_SANDBOX_READY, CreatedAt: 1}}
	return &runtimev1.RunPodSandboxResponse{PodSandboxId: "s0"}, nil
}

func (c *calling) ImageStatus(context.Context, *runtimev1.ImageStatusRequest, ...grpc.CallOption) (*runtimev1.ImageStatusResponse, error) {
	c.calls = append(c.calls, "image status")
	return &runtimev1.ImageStatusResponse{Image: &runtimev1.Image{Id: "i"}}, nil
}

func (c *calling) CreateContainer(_ context.Context, req *runtimev1.CreateContainerRequest, _ ...grpc.CallOption) (*runtimev1.CreateContainerResponse, error) {
	c.calls = append(c.calls, "CREATE")
	c.mu.Lock()
	defer c.mu.Unlock()
	id := fmt.Sprintf("c%d", len(c.made))
	c.made = append(c.made, &runtimev1.ContainerStatus{Id: id, Labels: req.Config.Labels, Annotations: req.Config.Annotations, State: runtimev1.ContainerState_CONTAINER_RUNNING})
	return &runtimev1.CreateContainerResponse{ContainerId: id}, nil
}

func (c *calling) StartContainer(context.Context, *runtimev1.StartContainerRequest, ...grpc.CallOption) (*runtimev1.StartContainerResponse, error) {
	c.calls = append(c.calls, "START")
	return &runtimev1.StartContainerResponse{}, nil
}

func (c *calling) StopContainer(_ context.Context, req *runtimev1.StopContainerRequest, _ ...grpc.CallOption) (*runtimev1.StopContainerResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, st := range c.made {
		if st.Id == req.ContainerId {
			ended := &runtimev1.ContainerStatus{Id: st.Id, Labels: st.Labels, Annotations: st.Annotations, State: runtimev1.ContainerState_CONTAINER_EXITED}
			c.made[i] = ended
		}
	}
	return &runtimev1.StopContainerResponse{}, nil
}

func (c *calling) StopPodSandbox(context.Context, *runtimev1.StopPodSandboxRequest, ...grpc.CallOption) (*runtimev1.StopPodSandboxResponse, error) {
	c.calls = append(c.calls, "STOP SANDBOX")
	return &runtimev1.StopPodSandboxResponse{}, nil
}

func (c *calling) RemoveContainer(context.Context, *runtimev1.RemoveContainerRequest, ...grpc.CallOption) (*runtimev1.RemoveContainerResponse, error) {
	c.calls = append(c.calls, "remove container")
	return &runtimev1.RemoveContainerResponse{}, nil
}

func (c *calling) RemovePodSandbox(context.Context, *runtimev1.RemovePodSandboxRequest, ...grpc.CallOption) (*runtimev1.RemovePodSandboxResponse, error) {
	c.calls = append(c.calls, "remove sandbox")
	return &runtimev1.RemovePodSandboxResponse{}, nil
}

// TestCallsOfAPod: a pod is started in one pass and ends in two, that ask CRI what they have
// to know and nothing twice.
func TestCallsOfAPod(t *testing.T) {
	t.Parallel()
	needs.Root(t, "makes a cgroup and volumes")
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "calls", Name: "p", Namespace: "ns"}}
	pod.Spec.Containers = []corev1.Container{
		{Name: "app", Image: "i", ImagePullPolicy: corev1.PullIfNotPresent}, {Name: "other", Image: "i", ImagePullPolicy: corev1.PullIfNotPresent},
	}
	w := testWorker(t, &fakeRuntime{}, pod)
	cri, cfg := &calling{}, w.m.cfg
	cfg.Runtime, cfg.Images, cfg.CgroupRoot = cri, cri, "/timonel-test-calls"
	cfg.Node = func() admission.Node {
		return admission.Node{Allocatable: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("10")}}
	}
	weights := w.m.weights
	w.m = NewManager(cfg)
	w.m.weights = weights
	w.observer.runtime = cri
	t.Cleanup(func() { _ = cgroup.Remove(cfg.CgroupRoot) })
	require.False(t, w.sync())
	require.Equal(t, []string{
		"list sandboxes", "list containers", "RUN SANDBOX",
		"list sandboxes", "sandbox status", "list containers",
		"image status", "image status", "CREATE", "START",
		"image status", "image status", "CREATE", "START",
		"list sandboxes", "sandbox status", "list containers", "container status", "container status",
	}, cri.calls)
	cri.calls = nil
	w.sync()
	require.Equal(t, []string{"list sandboxes", "sandbox status", "list containers", "container status", "container status"}, cri.calls)

	deleted, grace := pod.DeepCopy(), int64(30)
	deleted.DeletionTimestamp, deleted.DeletionGracePeriodSeconds = &metav1.Time{Time: time.Now().Add(30 * time.Second)}, &grace
	w.set(deleted)
	require.False(t, w.sync())
	w.wg.Wait() // they are stopped in the background
	cri.calls = nil
	require.False(t, w.sync())
	require.Equal(t, []string{
		"list sandboxes", "sandbox status", "list containers", "container status", "container status",
		"STOP SANDBOX", "remove container", "remove container", "remove sandbox",
	}, cri.calls)
	cri.calls = nil
	w.change(func(want *want) { want.removed = true })
	require.True(t, w.sync(), "it is gone")
	require.Empty(t, cri.calls)
}
