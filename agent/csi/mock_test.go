package csi

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/test/e2e/storage/drivers/csi-test/mock/service"
)

// TestUpstreamsMock: the driver that upstream's own tests of the kubelet use serves a
// volume that it attached. (Of a pod's own volumes it dies.)
func TestUpstreamsMock(t *testing.T) {
	w := newWorld(t)
	w.attachRequired(true)
	mock := service.New(service.Config{DriverName: name, AttachLimit: 3, NodeExpansionRequired: true, VolumeMountGroupRequired: true, EnableTopology: true})
	socket := filepath.Join(w.root, "plugins", name, "csi.sock")
	require.NoError(t, os.MkdirAll(filepath.Dir(socket), 0o755))
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	s := grpc.NewServer()
	csi.RegisterIdentityServer(s, mock)
	csi.RegisterControllerServer(s, mock)
	csi.RegisterNodeServer(s, mock)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	w.register()
	w.mu.Lock()
	node := w.told.Spec.Drivers[0]
	w.mu.Unlock()
	require.Equal(t, name, node.NodeID)
	require.EqualValues(t, 3, *node.Allocatable.Count)
	require.Equal(t, map[string]string{service.TopologyKey: service.TopologyValue}, w.m.Facts().Labels)

	capability := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}}
	made, err := mock.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30}, VolumeCapabilities: []*csi.VolumeCapability{capability}})
	require.NoError(t, err)
	id := made.Volume.VolumeId
	attached, err := mock.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: name, VolumeCapability: capability})
	require.NoError(t, err)
	unique := corev1.UniqueVolumeName(key{name, id}.unique())
	w.mu.Lock()
	w.node = &corev1.Node{Status: corev1.NodeStatus{VolumesInUse: []corev1.UniqueVolumeName{unique}, VolumesAttached: []corev1.AttachedVolume{{Name: unique}}}}
	w.va[attachmentName(id, name, "a1")] = &storagev1.VolumeAttachment{Status: storagev1.VolumeAttachmentStatus{Attached: true, AttachmentMetadata: attached.PublishContext}}
	w.mu.Unlock()

	pv := w.pv(id)
	pv.Name = "pv-mock"
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", UID: "c"}}
	claim.Status.Capacity = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	r := Request{Pod: w.pod("u1"), Volume: "data", PV: pv, Claim: claim}
	path := w.mount(r)
	require.Equal(t, path, w.mount(r))
	bigger := pv.DeepCopy()
	bigger.Spec.Capacity[corev1.ResourceStorage] = resource.MustParse("2Gi")
	r.PV = bigger
	w.mount(r)
	require.Eventually(t, func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.grown) > 0 }, 10*time.Second, time.Millisecond)
	w.kill()
	w.start()
	w.register()
	require.Equal(t, path, w.mount(r))
	w.release("u1")
	w.empty()
	require.NoDirExists(t, path)
}
