package pki

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

var nameForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// CheckName says whether name may be that of a controller or a node: a DNS name
// in small letters of at most 63 characters, so that it fits every label.
func CheckName(name string) error {
	if name == "" {
		return errors.New("the name is empty")
	}
	if len(name) > 63 {
		return fmt.Errorf("the name %q has %d characters, 63 are allowed", name, len(name))
	}
	if !nameForm.MatchString(name) {
		return fmt.Errorf("the name %q is not a DNS name in small letters (a-z, 0-9, - and . between)", name)
	}
	return nil
}

// SignNode issues the certificate of the node called name for a certificate
// request (DER), as a PEM chain, leaf first. The request must be signed, ask
// for that node and nothing else.
func (b *Bundle) SignNode(csr []byte, name string) ([]byte, error) {
	if err := CheckName(name); err != nil {
		return nil, fmt.Errorf("sign node certificate: %w", err)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of node %s: parse request: %w", name, err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("sign certificate of node %s: signature of the request: %w", name, err)
	}
	if got, want := request.Subject.CommonName, NodePrefix+name; got != want {
		return nil, fmt.Errorf("sign certificate of node %s: the request is for %q instead of %q", name, got, want)
	}
	if !slices.Equal(request.Subject.Organization, []string{NodeGroup}) {
		return nil, fmt.Errorf("sign certificate of node %s: the request's organisation is %q instead of %q",
			name, strings.Join(request.Subject.Organization, ","), NodeGroup)
	}
	switch key := request.PublicKey.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if key.N.BitLen() < 2048 {
			return nil, fmt.Errorf("sign certificate of node %s: its RSA key has %d bits, 2048 are needed", name, key.N.BitLen())
		}
	default:
		return nil, fmt.Errorf("sign certificate of node %s: keys of type %T are not accepted", name, key)
	}
	return b.ca.sign(leaf{
		subject: pkix.Name{CommonName: NodePrefix + name, Organization: []string{NodeGroup}},
		usages:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, request.PublicKey, b.now())
}

// NodeRequest is a new private key of a node and the request to certify it.
type NodeRequest struct {
	Key []byte // PEM
	CSR []byte // DER, as Join takes it
}

// NewNodeRequest makes the key and request of the node called name.
func NewNodeRequest(name string) (NodeRequest, error) {
	if err := CheckName(name); err != nil {
		return NodeRequest{}, fmt.Errorf("request node certificate: %w", err)
	}
	key, err := newKey()
	if err != nil {
		return NodeRequest{}, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: NodePrefix + name, Organization: []string{NodeGroup}},
	}, key)
	if err != nil {
		return NodeRequest{}, fmt.Errorf("request certificate of node %s: %w", name, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return NodeRequest{}, err
	}
	return NodeRequest{Key: keyPEM, CSR: csr}, nil
}

// Node is what an agent keeps on its disk after it has joined.
type Node struct {
	CA        []byte  // the cluster's authority, PEM
	Pair      KeyPair // the node's certificate and key
	GossipKey []byte
}

const (
	nodeCertFile = "node.crt"
	nodeKeyFile  = "node.key"
)

// Save writes the node's credentials to dir, private key last but one and the
// certificate last, so that a certificate that is there is usable.
func (n *Node) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("save node credentials: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{CAFile, n.CA},
		{GossipKeyFile, []byte(base64.StdEncoding.EncodeToString(n.GossipKey) + "\n")},
		{nodeKeyFile, n.Pair.Key},
		{nodeCertFile, n.Pair.Cert},
	} {
		if err := replaceFile(filepath.Join(dir, f.name), f.data, 0o600); err != nil {
			return fmt.Errorf("save node credentials: %w", err)
		}
	}
	return syncDir(dir)
}

// LoadNode reads what [Node.Save] wrote and checks that it is complete, of one
// cluster, of the node called name and not expired. An agent that has not
// joined gets an error that is [fs.ErrNotExist].
func LoadNode(dir, name string) (*Node, error) { return loadNode(dir, name, time.Now()) }

func loadNode(dir, name string, now time.Time) (*Node, error) {
	fail := func(file string, err error) (*Node, error) {
		return nil, fmt.Errorf("load node credentials: %s: %w", filepath.Join(dir, file), err)
	}
	certPEM, err := readFile(filepath.Join(dir, nodeCertFile), true)
	if err != nil {
		return nil, fmt.Errorf("load node credentials: %w", err)
	}
	n := &Node{Pair: KeyPair{Cert: certPEM}}
	var gossip []byte
	for file, to := range map[string]*[]byte{CAFile: &n.CA, nodeKeyFile: &n.Pair.Key, GossipKeyFile: &gossip} {
		data, err := readFile(filepath.Join(dir, file), true)
		if errors.Is(err, fs.ErrNotExist) {
			return fail(file, errors.New("missing beside "+nodeCertFile+": remove the folder and join again"))
		}
		if err != nil {
			return nil, fmt.Errorf("load node credentials: %w", err)
		}
		*to = data
	}
	if n.GossipKey, err = base64.StdEncoding.DecodeString(strings.TrimSpace(string(gossip))); err != nil || len(n.GossipKey) != gossipKeySize {
		return fail(GossipKeyFile, fmt.Errorf("not a base64 key of %d bytes: join again", gossipKeySize))
	}
	pair, err := n.Pair.TLS()
	if err != nil {
		return fail(nodeCertFile, err)
	}
	if err := checkValidity(pair.Leaf, now); err != nil {
		return fail(nodeCertFile, fmt.Errorf("%w: join again", err))
	}
	if id := IdentityOf(pair.Leaf); id != (Identity{RoleNode, name}) {
		return fail(nodeCertFile, fmt.Errorf("it belongs to %q, not to node %s: use that name or another data folder", pair.Leaf.Subject.CommonName, name))
	}
	ca, err := parseCert(n.CA)
	if err != nil {
		return fail(CAFile, err)
	}
	if err := pair.Leaf.CheckSignatureFrom(ca); err != nil {
		return fail(nodeCertFile, fmt.Errorf("not signed by %s: %w", CAFile, err))
	}
	return n, nil
}

// ClientTLS is for the agent's calls to controllers' cluster ports.
func (n *Node) ClientTLS() (*tls.Config, error) {
	cert, err := n.Pair.TLS()
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(n.CA) {
		return nil, errors.New("the cluster's CA: no PEM certificate in it")
	}
	return clientTLS(pool, &cert), nil
}

// Expires says until when the node's certificate is valid.
func (n *Node) Expires() (time.Time, error) {
	cert, err := parseCert(n.Pair.Cert)
	if err != nil {
		return time.Time{}, fmt.Errorf("the node's certificate: %w", err)
	}
	return cert.NotAfter, nil
}
