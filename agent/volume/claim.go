package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/component-helpers/storage/volume"

	"timonel/agent/hostile"
)

// claimsDir of a pod's folder has a file for each claim's volume that the pod got,
// so that it keeps it after the agent's start whatever has become of the claim.
const claimsDir = "claims"

// maxVolumeName bounds what is read of such a file: names of objects are shorter.
const maxVolumeName = 1 << 10

// ClaimOf names the claim that a volume of a pod uses, "" for none.
func ClaimOf(pod *corev1.Pod, v *corev1.Volume) string {
	switch {
	case v.PersistentVolumeClaim != nil:
		return v.PersistentVolumeClaim.ClaimName
	case v.Ephemeral != nil:
		return ephemeral.VolumeClaimName(pod, v)
	}
	return ""
}

// claimed finds what is behind a claim, and makes it if it is this node's own or a CSI
// driver's; of those it says when to ask again, too.
func (m *Manager) claimed(ctx context.Context, pod *corev1.Pod, v *corev1.Volume) (string, time.Time, error) {
	had, err := m.noted(pod.UID, v.Name)
	if err != nil {
		return "", time.Time{}, err
	}
	if had != "" {
		pv, ok := m.cfg.PersistentVolume(had)
		if !ok {
			return "", time.Time{}, fmt.Errorf("PersistentVolume %q, which the pod has, is not known here yet", had)
		}
		m.use(pv, pod.UID)
		if pv.Spec.CSI != nil {
			return m.claimOfDriver(pod, v, pv)
		}
		path, err := m.claimPath(pv)
		return path, time.Time{}, err
	}
	pv, err := m.bound(pod, v)
	if err != nil {
		return "", time.Time{}, err
	}
	never := time.Time{}
	if m.cfg.Labels != nil {
		if labels := m.cfg.Labels(); labels != nil {
			if err := volume.CheckNodeAffinity(pv, labels); err != nil {
				return "", never, fmt.Errorf("PersistentVolume %q is not for this node: %w", pv.Name, err)
			}
		}
	}
	if pv.Spec.CSI != nil {
		if !m.use(pv, pod.UID) {
			return "", never, errTaken
		}
		if err := m.note(pod.UID, v.Name, pv.Name); err != nil {
			return "", never, err
		}
		return m.claimOfDriver(pod, v, pv)
	}
	path, err := m.claimPath(pv)
	if err == nil {
		err = checkUse(pod, v.Name, false)
	}
	if err != nil {
		return "", never, err
	}
	if !m.use(pv, pod.UID) {
		return "", never, errTaken
	}
	if m.isOwn(pv) {
		if err := m.makeLocal(ctx, pv.Name); err != nil {
			return "", never, err
		}
	}
	if pv.Spec.Local != nil {
		readOnly := v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ReadOnly
		if err := m.giveToGroup(ctx, pod, path, readOnly); err != nil {
			return "", never, err
		}
	}
	return path, never, m.note(pod.UID, v.Name, pv.Name)
}

var errTaken = errors.New("volume uses the ReadWriteOncePod access mode and is already in use by another pod")

// bound returns the volume of a claim, or why the pod cannot have it, as the
// kubelet says it.
func (m *Manager) bound(pod *corev1.Pod, v *corev1.Volume) (*corev1.PersistentVolume, error) {
	name := ClaimOf(pod, v)
	claim, ok := m.cfg.PersistentVolumeClaim(pod.Namespace, name)
	switch {
	case !ok:
		return nil, fmt.Errorf("PVC %s/%s is not known here yet", pod.Namespace, name)
	case claim.DeletionTimestamp != nil:
		return nil, fmt.Errorf("can't start pod because PVC %s/%s is being deleted", pod.Namespace, name)
	case claim.Status.Phase != corev1.ClaimBound || claim.Spec.VolumeName == "":
		return nil, fmt.Errorf("PVC %s/%s has non-bound phase (%q) or empty pvc.Spec.VolumeName (%q)", pod.Namespace, name, claim.Status.Phase, claim.Spec.VolumeName)
	}
	if v.Ephemeral != nil {
		if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
			return nil, err
		}
	}
	pv, ok := m.cfg.PersistentVolume(claim.Spec.VolumeName)
	switch {
	case !ok:
		return nil, fmt.Errorf("PersistentVolume %q of PVC %s/%s is not known here yet", claim.Spec.VolumeName, pod.Namespace, name)
	case pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != claim.UID:
		return nil, fmt.Errorf("PersistentVolume %q spec.claimRef.uid is not that of PVC %s/%s", pv.Name, pod.Namespace, name)
	case pv.Spec.VolumeMode != nil && *pv.Spec.VolumeMode != corev1.PersistentVolumeFilesystem && pv.Spec.CSI == nil:
		return nil, fmt.Errorf("PersistentVolume %q: volumeMode %s is %w", pv.Name, *pv.Spec.VolumeMode, ErrUnsupported)
	}
	return pv, nil
}

