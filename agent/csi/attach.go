package csi

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// attachable says whether others attach a driver's volumes to nodes: those that the
// cluster knows nothing of, too.
func (m *Manager) attachable(driver string) bool {
	d, ok := m.cfg.CSIDriver(driver)
	return !ok || d.Spec.AttachRequired == nil || *d.Spec.AttachRequired
}

// attachmentName is that of the VolumeAttachment of a volume to a node, as upstream's
// attacher names it (pkg/volume/csi, getAttachmentName).
func attachmentName(handle, driver, node string) string {
	return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(handle+driver+node)))
}

// blocked says why a volume cannot be mounted yet: the cluster has to know that it is in
// use here, then to attach it. Who attaches volumes leaves those alone that are in use, so
// that none is taken from under a pod.
func (m *Manager) blocked(k key, r *Request) string {
	if r.Inline || !m.attachable(k.Driver) {
		return ""
	}
	name := corev1.UniqueVolumeName(k.unique())
	node := m.cfg.Live()
	switch {
	case node == nil || !slices.Contains(node.Status.VolumesInUse, name):
		return fmt.Sprintf("volume %q has not been added to the list of VolumesInUse in the node's volume status", r.name())
	case !slices.ContainsFunc(node.Status.VolumesAttached, func(a corev1.AttachedVolume) bool { return a.Name == name }):
		return fmt.Sprintf("volume %q is not attached to this node yet", r.name())
	}
	va, ok := m.cfg.VolumeAttachment(attachmentName(k.Handle, k.Driver, m.cfg.Node))
	switch {
	case !ok:
		return fmt.Sprintf("the VolumeAttachment of volume %q is not known here yet", r.name())
	case !va.Status.Attached && va.Status.AttachError != nil:
		return fmt.Sprintf("volume %q is not attached: %s", r.name(), va.Status.AttachError.Message)
	case !va.Status.Attached || va.DeletionTimestamp != nil:
		return fmt.Sprintf("the VolumeAttachment of volume %q does not say that it is attached", r.name())
	}
	return ""
}

// publishContext is what the attacher says of a volume that it attached.
func (m *Manager) publishContext(k key) map[string]string {
	if !m.attachable(k.Driver) {
		return nil
	}
	if va, ok := m.cfg.VolumeAttachment(attachmentName(k.Handle, k.Driver, m.cfg.Node)); ok {
		return maps.Clone(va.Status.AttachmentMetadata)
	}
	return nil
}

// used are the volumes in use that others attach. m.mu is held, or not needed yet.
func (m *Manager) used() []corev1.UniqueVolumeName {
	var out []corev1.UniqueVolumeName
	for _, v := range m.volumes {
		uses := v.staged != nil && v.staged.Attached
		for _, e := range v.uses {
			uses = uses || e.rec != nil && e.rec.Attached || e.want != nil && !e.want.Inline && m.attachable(v.Driver)
		}
		if uses {
			out = append(out, corev1.UniqueVolumeName(v.unique()))
		}
	}
	slices.Sort(out)
	return out
}

// tellUsed says that other volumes are in use, if they are. m.mu is held.
func (m *Manager) tellUsed() {
	now := m.used()
	if slices.Equal(now, m.inUse) {
		return
	}
	m.inUse = now
	if m.cfg.NodeChanged != nil {
		m.cfg.NodeChanged()
	}
}
