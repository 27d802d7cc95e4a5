package dispatch

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "timonel/proto/timonel/v1"
)

// TestVolumesOfDrivers: an agent that calls CSI drivers is sent what a claim's volume needs
// of the cluster, its Secrets included, but only for the claim that the volume is bound to:
// who makes a claim can name any volume.
func TestVolumesOfDrivers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	ref := func(name string) *corev1.SecretReference {
		return &corev1.SecretReference{Namespace: "sys", Name: name}
	}
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{
		ClaimRef: &corev1.ObjectReference{Namespace: "default", Name: "mine", UID: "c-mine"},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "h",
			NodeStageSecretRef: ref("stage"), NodePublishSecretRef: ref("publish"), NodeExpandSecretRef: ref("expand"), ControllerPublishSecretRef: ref("controller")}}}}
	claim := func(name string) *corev1.PersistentVolumeClaim {
		return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "c-" + "mine"}, Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv"}}
	}
	theirs := claim("theirs")
	theirs.UID = "c-theirs"
	for _, name := range []string{"stage", "publish", "expand", "controller"} {
		c.put(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "sys", Name: name}})
	}
	c.put(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "inline"}})
	driver := &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "d"}}
	va := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: attachmentName("h", "d", "a1")}}
	other := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: attachmentName("h", "d", "a2")}}
	c.put(driver)
	c.put(va)
	c.put(other)
	c.put(pv)
	c.put(theirs)
	withClaim := func(name string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}})
		}
	}
	c.put(podOn("a1", "thief", "u1", withClaim("theirs")))
	a := c.connect("c1", &pb.Hello{NodeName: "a1", Kinds: []string{kindDriver, kindAttachment}})
	first := a.batch()
	for _, line := range first {
		require.NotContains(t, line, "Secret", "%q", first)
		require.NotContains(t, line, "VolumeAttachment", "%q", first)
	}

	c.put(claim("mine"))
	c.put(podOn("a1", "mine", "u2", withClaim("mine")))
	has := map[string]bool{}
	for !has["Secret sys/publish"] {
		for _, line := range a.batch() {
			var kind, key string
			if _, err := fmt.Sscanf(line, "%s %s", &kind, &key); err == nil {
				has[kind+" "+key] = true
			}
		}
	}
	for _, want := range []string{"Secret sys/stage", "Secret sys/expand", "CSIDriver /d", "VolumeAttachment /" + va.Name} {
		require.True(t, has[want], "%s in %v", want, has)
	}
	require.False(t, has["Secret sys/controller"])
	require.False(t, has["VolumeAttachment /"+other.Name])

	va.Status.Attached = true
	rev := c.put(va)
	require.Equal(t, []string{fmt.Sprintf("VolumeAttachment /%s rev=%d", va.Name, rev), "synced"}, a.batch())
	driver.Labels = map[string]string{"a": "b"}
	rev = c.put(driver)
	require.Equal(t, []string{fmt.Sprintf("CSIDriver /d rev=%d", rev), "synced"}, a.batch())

	// One that does not know of them is not told.
	b := c.connect("c1", &pb.Hello{NodeName: "a1"})
	for _, line := range b.batch() {
		require.NotContains(t, line, "CSIDriver")
		require.NotContains(t, line, "VolumeAttachment")
	}
}

// TestDriversOfANode: what a CSINode names.
func TestDriversOfANode(t *testing.T) {
	t.Parallel()
	d := func(name, id string) storagev1.CSINodeDriver { return storagev1.CSINodeDriver{Name: name, NodeID: id} }
	list := func(d ...storagev1.CSINodeDriver) []storagev1.CSINodeDriver {
		return append([]storagev1.CSINodeDriver{}, d...)
	}
	for what, tt := range map[string]struct {
		live     []storagev1.CSINodeDriver
		said     csiReport
		next     []storagev1.CSINodeDriver
		replaced []storagev1.CSINodeDriver
	}{
		"nothing":                      {next: list()},
		"one comes":                    {said: csiReport{drivers: list(d("a", "1"))}, next: list(d("a", "1"))},
		"others stay":                  {live: list(d("b", "1")), said: csiReport{drivers: list(d("a", "1"))}, next: list(d("b", "1"), d("a", "1"))},
		"one that is gone goes":        {live: list(d("b", "1"), d("c", "1")), said: csiReport{gone: []string{"b"}}, next: list(d("c", "1"))},
		"one that is back stays":       {live: list(d("b", "1")), said: csiReport{drivers: list(d("b", "1")), gone: []string{"b"}}, next: list(d("b", "1"))},
		"another id goes before it is": {live: list(d("a", "1"), d("b", "1")), said: csiReport{drivers: list(d("a", "2"))}, next: list(d("b", "1"), d("a", "2")), replaced: list(d("b", "1"))},
		"the only one is replaced":     {live: list(d("a", "1")), said: csiReport{drivers: list(d("a", "2"))}, next: list(d("a", "2")), replaced: list()},
	} {
		next, replaced := mergeDrivers(tt.live, &tt.said)
		require.Equal(t, tt.next, next, what)
		require.Equal(t, tt.replaced, replaced, what)
	}
}

// TestGrownClaim: a claim's status says the volume's size once the node's part has it, and
// waits for nothing more; what an agent says of an older or another size is not taken.
func TestGrownClaim(t *testing.T) {
	t.Parallel()
	gib := func(n int64) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(n<<30, resource.BinarySI)}
	}
	pv := &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{Capacity: gib(2)}}
	claim := &corev1.PersistentVolumeClaim{Status: corev1.PersistentVolumeClaimStatus{Capacity: gib(1),
		AllocatedResourceStatuses: map[corev1.ResourceName]corev1.ClaimResourceStatus{corev1.ResourceStorage: corev1.PersistentVolumeClaimNodeResizePending},
		Conditions:                []corev1.PersistentVolumeClaimCondition{{Type: corev1.PersistentVolumeClaimFileSystemResizePending}, {Type: "Unused"}}}}
	before := claim.DeepCopy()
	next := grownClaim(claim, pv, 2<<30)
	require.Equal(t, int64(2<<30), next.Status.Capacity.Storage().Value())
	require.Nil(t, next.Status.AllocatedResourceStatuses)
	require.Equal(t, []corev1.PersistentVolumeClaimCondition{{Type: "Unused"}}, next.Status.Conditions)
	require.Equal(t, before, claim)
	require.Equal(t, before, grownClaim(claim, pv, 3<<30))
	require.Equal(t, before, grownClaim(claim, pv, 1<<30))
	require.Equal(t, next, grownClaim(next, pv, 2<<30))
	require.Equal(t, before, grownClaim(claim, &corev1.PersistentVolume{}, 0))

	// Less was allocated than the volume has.
	larger := &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{Capacity: gib(5)}}
	claim.Status.AllocatedResources = gib(3)
	require.Equal(t, int64(3<<30), grownClaim(claim, larger, 3<<30).Status.Capacity.Storage().Value())
	require.Equal(t, int64(1<<30), grownClaim(claim, larger, 5<<30).Status.Capacity.Storage().Value())
	claim.Status.AllocatedResources = gib(9)
	require.Equal(t, int64(1<<30), grownClaim(claim, larger, 9<<30).Status.Capacity.Storage().Value(), "no more than the volume has")
}
