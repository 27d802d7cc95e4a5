//go:build !race

// The race detector is left to the tests of package feed: with it, building the API
// server takes minutes.

package upstream

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagemigrationv1 "k8s.io/api/storagemigration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"timonel/apiserver"
	"timonel/pki"
	"timonel/state"
	"timonel/state/objects"
	"timonel/state/storage/storagetest"
)

// cluster is an API server whose objects upstream's controllers work on.
type cluster struct {
	t           *testing.T
	client      kubernetes.Interface
	controllers *Controllers
	store       *state.Store
}

func start(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
	if err != nil {
		t.Fatal(err)
	}
	ip := net.IPv4(127, 0, 0, 1)
	cert, err := bundle.Controller("c1", []net.IP{ip}, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := cert.WriteFiles(filepath.Join(dir, "c1"))
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	backend := storagetest.NewLocalBackend(state.Options{})
	server, err := apiserver.New(ctx, apiserver.Config{
		Name: "c1", Listener: listener, AdvertiseAddress: net.IPv4(192, 0, 2, 1), Certificates: files, Backend: backend,
	})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	as := func(name string, groups ...string) *rest.Config {
		return server.InProcess(&user.DefaultInfo{Name: name, Groups: groups})
	}
	cache := objects.NewCache(backend.Store())
	c := &cluster{t: t, store: backend.Store()}
	if c.client, err = kubernetes.NewForConfig(as("admin", user.SystemPrivilegedGroup)); err != nil {
		t.Fatal(err)
	}
	if c.controllers, err = New(Config{
		Cache: cache, Client: as, CAFile: filepath.Join(bundle.Dir(), pki.CAFile), CAKeyFile: filepath.Join(bundle.Dir(), pki.CAKeyFile),
		Dir: filepath.Join(dir, "upstream"), Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, f := range []func(context.Context) error{server.Run, cache.Run} {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				t.Errorf("ended early: %v", err)
			}
		})
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
	return c
}

// lead runs the controllers until the function that it returns is called.
func (c *cluster) lead() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.controllers.Run(ctx) }()
	return sync.OnceFunc(func() {
		c.t.Helper()
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				c.t.Errorf("Run: %v", err)
			}
		case <-time.After(time.Minute):
			c.t.Fatal("the controllers do not end with their term")
		}
	})
}

// until waits until check is true; what it could not do yet is tried again.
func (c *cluster) until(what string, check func(context.Context) (bool, error)) {
	c.t.Helper()
	var last error
	err := wait.PollUntilContextTimeout(c.t.Context(), 50*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		ok, err := check(ctx)
		last = err
		return ok && err == nil, nil
	})
	if err != nil {
		c.t.Fatalf("%s: %v, at last %v", what, err, last)
	}
}

