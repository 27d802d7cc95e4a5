package apiserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// A certificate that is renewed is served without a restart, and what is open goes on.
func TestServesTheRenewedCertificate(t *testing.T) {
	f, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(f.bundle.CA())
	served := func() (*x509.Certificate, error) {
		conn, err := tls.Dial("tcp", f.server.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "kubernetes"})
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0], nil
	}
	before, err := served()
	if err != nil {
		t.Fatal(err)
	}
	admin := f.network(t, "admin", "system:masters")
	watch := opened(t, "watch", admin, watchPods)
	if err := f.renew(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 3*time.Minute, func() error {
		after, err := served()
		if err == nil && after.SerialNumber.Cmp(before.SerialNumber) == 0 {
			err = errors.New("the old one is served")
		}
		return err
	})
	if _, err := client(t, admin).CoreV1().Nodes().List(within(t, 10*time.Second), metav1.ListOptions{}); err != nil {
		t.Error(err)
	}
	select {
	case err := <-watch.ended:
		t.Errorf("a watch ended: %v", err)
	default:
	}
}
