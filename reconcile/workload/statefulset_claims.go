package workload

import (
	"fmt"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/reconcile"
)

// claimName is the name of an ordinal's claim. Its form is looked at by others, who
// spread volumes over zones by it.
func claimName(set *appsv1.StatefulSet, template string, ordinal int) string {
	return fmt.Sprintf("%s-%s-%d", template, set.Name, ordinal)
}

// volumes are a pod's, with those of its claims in place of any by their names.
func (r *stateful) volumes(volumes []corev1.Volume, ordinal int) []corev1.Volume {
	var out []corev1.Volume
	for i := range r.set.Spec.VolumeClaimTemplates {
		name := r.set.Spec.VolumeClaimTemplates[i].Name
		out = append(out, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claimName(r.set, name, ordinal)},
		}})
	}
	for _, v := range volumes {
		if !slices.ContainsFunc(out, func(o corev1.Volume) bool { return o.Name == v.Name }) {
			out = append(out, v)
		}
	}
	return out
}

// hasVolumes says whether a pod has the volumes of all of its claims.
func (r *stateful) hasVolumes(pod *corev1.Pod, ordinal int) bool {
	for i := range r.set.Spec.VolumeClaimTemplates {
		name := r.set.Spec.VolumeClaimTemplates[i].Name
		if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
			return v.Name == name && v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claimName(r.set, name, ordinal)
		}) {
			return false
		}
	}
	return true
}

// claims yields an ordinal's claims that there are.
func (r *stateful) claims(ordinal int, yield func(*corev1.PersistentVolumeClaim)) {
	for i := range r.set.Spec.VolumeClaimTemplates {
		if claim, ok := r.in.Snapshot.PVCs().Get(r.set.Namespace, claimName(r.set, r.set.Spec.VolumeClaimTemplates[i].Name, ordinal)); ok {
			yield(claim)
		}
	}
}

// missingClaims returns the requests that create the claims of a pod that are not
// there. It returns false while one is being deleted: the pod must not get a volume
// that is about to go, which is told as verb's failure, if it is for one. Its other
// claims are created all the same, and the set is looked at again when the claim is gone.
func (r *stateful) missingClaims(pod string, ordinal int, verb string) ([]reconcile.Request, bool) {
	var out []reconcile.Request
	ready := true
	for i := range r.set.Spec.VolumeClaimTemplates {
		template := &r.set.Spec.VolumeClaimTemplates[i]
		name := claimName(r.set, template.Name, ordinal)
		if claim, ok := r.in.Snapshot.PVCs().Get(r.set.Namespace, name); ok {
			if claim.DeletionTimestamp != nil {
				if verb != "" {
					r.warn("Failed"+verb, "%s Pod %s in StatefulSet %s failed error: pvc %s is being deleted", verb, pod, r.set.Name, name)
				}
				ready = false
			}
			continue
		}
		claim := template.DeepCopy()
		claim.Name, claim.Namespace = name, r.set.Namespace
		claim.Labels = withLabels(claim.Labels, r.set.Spec.Selector.MatchLabels)
		if r.ownedBySet(ordinal) { // from the start: there may never be a pod to look at it for
			claim.OwnerReferences = append(claim.OwnerReferences, *metav1.NewControllerRef(r.set, reconcile.StatefulSetKind))
		}
		create := reconcile.Create(reconcile.PVCsResource, claim)
		create.Event = reconcile.NewEvent(reconcile.StatefulSetKind, r.set, corev1.EventTypeNormal, "SuccessfulCreate",
			"Create Claim %s Pod %s in StatefulSet %s success", name, pod, r.set.Name)
		create.FailEvent = reconcile.NewEvent(reconcile.StatefulSetKind, r.set, corev1.EventTypeWarning, "FailedCreate",
			"Create Claim %s for Pod %s in StatefulSet %s failed error", name, pod, r.set.Name)
		out = append(out, create)
	}
	return out, ready
}

// provide creates the claims that a pending pod misses and sets their owners. It
// returns false when one of them is being deleted.
func (r *stateful) provide(pod *corev1.Pod) bool {
	_, ordinal := identityOf(pod.Name)
	missing, ok := r.missingClaims(pod.Name, ordinal, "")
	r.result.Requests = append(r.result.Requests, missing...)
	if ok {
		r.retain(pod)
	}
	return ok
}

