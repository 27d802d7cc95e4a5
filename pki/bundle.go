package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"timonel/internal/durable"
)

// Names of the files in a bundle.
const (
	CAFile            = "ca.crt"
	CAKeyFile         = "ca.key"
	FrontProxyCAFile  = "front-proxy-ca.crt"
	FrontProxyKeyFile = "front-proxy-ca.key"
	ServiceAccountKey = "sa.key"
	GossipKeyFile     = "gossip.key"
	TokenFile         = "token"
	ClusterIDFile     = "cluster-id"
)

var bundleFiles = []struct {
	name   string
	secret bool
}{
	{CAFile, false}, {CAKeyFile, true}, {FrontProxyCAFile, false}, {FrontProxyKeyFile, true},
	{ServiceAccountKey, true}, {GossipKeyFile, true}, {TokenFile, true}, {ClusterIDFile, false},
}

var clusterIDForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// Bundle holds a cluster's secrets. It is read once and does not change; its
// methods may be called from many goroutines.
type Bundle struct {
	dir        string
	clusterID  string
	ca         *authority
	frontProxy *authority
	saKey      crypto.Signer
	gossipKey  []byte
	token      Token
	now        func() time.Time
}

// CreateBundle makes the secrets of a new cluster in dir, which must not exist
// or be empty, and returns them. It writes a folder beside dir and renames it,
// so that dir is complete or untouched.
func CreateBundle(dir string) (*Bundle, error) { return createBundle(dir, time.Now) }

func createBundle(dir string, now func() time.Time) (*Bundle, error) {
	dir = filepath.Clean(dir)
	switch entries, err := os.ReadDir(dir); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	case len(entries) > 0:
		return nil, fmt.Errorf("create cluster bundle: %s is not empty: use it as it is, or choose another folder", dir)
	}
	files, err := newBundleFiles(now())
	if err != nil {
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	}
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	}
	tmp, err := os.MkdirTemp(parent, "."+filepath.Base(dir)+".new-") // mode 0700
	if err != nil {
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	}
	defer os.RemoveAll(tmp) // nothing there any more after the rename
	for _, f := range bundleFiles {
		mode := fs.FileMode(0o644)
		if f.secret {
			mode = 0o600
		}
		if err := writeSynced(filepath.Join(tmp, f.name), files[f.name], mode); err != nil {
			return nil, fmt.Errorf("create cluster bundle: %w", err)
		}
	}
	if err := durable.SyncDir(tmp); err != nil {
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	}
	// Not os.Rename, which refuses an empty folder in the way.
	if err := syscall.Rename(tmp, dir); err != nil {
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	}
	if err := durable.SyncDir(parent); err != nil {
		return nil, fmt.Errorf("create cluster bundle: %w", err)
	}
	return loadBundle(dir, now)
}

func newBundleFiles(now time.Time) (map[string][]byte, error) {
	ca, err := newAuthority("timonel-ca", now)
	if err != nil {
		return nil, err
	}
	frontProxy, err := newAuthority("timonel-front-proxy-ca", now)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{CAFile: ca.pem(), FrontProxyCAFile: frontProxy.pem()}
	saKey, err := newKey()
	if err != nil {
		return nil, err
	}
	for name, key := range map[string]crypto.Signer{
		CAKeyFile: ca.key, FrontProxyKeyFile: frontProxy.key, ServiceAccountKey: saKey,
	} {
		if files[name], err = encodeKey(key); err != nil {
			return nil, err
		}
	}
	random := make([]byte, GossipKeySize+16+16)
	if _, err := rand.Read(random); err != nil {
		return nil, fmt.Errorf("read random bytes: %w", err)
	}
	gossip, secret, id := random[:GossipKeySize], random[GossipKeySize:GossipKeySize+16], random[GossipKeySize+16:]
	files[GossipKeyFile] = []byte(base64.StdEncoding.EncodeToString(gossip) + "\n")
	files[TokenFile] = []byte(Token{CAHash: hashCA(ca.cert), Secret: hex.EncodeToString(secret)}.String() + "\n")
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a random UUID, version 4
	files[ClusterIDFile] = fmt.Appendf(nil, "%x-%x-%x-%x-%x\n", id[0:4], id[4:6], id[6:8], id[8:10], id[10:16])
	return files, nil
}

// LoadBundle reads the bundle in dir and checks all of it. Its errors name the
// file and say what to do.
func LoadBundle(dir string) (*Bundle, error) { return loadBundle(filepath.Clean(dir), time.Now) }

