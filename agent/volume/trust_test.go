package volume

import (
	"encoding/pem"
	"testing"

	"github.com/stretchr/testify/require"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// certificate is a PEM block: what is in it is the API server's to check.
func certificate(der string) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(der)}))
}

func trustBundle(name, signer string, set map[string]string, content string) *certificatesv1.ClusterTrustBundle {
	return &certificatesv1.ClusterTrustBundle{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: set},
		Spec:       certificatesv1.ClusterTrustBundleSpec{SignerName: signer, TrustBundle: content},
	}
}

func TestTrustBundles(t *testing.T) {
	t.Parallel()
	live, dead := map[string]string{"live": "yes"}, map[string]string{"live": "no"}
	objects := &fakeObjects{bundles: map[string]*certificatesv1.ClusterTrustBundle{}}
	for _, b := range []*certificatesv1.ClusterTrustBundle{
		trustBundle("plain", "", nil, "of our own:\n"+certificate("c")+certificate("a")+certificate("c")),
		trustBundle("x.y:s:1", "x.y/s", live, certificate("b")+certificate("a")),
		trustBundle("x.y:s:2", "x.y/s", live, certificate("a")+certificate("d")),
		trustBundle("x.y:s:3", "x.y/s", dead, certificate("e")),
		trustBundle("x.y:other:1", "x.y/other", live, certificate("f")),
	} {
		objects.bundles[b.Name] = b
	}
	m := manager(t, Config{Objects: objects})
	yes := true
	for _, tt := range []struct {
		name string
		src  corev1.ClusterTrustBundleProjection
		want string // what is in the file
		err  string
	}{
		{"by name, each once, what is between them left out", corev1.ClusterTrustBundleProjection{Name: new("plain")},
			certificate("a") + certificate("c"), ""},
		{"by name, not there", corev1.ClusterTrustBundleProjection{Name: new("x")}, "", `clustertrustbundle "x" not found`},
		{"by name, not there and optional", corev1.ClusterTrustBundleProjection{Name: new("x"), Optional: &yes}, "", ""},
		{"by signer and labels, of several", corev1.ClusterTrustBundleProjection{SignerName: new("x.y/s"), LabelSelector: &metav1.LabelSelector{MatchLabels: live}},
			certificate("a") + certificate("b") + certificate("d"), ""},
		{"by signer, all", corev1.ClusterTrustBundleProjection{SignerName: new("x.y/s"), LabelSelector: &metav1.LabelSelector{}},
			certificate("a") + certificate("b") + certificate("d") + certificate("e"), ""},
		{"by signer, without a selector", corev1.ClusterTrustBundleProjection{SignerName: new("x.y/s")}, "", `no clustertrustbundle of signer "x.y/s"`},
		{"by signer, without a selector and optional", corev1.ClusterTrustBundleProjection{SignerName: new("x.y/s"), Optional: &yes}, "", ""},
		{"by signer, none has the labels", corev1.ClusterTrustBundleProjection{SignerName: new("x.y/s"), LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}},
			"", `has the labels "a=b"`},
		{"by nothing", corev1.ClusterTrustBundleProjection{}, "", "either name or signerName has to be set"},
	} {
		tt.src.Path = "ca/anchors.pem"
		pod := newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ClusterTrustBundle: &tt.src}}}}})
		mounts, _, err := m.Setup(t.Context(), pod, nil)
		if tt.err != "" {
			require.ErrorContains(t, err, tt.err, tt.name)
			continue
		}
		require.NoError(t, err, tt.name)
		require.Equal(t, map[string]string{"ca/anchors.pem": tt.want}, tree(t, mounts["v"]), tt.name)
	}
}

func TestWhoShowsABundle(t *testing.T) {
	t.Parallel()
	pod := newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{
			{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{Name: new("plain")}},
			{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{SignerName: new("x.y/s")}},
		}}}}, configMapVolume("m"))
	for name, want := range map[string]bool{"plain": true, "x.y:s:1": true, "x.y:s:": true, "x.y:s": false, "x.y:st:1": false, "plainer": false} {
		require.Equal(t, want, ShowsBundle(pod, name), name)
	}
}
