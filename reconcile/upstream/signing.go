package upstream

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/controller/certificates"

	"timonel/reconcile/upstream/feed"
)

// timonelPrefix begins the names and groups that Timonel's controllers know each other
// by. The certificates of package pki have them.
const timonelPrefix = "timonel:"

// wantsTimonel says whether a CertificateSigningRequest asks for a subject that
// Timonel's controllers would take for one of themselves, or cannot be read.
func wantsTimonel(object any) bool {
	block, _ := pem.Decode(object.(*certificatesv1.CertificateSigningRequest).Spec.Request)
	if block == nil {
		return true
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return true
	}
	// All names of the subject, not those alone that are read last: a subject may have
	// several of a kind.
	ours := func(name string) bool {
		return strings.HasPrefix(strings.ToLower(strings.TrimSpace(name)), timonelPrefix)
	}
	for _, attribute := range request.Subject.Names {
		if ours(fmt.Sprint(attribute.Value)) {
			return true
		}
	}
	return ours(request.Subject.CommonName) || slices.ContainsFunc(request.Subject.Organization, ours)
}

// clusterSigners are those that sign with the cluster's authority.
var clusterSigners = []string{
	certificatesv1.KubeAPIServerClientSignerName, certificatesv1.KubeAPIServerClientKubeletSignerName,
	certificatesv1.KubeletServingSignerName, "kubernetes.io/legacy-unknown",
}

// guardSigning marks approved requests as failed that ask one of the cluster's signers
// for a subject of Timonel's own. The signers do not see them.
func (c *Controllers) guardSigning(ctx context.Context, source *feed.Feed, builder clients) error {
	ctx, end := context.WithCancel(ctx)
	factory := source.NewFactory(ctx)
	defer factory.Shutdown()
	defer end()
	client, err := builder.Client("certificate-controller")
	if err != nil {
		return err
	}
	guard := certificates.NewCertificateController(ctx, "csrsigning-guard", client, factory.Certificates().V1().CertificateSigningRequests(),
		func(ctx context.Context, csr *certificatesv1.CertificateSigningRequest) error {
			if !slices.Contains(clusterSigners, csr.Spec.SignerName) || !certificates.IsCertificateRequestApproved(csr) ||
				certificates.HasTrueCondition(csr, certificatesv1.CertificateFailed) || !wantsTimonel(csr) {
				return nil
			}
			csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
				Type: certificatesv1.CertificateFailed, Status: corev1.ConditionTrue, Reason: "SignerValidationFailure",
				Message:        "names and groups that begin with " + timonelPrefix + " are those of Timonel's controllers, whose certificates are not signed by request",
				LastUpdateTime: metav1.Now(),
			})
			_, err := client.CertificatesV1().CertificateSigningRequests().UpdateStatus(ctx, csr, metav1.UpdateOptions{})
			return err
		})
	factory.Start(nil)
	guard.Run(ctx, 1)
	return fmt.Errorf("it returned")
}