func loadBundle(dir string, now func() time.Time) (*Bundle, error) {
	files := make(map[string][]byte, len(bundleFiles))
	var missing []string
	for _, f := range bundleFiles {
		data, err := readFile(filepath.Join(dir, f.name), f.secret)
		if errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, f.name)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("load cluster bundle: %w", err)
		}
		files[f.name] = data
	}
	if len(missing) == len(bundleFiles) {
		return nil, fmt.Errorf("load cluster bundle: %s holds none: copy the folder of another controller, or create a cluster: %w", dir, fs.ErrNotExist)
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("load cluster bundle: %s lacks %s: copy the whole folder of another controller", dir, strings.Join(missing, ", "))
	}

	b := &Bundle{dir: dir, now: now}
	inFile := func(name string, err error) error {
		return fmt.Errorf("load cluster bundle: %s: %w", filepath.Join(dir, name), err)
	}
	var err error
	if b.ca, err = loadAuthority(files[CAFile], files[CAKeyFile], now()); err != nil {
		return nil, inFile(CAFile, err)
	}
	if b.frontProxy, err = loadAuthority(files[FrontProxyCAFile], files[FrontProxyKeyFile], now()); err != nil {
		return nil, inFile(FrontProxyCAFile, err)
	}
	if b.saKey, err = parseKey(files[ServiceAccountKey]); err != nil {
		return nil, inFile(ServiceAccountKey, err)
	}
	if b.gossipKey, err = base64.StdEncoding.DecodeString(string(bytes.TrimSpace(files[GossipKeyFile]))); err != nil {
		return nil, inFile(GossipKeyFile, fmt.Errorf("not base64: %w", err))
	}
	if len(b.gossipKey) != GossipKeySize {
		return nil, inFile(GossipKeyFile, fmt.Errorf("the key has %d bytes instead of %d", len(b.gossipKey), GossipKeySize))
	}
	if b.token, err = ParseToken(string(files[TokenFile])); err != nil {
		return nil, inFile(TokenFile, err)
	}
	if b.token.CAHash != hashCA(b.ca.cert) {
		return nil, inFile(TokenFile, fmt.Errorf("the token is of another cluster: its CA is %s, that of %s is %s",
			short(b.token.CAHash), CAFile, short(hashCA(b.ca.cert))))
	}
	b.clusterID = string(bytes.TrimSpace(files[ClusterIDFile]))
	if !clusterIDForm.MatchString(b.clusterID) {
		return nil, inFile(ClusterIDFile, fmt.Errorf("%q is not a UUID", b.clusterID))
	}
	return b, nil
}

// loadAuthority parses a certificate authority and checks that it can sign.
func loadAuthority(certPEM, keyPEM []byte, now time.Time) (*authority, error) {
	cert, err := parseCert(certPEM)
	if err != nil {
		return nil, err
	}
	if !cert.IsCA {
		return nil, errors.New("the certificate is not an authority")
	}
	if err := checkValidity(cert, now); err != nil {
		return nil, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("its private key: %w", err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(cert.PublicKey) {
		return nil, errors.New("certificate and private key do not belong together: copy both from the same bundle")
	}
	return &authority{cert: cert, key: key}, nil
}

func checkValidity(cert *x509.Certificate, now time.Time) error {
	if now.Before(cert.NotBefore) {
		return fmt.Errorf("the certificate of %s is not valid before %s, and it is %s here: check the clock",
			cert.Subject.CommonName, cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if now.After(cert.NotAfter) {
		return fmt.Errorf("the certificate of %s expired at %s (it is %s here)",
			cert.Subject.CommonName, cert.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// Dir is the folder that the bundle was read from.
func (b *Bundle) Dir() string { return b.dir }

// ClusterID is the cluster's UUID.
func (b *Bundle) ClusterID() string { return b.clusterID }

// Token is the join token that comes with the bundle, as text: agents of a new
// cluster join with it on its first day.
func (b *Bundle) Token() string { return b.token.String() }

// CA is the cluster's certificate authority, PEM.
func (b *Bundle) CA() []byte { return b.ca.pem() }

// FrontProxyCA is the authority of the API aggregator's client certificates, PEM.
func (b *Bundle) FrontProxyCA() []byte { return b.frontProxy.pem() }

// CASigner is the cluster's authority and its key, for the signing of
// CertificateSigningRequests.
func (b *Bundle) CASigner() (*x509.Certificate, crypto.Signer) { return b.ca.cert, b.ca.key }

// ServiceAccountSigner is the key that signs service account tokens.
func (b *Bundle) ServiceAccountSigner() crypto.Signer { return b.saKey }

// ServiceAccountPublic is the public part of the same key, PEM.
func (b *Bundle) ServiceAccountPublic() ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(b.saKey.Public())
	if err != nil {
		return nil, fmt.Errorf("encode service account public key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// BootstrapSecret is the secret of the token that comes with the bundle. It admits
// nobody by itself: the cluster's state says whether and until when it does.
func (b *Bundle) BootstrapSecret() string { return b.token.Secret }

// JoinToken is the text of the join token with a secret.
func (b *Bundle) JoinToken(secret string) string {
	return Token{CAHash: b.token.CAHash, Secret: secret}.String()
}

// CAExpires is when the authorities do.
func (b *Bundle) CAExpires() (ca, frontProxy time.Time) {
	return b.ca.cert.NotAfter, b.frontProxy.cert.NotAfter
}

// ClientCert issues a client certificate for the API, as for a kubeconfig. The
// groups are the API's: "system:masters" may do everything.
func (b *Bundle) ClientCert(user string, groups []string) (KeyPair, error) {
	if user == "" {
		return KeyPair{}, errors.New("issue client certificate: the user's name is empty")
	}
	return b.ca.issue(leaf{
		subject: pkix.Name{CommonName: user, Organization: groups},
		usages:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, b.now())
}

// Warnings says which authorities expire within the given time.
func (b *Bundle) Warnings(within time.Duration) []string {
	var out []string
	for name, a := range map[string]*authority{CAFile: b.ca, FrontProxyCAFile: b.frontProxy} {
		if a.cert.NotAfter.Before(b.now().Add(within)) {
			out = append(out, fmt.Sprintf("%s expires at %s: plan a new authority",
				filepath.Join(b.dir, name), a.cert.NotAfter.Format(time.RFC3339)))
		}
	}
	return out
}
