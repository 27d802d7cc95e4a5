package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/clientcmd"

	"timonel/pki"
)

func TestWhatExpiresSoonIsAProblem(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	for _, test := range []struct {
		kind string
		left time.Duration
		want string // none if empty
	}{
		{"authority", 31 * day, ""},
		{"authority", 30*day - time.Hour, "expires in 29 days, at 2026-12-27T11:00:00Z: plan"},
		{"controller", 31 * day, ""},
		{"controller", 36 * time.Hour, "expires in 36 hours"},
		{"controller", -time.Hour, "has expired, at 2026-11-27T11:00:00Z"},
		{"kubeconfig", 3 * day, "expires in 3 days"},
		{"node", 49 * time.Hour, ""}, // a healthy one is renewed with 56 left
		{"node", 47 * time.Hour, "expires in 47 hours"},
		{"node", 10 * time.Minute, "expires in 10 minutes"},
		{"token", time.Minute, ""},
		{"of a later version", time.Minute, ""},
	} {
		problems := expiryProblems([]Expiry{{What: "it", Kind: test.kind, At: now.Add(test.left)}}, now)
		if test.want == "" {
			require.Empty(t, problems, "%s, %s left", test.kind, test.left)
			continue
		}
		require.Len(t, problems, 1, "%s, %s left", test.kind, test.left)
		require.Contains(t, problems[0], test.want)
	}
}

func TestExpiriesOfControllers(t *testing.T) {
	t.Parallel()
	at := func(hours int) time.Time { return time.Unix(0, 0).Add(time.Duration(hours) * time.Hour) }
	s := &Status{Controllers: []ControllerStatus{
		{Answers: true, Revision: 5, Expiries: []Expiry{{"CA", "authority", at(90)}, {"controller c1", "controller", at(20)}, {"node a1", "node", at(1)}}},
		{Answers: true, Revision: 9, Expiries: []Expiry{{"CA", "authority", at(90)}, {"controller c2", "controller", at(10)}, {"node a1", "node", at(30)}}},
		{Answers: false, Revision: 99, Expiries: []Expiry{{"controller c3", "controller", at(2)}}},
	}}
	s.expiries()
	require.Equal(t, []Expiry{
		{"controller c2", "controller", at(10)}, {"controller c1", "controller", at(20)}, {"node a1", "node", at(30)}, {"CA", "authority", at(90)},
	}, s.Expiries)
}

func TestKubeconfigExpires(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, ok := kubeconfigExpiry(filepath.Join(dir, "none"))
	require.False(t, ok)
	bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
	require.NoError(t, err)
	pair, err := bundle.ClientCert("admin", []string{pki.AdminGroup})
	require.NoError(t, err)
	path := filepath.Join(dir, "kubeconfig")
	require.NoError(t, pki.WriteKubeconfig(path, pki.KubeconfigSpec{CA: bundle.CA(), User: "admin", Client: pair,
		Contexts: []pki.KubeContext{{Name: "timonel", Server: "https://127.0.0.1:6443"}}}))
	e, ok := kubeconfigExpiry(path)
	require.True(t, ok)
	require.Equal(t, "kubeconfig", e.Kind)
	require.WithinDuration(t, time.Now().Add(365*24*time.Hour), e.At, time.Hour)
}

func TestKubeconfigThatEndsSoonIsMadeAnew(t *testing.T) {
	t.Parallel()
	s := testSpec(t)
	bundle, err := pki.CreateBundle(s.BundleDir())
	require.NoError(t, err)
	require.NoError(t, s.writeKubeconfig(bundle))
	written, err := os.ReadFile(s.Kubeconfig())
	require.NoError(t, err)
	require.NoError(t, s.writeKubeconfig(bundle))
	same, err := os.ReadFile(s.Kubeconfig())
	require.NoError(t, err)
	require.Equal(t, written, same)

	config, err := clientcmd.Load(written)
	require.NoError(t, err)
	config.AuthInfos[adminUser].ClientCertificateData = certificateUntil(t, time.Now().Add(29*24*time.Hour))
	require.NoError(t, clientcmd.WriteToFile(*config, s.Kubeconfig()))
	require.NoError(t, s.writeKubeconfig(bundle))
	e, ok := kubeconfigExpiry(s.Kubeconfig())
	require.True(t, ok)
	require.WithinDuration(t, time.Now().Add(365*24*time.Hour), e.At, time.Hour)
	info, err := os.Stat(s.Kubeconfig())
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
}

func certificateUntil(t *testing.T, end time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: end}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
