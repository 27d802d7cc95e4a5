package storage

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/volume"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/state/objects"
)

const (
	// LocalProvisioner makes volumes that are folders on the nodes.
	LocalProvisioner = "timonel.io/local"
	// LocalFinalizer of a volume holds it until its Node has deleted the folder.
	LocalFinalizer = "timonel.io/local-volume"
	// LocalVolumesAnnotation of a Node says where its local volumes are. A Node without
	// it has none.
	LocalVolumesAnnotation = "timonel.io/local-volumes"
	// DeletedVolumesAnnotation of a Node lists the UIDs, separated by commas, of volumes
	// that are being deleted and of which nothing is on the Node's disk any more.
	DeletedVolumesAnnotation = "timonel.io/deleted-volumes"
)

// nodePoll is when to look again for a Node that has no local volumes yet.
const nodePoll = 10 * time.Second

// isLocal says whether a volume was made by the provisioner that is built in.
func isLocal(pv *corev1.PersistentVolume) bool {
	return pv.Annotations[volume.AnnDynamicallyProvisioned] == LocalProvisioner && pv.Annotations[objects.NodeAnnotation] != ""
}

// provisionLocal makes a volume on the node that the scheduler has selected.
func (p *pass) provisionLocal(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) {
	if claim.DeletionTimestamp != nil {
		return
	}
	fail := func(format string, args ...any) {
		p.claimEvent(claim, corev1.EventTypeWarning, provisioningFailed, "Failed to provision volume with StorageClass %q: %s", class.Name, fmt.Sprintf(format, args...))
	}
	if why := cannotBeLocal(claim, class); why != "" {
		fail("%s", why)
		p.pending(claim)
		return
	}
	name := claim.Annotations[volume.AnnSelectedNode]
	node, ok := p.in.Snapshot.Nodes().Get("", name)
	if !ok {
		fail("node %q, on which it was to be, is gone", name)
		meta := reconcile.Pinned(claim)
		meta["annotations"] = map[string]any{volume.AnnSelectedNode: nil}
		p.Add(reconcile.MergePatch(reconcile.PVCsResource, claim, "", map[string]any{"metadata": meta}))
		return
	}
	folder, host := node.Annotations[LocalVolumesAnnotation], node.Labels[corev1.LabelHostname]
	if folder == "" || host == "" {
		fail("node %q has no annotation %s or no label %s: its agent may be older than the controllers", name, LocalVolumesAnnotation, corev1.LabelHostname)
		p.At(p.in.Now.Add(nodePoll))
		return
	}
	create := reconcile.Create(reconcile.PVsResource, localVolume(claim, class, node, path.Join(folder, volumeName(claim))))
	create.Event = reconcile.NewEvent(reconcile.PVCKind, claim, corev1.EventTypeNormal, provisioningSucceeded,
		"Successfully provisioned volume %s using %s", volumeName(claim), LocalProvisioner)
	create.FailEvent = reconcile.NewEvent(reconcile.PVCKind, claim, corev1.EventTypeWarning, provisioningFailed, "Error creating provisioned PV object for claim %s/%s", claim.Namespace, claim.Name)
	if claim.Annotations[volume.AnnStorageProvisioner] == LocalProvisioner {
		p.Add(create)
		return
	}
	p.sequence(annotateProvisioner(claim, LocalProvisioner), create)
}

// volumeName is the name of the volume that is made for a claim.
func volumeName(claim *corev1.PersistentVolumeClaim) string { return "pvc-" + string(claim.UID) }

