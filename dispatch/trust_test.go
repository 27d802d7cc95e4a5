package dispatch

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "timonel/proto/timonel/v1"
)

func bundle(name, signer string, set map[string]string) *certificatesv1beta1.ClusterTrustBundle {
	return &certificatesv1beta1.ClusterTrustBundle{
		TypeMeta:   metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1beta1", Kind: "ClusterTrustBundle"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: set},
		Spec:       certificatesv1beta1.ClusterTrustBundleSpec{SignerName: signer, TrustBundle: "pem"},
	}
}

func showsBundle(src corev1.ClusterTrustBundleProjection) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "t", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ClusterTrustBundle: &src}}}}}}
	}
}

// TestTrustBundlesOfANode: an agent is sent the trust bundles that volumes of its pods
// show, those that come, match or go later included, and no other.
func TestTrustBundlesOfANode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	live := map[string]string{"live": "yes"}
	c.put(bundle("named", "", nil))
	c.put(bundle("other", "", nil))
	c.put(bundle("a.b:one:1", "a.b/one", live))
	c.put(bundle("a.b:one:2", "a.b/one", nil))
	c.put(bundle("a.b:one:more:1", "a.b/one:more", live)) // another signer's, whose name begins alike
	name, signer := "named", "a.b/one"
	c.put(podOn("a1", "byname", "u1", showsBundle(corev1.ClusterTrustBundleProjection{Name: &name})))
	c.put(podOn("a1", "bysigner", "u2", showsBundle(corev1.ClusterTrustBundleProjection{
		SignerName: &signer, LabelSelector: &metav1.LabelSelector{MatchLabels: live}})))
	c.put(podOn("a1", "none", "u3", showsBundle(corev1.ClusterTrustBundleProjection{SignerName: &signer})))

	a := c.connect("c1", &pb.Hello{NodeName: "a1", TrustBundles: true})
	first := a.batch()
	require.Len(t, first, 7, "welcome, two bundles, three pods, synced: %q", first)
	require.Contains(t, first, "ClusterTrustBundle /named rev=3")
	require.Contains(t, first, "ClusterTrustBundle /a.b:one:1 rev=5")

	rev := c.put(bundle("a.b:one:2", "a.b/one", live)) // it matches now
	require.Equal(t, []string{fmt.Sprintf("ClusterTrustBundle /a.b:one:2 rev=%d", rev), "synced"}, a.batch())
	rev = c.put(bundle("a.b:one:3", "a.b/one", live)) // it is new
	require.Equal(t, []string{fmt.Sprintf("ClusterTrustBundle /a.b:one:3 rev=%d", rev), "synced"}, a.batch())
	c.put(bundle("a.b:one:1", "a.b/one", nil)) // it does not match any more
	require.Equal(t, []string{"remove ClusterTrustBundle /a.b:one:1", "synced"}, a.batch())
	c.remove(bundle("named", "", nil))
	require.Equal(t, []string{"remove ClusterTrustBundle /named", "synced"}, a.batch())
}

// TestTrustBundlesAreForThoseThatKnowThem: an agent of before there were any would end
// its stream for want of the kind, again and again.
func TestTrustBundlesAreForThoseThatKnowThem(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	c.put(bundle("named", "", nil))
	name := "named"
	c.put(podOn("a1", "byname", "u1", showsBundle(corev1.ClusterTrustBundleProjection{Name: &name})))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	first := a.batch()
	require.Len(t, first, 3, "welcome, pod, synced: %q", first)
}
