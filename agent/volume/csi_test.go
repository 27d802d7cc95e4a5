package volume

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/csi"
)

// fakeCSI is what drivers do.
type fakeCSI struct {
	asked []csi.Request
	err   error
	again time.Time
	held  error
	freed []types.UID
}

func (f *fakeCSI) Mount(r csi.Request) (string, time.Time, error) {
	f.asked = append(f.asked, r)
	return "/there/" + r.Volume, f.again, f.err
}

func (f *fakeCSI) Release(_ context.Context, uid types.UID) error {
	f.freed = append(f.freed, uid)
	return f.held
}

func (f *fakeCSI) Pods() []types.UID { return []types.UID{"left"} }

// TestClaimOfADriver: what a driver is asked for of a claim's volume; what waits is told
// from what failed; nothing of a pod is removed before drivers let go of it.
func TestClaimOfADriver(t *testing.T) {
	t.Parallel()
	objects, claim, pv := local()
	pv.Annotations = nil
	pv.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "h"}}
	claim.Status.Capacity = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Ki")}
	drivers := &fakeCSI{err: csi.ErrPending, again: time.Unix(9, 0)}
	m := manager(t, Config{Objects: objects, CSI: drivers})
	yes := true
	own := corev1.Volume{Name: "own", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: "d", ReadOnly: &yes}}}
	pod := podOf("u1", claimVolume("data"))
	pod.Spec.Volumes = append(pod.Spec.Volumes, own)
	pod.Spec.Volumes[0].PersistentVolumeClaim.ReadOnly = true

	_, _, err := m.Setup(t.Context(), pod, nil)
	require.ErrorIs(t, err, ErrPending)
	require.Len(t, drivers.asked, 2)
	require.Equal(t, csi.Request{Pod: pod, Volume: "d", PV: pv, Claim: claim, ReadOnly: true}, drivers.asked[0])
	require.Equal(t, csi.Request{Pod: pod, Volume: "own", Source: own.CSI, Inline: true, ReadOnly: true}, drivers.asked[1])
	require.True(t, ReadOnly(&own))

	drivers.err = &csi.Failure{Message: "MountVolume.SetUp failed for volume \"pvc-1\" : no"}
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NotErrorIs(t, err, ErrPending)
	require.EqualError(t, err, drivers.err.Error()+"\n"+drivers.err.Error(), "each says which it is")

	drivers.err = nil
	mounts, again, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, Mounts{"d": "/there/d", "own": "/there/own"}, mounts)
	require.Equal(t, time.Unix(9, 0), again)

	// It is the pod's from then on, whatever becomes of the claim.
	delete(objects.claims, "data")
	drivers.asked = nil
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, csi.Request{Pod: pod, Volume: "d", PV: pv, ReadOnly: true}, drivers.asked[0])
	require.True(t, m.isUsed("pvc-1"))

	pods, err := m.Pods()
	require.NoError(t, err)
	require.ElementsMatch(t, []types.UID{"left", "u1"}, pods)
	drivers.held = csi.ErrPending
	require.ErrorIs(t, m.Release(t.Context(), "u1"), ErrPending)
	require.ErrorIs(t, m.Teardown(t.Context(), "u1"), ErrPending)
	require.DirExists(t, m.PodDir("u1"))
	require.True(t, m.isUsed("pvc-1"))
	drivers.held = nil
	require.NoError(t, m.Teardown(t.Context(), "u1"))
	require.NoDirExists(t, m.PodDir("u1"))
	require.NoError(t, m.Teardown(t.Context(), "never"))
	require.Equal(t, []types.UID{"u1", "u1", "u1", "never"}, drivers.freed)
}

// TestBlockAndFilesystem: containers have to use a volume as what it is; block volumes of
// others than CSI drivers are not had.
func TestBlockAndFilesystem(t *testing.T) {
	t.Parallel()
	objects, _, pv := local()
	block := corev1.PersistentVolumeBlock
	drivers := &fakeCSI{}
	m := manager(t, Config{Objects: objects, CSI: drivers, Node: "n1", LocalDir: t.TempDir()})
	mounted := podOf("u1", claimVolume("data"))
	mounted.Spec.Containers = []corev1.Container{{VolumeMounts: []corev1.VolumeMount{{Name: "d", MountPath: "/d"}}}}
	device := podOf("u2", claimVolume("data"))
	device.Spec.InitContainers = []corev1.Container{{VolumeDevices: []corev1.VolumeDevice{{Name: "d", DevicePath: "/dev/d"}}}}

	_, _, err := m.Setup(t.Context(), device, nil)
	require.ErrorContains(t, err, "volume d has volumeMode Filesystem, but is specified in volumeDevices")
	pv.Spec.VolumeMode = &block
	_, _, err = m.Setup(t.Context(), device, nil)
	require.ErrorIs(t, err, ErrUnsupported)
	pv.Annotations = nil
	pv.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "h"}}
	_, _, err = m.Setup(t.Context(), mounted, nil)
	require.ErrorContains(t, err, "volume d has volumeMode Block, but is specified in volumeMounts")
	require.Empty(t, drivers.asked)
	_, _, err = m.Setup(t.Context(), device, nil)
	require.NoError(t, err)
	require.True(t, drivers.asked[0].Block)
}