// claimPath is where a volume is on this node.
func (m *Manager) claimPath(pv *corev1.PersistentVolume) (string, error) {
	switch s := &pv.Spec.PersistentVolumeSource; {
	case isMadeHere(pv):
		if !m.isOwn(pv) {
			return "", fmt.Errorf("PersistentVolume %q is on the disk of node %q", pv.Name, pv.Annotations[nodeAnnotation])
		}
		return m.localPath(pv.Name)
	case s.HostPath != nil:
		return s.HostPath.Path, hostPath(s.HostPath)
	case s.Local != nil:
		st, err := hostile.Stat(s.Local.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("path %q does not exist", s.Local.Path)
		}
		if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			err = fmt.Errorf("PersistentVolume %q: a local volume that is %s is %w", pv.Name, hostile.KindName(st.Mode), ErrUnsupported)
		}
		return s.Local.Path, err
	}
	return "", fmt.Errorf("PersistentVolume %q: volumes of type %s are %w: use csi, local or hostPath", pv.Name, typeOf(&pv.Spec.PersistentVolumeSource), ErrUnsupported)
}

// giveToGroup lets the pod's fsGroup at a volume, as its policy says.
func (m *Manager) giveToGroup(ctx context.Context, pod *corev1.Pod, path string, readOnly bool) error {
	gid := fsGroup(pod)
	if gid == nil {
		return nil
	}
	parent, err := hostile.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	name := filepath.Base(path)
	if p := pod.Spec.SecurityContext.FSGroupChangePolicy; p != nil && *p == corev1.FSGroupChangeOnRootMismatch {
		if has, err := parent.HasGroup(name, int(*gid), readOnly); has || err != nil {
			return err
		}
	}
	return parent.SetGroup(ctx, name, int(*gid), readOnly)
}

// noted is the PersistentVolume that a pod has by a volume's name, "" for none.
func (m *Manager) noted(uid types.UID, name string) (string, error) {
	dir, err := hostile.OpenRoot(m.PodDir(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer dir.Close()
	raw, err := dir.ReadFile(filepath.Join(claimsDir, name), maxVolumeName)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(raw), err
}

func (m *Manager) note(uid types.UID, name, pv string) error {
	dir, err := m.podSubDir(uid, claimsDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	making := "." + name + ".new"
	if err := dir.Remove(making); err != nil {
		return err
	}
	if err := dir.Create(making, []byte(pv), 0o600, -1, -1); err != nil {
		return err
	}
	return dir.Rename(making, name)
}

// use notes that a pod uses a volume, unless only one may and another does.
func (m *Manager) use(pv *corev1.PersistentVolume, uid types.UID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	users := m.users[pv.Name]
	if slices.Contains(users, uid) {
		return true
	}
	if len(users) > 0 && slices.Contains(pv.Spec.AccessModes, corev1.ReadWriteOncePod) {
		return false
	}
	m.users[pv.Name] = append(users, uid)
	return true
}

// unuse forgets what a pod used.
func (m *Manager) unuse(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, users := range m.users {
		if i := slices.Index(users, uid); i >= 0 {
			if len(users) == 1 {
				delete(m.users, name)
			} else {
				m.users[name] = slices.Delete(slices.Clone(users), i, i+1)
			}
		}
	}
}
