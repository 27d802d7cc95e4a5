package storage

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/component-helpers/storage/volume"
	csitranslation "k8s.io/csi-translation-lib"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/state/objects"
)

// Reasons of events, as upstream's.
const (
	failedBinding         = "FailedBinding"
	volumeMismatch        = "VolumeMismatch"
	volumeFailedRecycle   = "VolumeFailedRecycle"
	volumeFailedDelete    = "VolumeFailedDelete"
	externalProvisioning  = "ExternalProvisioning"
	provisioningFailed    = "ProvisioningFailed"
	provisioningSucceeded = "ProvisioningSucceeded"
	waitForFirstConsumer  = "WaitForFirstConsumer"
	waitForPodScheduled   = "WaitForPodScheduled"
)

// preResizeAnnotation of a volume is its size before it was made larger for a
// claim that has not heard of it yet.
const preResizeAnnotation = "volume.alpha.kubernetes.io/pre-resize-capacity"

// claim decides for one claim.
func (p *pass) claim(claim *corev1.PersistentVolumeClaim) error {
	if _, bound := claim.Annotations[volume.AnnBindCompleted]; bound {
		return p.boundClaim(claim)
	}
	if claim.Spec.VolumeName != "" {
		return p.claimOfVolume(claim)
	}
	return p.freeClaim(claim)
}

