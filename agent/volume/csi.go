package volume

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/csi"
	"timonel/agent/hostile"
)

// ErrPending marks volumes that are being made, beside: nothing of them has failed, and
// the pod is woken when they are there.
var ErrPending = csi.ErrPending

// CSI mounts the volumes of CSI drivers; see [csi.Manager].
type CSI interface {
	Mount(r csi.Request) (path string, again time.Time, err error)
	Release(ctx context.Context, uid types.UID) error
	Pods() []types.UID
}

// ofDriver has a driver mount a volume.
func (m *Manager) ofDriver(r csi.Request) (string, time.Time, error) {
	if m.cfg.CSI == nil {
		return "", time.Time{}, fmt.Errorf("volumes of CSI drivers are %w", ErrUnsupported)
	}
	if err := checkUse(r.Pod, r.Volume, r.Block); err != nil {
		return "", time.Time{}, err
	}
	return m.cfg.CSI.Mount(r)
}

// claimOfDriver has a driver mount the volume of a claim.
func (m *Manager) claimOfDriver(pod *corev1.Pod, v *corev1.Volume, pv *corev1.PersistentVolume) (string, time.Time, error) {
	r := csi.Request{
		Pod: pod, Volume: v.Name, PV: pv, Block: isBlock(pv),
		ReadOnly: v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ReadOnly,
	}
	if claim, ok := m.cfg.PersistentVolumeClaim(pod.Namespace, ClaimOf(pod, v)); ok && claim.Spec.VolumeName == pv.Name {
		r.Claim = claim
	}
	return m.ofDriver(r)
}

func isBlock(pv *corev1.PersistentVolume) bool {
	return pv.Spec.VolumeMode != nil && *pv.Spec.VolumeMode == corev1.PersistentVolumeBlock
}

// checkUse says whether containers use a volume as what it is, in upstream's words
// (pkg/kubelet/volumemanager/populator).
func checkUse(pod *corev1.Pod, volume string, block bool) error {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if block && slices.ContainsFunc(list[i].VolumeMounts, func(vm corev1.VolumeMount) bool { return vm.Name == volume }) {
				return fmt.Errorf("volume %s has volumeMode Block, but is specified in volumeMounts", volume)
			}
			if !block && slices.ContainsFunc(list[i].VolumeDevices, func(d corev1.VolumeDevice) bool { return d.Name == volume }) {
				return fmt.Errorf("volume %s has volumeMode Filesystem, but is specified in volumeDevices", volume)
			}
		}
	}
	return nil
}

// releaseDrivers has drivers take back what they have mounted for a pod. What the agent
// itself has mounted of it, for subPaths, goes before.
func (m *Manager) releaseDrivers(ctx context.Context, uid types.UID) error {
	if m.cfg.CSI == nil {
		return nil
	}
	if err := hostile.Unmount(filepath.Join(m.PodDir(uid), "subpaths")); err != nil {
		return err
	}
	return m.cfg.CSI.Release(ctx, uid)
}
