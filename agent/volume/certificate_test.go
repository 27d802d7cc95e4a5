package volume

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// signer is a cluster in which pods' certificates are asked for.
type signer struct {
	t       *testing.T
	m       *Manager
	now     time.Time
	pod     *corev1.Pod
	objects *fakeObjects
	asked   []*certificatesv1.PodCertificateRequest
	refuse  error
	events  []string
}

func newSigner(t *testing.T, sources ...corev1.PodCertificateProjection) *signer {
	t.Helper()
	s := &signer{t: t, now: time.Unix(1_700_000_000, 0), objects: &fakeObjects{requests: map[string]*certificatesv1.PodCertificateRequest{}}}
	s.m = manager(t, Config{
		Objects: s.objects, Node: "a1", Now: func() time.Time { return s.now },
		Certificates: func(_ context.Context, r *certificatesv1.PodCertificateRequest) error {
			if s.refuse != nil {
				return s.refuse
			}
			s.asked = append(s.asked, r)
			return nil
		},
		Event: func(uid types.UID, kind, reason, message string) {
			s.events = append(s.events, string(uid)+" "+kind+" "+reason+": "+message)
		},
	})
	v := corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{}}}
	for i := range sources {
		v.Projected.Sources = append(v.Projected.Sources, corev1.VolumeProjection{PodCertificate: &sources[i]})
	}
	s.pod = newPod(v)
	return s
}

func (s *signer) setup() (map[string]string, time.Time, error) {
	mounts, refresh, err := s.m.Setup(s.t.Context(), s.pod, nil)
	if err != nil {
		return nil, refresh, err
	}
	return tree(s.t, mounts["v"]), refresh, nil
}

// issue answers the request that was made last.
func (s *signer) issue(chain string, life time.Duration) {
	r := s.asked[len(s.asked)-1].DeepCopy()
	begin, end := metav1.NewTime(s.now.Add(life/2)), metav1.NewTime(s.now.Add(life))
	r.Status = certificatesv1.PodCertificateRequestStatus{
		CertificateChain: "from me\n" + chain, BeginRefreshAt: &begin, NotAfter: &end,
		Conditions: []metav1.Condition{{Type: certificatesv1.PodCertificateRequestConditionTypeIssued, Status: metav1.ConditionTrue}},
	}
	s.objects.requests[r.Name] = r
}