// freeClaim is for a claim that takes any volume.
func (p *pass) freeClaim(claim *corev1.PersistentVolumeClaim) error {
	name := volume.GetPersistentVolumeClaimClass(claim)
	class, known := p.in.Snapshot.StorageClasses().Get("", name)
	delayed := known && class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer
	pv, err := bestMatch(p.in.Snapshot, claim, delayed)
	if err != nil {
		return fmt.Errorf("find a volume for claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	if pv != nil {
		return p.bind(pv, claim)
	}
	if !volume.PersistentVolumeClaimHasClass(claim) {
		if class := DefaultClass(p.in.Snapshot); class != nil {
			p.Add(reconcile.MergePatch(reconcile.PVCsResource, claim, "", map[string]any{
				"metadata": reconcile.Pinned(claim), "spec": map[string]any{"storageClassName": class.Name},
			}))
			return nil
		}
	}
	switch _, selected := claim.Annotations[volume.AnnSelectedNode]; {
	case delayed && !selected:
		p.sayWaiting(claim)
	case name != "":
		p.provision(claim, name, class)
		return nil
	default:
		p.claimEvent(claim, corev1.EventTypeNormal, failedBinding, "no persistent volumes available for this claim and no storage class is set")
	}
	p.pending(claim)
	return nil
}

// sayWaiting tells for what a claim waits whose class waits for a pod.
func (p *pass) sayWaiting(claim *corev1.PersistentVolumeClaim) {
	var pods []string
	for pod := range p.in.Snapshot.PodsUsing(claim.Namespace, claim.Name) {
		if !over(pod) && pod.Spec.NodeName == "" {
			pods = append(pods, pod.Name)
		}
	}
	switch len(pods) {
	case 0:
		p.claimEvent(claim, corev1.EventTypeNormal, waitForFirstConsumer, "waiting for first consumer to be created before binding")
	case 1:
		p.claimEvent(claim, corev1.EventTypeNormal, waitForPodScheduled, "waiting for pod %s to be scheduled", pods[0])
	default:
		p.claimEvent(claim, corev1.EventTypeNormal, waitForPodScheduled, "waiting for pods %s to be scheduled", strings.Join(pods, ","))
	}
}

// over says whether a pod has ended, or is being deleted and nothing of it runs.
func over(pod *corev1.Pod) bool {
	if objects.PodEnded(pod) {
		return true
	}
	runs := func(list []corev1.ContainerStatus) bool {
		return slices.ContainsFunc(list, func(c corev1.ContainerStatus) bool { return c.State.Terminated == nil && c.State.Waiting == nil })
	}
	s := &pod.Status
	return pod.DeletionTimestamp != nil && !runs(s.InitContainerStatuses) && !runs(s.ContainerStatuses) && !runs(s.EphemeralContainerStatuses)
}

// bestMatch returns the volume that a claim is to have: one that names it, or else
// the smallest of those with the fewest access modes beyond what it asks for.
func bestMatch(s *objects.Snapshot, claim *corev1.PersistentVolumeClaim, delayed bool) (*corev1.PersistentVolume, error) {
	byModes := map[string][]*corev1.PersistentVolume{}
	add := func(pv *corev1.PersistentVolume) {
		if volume.CheckAccessModes(claim, pv) {
			modes := modesOf(pv)
			byModes[modes] = append(byModes[modes], pv)
		}
	}
	for pv := range s.PVsClaimed(claim.Namespace, claim.Name) {
		add(pv)
	}
	for pv := range s.PVsFree(volume.GetPersistentVolumeClaimClass(claim)) {
		add(pv)
	}
	for _, modes := range slices.SortedFunc(maps.Keys(byModes), func(a, b string) int {
		return cmp.Or(cmp.Compare(strings.Count(a, ","), strings.Count(b, ",")), cmp.Compare(a, b))
	}) {
		if pv, err := volume.FindMatchingVolume(claim, byModes[modes], nil, nil, delayed, true); pv != nil || err != nil {
			return pv, err
		}
	}
	return nil, nil
}

func modesOf(pv *corev1.PersistentVolume) string {
	var modes []string
	for _, m := range pv.Spec.AccessModes {
		modes = append(modes, string(m))
	}
	slices.Sort(modes)
	return strings.Join(slices.Compact(modes), ",")
}

// claimOfVolume is for a claim that names the volume it is to have.
func (p *pass) claimOfVolume(claim *corev1.PersistentVolumeClaim) error {
	pv, ok := p.in.Snapshot.PVs().Get("", claim.Spec.VolumeName)
	switch {
	case !ok:
	case pv.Spec.ClaimRef == nil:
		why := unsuitable(pv, claim)
		if why == nil {
			return p.bind(pv, claim)
		}
		p.claimEvent(claim, corev1.EventTypeWarning, volumeMismatch, "Cannot bind to requested volume %q: %s", pv.Name, why)
	case volume.IsVolumeBoundToClaim(pv, claim):
		return p.bind(pv, claim)
	default:
		p.claimEvent(claim, corev1.EventTypeWarning, failedBinding, "volume %q already bound to a different claim.", pv.Name)
	}
	p.pending(claim)
	return nil
}

// unsuitable says why a claim cannot have the volume it names, or nil.
func unsuitable(pv *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim) error {
	asked, size := claim.Spec.Resources.Requests[corev1.ResourceStorage], pv.Spec.Capacity[corev1.ResourceStorage]
	switch {
	case pv.DeletionTimestamp != nil:
		return fmt.Errorf("the volume is marked for deletion %q", pv.Name)
	case size.Value() < asked.Value():
		return errors.New("requested PV is too small")
	case volume.GetPersistentVolumeClass(pv) != volume.GetPersistentVolumeClaimClass(claim):
		return errors.New("storageClassName does not match")
	case ptr.Deref(pv.Spec.VolumeAttributesClassName, "") != ptr.Deref(claim.Spec.VolumeAttributesClassName, ""):
		return errors.New("volumeAttributesClassName does not match")
	case volume.CheckVolumeModeMismatches(&claim.Spec, &pv.Spec):
		return errors.New("incompatible volumeMode")
	case !volume.CheckAccessModes(claim, pv):
		return errors.New("incompatible accessMode")
	}
	return nil
}

// boundClaim is for a claim that was bound before.
func (p *pass) boundClaim(claim *corev1.PersistentVolumeClaim) error {
	if claim.Spec.VolumeName == "" {
		p.lost(claim, "ClaimLost", "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!")
		return nil
	}
	pv, ok := p.in.Snapshot.PVs().Get("", claim.Spec.VolumeName)
	switch {
	case !ok:
		p.lost(claim, "ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!")
	case pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID == claim.UID:
		return p.bind(pv, claim)
	default:
		p.lost(claim, "ClaimMisbound", "Two claims are bound to the same volume, this one is bound incorrectly")
	}
	return nil
}

// bind makes what is missing of a binding: the volume's reference to the claim and
// its phase, the claim's to the volume and its status.
func (p *pass) bind(pv *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim) error {
	bound, changed, err := volume.GetBindVolumeToClaim(pv, claim)
	if err != nil {
		return fmt.Errorf("bind volume %s to claim %s/%s: %w", pv.Name, claim.Namespace, claim.Name, err)
	}
	var requests []reconcile.Request
	if changed {
		requests = append(requests, reconcile.Update(reconcile.PVsResource, bound))
	}
	if pv.Status.Phase != corev1.VolumeBound {
		requests = append(requests, volumePhase(pv, corev1.VolumeBound))
	}
	_, completed := claim.Annotations[volume.AnnBindCompleted]
	if claim.Spec.VolumeName != pv.Name || !completed {
		meta := reconcile.Pinned(claim)
		annotations := map[string]string{volume.AnnBindCompleted: "yes"}
		patch := map[string]any{"metadata": meta}
		if claim.Spec.VolumeName != pv.Name {
			patch["spec"] = map[string]any{"volumeName": pv.Name}
			if _, ok := claim.Annotations[volume.AnnBoundByController]; !ok {
				annotations[volume.AnnBoundByController] = "yes"
			}
		}
		meta["annotations"] = annotations
		requests = append(requests, reconcile.MergePatch(reconcile.PVCsResource, claim, "", patch))
	}
	status, err := boundStatus(claim, pv)
	if err != nil {
		return err
	}
	if len(status) > 0 {
		requests = append(requests, claimStatus(claim, status))
	}
	p.sequence(requests...)
	return nil
}

// boundStatus is what of a claim's status is to be otherwise when it has a volume.
func boundStatus(claim *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) (map[string]any, error) {
	status := map[string]any{}
	if !slices.Equal(claim.Status.AccessModes, pv.Spec.AccessModes) {
		status["accessModes"] = pv.Spec.AccessModes
	}
	if claim.Status.Phase == corev1.ClaimBound {
		return status, nil
	}
	status["phase"] = corev1.ClaimBound
	// The size is set on binding alone: later it is the file system's, which may
	// rightly differ from the volume's.
	size, ok := pv.Spec.Capacity[corev1.ResourceStorage]
	if !ok {
		return nil, fmt.Errorf("PersistentVolume %q is without a storage capacity", pv.Name)
	}
	if text, ok := pv.Annotations[preResizeAnnotation]; ok {
		if before, err := resource.ParseQuantity(text); err == nil {
			size = before
		}
	}
	if had, ok := claim.Status.Capacity[corev1.ResourceStorage]; !ok || had.Cmp(size) != 0 {
		status["capacity"] = map[corev1.ResourceName]resource.Quantity{corev1.ResourceStorage: size}
	}
	if ptr.Deref(claim.Status.CurrentVolumeAttributesClassName, "") != ptr.Deref(pv.Spec.VolumeAttributesClassName, "") {
		status["currentVolumeAttributesClassName"] = pv.Spec.VolumeAttributesClassName
	}
	return status, nil
}

func claimStatus(claim *corev1.PersistentVolumeClaim, status map[string]any) reconcile.Request {
	return reconcile.MergePatch(reconcile.PVCsResource, claim, "status", map[string]any{
		"metadata": map[string]any{"uid": string(claim.UID)}, "status": status,
	})
}

// unboundStatus is what of a claim's status is to be otherwise when it has no volume.
func unboundStatus(claim *corev1.PersistentVolumeClaim, phase corev1.PersistentVolumeClaimPhase) map[string]any {
	status := map[string]any{}
	if claim.Status.Phase != phase {
		status["phase"] = phase
	}
	if claim.Status.AccessModes != nil {
		status["accessModes"] = nil
	}
	if claim.Status.Capacity != nil {
		status["capacity"] = nil
	}
	if claim.Status.CurrentVolumeAttributesClassName != nil {
		status["currentVolumeAttributesClassName"] = nil
	}
	return status
}

func (p *pass) pending(claim *corev1.PersistentVolumeClaim) {
	if status := unboundStatus(claim, corev1.ClaimPending); len(status) > 0 {
		p.Add(claimStatus(claim, status))
	}
}

func (p *pass) lost(claim *corev1.PersistentVolumeClaim, reason, message string) {
	if claim.Status.Phase == corev1.ClaimLost {
		return
	}
	r := claimStatus(claim, unboundStatus(claim, corev1.ClaimLost))
	r.Event = reconcile.NewEvent(reconcile.PVCKind, claim, corev1.EventTypeWarning, reason, "%s", message)
	p.Add(r)
}

// provision has a volume made for a claim: by this program, or by a driver that
// looks for claims with its name.
func (p *pass) provision(claim *corev1.PersistentVolumeClaim, name string, class *storagev1.StorageClass) {
	if class == nil {
		p.claimEvent(claim, corev1.EventTypeWarning, provisioningFailed, "storageclass.storage.k8s.io %q not found", name)
		return
	}
	if class.Provisioner == LocalProvisioner {
		p.provisionLocal(claim, class)
		return
	}
	provisioner, migrated := migratedName(class.Provisioner)
	if !migrated && strings.HasPrefix(provisioner, "kubernetes.io/") {
		p.claimEvent(claim, corev1.EventTypeWarning, provisioningFailed, "no volume plugin matched name: %s", provisioner)
		return
	}
	if claim.Annotations[volume.AnnStorageProvisioner] != provisioner {
		p.Add(annotateProvisioner(claim, provisioner)) // and say so in the pass that sees it
		return
	}
	p.claimEvent(claim, corev1.EventTypeNormal, externalProvisioning, "Waiting for a volume to be created either by the external provisioner '%s' "+
		"or manually by the system administrator. If volume creation is delayed, please verify that "+
		"the provisioner is running and correctly registered.", provisioner)
}

func annotateProvisioner(claim *corev1.PersistentVolumeClaim, provisioner string) reconcile.Request {
	meta := reconcile.Pinned(claim)
	meta["annotations"] = map[string]string{volume.AnnStorageProvisioner: provisioner, volume.AnnBetaStorageProvisioner: provisioner}
	return reconcile.MergePatch(reconcile.PVCsResource, claim, "", map[string]any{"metadata": meta})
}

// migratedName is the name of the CSI driver that serves the classes of a
// provisioner which was part of Kubernetes once, or the name as it is.
func migratedName(provisioner string) (name string, migrated bool) {
	if csi, err := csitranslation.New().GetCSINameFromInTreeName(provisioner); err == nil {
		return csi, true
	}
	return provisioner, false
}
