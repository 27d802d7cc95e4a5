package storage_test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/volume"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/storage"
	"timonel/reconcile/storytest"
)

// TestNeverTwoOnOne binds claims and volumes that come, go, and name each other, in
// any order of the work, while every request may find that another was faster. At no
// time do two claims have one volume or one claim two; in the end each that is bound
// is so from both sides, and no claim waits for a volume that is free and fits.
func TestNeverTwoOnOne(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := storytest.NewWorld(t)
		s := storytest.New(w, storage.Binder{}, storage.ClaimProtection{}, storage.VolumeProtection{})
		s.Shuffle = func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "next") }
		names := rapid.SampledFrom([]string{"a", "b", "c", "d"})
		s.Before = func(reconcile.Request) {
			neverTwo(t, w)
			if rapid.IntRange(0, 3).Draw(t, "meanwhile") == 0 {
				bindAsScheduler(t, w, names.Draw(t, "volume"), names.Draw(t, "claim"))
			}
		}
		size := rapid.Custom(func(t *rapid.T) resource.Quantity {
			return *resource.NewQuantity(int64(rapid.IntRange(1, 3).Draw(t, "size"))<<30, resource.BinarySI)
		})
		var made int
		add := func(obj reconcile.Object, exists bool) {
			if !exists {
				made++
				obj.SetUID(types.UID(fmt.Sprintf("made-%d", made)))
				w.Add(obj)
			}
		}
		s.Start()
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			name, other := names.Draw(t, "name"), names.Draw(t, "other")
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0, 1:
				pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
					Capacity:                      corev1.ResourceList{corev1.ResourceStorage: size.Draw(t, "capacity")},
					AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
					PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
				}}
				if rapid.Bool().Draw(t, "claimRef") {
					pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "default", Name: other}
				}
				_, exists := w.Snapshot().PVs().Get("", name)
				add(pv, exists)
			case 2, 3:
				none := ""
				claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: corev1.PersistentVolumeClaimSpec{
					StorageClassName: &none, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
					Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: size.Draw(t, "request")}},
				}}
				if rapid.IntRange(0, 3).Draw(t, "volumeName") == 0 {
					claim.Spec.VolumeName = other
				}
				_, exists := w.Snapshot().PVCs().Get("default", name)
				add(claim, exists)
			case 4:
				_ = w.Write(context.Background(), reconcile.Request{Verb: reconcile.VerbDelete, Resource: reconcile.PVCsResource, Namespace: "default", Name: name})
			case 5:
				_ = w.Write(context.Background(), reconcile.Request{Verb: reconcile.VerbDelete, Resource: reconcile.PVsResource, Name: name})
			case 6: // somebody touches it, so that what was decided is outdated
				if _, ok := w.Snapshot().PVs().Get("", name); ok {
					w.Edit(reconcile.PVsResource, "", name, func(o map[string]any) {
						storytest.MergeJSON(o, map[string]any{"metadata": map[string]any{"labels": map[string]any{"touched": fmt.Sprint(made)}}})
					})
				}
			case 7: // the binder of a scheduler
				bindAsScheduler(t, w, name, other)
			}
			for range rapid.IntRange(0, 4).Draw(t, "work") {
				s.Step()
			}
			neverTwo(t, w)
		}
		for i := 0; s.Step(); i++ {
			if i > 2000 {
				t.Fatalf("there is no end:\n%s", s.Show("persistentvolume"))
			}
		}
		neverTwo(t, w)
		atRest(t, w)
	})
}

// bindAsScheduler makes a free volume name a claim that has none.
func bindAsScheduler(t *rapid.T, w *storytest.World, name, other string) {
	pv, ok := w.Snapshot().PVs().Get("", name)
	claim, there := w.Snapshot().PVCs().Get("default", other)
	if !ok || !there || pv.Spec.ClaimRef != nil || pv.DeletionTimestamp != nil || claim.Spec.VolumeName != "" {
		return
	}
	bound, _, err := volume.GetBindVolumeToClaim(pv, claim)
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Write(context.Background(), reconcile.Update(reconcile.PVsResource, bound))
}

