package storage

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/state/objects"
)

// The finalizers that admission gives to what must not go while it is used.
const (
	claimFinalizer      = "kubernetes.io/pvc-protection"
	volumeFinalizer     = "kubernetes.io/pv-protection"
	attributesFinalizer = "kubernetes.io/vac-protection"
)

var (
	attributesResource = storagev1.SchemeGroupVersion.WithResource("volumeattributesclasses")
	attributesKind     = storagev1.SchemeGroupVersion.WithKind("VolumeAttributesClass")
)

func without(list []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == name })
}

// setFinalizers gives this version of an object these finalizers.
func setFinalizers(resource schema.GroupVersionResource, obj metav1.Object, finalizers []string) reconcile.Request {
	meta := reconcile.Pinned(obj)
	meta["finalizers"] = finalizers
	return reconcile.MergePatch(resource, obj, "", map[string]any{"metadata": meta})
}

// protect keeps a finalizer on what is not being deleted, and takes it from what is
// being deleted and not used.
func protect(result *reconcile.Result, resource schema.GroupVersionResource, obj metav1.Object, finalizer string, used func() bool) {
	has := slices.Contains(obj.GetFinalizers(), finalizer)
	switch deleting := obj.GetDeletionTimestamp() != nil; {
	case deleting && has && !used():
		result.Add(setFinalizers(resource, obj, without(obj.GetFinalizers(), finalizer)))
	case !deleting && !has:
		result.Add(setFinalizers(resource, obj, append(slices.Clone(obj.GetFinalizers()), finalizer)))
	}
}

// ClaimProtection keeps claims that pods use, and says of the others since when
// nobody does.
type ClaimProtection struct{}

// Name implements Reconciler.
func (ClaimProtection) Name() string { return "persistentvolumeclaim-protection-controller" }

// All implements Reconciler.
func (ClaimProtection) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.PVCKind, s.PVCs().All())
}

// Keys implements Reconciler: a claim follows itself, and the pods that use it as
// they come, are placed, end and go.
func (ClaimProtection) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	switch now := c.Meta().Object.(type) {
	case *corev1.PersistentVolumeClaim:
		if c.New != nil {
			return []reconcile.Key{reconcile.KeyOf(reconcile.PVCKind, now)}
		}
	case *corev1.Pod:
		before, ok := old(c).(*corev1.Pod)
		if ok && before.UID != now.UID {
			return append(claimsOf(before), claimsOf(now)...)
		}
		if ok && c.New != nil && before.Spec.NodeName == now.Spec.NodeName && over(before) == over(now) && shutDown(before) == shutDown(now) {
			return nil
		}
		return claimsOf(now)
	}
	return nil
}

// Reconcile implements Reconciler.
func (ClaimProtection) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	claim, ok := in.Snapshot.PVCs().Get(key.Namespace, key.Name)
	if !ok {
		return result, nil
	}
	protect(&result, reconcile.PVCsResource, claim, claimFinalizer, func() bool {
		for pod := range in.Snapshot.PodsUsing(claim.Namespace, claim.Name) {
			if keeps(pod, claim) {
				return true
			}
		}
		return false
	})
	if len(result.Requests) == 0 && claim.DeletionTimestamp == nil && claim.Status.Phase == corev1.ClaimBound {
		unused(in, claim, &result)
	}
	return result, nil
}

// keeps says whether a pod keeps a claim that is being deleted. One that was not
// placed cannot start with it any more.
func keeps(pod *corev1.Pod, claim *corev1.PersistentVolumeClaim) bool {
	return pod.Spec.NodeName != "" && slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		if v.Ephemeral != nil {
			return !shutDown(pod) && isFor(pod, &v, claim)
		}
		return objects.ClaimName(pod, &v) == claim.Name
	})
}

// isFor says whether a claim was made for an ephemeral volume of a pod.
func isFor(pod *corev1.Pod, v *corev1.Volume, claim *corev1.PersistentVolumeClaim) bool {
	return objects.ClaimName(pod, v) == claim.Name && ephemeral.VolumeIsForPod(pod, claim) == nil
}

// shutDown says whether nothing of a deleted pod runs: it waits for the garbage
// collector, which may wait for its claims.
func shutDown(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil && *pod.DeletionGracePeriodSeconds == 0
}