// retention is the set's policy, to retain if it has none.
func (r *stateful) retention() appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy {
	if p := r.set.Spec.PersistentVolumeClaimRetentionPolicy; p != nil {
		return *p
	}
	return appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{
		WhenDeleted: appsv1.RetainPersistentVolumeClaimRetentionPolicyType,
		WhenScaled:  appsv1.RetainPersistentVolumeClaimRetentionPolicyType,
	}
}

// ownedBySet says whether an ordinal's claims are to be deleted with the set.
func (r *stateful) ownedBySet(ordinal int) bool {
	policy := r.retention()
	const remove = appsv1.DeletePersistentVolumeClaimRetentionPolicyType
	return policy.WhenDeleted == remove && (policy.WhenScaled != remove || wantedOrdinal(r.set, ordinal))
}

// staleClaim says whether a claim of the ordinal is still owned by the pod that had
// the name before: it goes with that pod, and one of the same name comes after it.
func (r *stateful) staleClaim(pod string, ordinal int) bool {
	if r.retention().WhenScaled == appsv1.RetainPersistentVolumeClaimRetentionPolicyType {
		return false
	}
	stale := false
	r.claims(ordinal, func(claim *corev1.PersistentVolumeClaim) {
		for _, ref := range claim.OwnerReferences {
			stale = stale || refers(ref, pod, reconcile.PodKind)
		}
	})
	return stale
}

// retain gives the claims of a pod the owners that the policy says, by which they are
// deleted with the set or with a pod that is scaled away, once in a pass. It says
// whether any was changed.
func (r *stateful) retain(pod *corev1.Pod) bool {
	if r.retained[pod] {
		return false
	}
	r.retained[pod] = true
	changed := false
	_, ordinal := identityOf(pod.Name)
	r.claims(ordinal, func(claim *corev1.PersistentVolumeClaim) {
		refs, ok := r.claimOwners(claim, pod)
		if ok {
			return
		}
		updated := claim.DeepCopy()
		updated.OwnerReferences = refs
		update := reconcile.Update(reconcile.PVCsResource, updated)
		update.FailEvent = r.tell(update, "Update", pod.Name).FailEvent
		r.result.Add(update)
		changed = true
	})
	return changed
}

// claimOwners returns the owners that a claim should have, and whether it has them.
func (r *stateful) claimOwners(claim *corev1.PersistentVolumeClaim, pod *corev1.Pod) ([]metav1.OwnerReference, bool) {
	policy := r.retention()
	const remove = appsv1.DeletePersistentVolumeClaimRetentionPolicyType
	_, ordinal := identityOf(pod.Name)
	wanted := wantedOrdinal(r.set, ordinal)
	ownedBySet := r.ownedBySet(ordinal)
	ownedByPod := policy.WhenScaled == remove && !wanted

	var bySet, byPod, lax, foreign bool
	var others []metav1.OwnerReference
	for _, ref := range claim.OwnerReferences {
		ofSet, ofPod := refers(ref, r.set.Name, reconcile.StatefulSetKind), refers(ref, pod.Name, reconcile.PodKind)
		if ofSet && ref.UID != r.set.UID || ofPod && ref.UID != pod.UID {
			return nil, true // it goes with one that was here before
		}
		controls := ref.Controller != nil && *ref.Controller
		bySet = bySet || ref.UID == r.set.UID
		byPod = byPod || ref.UID == pod.UID
		lax = lax || !controls && (ref.UID == r.set.UID || ref.UID == pod.UID)
		if !ofSet && !ofPod {
			foreign = foreign || controls
			others = append(others, ref)
		}
	}
	if foreign && (policy.WhenDeleted == remove || policy.WhenScaled == remove) {
		if pod.Status.Phase == corev1.PodPending || bySet || byPod { // or each pass would tell of it
			r.warn("ConflictingController", "PersistentVolumeClaim %s has a conflicting OwnerReference that acts as a manging controller, "+
				"the retention policy is ignored for this claim", claim.Name)
		}
		return others, !bySet && !byPod
	}
	if !lax && bySet == ownedBySet && byPod == ownedByPod {
		return nil, true
	}
	if ownedBySet {
		others = append(others, *metav1.NewControllerRef(r.set, reconcile.StatefulSetKind))
	}
	if ownedByPod {
		others = append(others, *metav1.NewControllerRef(pod, reconcile.PodKind))
	}
	return others, false
}

// refers says whether a reference is to an object of a kind and name, whatever its UID.
func refers(ref metav1.OwnerReference, name string, kind schema.GroupVersionKind) bool {
	return ref.Name == name && ref.Kind == kind.Kind && ref.APIVersion == kind.GroupVersion().String()
}
