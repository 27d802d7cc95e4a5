package pki

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// serviceIP is the kubernetes Service's address, which pods reach the API by.
var serviceIP = net.IPv4(10, 96, 0, 1)

// Controller is what one controller identifies itself with, issued anew at
// every start.
type Controller struct {
	Name string

	APIServing       KeyPair // the Kubernetes API's serving certificate
	Cluster          KeyPair // cluster port and Raft, as server and as client
	KubeletClient    KeyPair // the API server to agents' kubelet API
	FrontProxyClient KeyPair // the API aggregator to extension servers

	bundle  *Bundle
	cluster tls.Certificate
}

// Controller issues the certificates of the controller called name. The API's
// serving certificate is valid for ips and dnsNames besides localhost, name, the
// kubernetes Service's names and its address 10.96.0.1; another service network
// needs its first address among ips.
func (b *Bundle) Controller(name string, ips []net.IP, dnsNames []string) (*Controller, error) {
	if err := CheckName(name); err != nil {
		return nil, fmt.Errorf("issue certificates of controller: %w", err)
	}
	now := b.now()
	server := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	c := &Controller{Name: name, bundle: b}

	names := append([]string{
		"localhost", name,
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}, dnsNames...)
	slices.Sort(names)
	addresses := append([]net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, serviceIP}, ips...)
	self := pkix.Name{CommonName: ControllerPrefix + name, Organization: []string{ControllerGroup}}
	for _, issue := range []struct {
		to   *KeyPair
		from *authority
		leaf leaf
	}{
		{&c.APIServing, b.ca, leaf{
			subject: pkix.Name{CommonName: "kube-apiserver"}, usages: server,
			names: slices.Compact(names), ips: addresses,
		}},
		{&c.Cluster, b.ca, leaf{subject: self, usages: append(slices.Clone(server), client...), chain: true}},
		{&c.KubeletClient, b.ca, leaf{
			subject: pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{AdminGroup}}, usages: client,
		}},
		{&c.FrontProxyClient, b.frontProxy, leaf{subject: pkix.Name{CommonName: "front-proxy-client"}, usages: client}},
	} {
		pair, err := issue.from.issue(issue.leaf, now)
		if err != nil {
			return nil, err
		}
		*issue.to = pair
	}
	var err error
	if c.cluster, err = c.Cluster.TLS(); err != nil {
		return nil, fmt.Errorf("certificate of controller %s: %w", name, err)
	}
	return c, nil
}

// Expires says until when the controller's certificates are valid. Starting it
// again issues new ones.
func (c *Controller) Expires() time.Time { return c.cluster.Leaf.NotAfter }

// ClusterServerTLS is for the cluster port's gRPC server. A client certificate
// is verified when there is one; what a caller without one may do is for the
// server to decide, by [PeerIdentity].
func (c *Controller) ClusterServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{c.cluster},
		ClientAuth:   tls.VerifyClientCertIfGiven,
		ClientCAs:    c.bundle.ca.pool(),
		NextProtos:   []string{"h2"},
	}
}

// ClusterClientTLS is for calls to other controllers' cluster ports.
func (c *Controller) ClusterClientTLS() *tls.Config {
	return clientTLS(c.bundle.ca.pool(), &c.cluster)
}

// RaftTLS is for both ends of Raft's own connections: each must be a controller
// of this cluster.
func (c *Controller) RaftTLS() *tls.Config {
	config := clientTLS(c.bundle.ca.pool(), &c.cluster)
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

// WriteFiles writes the controller's certificates and keys, and what of the
// bundle verifies others', to dir, which only its owner may read.
func (c *Controller) WriteFiles(dir string) (Files, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
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
		{&f.APIServingCert, "apiserver.crt", c.APIServing.Cert},
		{&f.APIServingKey, "apiserver.key", c.APIServing.Key},
		{&f.KubeletClientCert, "kubelet-client.crt", c.KubeletClient.Cert},
		{&f.KubeletClientKey, "kubelet-client.key", c.KubeletClient.Key},
		{&f.FrontProxyClientCert, "front-proxy-client.crt", c.FrontProxyClient.Cert},
		{&f.FrontProxyClientKey, "front-proxy-client.key", c.FrontProxyClient.Key},
		{&f.ServiceAccountKey, ServiceAccountKey, sa},
	} {
		*file.path = filepath.Join(dir, file.name)
		if err := replaceFile(*file.path, file.data, 0o600); err != nil {
			return Files{}, fmt.Errorf("write certificates of controller %s: %w", c.Name, err)
		}
	}
	return f, nil
}
