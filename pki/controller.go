package pki

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"timonel/internal/durable"
)

// serviceIP is the kubernetes Service's address, which pods reach the API by.
var serviceIP = net.IPv4(10, 96, 0, 1)

// Controller is what one controller identifies itself with, issued anew at
// every start, and by [Controller.Renew] while it runs. Its methods may be called
// from many goroutines.
type Controller struct {
	Name string

	bundle *Bundle
	ips    []net.IP
	names  []string

	mu      sync.Mutex // held while files are written, or what is in them changes
	current atomic.Pointer[Credentials]
}

// Credentials are a controller's certificates, all of one time.
type Credentials struct {
	APIServing       KeyPair // the Kubernetes API's serving certificate
	Cluster          KeyPair // cluster port and Raft, as server and as client
	KubeletClient    KeyPair // the API server to agents' kubelet API
	FrontProxyClient KeyPair // the API aggregator to extension servers

	cluster tls.Certificate
	renewal time.Time
}

// Controller issues the certificates of the controller called name. The API's
// serving certificate is valid for ips and dnsNames besides localhost, name, the
// kubernetes Service's names and its address 10.96.0.1; another service network
// needs its first address among ips.
func (b *Bundle) Controller(name string, ips []net.IP, dnsNames []string) (*Controller, error) {
	if err := CheckName(name); err != nil {
		return nil, fmt.Errorf("issue certificates of controller: %w", err)
	}
	names := append([]string{
		"localhost", name,
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}, dnsNames...)
	slices.Sort(names)
	c := &Controller{
		Name: name, bundle: b, names: slices.Compact(names),
		ips: append([]net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, serviceIP}, ips...),
	}
	return c, c.Renew()
}

// Renew issues the certificates anew, with new keys. From when it returns, new
// connections of all configs that came from the controller use them, as client and
// as server; what was written to files is for [Controller.WriteFiles] to replace.
func (c *Controller) Renew() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, now := c.bundle, c.bundle.now()
	server := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	self := pkix.Name{CommonName: ControllerPrefix + c.Name, Organization: []string{ControllerGroup}}
	next := &Credentials{}
	for _, issue := range []struct {
		to   *KeyPair
		from *authority
		leaf leaf
	}{
		{&next.APIServing, b.ca, leaf{subject: pkix.Name{CommonName: "kube-apiserver"}, usages: server, names: c.names, ips: c.ips}},
		{&next.Cluster, b.ca, leaf{subject: self, usages: append(slices.Clone(server), client...), chain: true}},
		{&next.KubeletClient, b.ca, leaf{
			subject: pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{AdminGroup}}, usages: client,
		}},
		{&next.FrontProxyClient, b.frontProxy, leaf{subject: pkix.Name{CommonName: "front-proxy-client"}, usages: client}},
	} {
		pair, err := issue.from.issue(issue.leaf, now)
		if err != nil {
			return err
		}
		*issue.to = pair
	}
	var err error
	if next.cluster, err = next.Cluster.TLS(); err != nil {
		return fmt.Errorf("certificate of controller %s: %w", c.Name, err)
	}
	// All are of one time, but those of the front proxy's authority may end with it.
	end := next.cluster.Leaf.NotAfter
	if frontProxy := b.frontProxy.cert.NotAfter; frontProxy.Before(end) {
		end = frontProxy
	}
	next.renewal = now.Add(max(end.Sub(now)*2/3, minRenewal))
	c.current.Store(next)
	return nil
}

// minRenewal is the least time between two renewals: certificates end with their
// authority, and towards its end renewing them gains nothing.
const minRenewal = time.Hour

// Credentials are the controller's newest certificates.
func (c *Controller) Credentials() *Credentials { return c.current.Load() }

// Expires says until when the controller's newest certificates are valid.
func (c *Controller) Expires() time.Time { return c.current.Load().cluster.Leaf.NotAfter }

// Renewal says when the controller's certificates are to be renewed: when two thirds
// of their life are over.
func (c *Controller) Renewal() time.Time { return c.current.Load().renewal }

func (c *Controller) serverCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return &c.current.Load().cluster, nil
}

func (c *Controller) clientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return &c.current.Load().cluster, nil
}

// ClusterServerTLS is for the cluster port's gRPC server. A client certificate
// is verified when there is one; what a caller without one may do is for the
// server to decide, by [PeerIdentity].
func (c *Controller) ClusterServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: c.serverCertificate,
		ClientAuth:     tls.VerifyClientCertIfGiven,
		ClientCAs:      c.bundle.ca.pool(),
		NextProtos:     []string{"h2"},
	}
}

// ClusterClientTLS is for calls to other controllers' cluster ports.
func (c *Controller) ClusterClientTLS() *tls.Config {
	config := clientTLS(c.bundle.ca.pool(), nil)
	config.GetClientCertificate = c.clientCertificate
	return config
}

// ClusterClientTLSTo is for calls to the controller called name: whoever answers must
// have its certificate, wherever the connection led.
func (c *Controller) ClusterClientTLSTo(name string) *tls.Config {
	config := c.ClusterClientTLS()
	check := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if err := check(state); err != nil {
			return err
		}
		if id := IdentityOf(state.PeerCertificates[0]); id.Name != name {
			return fmt.Errorf("the other end is not controller %s but %s", name, id)
		}
		return nil
	}
	return config
}

// RaftTLS is for both ends of Raft's own connections: each must be a controller
// of this cluster.
func (c *Controller) RaftTLS() *tls.Config {
	config := c.ClusterClientTLS()
	config.GetCertificate = c.serverCertificate
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.ClientCAs = config.RootCAs
	return config
}

// Files are the paths of what [Controller.WriteFiles] wrote, for those parts of
// Kubernetes that only take files.
type Files struct {
	CA, FrontProxyCA                          string
	APIServingCert, APIServingKey             string
	KubeletClientCert, KubeletClientKey       string
	FrontProxyClientCert, FrontProxyClientKey string
	ServiceAccountKey                         string
}

// WriteFiles writes the controller's newest certificates and keys, and what of the
// bundle verifies others', to dir, which only its owner may read. Files that are
// there are replaced one by one, a key before its certificate: who reads both then
// sees for a moment that they do not belong together, and reads them again.
func (c *Controller) WriteFiles(dir string) (Files, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.current.Load()
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return Files{}, fmt.Errorf("write certificates of controller %s: %w", c.Name, err)
	}
	sa, err := encodeKey(c.bundle.saKey)
	if err != nil {
		return Files{}, err
	}
	var f Files
	for _, file := range []struct {
		path *string
		name string
		data []byte
	}{
		{&f.CA, CAFile, c.bundle.CA()},
		{&f.FrontProxyCA, FrontProxyCAFile, c.bundle.FrontProxyCA()},
		{&f.APIServingKey, "apiserver.key", now.APIServing.Key},
		{&f.APIServingCert, "apiserver.crt", now.APIServing.Cert},
		{&f.KubeletClientKey, "kubelet-client.key", now.KubeletClient.Key},
		{&f.KubeletClientCert, "kubelet-client.crt", now.KubeletClient.Cert},
		{&f.FrontProxyClientKey, "front-proxy-client.key", now.FrontProxyClient.Key},
		{&f.FrontProxyClientCert, "front-proxy-client.crt", now.FrontProxyClient.Cert},
		{&f.ServiceAccountKey, ServiceAccountKey, sa},
	} {
		*file.path = filepath.Join(dir, file.name)
		if err := replaceFile(*file.path, file.data, 0o600); err != nil {
			return Files{}, fmt.Errorf("write certificates of controller %s: %w", c.Name, err)
		}
	}
	return f, nil
}
