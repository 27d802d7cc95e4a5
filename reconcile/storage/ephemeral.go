package storage

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/ephemeral"

	"timonel/reconcile"
	"timonel/state/objects"
)

// Ephemeral makes the claims of pods' ephemeral volumes. A claim is the pod's, so
// that it goes with the pod.
type Ephemeral struct{}

// Name implements Reconciler.
func (Ephemeral) Name() string { return "ephemeral-volume-controller" }

func hasEphemeral(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Ephemeral != nil })
}

// All implements Reconciler.
func (Ephemeral) All(s *objects.Snapshot) (keys []reconcile.Key) {
	for pod := range s.Pods().All() {
		if hasEphemeral(pod) {
			keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
		}
	}
	return keys
}

// Keys implements Reconciler: a pod when it comes, and when a claim of the name that
// it needs has gone.
func (Ephemeral) Keys(c objects.Changed, s *objects.Snapshot) (keys []reconcile.Key) {
	switch now := c.Meta().Object.(type) {
	case *corev1.Pod:
		if (c.Old == nil || c.Old.UID != now.UID) && hasEphemeral(now) {
			return []reconcile.Key{reconcile.KeyOf(reconcile.PodKind, now)}
		}
	case *corev1.PersistentVolumeClaim:
		if c.New != nil {
			return nil
		}
		for pod := range s.PodsUsing(now.Namespace, now.Name) {
			if hasEphemeral(pod) {
				keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
			}
		}
	}
	return keys
}

// Reconcile implements Reconciler.
func (Ephemeral) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	var result reconcile.Result
	pod, ok := in.Snapshot.Pods().Get(key.Namespace, key.Name)
	if !ok || !hasEphemeral(pod) {
		return result, nil
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.Ephemeral == nil {
			continue
		}
		name := objects.ClaimName(pod, v)
		event := reconcile.NewEvent(reconcile.PodKind, pod, corev1.EventTypeWarning, failedBinding, "ephemeral volume %s: create PVC %s", v.Name, name)
		if claim, ok := in.Snapshot.PVCs().Get(pod.Namespace, name); ok {
			if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
				event.Message = fmt.Sprintf("ephemeral volume %s: %v", v.Name, err)
				result.Events = append(result.Events, *event)
				return result, nil // looked at again when that claim has gone
			}
			continue
		}
		template, yes := v.Ephemeral.VolumeClaimTemplate, true
		create := reconcile.Create(reconcile.PVCsResource, &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: pod.Namespace, Name: name, Annotations: template.Annotations, Labels: template.Labels,
				OwnerReferences: []metav1.OwnerReference{{
					APIVersion: "v1", Kind: reconcile.PodKind.Kind, Name: pod.Name, UID: pod.UID, Controller: &yes, BlockOwnerDeletion: &yes,
				}},
			},
			Spec: template.Spec,
		})
		create.FailEvent = event
		result.Add(create)
	}
	return result, nil
}