// neverTwo fails when two claims are bound to one volume, or two bound volumes are one claim's.
func neverTwo(t *rapid.T, w *storytest.World) {
	s := w.Snapshot()
	holders, volumes := map[string]string{}, map[types.UID]string{}
	for claim := range s.PVCs().All() {
		if claim.Status.Phase != corev1.ClaimBound {
			continue
		}
		pv := claim.Spec.VolumeName
		if other := holders[pv]; other != "" {
			t.Fatalf("claims %s and %s both have volume %s", other, claim.Name, pv)
		}
		holders[pv] = claim.Name
		// Without a UID it is a new volume of the name, which nobody has yet.
		if v, ok := s.PVs().Get("", pv); ok && v.Spec.ClaimRef != nil && v.Spec.ClaimRef.UID != "" && v.Spec.ClaimRef.UID != claim.UID {
			t.Fatalf("claim %s (%s) is bound to volume %s, which is that of %s", claim.Name, claim.UID, pv, v.Spec.ClaimRef.UID)
		}
	}
	for claim := range s.PVCs().All() {
		for pv := range s.PVsClaimed(claim.Namespace, claim.Name) {
			if claim.Status.Phase != corev1.ClaimBound || pv.Spec.ClaimRef.UID != claim.UID || pv.Spec.ClaimRef.UID == "" || claim.Spec.VolumeName != pv.Name {
				continue
			}
			if other := volumes[claim.UID]; other != "" {
				t.Fatalf("claim %s has volumes %s and %s", claim.Name, other, pv.Name)
			}
			volumes[claim.UID] = pv.Name
		}
	}
}

// atRest checks what holds when there is nothing to do.
func atRest(t *rapid.T, w *storytest.World) {
	s := w.Snapshot()
	for pv := range s.PVs().All() {
		ref := pv.Spec.ClaimRef
		want := []corev1.PersistentVolumePhase{corev1.VolumeAvailable}
		if ref != nil && ref.UID != "" {
			claim, ok := s.PVCs().Get(ref.Namespace, ref.Name)
			switch {
			case !ok || claim.UID != ref.UID:
				want = []corev1.PersistentVolumePhase{corev1.VolumeReleased}
			case claim.Spec.VolumeName == pv.Name:
				want = []corev1.PersistentVolumePhase{corev1.VolumeBound}
			case claim.Spec.VolumeName != "":
				t.Fatalf("volume %s is held for claim %s, which has %s", pv.Name, claim.Name, claim.Spec.VolumeName)
			default:
				// A volume too small, or being deleted, that somebody bound to the claim.
				want = []corev1.PersistentVolumePhase{corev1.VolumeAvailable, corev1.VolumePending}
			}
		}
		if !slices.Contains(want, pv.Status.Phase) {
			t.Fatalf("volume %s is %s, want %v", pv.Name, pv.Status.Phase, want)
		}
	}
	for claim := range s.PVCs().All() {
		pv, ok := s.PVs().Get("", claim.Spec.VolumeName)
		switch claim.Status.Phase {
		case corev1.ClaimBound:
			if !ok || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != claim.UID || pv.Status.Phase != corev1.VolumeBound {
				t.Fatalf("claim %s is Bound to %s, which is not bound to it", claim.Name, claim.Spec.VolumeName)
			}
		case corev1.ClaimPending:
			if claim.Spec.VolumeName != "" {
				continue
			}
			for free := range s.PVsFree("") {
				size, asked := free.Spec.Capacity[corev1.ResourceStorage], claim.Spec.Resources.Requests[corev1.ResourceStorage]
				if free.DeletionTimestamp == nil && free.Status.Phase == corev1.VolumeAvailable && size.Cmp(asked) >= 0 {
					t.Fatalf("claim %s waits although volume %s is free", claim.Name, free.Name)
				}
			}
		}
	}
}
