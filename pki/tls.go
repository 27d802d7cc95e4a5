package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// requireController returns a check of a TLS peer: its certificate must be
// valid, signed by this cluster's CA and belong to a controller. Its address
// does not matter, so that a controller may change it.
func requireController(roots *x509.CertPool) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("the other end showed no certificate")
		}
		leaf := state.PeerCertificates[0]
		if _, err := leaf.Verify(x509.VerifyOptions{
			Roots: roots,
			// What it may be used for follows from its organisation below.
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		}); err != nil {
			var unknown x509.UnknownAuthorityError
			if errors.As(err, &unknown) {
				return fmt.Errorf("the other end (%s) belongs to another cluster: %w", leaf.Subject.CommonName, err)
			}
			return fmt.Errorf("the certificate of the other end: %w", err)
		}
		if id := IdentityOf(leaf); id.Role != RoleController {
			return fmt.Errorf("the other end is not a controller of this cluster but %q", leaf.Subject.CommonName)
		}
		return nil
	}
}

// clientTLS is the config of a client of the cluster port.
func clientTLS(roots *x509.CertPool, cert *tls.Certificate) *tls.Config {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		RootCAs:            roots,
		InsecureSkipVerify: true, // names and addresses are not checked, all else is, below
		VerifyConnection:   requireController(roots),
	}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	return config
}

// ClientTLS is how an agent that knows only a token calls Join at address: the
// server must show a controller's certificate and the CA that the token names.
func (t Token) ClientTLS(address string) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // there is no root yet but the token's hash, checked below
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return fmt.Errorf("the controller at %s showed no certificate", address)
			}
			last := state.PeerCertificates[len(state.PeerCertificates)-1]
			if got := hashCA(last); got != t.CAHash {
				return fmt.Errorf("the controller at %s belongs to another cluster: its CA %s does not match the token, whose CA is %s",
					address, short(got), short(t.CAHash))
			}
			roots := x509.NewCertPool()
			roots.AddCert(last)
			if err := requireController(roots)(state); err != nil {
				return fmt.Errorf("the controller at %s: %w", address, err)
			}
			return nil
		},
	}
}
