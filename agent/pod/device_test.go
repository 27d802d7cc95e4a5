package pod

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/csi"
	"timonel/agent/volume"
)

// TestBlockVolumes: a container has its block volumes as devices, of a claim that may be
// read alone to read.
func TestBlockVolumes(t *testing.T) {
	t.Parallel()
	claim := func(name string, readOnly bool) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name, ReadOnly: readOnly}}}
	}
	pod := &corev1.Pod{Spec: corev1.PodSpec{Volumes: []corev1.Volume{claim("a", false), claim("b", true)}}}
	c := &corev1.Container{VolumeDevices: []corev1.VolumeDevice{{Name: "a", DevicePath: "/dev/xvda"}, {Name: "b", DevicePath: "/dev/xvdb"}}}
	w := &worker{known: known{volumes: volume.Mounts{"a": "/host/a", "b": "/host/b"}}}
	got, err := w.devices(pod, c)
	require.NoError(t, err)
	require.Equal(t, []*runtimev1.Device{
		{HostPath: "/host/a", ContainerPath: "/dev/xvda", Permissions: "mrw"}, {HostPath: "/host/b", ContainerPath: "/dev/xvdb", Permissions: "r"},
	}, got)
	c.VolumeDevices[0].Name = "c"
	_, err = w.devices(pod, c)
	require.ErrorContains(t, err, `volume "c" of device /dev/xvda is not ready`)
}

// TestMountMessages: what CSI says of a volume is upstream's already, with its reason.
func TestMountMessages(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err             error
		message, reason string
	}{
		{errors.New("volume \"v\": no"), "MountVolume failed: volume \"v\": no", "FailedMount"},
		{errors.Join(&csi.Failure{Message: "MountVolume.SetUp failed for volume \"v\" : no"}), "MountVolume.SetUp failed for volume \"v\" : no", "FailedMount"},
		{errors.Join(&csi.Failure{Message: "MapVolume.SetUpDevice failed for volume \"v\" : no"}, errors.New("b")), "MapVolume.SetUpDevice failed for volume \"v\" : no; b", "FailedMapVolume"},
		{fmt.Errorf("wait: %w", volume.ErrPending), "MountVolume failed: wait: not there yet", "FailedMount"},
	} {
		require.Equal(t, tt.message, mountMessage(tt.err))
		require.Equal(t, tt.reason, eventOf(tt.message))
	}
}