// unused keeps the condition Unused of a bound claim.
func unused(in reconcile.Input, claim *corev1.PersistentVolumeClaim, result *reconcile.Result) {
	now := corev1.PersistentVolumeClaimCondition{
		Type: corev1.PersistentVolumeClaimUnused, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(in.Now).Rfc3339Copy(),
		Reason: "NoPodsUsingPVC", Message: "No pods are currently referencing this PVC",
	}
	for pod := range in.Snapshot.PodsUsing(claim.Namespace, claim.Name) {
		if !over(pod) && slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
			return v.Ephemeral == nil && objects.ClaimName(pod, &v) == claim.Name || v.Ephemeral != nil && isFor(pod, &v, claim)
		}) {
			now.Status, now.Reason, now.Message = corev1.ConditionFalse, "PodUsingPVC", "A pod is currently referencing this PVC"
			break
		}
	}
	conditions := slices.Clone(claim.Status.Conditions)
	i := slices.IndexFunc(conditions, func(c corev1.PersistentVolumeClaimCondition) bool { return c.Type == now.Type })
	switch {
	case i < 0:
		conditions = append(conditions, now)
	case conditions[i].Status == now.Status:
		return
	default:
		conditions[i] = now
	}
	result.Add(reconcile.MergePatch(reconcile.PVCsResource, claim, "status", map[string]any{
		"metadata": reconcile.Pinned(claim), "status": map[string]any{"conditions": conditions},
	}))
}

// VolumeProtection keeps volumes that are bound.
type VolumeProtection struct{}

// Name implements Reconciler.
func (VolumeProtection) Name() string { return "persistentvolume-protection-controller" }

// All implements Reconciler.
func (VolumeProtection) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.PVKind, s.PVs().All())
}

// Keys implements Reconciler.
func (VolumeProtection) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	if m := c.New; m != nil && m.GVK == reconcile.PVKind {
		return []reconcile.Key{volumeKey(m.Name)}
	}
	return nil
}

// Reconcile implements Reconciler.
func (VolumeProtection) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	if pv, ok := in.Snapshot.PVs().Get("", key.Name); ok {
		protect(&result, reconcile.PVsResource, pv, volumeFinalizer, func() bool { return pv.Status.Phase == corev1.VolumeBound })
	}
	return result, nil
}

// AttributesProtection keeps VolumeAttributesClasses that volumes or claims name.
type AttributesProtection struct{}

// Name implements Reconciler.
func (AttributesProtection) Name() string { return "volumeattributesclass-protection-controller" }

// attributesKey finds a class by what it is called: a Meta has no table of its own.
func attributesKey(name string) reconcile.Key {
	return reconcile.NewKey(attributesKind, "", name)
}

const attributesPrefix = objects.DefaultPrefix + "volumeattributesclasses/"

// All implements Reconciler.
func (AttributesProtection) All(s *objects.Snapshot) (keys []reconcile.Key) {
	for m := range s.Metas().WithPrefix(attributesPrefix) {
		keys = append(keys, attributesKey(m.Name))
	}
	return keys
}

// Keys implements Reconciler: a class follows itself, and those that name it when
// they do so no more.
func (AttributesProtection) Keys(c objects.Changed, s *objects.Snapshot) (keys []reconcile.Key) {
	if m := c.New; m != nil && m.GVK.GroupKind() == attributesKind.GroupKind() {
		return []reconcile.Key{attributesKey(m.Name)}
	}
	if c.Old == nil {
		return nil
	}
	for _, name := range attributesOf(c.Old.Object) {
		if m, ok := s.Metas().Get(attributesPrefix + name); ok && m.DeletionTimestamp != nil {
			keys = append(keys, attributesKey(name))
		}
	}
	return keys
}

// attributesOf are the classes that a volume or a claim names.
func attributesOf(obj any) []string {
	switch o := obj.(type) {
	case *corev1.PersistentVolume:
		return without([]string{ptr.Deref(o.Spec.VolumeAttributesClassName, "")}, "")
	case *corev1.PersistentVolumeClaim:
		names := []string{ptr.Deref(o.Spec.VolumeAttributesClassName, ""), ptr.Deref(o.Status.CurrentVolumeAttributesClassName, "")}
		if s := o.Status.ModifyVolumeStatus; s != nil {
			names = append(names, s.TargetVolumeAttributesClassName)
		}
		return without(names, "")
	}
	return nil
}

// Reconcile implements Reconciler.
func (AttributesProtection) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	if m, ok := in.Snapshot.Metas().Get(attributesPrefix + key.Name); ok {
		protect(&result, attributesResource, m, attributesFinalizer, func() bool {
			for range in.Snapshot.UsersOfAttributes(key.Name) {
				return true
			}
			return false
		})
	}
	return result, nil
}
