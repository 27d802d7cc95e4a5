package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"timonel/pki"
	"timonel/state"
	"timonel/state/storage/storagetest"
)

// advertised is an address that nothing connects to (RFC 5737).
var advertised = net.IPv4(192, 0, 2, 10)

// fixture is a running server over a local backend.
type fixture struct {
	server  *Server
	backend *storagetest.LocalBackend
	bundle  *pki.Bundle
	// renew issues the controller's certificates anew, where the server reads them.
	renew func() error
	ready time.Duration // from New to ready
	stop  func() error
}

// commonServer is the server that most tests share: a start takes seconds.
var commonServer = sync.OnceValues(func() (*fixture, error) {
	return startFixture(storagetest.NewLocalBackend(state.Options{}), nil, func(c *Config) {
		c.Health = map[string]func(context.Context) error{}
		for name, failure := range health {
			c.Health[name] = func(context.Context) error {
				if err := failure.Load(); err != nil {
					return *err
				}
				return nil
			}
		}
		c.ReadyOnly = []string{"raft"}
		c.NodeAddress = whoseAddress
		c.PodAddress = whosePodAddress
		c.DNSAddresses = []netip.Addr{netip.MustParseAddr("10.96.0.10")}
		c.Paths = map[string]http.Handler{"/timonel/v1/test": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			who, _ := request.UserFrom(r.Context())
			_, deadline := r.Context().Deadline()
			fmt.Fprintf(w, "%s %s, deadline: %t", r.Method, who.GetName(), deadline)
		})}
	})
})

// health is what the common server's checks say.
var health = map[string]*atomic.Pointer[error]{"raft": {}, "disk": {}}

func TestMain(m *testing.M) {
	code := m.Run()
	if f, err := commonServer(); err == nil {
		if err := f.stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stop the common server:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// shareServer returns the common server.
func shareServer(t *testing.T) *fixture {
	t.Helper()
	f, err := commonServer()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// startFixture starts a server and waits until it is ready. A nil bundle is that
// of a new cluster.
func startFixture(backend *storagetest.LocalBackend, bundle *pki.Bundle, change func(*Config)) (*fixture, error) {
	dir, err := os.MkdirTemp("", "timonel-apiserver-")
	if err != nil {
		return nil, err
	}
	if bundle == nil {
		if bundle, err = pki.CreateBundle(filepath.Join(dir, "bundle")); err != nil {
			return nil, err
		}
	}
	controller, err := bundle.Controller("c1", []net.IP{advertised}, nil)
	if err != nil {
		return nil, err
	}
	files, err := controller.WriteFiles(filepath.Join(dir, "c1"))
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	config := Config{
		Name: "c1", Listener: listener, AdvertiseAddress: advertised, Certificates: files, Backend: backend,
	}
	if change != nil {
		change(&config)
	}
	began := time.Now()
	ctx, cancel := context.WithCancel(context.Background())
	server, err := New(ctx, config)
	if err != nil {
		cancel()
		return nil, err
	}
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	f := &fixture{server: server, backend: backend, bundle: bundle}
	f.renew = func() error {
		if err := controller.Renew(); err != nil {
			return err
		}
		_, err := controller.WriteFiles(filepath.Join(dir, "c1"))
		return err
	}
	f.stop = func() error {
		cancel()
		return errors.Join(<-done, os.RemoveAll(dir))
	}
	if err := f.waitReady(time.Minute); err != nil {
		return nil, errors.Join(err, f.stop())
	}
	f.ready = time.Since(began)
	return f, nil
}

// waitReady polls /readyz, as a load balancer does.
func (f *fixture) waitReady(limit time.Duration) error {
	client, err := kubernetes.NewForConfig(f.admin())
	if err != nil {
		return err
	}
	var body []byte
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		var code int
		result := client.RESTClient().Get().AbsPath("/readyz").Param("verbose", "1").Do(context.Background()).StatusCode(&code)
		if code == http.StatusOK {
			return nil
		}
		body, _ = result.Raw()
	}
	return fmt.Errorf("not ready after %s:\n%s", limit, body)
}

// admin is a client configuration in memory that may do everything.
func (f *fixture) admin() *rest.Config {
	return f.server.InProcess(&user.DefaultInfo{Name: "admin", Groups: []string{user.SystemPrivilegedGroup}})
}

// network is a client configuration by TLS with a client certificate.
func (f *fixture) network(t *testing.T, name string, groups ...string) *rest.Config {
	t.Helper()
	config := f.anonymous()
	pair, err := f.bundle.ClientCert(name, groups)
	if err != nil {
		t.Fatal(err)
	}
	config.CertData, config.KeyData = pair.Cert, pair.Key
	return config
}

func (f *fixture) anonymous() *rest.Config {
	return &rest.Config{
		Host:            "https://" + f.server.Addr().String(),
		QPS:             -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: f.bundle.CA()},
	}
}

func client(t *testing.T, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until check returns nil.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	var err error
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("after %s: %v", limit, err)
}
