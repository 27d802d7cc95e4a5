package volume

import (
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// trustBundle adds the certificates of ClusterTrustBundles: of one by name, or of those
// of a signer that a selector matches.
func (p *payload) trustBundle(src *corev1.ClusterTrustBundleProjection, mode int32) error {
	var bundles []*certificatesv1.ClusterTrustBundle
	var missing error
	switch {
	case src.Name != nil:
		b, ok := p.manager.cfg.ClusterTrustBundle(*src.Name)
		if !ok {
			missing = fmt.Errorf("clustertrustbundle %q not found", *src.Name)
			break
		}
		bundles = append(bundles, b)
	case src.SignerName != nil:
		// As everywhere, no selector matches none and an empty one all.
		selector, err := metav1.LabelSelectorAsSelector(src.LabelSelector)
		if err != nil {
			return fmt.Errorf("clusterTrustBundle of signer %q: labelSelector: %w", *src.SignerName, err)
		}
		for _, b := range p.manager.cfg.ClusterTrustBundles(*src.SignerName) {
			if selector.Matches(labels.Set(b.Labels)) {
				bundles = append(bundles, b)
			}
		}
		if len(bundles) == 0 {
			missing = fmt.Errorf("no clustertrustbundle of signer %q has the labels %q", *src.SignerName, selector)
		}
	default:
		return errors.New("clusterTrustBundle: either name or signerName has to be set")
	}
	if missing != nil && !optional(src.Optional) {
		return missing
	}
	e := p.private(mode)
	e.data = anchors(bundles)
	return p.add(src.Path, e)
}

// anchors are the certificates of bundles, each once and in an order that does not
// depend on that of the bundles.
func anchors(bundles []*certificatesv1.ClusterTrustBundle) []byte {
	var all []string
	for _, b := range bundles {
		for rest := []byte(b.Spec.TrustBundle); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			all = append(all, string(block.Bytes))
		}
	}
	slices.Sort(all)
	out := []byte{} // of none, too, there is a file
	for _, der := range slices.Compact(all) {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(der)})...)
	}
	return out
}

// ShowsBundle says whether a volume of pod may show the ClusterTrustBundle of a name. A
// signer's have names that begin with its own.
func ShowsBundle(pod *corev1.Pod, name string) bool {
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Projected == nil {
			continue
		}
		for _, s := range pod.Spec.Volumes[i].Projected.Sources {
			b := s.ClusterTrustBundle
			if b != nil && (b.Name != nil && *b.Name == name ||
				b.SignerName != nil && strings.HasPrefix(name, strings.ReplaceAll(*b.SignerName, "/", ":")+":")) {
				return true
			}
		}
	}
	return false
}