func (c *cluster) used(quota, resource string) func(context.Context) (bool, error) {
	name, want, _ := strings.Cut(resource, "=")
	return func(ctx context.Context) (bool, error) {
		q, err := c.client.CoreV1().ResourceQuotas("default").Get(ctx, quota, metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		got, ok := q.Status.Used[corev1.ResourceName(name)]
		if !ok || got.String() != want {
			return false, fmt.Errorf("%s used is %s, want %s", name, got.String(), want)
		}
		return true, nil
	}
}

// Quotas are counted and kept, of kinds that are decoded whole and of others; in a
// second term too. What ended with the first leaves no goroutine.
func TestQuotaInTwoTerms(t *testing.T) {
	c := start(t)
	c.until("the API serves", func(ctx context.Context) (bool, error) {
		_, err := c.client.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
		return err == nil || apierrors.IsAlreadyExists(err), err
	})
	ctx := t.Context()
	if _, err := c.client.CoreV1().ResourceQuotas("default").Create(ctx, &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "q"},
		Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{
			"configmaps": apiresource.MustParse("2"), "count/networkpolicies.networking.k8s.io": apiresource.MustParse("5"), "services": apiresource.MustParse("5"),
		}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	configMap := func(name string) error {
		_, err := c.client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	}
	before := runtime.NumGoroutine()
	for term := range 2 {
		end := c.lead()
		c.until("ConfigMaps", c.used("q", fmt.Sprint("configmaps=", term)))
		c.until("NetworkPolicies", c.used("q", "count/networkpolicies.networking.k8s.io=0"))
		for _, name := range []string{"a", "b"}[term:] {
			if err := configMap(name); err != nil {
				t.Fatal(err)
			}
		}
		// Admission counts an object before it is there, so that a count of upstream's at
		// its start may miss it; another limit makes it count again.
		c.until("another limit", func(ctx context.Context) (bool, error) {
			q, err := c.client.CoreV1().ResourceQuotas("default").Get(ctx, "q", metav1.GetOptions{})
			if err != nil {
				return false, err
			}
			q.Spec.Hard["services"] = *apiresource.NewQuantity(int64(10+term), apiresource.DecimalSI)
			_, err = c.client.CoreV1().ResourceQuotas("default").Update(ctx, q, metav1.UpdateOptions{})
			return err == nil, err
		})
		c.until("ConfigMaps", c.used("q", "configmaps=2"))
		if err := configMap("c"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "exceeded quota: q, requested: configmaps=1, used: configmaps=2, limited: configmaps=2") {
			t.Errorf("over quota: %v", err)
		}
		if err := c.client.CoreV1().ConfigMaps("default").Delete(ctx, "b", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		c.until("ConfigMaps after one is gone", c.used("q", "configmaps=1"))
		end()
	}
	c.until("the controllers' goroutines end", func(context.Context) (bool, error) {
		if now := runtime.NumGoroutine(); now > before+20 {
			return false, fmt.Errorf("%d goroutines before the controllers ran, %d after", before, now)
		}
		return true, nil
	})
}

// Aggregated roles have rules, approved requests a certificate of the cluster, and
// requests for a controller's subject none.
func TestRolesAndCertificates(t *testing.T) {
	c := start(t)
	defer c.lead()()
	ctx := t.Context()
	c.until("the role view has rules", func(ctx context.Context) (bool, error) {
		role, err := c.client.RbacV1().ClusterRoles().Get(ctx, "view", metav1.GetOptions{})
		return err == nil && len(role.Rules) > 5, err
	})
	if _, err := c.client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "more-of-view", Labels: map[string]string{"rbac.authorization.k8s.io/aggregate-to-view": "true"}},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"stable.example.com"}, Resources: []string{"crontabs"}, Verbs: []string{"get"}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the role view has one more", func(ctx context.Context) (bool, error) {
		role, err := c.client.RbacV1().ClusterRoles().Get(ctx, "view", metav1.GetOptions{})
		return err == nil && strings.Contains(fmt.Sprint(role.Rules), "stable.example.com"), err
	})

	requests := c.client.CertificatesV1().CertificateSigningRequests()
	for name, subject := range map[string]pkix.Name{
		"alice": {CommonName: "alice", Organization: []string{"dev"}},
		"evil":  {CommonName: pki.ControllerPrefix + "c9", Organization: []string{pki.ControllerGroup}},
	} {
		csr, err := requests.Create(ctx, &certificatesv1.CertificateSigningRequest{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: certificatesv1.CertificateSigningRequestSpec{
				Request: requestFor(t, subject), SignerName: certificatesv1.KubeAPIServerClientSignerName, Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test"}}
		if _, err := requests.UpdateApproval(ctx, name, csr, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	c.until("alice has a certificate", func(ctx context.Context) (bool, error) {
		csr, err := requests.Get(ctx, "alice", metav1.GetOptions{})
		if err != nil || len(csr.Status.Certificate) == 0 {
			return false, err
		}
		block, _ := pem.Decode(csr.Status.Certificate)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return false, err
		}
		if cert.Subject.CommonName != "alice" || cert.IsCA {
			t.Errorf("the certificate is of %s, for an authority: %v", cert.Subject, cert.IsCA)
		}
		return true, nil
	})
	c.until("the request for a controller's subject is failed", func(ctx context.Context) (bool, error) {
		csr, err := requests.Get(ctx, "evil", metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		if len(csr.Status.Certificate) > 0 {
			t.Fatal("a certificate of a controller was signed")
		}
		for _, condition := range csr.Status.Conditions {
			if condition.Type == certificatesv1.CertificateFailed {
				return condition.Reason == "SignerValidationFailure", nil
			}
		}
		return false, fmt.Errorf("its conditions are %v", csr.Status.Conditions)
	})
}

// A StorageVersionMigration is carried out, once the graph that it needs is there.
func TestStorageVersionMigration(t *testing.T) {
	c := start(t)
	defer c.lead()()
	ctx := t.Context()
	c.until("the API serves", func(ctx context.Context) (bool, error) {
		_, err := c.client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "a"}}, metav1.CreateOptions{})
		return err == nil || apierrors.IsAlreadyExists(err), err
	})
	migrations := c.client.StoragemigrationV1().StorageVersionMigrations()
	if _, err := migrations.Create(ctx, &storagemigrationv1.StorageVersionMigration{
		ObjectMeta: metav1.ObjectMeta{Name: "m"},
		Spec:       storagemigrationv1.StorageVersionMigrationSpec{Resource: metav1.GroupResource{Resource: "configmaps"}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the migration succeeds", func(ctx context.Context) (bool, error) {
		m, err := migrations.Get(ctx, "m", metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		if !meta.IsStatusConditionTrue(m.Status.Conditions, string(storagemigrationv1.MigrationSucceeded)) {
			return false, fmt.Errorf("its conditions are %v", m.Status.Conditions)
		}
		return true, nil
	})
}

// One that does not end with its term is given up, so that the replica may lead again.
func TestControllerThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	c := &Controllers{Config: Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil))}}
	ctx, cancel := context.WithCancel(t.Context())
	begun, never := make(chan struct{}), make(chan struct{})
	defer close(never)
	go func() { <-begun; cancel() }()
	if err := c.keep(ctx, "stubborn", func(context.Context) error { close(begun); <-never; return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("keep: %v", err)
	}
}

// One that panics or returns is built anew; one that is off is not.
func TestControllerThatFails(t *testing.T) {
	t.Parallel()
	c := &Controllers{Config: Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil))}}
	tries := 0
	if err := c.keep(t.Context(), "clumsy", func(context.Context) error {
		if tries++; tries == 1 {
			panic("oops")
		}
		return errNotBuilt
	}); err != nil || tries != 2 {
		t.Errorf("keep: %v after %d tries", err, tries)
	}
}