func TestPodCertificate(t *testing.T) {
	t.Parallel()
	hour := int32(3600)
	s := newSigner(t, corev1.PodCertificateProjection{
		SignerName: "a.b/c", KeyType: "ECDSAP256", MaxExpirationSeconds: &hour, UserAnnotations: map[string]string{"a.b/x": "y"},
		CredentialBundlePath: "bundle.pem", KeyPath: "key.pem", CertificateChainPath: "chain.pem",
	})
	s.refuse = errors.New("no controller is connected")
	_, _, err := s.setup()
	require.ErrorContains(t, err, `ask signer "a.b/c" for a certificate: no controller is connected`)
	s.refuse = nil
	_, _, err = s.setup()
	require.ErrorContains(t, err, "credential bundle is not issued yet")
	_, _, err = s.setup()
	require.ErrorIs(t, err, errNotIssued)
	require.Len(t, s.asked, 1, "it is asked once")
	spec := s.asked[0].Spec
	require.Equal(t, "a.b/c p uid-1 sa a1 3600", spec.SignerName+" "+spec.PodName+" "+string(spec.PodUID)+" "+spec.ServiceAccountName+" "+string(spec.NodeName)+" 3600")
	require.Equal(t, &hour, spec.MaxExpirationSeconds)
	require.Equal(t, map[string]string{"a.b/x": "y"}, spec.UnverifiedUserAnnotations)
	require.Equal(t, s.pod.UID, s.asked[0].OwnerReferences[0].UID)
	require.True(t, AskedFor(s.pod, s.asked[0].Name))
	require.False(t, AskedFor(s.pod, "req-uid-12-x"), "another pod whose uid begins alike")

	s.issue(certificate("leaf")+certificate("middle"), time.Hour)
	files, refresh, err := s.setup()
	require.NoError(t, err)
	chain := certificate("leaf") + certificate("middle")
	require.Equal(t, chain, files["chain.pem"], "and nothing that the signer wrote beside")
	require.Equal(t, files["key.pem"]+chain, files["bundle.pem"])
	requireKeyOf(t, files["key.pem"], spec.StubPKCS10Request)
	require.False(t, refresh.Before(s.now.Add(30*time.Minute)) || refresh.After(s.now.Add(35*time.Minute)), "renewed from beginRefreshAt on, spread over 5 minutes: %s", refresh)

	// A request is deleted after a while, and an agent begins anew: what was issued stays.
	clear(s.objects.requests)
	s.m = New(s.m.cfg)
	again, _, err := s.setup()
	require.NoError(t, err)
	require.Equal(t, files, again)
	require.Len(t, s.asked, 1)

	s.now = s.now.Add(40 * time.Minute)
	old, refresh, err := s.setup()
	require.NoError(t, err)
	require.Equal(t, files, old, "the old one stays until there is a new one")
	require.Len(t, s.asked, 2)
	require.NotEqual(t, s.asked[0].Name, s.asked[1].Name)
	require.NotEqual(t, s.asked[0].Spec.StubPKCS10Request, s.asked[1].Spec.StubPKCS10Request, "each has a key of its own")
	require.Equal(t, s.now.Add(time.Minute), refresh)

	s.now = s.now.Add(10 * time.Minute)
	_, _, err = s.setup()
	require.NoError(t, err)
	s.now = s.now.Add(time.Hour)
	_, _, err = s.setup()
	require.NoError(t, err)
	_, _, err = s.setup()
	require.NoError(t, err)
	require.Equal(t, []string{
		"uid-1 Warning CertificateOverdueForRefresh: PodCertificate refresh overdue", "uid-1 Warning CertificateExpired: PodCertificate expired",
	}, s.events, "each is told once")

	// Nobody has the request that was made over an hour ago: it was deleted.
	require.Len(t, s.asked, 3, "another one is asked for")
	s.issue(certificate("new"), time.Hour)
	files, _, err = s.setup()
	require.NoError(t, err)
	require.Equal(t, certificate("new"), files["chain.pem"])
	requireKeyOf(t, files["key.pem"], s.asked[2].Spec.StubPKCS10Request)
}

// requireKeyOf says that a key is the one that a PKCS#10 request is signed by.
func requireKeyOf(t *testing.T, key string, request []byte) {
	t.Helper()
	block, rest := pem.Decode([]byte(key))
	require.NotNil(t, block)
	require.Empty(t, rest)
	require.Equal(t, "PRIVATE KEY", block.Type)
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	require.NoError(t, err)
	asked, err := x509.ParseCertificateRequest(request)
	require.NoError(t, err)
	require.NoError(t, asked.CheckSignature())
	again, err := x509.CreateCertificateRequest(nil, &x509.CertificateRequest{}, private)
	if err != nil { // without random numbers Ed25519 and RSA sign alone
		again, err = x509.CreateCertificateRequest(random{}, &x509.CertificateRequest{}, private)
	}
	require.NoError(t, err)
	of, err := x509.ParseCertificateRequest(again)
	require.NoError(t, err)
	require.Equal(t, of.RawSubjectPublicKeyInfo, asked.RawSubjectPublicKeyInfo)
}

type random struct{}

func (random) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i*7 + 1)
	}
	return len(p), nil
}

