package objects

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/volume"

	"timonel/state"
)

// TestVolumesAreFound: pods by claim, volumes by class, claim and node, claims by
// class and volume, as they change.
func TestVolumesAreFound(t *testing.T) {
	t.Parallel()
	s := state.New(state.Options{})
	user := pod("a", "user", "n1")
	user.Spec.Volumes = []corev1.Volume{
		{Name: "d", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}},
		{Name: "e", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}},
		{Name: "x", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
	}
	fast, gold := "fast", "gold"
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "data"},
		Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: &fast, VolumeAttributesClassName: &gold}}
	classless := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "classless"}}
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "v", Annotations: map[string]string{NodeAnnotation: "n1"}},
		Spec: corev1.PersistentVolumeSpec{StorageClassName: fast}}
	put := func(key string, o interface {
		metav1.Object
		object
	}) state.Change {
		return state.Change{Key: "/registry/" + key, Value: encode(t, o)}
	}
	first := apply(t, s, putPod(t, user), put("persistentvolumeclaims/a/data", claim), put("persistentvolumeclaims/a/classless", classless), put("persistentvolumes/v", pv))
	c := start(t, s)
	before := snapshotAt(t, c, first)
	wantNames(t, "pods that use data", names(before.PodsUsing("a", "data")), "user")
	wantNames(t, "pods that use user-e", names(before.PodsUsing("a", "user-e")), "user")
	wantNames(t, "pods that use another's", names(before.PodsUsing("b", "data")))
	wantNames(t, "free volumes", names(before.PVsFree(fast)), "v")
	wantNames(t, "free volumes without a class", names(before.PVsFree("")))
	wantNames(t, "volumes of n1", names(before.PVsOnNode("n1")), "v")
	wantNames(t, "claims that wait", names(before.PVCsPending(fast)), "data")
	wantNames(t, "claims without a class", names(before.PVCsWithoutClass()), "classless")
	wantNames(t, "users of gold", names(before.UsersOfAttributes(gold)), "data")

	pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "a", Name: "data"}
	claim.Spec.VolumeName, claim.Annotations = "v", map[string]string{volume.AnnBindCompleted: "yes"}
	user.Spec.Volumes = nil
	after := snapshotAt(t, c, apply(t, s, putPod(t, user), put("persistentvolumeclaims/a/data", claim), put("persistentvolumes/v", pv)))
	wantNames(t, "pods that use data no more", names(after.PodsUsing("a", "data")))
	wantNames(t, "volumes of data", names(after.PVsClaimed("a", "data")), "v")
	wantNames(t, "free volumes, bound", names(after.PVsFree(fast)))
	wantNames(t, "claims that wait, bound", names(after.PVCsPending(fast)))
	wantNames(t, "claims of v", names(after.PVCsNaming("v")), "data")
	wantNames(t, "free volumes before", names(before.PVsFree(fast)), "v")

	gone := snapshotAt(t, c, apply(t, s, state.Change{Key: "/registry/persistentvolumes/v", Delete: true}, state.Change{Key: "/registry/persistentvolumeclaims/a/data", Delete: true},
		state.Change{Key: "/registry/persistentvolumeclaims/a/classless", Delete: true}))
	if n := gone.byVolume.Len(); n != 0 {
		t.Errorf("%d entries are left of what is gone", n)
	}
}
