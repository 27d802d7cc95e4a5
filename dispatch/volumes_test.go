package dispatch

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// TestVolumesOfANode: an agent is sent the claims of its pods and their volumes, and
// of its own volumes those that it is to delete.
func TestVolumesOfANode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "data"}}
	volume := func(name, node string) *corev1.PersistentVolume {
		return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{objects.NodeAnnotation: node}}}
	}
	c.put(claim)
	c.put(volume("used", "a1"))
	c.put(volume("idle", "a1"))
	c.put(volume("elsewhere", "a2"))
	withClaim := func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "d", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}}}
	}
	c.put(podOn("a1", "web", "u1", withClaim))

	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	first := a.batch()
	require.Contains(t, first, "PersistentVolumeClaim default/data rev=3")
	require.Len(t, first, 4, "welcome, claim, pod, synced: %q", first)

	claim.Spec.VolumeName = "used"
	rev := c.put(claim)
	require.Equal(t, []string{"PersistentVolume /used rev=4", fmt.Sprintf("PersistentVolumeClaim default/data rev=%d", rev), "synced"}, a.batch())

	now := metav1.Now()
	idle, elsewhere := volume("idle", "a1"), volume("elsewhere", "a2")
	idle.DeletionTimestamp, elsewhere.DeletionTimestamp = &now, &now
	c.put(elsewhere)
	rev = c.put(idle)
	require.Equal(t, []string{fmt.Sprintf("PersistentVolume /idle rev=%d", rev), "synced"}, a.batch())
	c.remove(idle)
	require.Equal(t, []string{"remove PersistentVolume /idle", "synced"}, a.batch())
}

func TestAnnotationsAreTakenBack(t *testing.T) {
	t.Parallel()
	live := map[string]string{"theirs": "1", "said": "2"}
	require.Equal(t, map[string]string{"theirs": "1", "other": "3"}, annotate(live, map[string]string{"said": "", "other": "3", "never": ""}))
	require.Equal(t, map[string]string{"theirs": "1", "said": "2"}, live)
}
