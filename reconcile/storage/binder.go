package storage

import (
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/component-helpers/storage/volume"

	"timonel/reconcile"
	"timonel/state/objects"
)

// Binder binds claims to volumes, has volumes made for claims, and reclaims those
// whose claims are gone.
type Binder struct{}

// Name implements Reconciler.
func (Binder) Name() string { return "persistentvolume-controller" }

func volumeKey(name string) reconcile.Key {
	return reconcile.NewKey(reconcile.PVKind, "", name)
}

// All implements Reconciler.
func (Binder) All(s *objects.Snapshot) []reconcile.Key {
	return append(reconcile.KeysOf(reconcile.PVKind, s.PVs().All()), reconcile.KeysOf(reconcile.PVCKind, s.PVCs().All())...)
}

// Keys implements Reconciler.
func (Binder) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	switch now := c.Meta().Object.(type) {
	case *corev1.PersistentVolumeClaim:
		keys := []reconcile.Key{reconcile.KeyOf(reconcile.PVCKind, now)}
		for pv := range s.PVsClaimed(now.Namespace, now.Name) {
			keys = append(keys, volumeKey(pv.Name))
		}
		if now.Spec.VolumeName != "" {
			keys = append(keys, volumeKey(now.Spec.VolumeName))
		}
		return keys
	case *corev1.PersistentVolume:
		return volumeChanged(c, now, s)
	case *storagev1.StorageClass:
		keys := reconcile.KeysOf(reconcile.PVCKind, s.PVCsPending(now.Name))
		if c.New != nil && isDefault(now) {
			keys = append(keys, reconcile.KeysOf(reconcile.PVCKind, s.PVCsWithoutClass())...)
		}
		return keys
	case *corev1.Pod:
		// Upstream says every 15 s for which pods a claim waits. Here it is said when
		// the scheduler has not placed one.
		cond := reconcile.PodCondition(now, corev1.PodScheduled)
		if c.New == nil || now.Spec.NodeName != "" || cond == nil || cond.Status != corev1.ConditionFalse {
			return nil
		}
		if before, ok := old(c).(*corev1.Pod); ok && reconcile.PodCondition(before, corev1.PodScheduled) != nil {
			return nil
		}
		return claimsOf(now)
	case *corev1.Node:
		return deletedOnNode(c, now, s)
	}
	return nil
}

// old is the object before a change, nil if it is new.
func old(c objects.Changed) any {
	if c.Old == nil {
		return nil
	}
	return c.Old.Object
}

// claimsOf returns the keys of the claims that a pod uses.
func claimsOf(pod *corev1.Pod) (keys []reconcile.Key) {
	for i := range pod.Spec.Volumes {
		if name := objects.ClaimName(pod, &pod.Spec.Volumes[i]); name != "" {
			keys = append(keys, reconcile.NewKey(reconcile.PVCKind, pod.Namespace, name))
		}
	}
	return keys
}

// volumeChanged returns the keys that a changed volume concerns: its own, its
// claims, and those of pending claims that it could serve, once it can.
func volumeChanged(c objects.Changed, pv *corev1.PersistentVolume, s *objects.Snapshot) []reconcile.Key {
	keys := append([]reconcile.Key{volumeKey(pv.Name)}, reconcile.KeysOf(reconcile.PVCKind, s.PVCsNaming(pv.Name))...)
	if ref := pv.Spec.ClaimRef; ref != nil {
		keys = append(keys, reconcile.NewKey(reconcile.PVCKind, ref.Namespace, ref.Name))
	}
	if c.New == nil || !available(pv) {
		return keys
	}
	if before, ok := old(c).(*corev1.PersistentVolume); ok && available(before) && before.Generation == pv.Generation && before.Spec.Size() == pv.Spec.Size() {
		return keys
	}
	for claim := range s.PVCsPending(volume.GetPersistentVolumeClass(pv)) {
		if claim.Spec.VolumeName != "" {
			continue
		}
		if fits, err := volume.FindMatchingVolume(claim, []*corev1.PersistentVolume{pv}, nil, nil, false, true); err == nil && fits != nil {
			keys = append(keys, reconcile.KeyOf(reconcile.PVCKind, claim))
		}
	}
	return keys
}

func available(pv *corev1.PersistentVolume) bool {
	return pv.Spec.ClaimRef == nil && pv.Status.Phase == corev1.VolumeAvailable && pv.DeletionTimestamp == nil
}

// Reconcile implements Reconciler.
func (Binder) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	p := pass{in: in}
	switch key.Kind {
	case reconcile.PVCKind.Kind:
		if claim, ok := in.Snapshot.PVCs().Get(key.Namespace, key.Name); ok {
			err := p.claim(claim)
			return p.Result, err
		}
	case reconcile.PVKind.Kind:
		if pv, ok := in.Snapshot.PVs().Get("", key.Name); ok {
			p.volume(pv)
		}
	}
	return p.Result, nil
}

// pass is one over a claim or a volume.
type pass struct {
	reconcile.Result
	in reconcile.Input
}

func (p *pass) claimEvent(claim *corev1.PersistentVolumeClaim, kind, reason, format string, args ...any) {
	p.Events = append(p.Events, *reconcile.NewEvent(reconcile.PVCKind, claim, kind, reason, format, args...))
}

func (p *pass) volumeEvent(pv *corev1.PersistentVolume, kind, reason, format string, args ...any) {
	p.Events = append(p.Events, *reconcile.NewEvent(reconcile.PVKind, pv, kind, reason, format, args...))
}

// sequence adds requests each of which is made once the one before has succeeded.
func (p *pass) sequence(requests ...reconcile.Request) {
	if len(requests) > 0 {
		first := requests[0]
		first.Then = append(first.Then, requests[1:]...)
		p.Add(first)
	}
}
