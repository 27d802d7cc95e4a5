package pki

import (
	"crypto"
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
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"timonel/internal/durable"
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

// NodeLifetime is how long a node's certificate is valid by default. A running
// agent renews it when two thirds of that are over.
const NodeLifetime = 7 * 24 * time.Hour

// maxCSR bounds a certificate request; the biggest that is accepted, of an RSA key
// of 4096 bits, has some 1,200 bytes.
const maxCSR = 8 << 10

// NodeCSR is a node's certificate request that was checked.
type NodeCSR struct {
	Name      string
	PublicKey any
	// PublicKeyInfo is the key's SubjectPublicKeyInfo, DER.
	PublicKeyInfo []byte
}

// ParseNodeCSR checks a certificate request (DER) of the node called name: it must
// be signed with its key, ask for that node and for nothing else.
func ParseNodeCSR(csr []byte, name string) (NodeCSR, error) {
	if err := CheckName(name); err != nil {
		return NodeCSR{}, fmt.Errorf("sign node certificate: %w", err)
	}
	fail := func(format string, args ...any) (NodeCSR, error) {
		return NodeCSR{}, fmt.Errorf("sign certificate of node %s: %w", name, fmt.Errorf(format, args...))
	}
	if len(csr) > maxCSR {
		return fail("the request has %d bytes, %d are allowed", len(csr), maxCSR)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return fail("parse request: %w", err)
	}
	// The key first: checking the signature of a huge one takes long.
	switch key := request.PublicKey.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 4096 {
			return fail("its RSA key has %d bits, 2048 to 4096 are accepted", bits)
		}
	default:
		return fail("keys of type %T are not accepted", key)
	}
	if err := request.CheckSignature(); err != nil {
		return fail("signature of the request: %w", err)
	}
	if got, want := request.Subject.CommonName, NodePrefix+name; got != want {
		return fail("the request is for %q instead of %q", got, want)
	}
	if !slices.Equal(request.Subject.Organization, []string{NodeGroup}) {
		return fail("the request's organisation is %q instead of %q", strings.Join(request.Subject.Organization, ","), NodeGroup)
	}
	if len(request.Subject.Names) != 2 {
		return fail("the request's subject has more than a name and an organisation")
	}
	if len(request.Extensions) > 0 || len(request.DNSNames)+len(request.IPAddresses)+len(request.EmailAddresses)+len(request.URIs) > 0 {
		return fail("the request asks for extensions or further names, which a node has none of")
	}
	return NodeCSR{Name: name, PublicKey: request.PublicKey, PublicKeyInfo: request.RawSubjectPublicKeyInfo}, nil
}

// SignNode issues the certificate for a certificate request (DER) of the node
// called name, valid for [NodeLifetime], as a PEM chain, leaf first. The request
// must be signed, ask for that node and nothing else.
func (b *Bundle) SignNode(csr []byte, name string) ([]byte, error) {
	request, err := ParseNodeCSR(csr, name)
	if err != nil {
		return nil, err
	}
	return b.SignNodeUntil(request, b.now().Add(NodeLifetime))
}

// SignNodeUntil issues the certificate for a request that was checked.
func (b *Bundle) SignNodeUntil(request NodeCSR, notAfter time.Time) ([]byte, error) {
	return b.ca.sign(leaf{
		subject:  pkix.Name{CommonName: NodePrefix + request.Name, Organization: []string{NodeGroup}},
		usages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		notAfter: notAfter,
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
	return nodeRequest(name, key)
}

// NewNodeRequestFor makes the request of the node called name for the key (PEM)
// that it has.
func NewNodeRequestFor(name string, keyPEM []byte) (NodeRequest, error) {
	key, err := parseKey(keyPEM)
	if err != nil {
		return NodeRequest{}, fmt.Errorf("request certificate of node %s: its private key: %w", name, err)
	}
	return nodeRequest(name, key)
}

func nodeRequest(name string, key crypto.Signer) (NodeRequest, error) {
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
	CA   []byte  // the cluster's authority, PEM
	Pair KeyPair // the node's certificate and key
	// GossipKeys are the nodes' pool's: the first seals, any opens.
	GossipKeys [][]byte
}

const (
	nodeCertFile = "node.crt"
	nodeKeyFile  = "node.key"
)

// Save writes the node's credentials to dir, private key last but one and the
// certificate last, so that a certificate that is there is usable.
func (n *Node) Save(dir string) error {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("save node credentials: %w", err)
	}
	if err := SaveGossipKeys(dir, n.GossipKeys); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{CAFile, n.CA},
		// For an agent of before there were several.
		{GossipKeyFile, []byte(base64.StdEncoding.EncodeToString(n.GossipKeys[0]) + "\n")},
		{nodeKeyFile, n.Pair.Key},
	} {
		if err := replaceFile(filepath.Join(dir, f.name), f.data, 0o600); err != nil {
			return fmt.Errorf("save node credentials: %w", err)
		}
	}
	return n.SaveCertificate(dir)
}

// SaveCertificate replaces the certificate in dir by one for the same key, and leaves
// all else there.
func (n *Node) SaveCertificate(dir string) error {
	if err := replaceFile(filepath.Join(dir, nodeCertFile), n.Pair.Cert, 0o600); err != nil {
		return fmt.Errorf("save node credentials: %w", err)
	}
	return nil
}

// LoadNode reads what [Node.Save] wrote and checks that it is complete, of one
// cluster, of the node called name and not expired. An agent that has not
// joined gets an error that is [fs.ErrNotExist]; one whose certificate has expired
// gets it and an error that is [ErrNodeExpired].
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
	for file, to := range map[string]*[]byte{CAFile: &n.CA, nodeKeyFile: &n.Pair.Key} {
		data, err := readFile(filepath.Join(dir, file), true)
		if errors.Is(err, fs.ErrNotExist) {
			return fail(file, errors.New("missing beside "+nodeCertFile+": remove the folder and join again"))
		}
		if err != nil {
			return nil, fmt.Errorf("load node credentials: %w", err)
		}
		*to = data
	}
	var file string
	if n.GossipKeys, file, err = loadGossipKeys(dir); errors.Is(err, fs.ErrNotExist) {
		return fail(file, errors.New("missing beside "+nodeCertFile+": remove the folder and join again"))
	} else if err != nil {
		return fail(file, err)
	}
	pair, err := n.Pair.TLS()
	if err != nil {
		return fail(nodeCertFile, err)
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
	if err := checkValidity(pair.Leaf, now); err != nil {
		_, why := fail(nodeCertFile, fmt.Errorf("%w: join again, with a new token", err))
		return n, errors.Join(ErrNodeExpired, why)
	}
	return n, nil
}

// ErrNodeExpired is wrapped when a node's certificate is not valid now. All else
// is good: its key may be certified anew.
var ErrNodeExpired = errors.New("the node's certificate is not valid now")

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

// Validity says from when until when the node's certificate is valid.
func (n *Node) Validity() (from, until time.Time, err error) {
	cert, err := parseCert(n.Pair.Cert)
	if err != nil {
		return time.Time{}, time.Time{}, fmt.Errorf("the node's certificate: %w", err)
	}
	return cert.NotBefore, cert.NotAfter, nil
}
