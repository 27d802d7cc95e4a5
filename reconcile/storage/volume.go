package storage

import (
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/storage/volume"

	"timonel/reconcile"
)

// volume decides for one volume.
func (p *pass) volume(pv *corev1.PersistentVolume) {
	if isLocal(pv) && pv.DeletionTimestamp != nil {
		p.deletedLocal(pv)
	}
	ref := pv.Spec.ClaimRef
	if ref == nil || ref.UID == "" {
		p.phase(pv, corev1.VolumeAvailable)
		return
	}
	claim, ok := p.in.Snapshot.PVCs().Get(ref.Namespace, ref.Name)
	if !ok || claim.UID != ref.UID {
		p.release(pv)
		return
	}
	switch {
	case claim.Spec.VolumeName == pv.Name:
		p.phase(pv, corev1.VolumeBound)
	case claim.Spec.VolumeName == "":
		// The claim's own pass binds it, unless it cannot be.
		if volume.CheckVolumeModeMismatches(&claim.Spec, &pv.Spec) {
			p.volumeEvent(pv, corev1.EventTypeWarning, volumeMismatch,
				"Cannot bind PersistentVolume to requested PersistentVolumeClaim %q due to incompatible volumeMode.", claim.Name)
			p.claimEvent(claim, corev1.EventTypeWarning, volumeMismatch,
				"Cannot bind PersistentVolume %q to requested PersistentVolumeClaim due to incompatible volumeMode.", pv.Name)
		}
	case pv.Annotations[volume.AnnDynamicallyProvisioned] != "" && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete:
		p.release(pv) // made for a claim that has another
	default:
		p.unbind(pv)
	}
}

// phase makes a volume's phase what it should be.
func (p *pass) phase(pv *corev1.PersistentVolume, phase corev1.PersistentVolumePhase) {
	if pv.Status.Phase != phase {
		p.Add(volumePhase(pv, phase))
	}
}

func volumePhase(pv *corev1.PersistentVolume, phase corev1.PersistentVolumePhase) reconcile.Request {
	status := map[string]any{"phase": phase}
	if pv.Status.Message != "" {
		status["message"] = nil
	}
	return reconcile.MergePatch(reconcile.PVsResource, pv, "status", map[string]any{
		"metadata": map[string]any{"uid": string(pv.UID)}, "status": status,
	})
}

// failed makes a volume's phase Failed and says why, once.
func (p *pass) failed(pv *corev1.PersistentVolume, reason, message string) {
	if pv.Status.Phase == corev1.VolumeFailed {
		return
	}
	r := volumePhase(pv, corev1.VolumeFailed)
	r.Event = reconcile.NewEvent(reconcile.PVKind, pv, corev1.EventTypeWarning, reason, "%s", message)
	p.Add(r)
}

// unbind takes a volume's claim from it, which has another volume. A reference that
// the volume's maker wrote stays, without the claim's UID.
func (p *pass) unbind(pv *corev1.PersistentVolume) {
	free := pv.DeepCopy()
	if _, ours := pv.Annotations[volume.AnnBoundByController]; ours {
		free.Spec.ClaimRef = nil
		maps.DeleteFunc(free.Annotations, func(k, _ string) bool { return k == volume.AnnBoundByController })
	} else {
		free.Spec.ClaimRef.UID = ""
	}
	requests := []reconcile.Request{reconcile.Update(reconcile.PVsResource, free)}
	if pv.Status.Phase != corev1.VolumeAvailable {
		requests = append(requests, volumePhase(pv, corev1.VolumeAvailable))
	}
	p.sequence(requests...)
}

// release is for a volume whose claim is gone, or has another: it says so first,
// then the volume is reclaimed as it asks for. What has failed stays so.
func (p *pass) release(pv *corev1.PersistentVolume) {
	if pv.Status.Phase != corev1.VolumeReleased && pv.Status.Phase != corev1.VolumeFailed {
		p.Add(volumePhase(pv, corev1.VolumeReleased))
		return
	}
	if pv.Annotations[volume.AnnMigratedTo] != "" {
		return // its CSI driver's
	}
	switch pv.Spec.PersistentVolumeReclaimPolicy {
	case corev1.PersistentVolumeReclaimRetain:
	case corev1.PersistentVolumeReclaimDelete:
		p.reclaim(pv)
	case corev1.PersistentVolumeReclaimRecycle:
		ref := pv.Spec.ClaimRef
		if _, again := p.in.Snapshot.PVCs().Get(ref.Namespace, ref.Name); !again {
			var pods []string
			for pod := range p.in.Snapshot.PodsUsing(ref.Namespace, ref.Name) {
				if !over(pod) {
					pods = append(pods, pod.Namespace+"/"+pod.Name)
				}
			}
			if len(pods) > 0 {
				p.volumeEvent(pv, corev1.EventTypeNormal, volumeFailedRecycle, "Volume is used by pods: %s", strings.Join(pods, ","))
				return
			}
		}
		p.failed(pv, volumeFailedRecycle, "No recycler plugin found for the volume!")
	default:
		p.failed(pv, "VolumeUnknownReclaimPolicy", "Volume has unrecognized PersistentVolumeReclaimPolicy")
	}
}

// reclaim deletes a volume that this program has made. What others make, they
// delete; what nobody would delete has failed.
func (p *pass) reclaim(pv *corev1.PersistentVolume) {
	provisioner := pv.Annotations[volume.AnnDynamicallyProvisioned]
	_, migrated := migratedName(provisioner)
	switch {
	case isLocal(pv):
		if pv.DeletionTimestamp == nil {
			p.Add(reconcile.Delete(reconcile.PVsResource, pv))
		}
	case migrated, provisioner != "" && !strings.HasPrefix(provisioner, "kubernetes.io/"), provisioner == "" && pv.Spec.CSI != nil:
	case provisioner != "":
		p.failed(pv, volumeFailedDelete, "no volume plugin matched name: "+provisioner)
	default:
		p.failed(pv, volumeFailedDelete, "error getting deleter volume plugin for volume \""+pv.Name+"\": no deletable volume plugin matched")
	}
}
