package agent_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"timonel/agent/hostile"
	"timonel/internal/csidriver"
	pb "timonel/proto/timonel/v1"
)

// registrar is the sidecar that registers a driver.
type registrar struct {
	registration.UnimplementedRegistrationServer
	info *registration.PluginInfo
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return r.info, nil
}

func (r *registrar) NotifyRegistrationStatus(context.Context, *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	return &registration.RegistrationStatusResponse{}, nil
}

// installDriver starts a driver and its registrar, as their pods would: by the paths that
// their manifests name.
func installDriver(t *testing.T, n *testNode, name, disk string) {
	t.Helper()
	endpoint := filepath.Join(n.cfg.KubeletDir, "plugins", name, "csi.sock")
	d, err := csidriver.Start(csidriver.Config{Name: name, Dir: disk, Socket: endpoint, NodeID: "n-1", Segments: map[string]string{"rack": "r1"}, MaxVolumes: 5})
	require.NoError(t, err)
	t.Cleanup(d.Stop)
	socket := filepath.Join(n.cfg.KubeletDir, "plugins_registry", name+"-reg.sock")
	var l net.Listener
	require.Eventually(t, func() bool { l, err = net.Listen("unix", socket); return err == nil }, 20*time.Second, 10*time.Millisecond, "%v", &err)
	s := grpc.NewServer()
	registration.RegisterRegistrationServer(s, &registrar{info: &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: name, Endpoint: endpoint, SupportedVersions: []string{"1.0.0"},
	}})
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
}

// TestCSIVolume: a driver registers by the paths of its manifest; a claim's volume is
// mounted once it is in use and attached by the cluster's word, beside one of the pod's
// own; both outlive the agent's end, and nothing is left of them after the pod's.
func TestCSIVolume(t *testing.T) {
	const driver = "d.example"
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.cfg.KubeletDir = n.cfg.DataDir + "-k"
	disk, err := os.MkdirTemp("", "timonel-csi-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(disk) })
	require.NoError(t, os.MkdirAll(filepath.Join(disk, "v1"), 0o777))
	require.NoError(t, os.Chmod(filepath.Join(disk, "v1"), 0o777))
	n.start()
	installDriver(t, n, driver, disk)
	c.wait("the driver to be said", 30*time.Second, func() bool {
		return c.csi != nil && len(c.csi.Spec.Drivers) == 1 && c.csi.Spec.Drivers[0].NodeID == "n-1" && *c.csi.Spec.Drivers[0].Allocatable.Count == 5
	})
	c.wait("the Node to say it", 30*time.Second, func() bool {
		return c.node.Labels["rack"] == "r1" && c.node.Annotations["csi.volume.kubernetes.io/nodeid"] == `{"d.example":"n-1"}`
	})

	unique := corev1.UniqueVolumeName("kubernetes.io/csi/" + driver + "^v1")
	c.object("CSIDriver", &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: driver}, Spec: storagev1.CSIDriverSpec{PodInfoOnMount: new(true),
		VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent, storagev1.VolumeLifecycleEphemeral}}})
	c.object("PersistentVolumeClaim", &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "data", UID: "c"},
		Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv"}, Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}})
	c.object("PersistentVolume", &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{
		AccessModes:            []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		ClaimRef:               &corev1.ObjectReference{Namespace: "default", Name: "data", UID: "c"},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: "v1"}}}})
	app := shell("app", "echo hello > /data/f && echo x > /own/f && exec sleep 1000")
	app.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}, {Name: "own", MountPath: "/own"}}
	p := newPod("stateful", app)
	p.Spec.Volumes = []corev1.Volume{
		{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}},
		{Name: "own", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: driver}}},
	}
	c.set(p)
	c.wait("the volume to be in use", 30*time.Second, func() bool { return slices.Contains(c.node.Status.VolumesInUse, unique) })
	require.NoFileExists(t, filepath.Join(disk, "v1", "f"))
	id := fmt.Sprintf("csi-%x", sha256.Sum256([]byte("v1"+driver+"a1")))
	c.object("VolumeAttachment", &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: id}, Status: storagev1.VolumeAttachmentStatus{Attached: true}})
	c.mu.Lock()
	live := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a1"}, Status: corev1.NodeStatus{
		VolumesInUse: []corev1.UniqueVolumeName{unique}, VolumesAttached: []corev1.AttachedVolume{{Name: unique}}}}
	raw, err := live.Marshal()
	require.NoError(t, err)
	require.NoError(t, c.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_NodeSet{NodeSet: &pb.NodeSet{Node: raw}}}))
	c.mu.Unlock()
	st := c.ready(p)
	said, err := os.ReadFile(filepath.Join(disk, "v1", "f"))
	require.NoError(t, err)
	require.Equal(t, "hello\n", string(said))

	require.Eventually(t, func() bool {
		code, summary := c.get("/stats/summary")
		return code == 200 && strings.Contains(summary, `"pvcRef":{"name":"data","namespace":"default"}`) && strings.Contains(summary, `"capacityBytes"`)
	}, 20*time.Second, 50*time.Millisecond)

	n.stop()
	n.start()
	c.wait("a stream", 20*time.Second, func() bool { return c.stream != nil && slices.Contains(c.node.Status.VolumesInUse, unique) })
	require.Equal(t, ids(st), ids(c.ready(p)), "it goes on")
	c.wait("the driver to be said again", 30*time.Second, func() bool { return c.node.Annotations["csi.volume.kubernetes.io/nodeid"] != "" })

	c.delete(p, 1)
	c.wait("the volume to be free", 30*time.Second, func() bool { return len(c.node.Status.VolumesInUse) == 0 })
	for _, below := range []string{"pods", "plugins"} {
		mounts, err := hostile.MountsBelow(filepath.Join(n.cfg.DataDir, below))
		require.NoError(t, err)
		require.Empty(t, mounts)
	}
	records, err := filepath.Glob(filepath.Join(n.cfg.DataDir, "csi", "*", "*"))
	require.NoError(t, err)
	require.Empty(t, records)
	require.FileExists(t, filepath.Join(disk, "v1", "f"))
}