func TestPodCertificateIsRefused(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{certificatesv1.PodCertificateRequestConditionTypeDenied, certificatesv1.PodCertificateRequestConditionTypeFailed} {
		s := newSigner(t, corev1.PodCertificateProjection{SignerName: "a.b/c", KeyType: "ED25519", KeyPath: "key.pem"})
		_, _, err := s.setup()
		require.ErrorIs(t, err, errNotIssued)
		r := s.asked[0].DeepCopy()
		r.Status.Conditions = []metav1.Condition{{Type: kind, Status: metav1.ConditionTrue, Reason: "NotYou", Message: "because"}}
		s.objects.requests[r.Name] = r
		for range 3 {
			_, _, err = s.setup()
			require.ErrorContains(t, err, `reason="NotYou" message="because"`)
		}
		require.Len(t, s.asked, 1, "it is for good")
		require.Len(t, s.events, 1)
		require.Contains(t, s.events[0], "uid-1 Warning "+kind+": PodCertificateRequest ns/"+r.Name)
	}
}

// A request that somebody else made by this node's name is never believed.
func TestPodCertificateOfAnotherKey(t *testing.T) {
	t.Parallel()
	s := newSigner(t, corev1.PodCertificateProjection{SignerName: "a.b/c", KeyType: "ED25519", CredentialBundlePath: "b"})
	_, _, err := s.setup()
	require.ErrorIs(t, err, errNotIssued)
	s.issue(certificate("theirs"), time.Hour)
	s.objects.requests[s.asked[0].Name].Spec.StubPKCS10Request = []byte("theirs")
	_, _, err = s.setup()
	require.ErrorIs(t, err, errNotIssued)
	require.Len(t, s.asked, 2, "it is asked again by another name")
	s.issue(certificate("ours"), time.Hour)
	files, _, err := s.setup()
	require.NoError(t, err)
	require.Contains(t, files["b"], certificate("ours"))
}

// Each source has its own key, which is on no disk, and goes with the pod.
func TestPodCertificateKeysAreOnMemory(t *testing.T) {
	t.Parallel()
	s := newSigner(t,
		corev1.PodCertificateProjection{SignerName: "a.b/c", KeyType: "ED25519", KeyPath: "one"},
		corev1.PodCertificateProjection{SignerName: "a.b/c", KeyType: "ECDSAP384", KeyPath: "two"})
	s.pod.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: new(int64(1000))}
	s.pod.Spec.Containers = []corev1.Container{{Name: "c"}}
	for range 2 {
		_, _, err := s.setup()
		require.ErrorIs(t, err, errNotIssued)
		s.issue(certificate("x"), time.Hour)
	}
	files, _, err := s.setup()
	require.NoError(t, err)
	require.NotEqual(t, files["one"], files["two"])
	records := filepath.Join(s.m.PodDir(s.pod.UID), "certificates")
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(records, &st))
	require.EqualValues(t, unix.TMPFS_MAGIC, st.Type)
	info, err := os.Stat(filepath.Join(s.m.path(s.pod.UID, "projected", "v"), "one"))
	require.NoError(t, err)
	require.Equal(t, "-rw-------", info.Mode().String(), "for the user that all of the pod runs as")
	require.NoError(t, s.m.Release(t.Context(), s.pod.UID))
	require.NoDirExists(t, records)
}

func TestKeysOfEachType(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		kind string
		want x509.PublicKeyAlgorithm
	}{
		{"RSA3072", x509.RSA}, {"RSA4096", x509.RSA}, {"ECDSAP256", x509.ECDSA}, {"ECDSAP384", x509.ECDSA},
		{"ECDSAP521", x509.ECDSA}, {"ED25519", x509.Ed25519},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			t.Parallel()
			key, request, err := newKey(tt.kind)
			require.NoError(t, err)
			requireKeyOf(t, string(key), request)
			asked, err := x509.ParseCertificateRequest(request)
			require.NoError(t, err)
			require.Equal(t, tt.want, asked.PublicKeyAlgorithm)
		})
	}
	_, _, err := newKey("DSA")
	require.ErrorContains(t, err, `unknown key type "DSA"`)
}
