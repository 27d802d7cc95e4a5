package upstream

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"

	"timonel/pki"
)

func requestFor(t testing.TB, subject pkix.Name) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject}, k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func TestWantsTimonel(t *testing.T) {
	t.Parallel()
	commonName := asn1.ObjectIdentifier{2, 5, 4, 3}
	for _, test := range []struct {
		name    string
		request []byte
		want    bool
	}{
		{"a user", requestFor(t, pkix.Name{CommonName: "alice", Organization: []string{"dev"}}), false},
		{"a node", requestFor(t, pkix.Name{CommonName: pki.NodePrefix + "a1", Organization: []string{pki.NodeGroup}}), false},
		{"timonel as a word", requestFor(t, pkix.Name{CommonName: "timonel-bot", Organization: []string{"timonel"}}), false},
		{"a controller", requestFor(t, pkix.Name{CommonName: pki.ControllerPrefix + "c1", Organization: []string{pki.ControllerGroup}}), true},
		{"a controller's name", requestFor(t, pkix.Name{CommonName: pki.ControllerPrefix + "c1"}), true},
		{"the controllers' group", requestFor(t, pkix.Name{CommonName: "alice", Organization: []string{"dev", pki.ControllerGroup}}), true},
		{"in other letters", requestFor(t, pkix.Name{CommonName: " Timonel:controller:c1"}), true},
		{"two common names", requestFor(t, pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{
			{Type: commonName, Value: pki.ControllerPrefix + "c1"}, {Type: commonName, Value: "alice"},
		}}), true},
		{"no request", []byte("hello"), true},
		{"nothing", nil, true},
	} {
		csr := &certificatesv1.CertificateSigningRequest{Spec: certificatesv1.CertificateSigningRequestSpec{Request: test.request}}
		if got := wantsTimonel(csr); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}