// cannotBeLocal says which field of a claim or of its class the provisioner does
// not carry out, or "".
func cannotBeLocal(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) string {
	oneNode := func(m corev1.PersistentVolumeAccessMode) bool {
		return m == corev1.ReadWriteOnce || m == corev1.ReadWriteOncePod
	}
	for _, m := range claim.Spec.AccessModes {
		if !oneNode(m) {
			return fmt.Sprintf("spec.accessModes: a volume on one node's disk can be ReadWriteOnce or ReadWriteOncePod, not %s", m)
		}
	}
	switch {
	case claim.Annotations[volume.AnnSelectedNode] == "":
		return "the StorageClass must have volumeBindingMode WaitForFirstConsumer, so that the volume is made where its pod runs"
	case claim.Spec.VolumeMode != nil && *claim.Spec.VolumeMode != corev1.PersistentVolumeFilesystem:
		return fmt.Sprintf("spec.volumeMode: it makes folders, not %s devices", *claim.Spec.VolumeMode)
	case claim.Spec.Selector != nil:
		return "spec.selector: it selects among volumes that are there, and none is made by it"
	case claim.Spec.DataSource != nil || claim.Spec.DataSourceRef != nil:
		return "spec.dataSource: it cannot copy snapshots or other volumes"
	case ptr.Deref(claim.Spec.VolumeAttributesClassName, "") != "":
		return "spec.volumeAttributesClassName: it knows no attributes"
	case len(class.MountOptions) > 0:
		return "the StorageClass' mountOptions: it mounts nothing"
	case len(class.Parameters) > 0:
		return "the StorageClass' parameters: it knows none"
	}
	return ""
}

// localVolume is what is made for a claim. The path is for people: the node knows
// its own folder and finds the volume by name.
func localVolume(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass, node *corev1.Node, path string) *corev1.PersistentVolume {
	policy, mode := corev1.PersistentVolumeReclaimDelete, corev1.PersistentVolumeFilesystem
	if class.ReclaimPolicy != nil {
		policy = *class.ReclaimPolicy
	}
	ref := reconcile.Reference(reconcile.PVCKind, claim)
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name: volumeName(claim), Finalizers: []string{LocalFinalizer},
			Annotations: map[string]string{
				volume.AnnDynamicallyProvisioned: LocalProvisioner, volume.AnnBoundByController: "yes", objects.NodeAnnotation: node.Name,
			},
		},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			ClaimRef:                      &ref,
			PersistentVolumeReclaimPolicy: policy,
			StorageClassName:              class.Name,
			VolumeMode:                    &mode,
			PersistentVolumeSource:        corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: path}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{
					Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{node.Labels[corev1.LabelHostname]},
				}},
			}}}},
		},
	}
}

// deletedLocal lets a local volume go that is being deleted: when its node has
// deleted the folder, when the folder is to stay, or when the node is no more.
func (p *pass) deletedLocal(pv *corev1.PersistentVolume) {
	if !slices.Contains(pv.Finalizers, LocalFinalizer) {
		return
	}
	r := setFinalizers(reconcile.PVsResource, pv, without(pv.Finalizers, LocalFinalizer))
	if pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
		p.Add(r)
		return
	}
	name := pv.Annotations[objects.NodeAnnotation]
	node, ok := p.in.Snapshot.Nodes().Get("", name)
	switch {
	case !ok:
		r.Event = reconcile.NewEvent(reconcile.PVKind, pv, corev1.EventTypeWarning, volumeFailedDelete,
			"Node %q is gone: what its disk has of the volume was not deleted", name)
		p.Add(r)
	case slices.Contains(deletedVolumes(node), pv.UID):
		p.Add(r)
	}
}

// deletedVolumes are the UIDs that a Node lists.
func deletedVolumes(node *corev1.Node) []types.UID {
	var out []types.UID
	for uid := range strings.SplitSeq(node.Annotations[DeletedVolumesAnnotation], ",") {
		if uid != "" {
			out = append(out, types.UID(uid))
		}
	}
	return out
}

// deletedOnNode returns the keys of the volumes that a Node says it has deleted, and
// of all that wait for it when it is gone.
func deletedOnNode(c objects.Changed, node *corev1.Node, s *objects.Snapshot) (keys []reconcile.Key) {
	if c.New == nil {
		for pv := range s.PVsOnNode(node.Name) {
			if pv.DeletionTimestamp != nil {
				keys = append(keys, volumeKey(pv.Name))
			}
		}
		return keys
	}
	if before, ok := old(c).(*corev1.Node); ok && before.Annotations[DeletedVolumesAnnotation] == node.Annotations[DeletedVolumesAnnotation] {
		return nil
	}
	for _, uid := range deletedVolumes(node) {
		if m, ok := s.Metas().ByUID(uid); ok && m.GVK == reconcile.PVKind {
			keys = append(keys, volumeKey(m.Name))
		}
	}
	return keys
}
