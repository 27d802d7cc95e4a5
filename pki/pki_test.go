package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/clientcmd"
)

func newBundle(t *testing.T) *Bundle {
	t.Helper()
	b, err := CreateBundle(filepath.Join(t.TempDir(), "pki"))
	require.NoError(t, err)
	return b
}

func at(when time.Time) func() time.Time { return func() time.Time { return when } }

func TestCreateBundleInAnEmptyFolder(t *testing.T) {
	dir := t.TempDir()
	if _, err := CreateBundle(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadBundle(dir); err != nil {
		t.Fatal(err)
	}
}

func TestCreateBundle(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	again, err := LoadBundle(b.Dir())
	require.NoError(t, err)
	require.Equal(t, b.Token(), again.Token())
	require.Equal(t, b.ClusterID(), again.ClusterID())
	require.Len(t, again.GossipKey(), 32)
	require.NotEqual(t, b.Token(), newBundle(t).Token())

	for _, f := range bundleFiles {
		info, err := os.Stat(filepath.Join(b.Dir(), f.name))
		require.NoError(t, err)
		if f.secret {
			require.Equal(t, fs.FileMode(0o600), info.Mode().Perm(), f.name)
		}
	}
	left, err := os.ReadDir(filepath.Dir(b.Dir()))
	require.NoError(t, err)
	require.Len(t, left, 1, "nothing is left beside the bundle")

	_, err = CreateBundle(b.Dir())
	require.ErrorContains(t, err, "is not empty")
	same, err := LoadBundle(b.Dir())
	require.NoError(t, err)
	require.Equal(t, b.Token(), same.Token(), "an existing bundle is not touched")
}

func TestLoadBundleErrors(t *testing.T) {
	t.Parallel()
	other := newBundle(t)
	write := func(file, data string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(data), 0o600))
		}
	}
	fromOther := func(file string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			data, err := os.ReadFile(filepath.Join(other.Dir(), file))
			require.NoError(t, err)
			write(file, string(data))(t, dir)
		}
	}
	tests := []struct {
		name   string
		damage func(t *testing.T, dir string)
		now    time.Time
		file   string
		want   string
	}{
		{name: "no folder", damage: func(t *testing.T, dir string) { require.NoError(t, os.RemoveAll(dir)) }, want: "holds none"},
		{name: "key missing", damage: func(t *testing.T, dir string) { require.NoError(t, os.Remove(filepath.Join(dir, CAKeyFile))) }, file: CAKeyFile, want: "lacks"},
		{name: "key readable by others", damage: func(t *testing.T, dir string) {
			require.NoError(t, os.Chmod(filepath.Join(dir, ServiceAccountKey), 0o644))
		}, file: ServiceAccountKey, want: "run chmod 600"},
		{name: "CA is not PEM", damage: write(CAFile, "hello"), file: CAFile, want: "no PEM certificate"},
		{name: "CA is truncated", damage: write(CAFile, string(other.CA()[:200])), file: CAFile, want: "no PEM certificate"},
		{name: "CA of another cluster", damage: fromOther(CAFile), file: CAFile, want: "do not belong together"},
		{name: "CA and key of another cluster", damage: func(t *testing.T, dir string) {
			fromOther(CAFile)(t, dir)
			fromOther(CAKeyFile)(t, dir)
		}, file: TokenFile, want: "of another cluster"},
		{name: "service account key", damage: write(ServiceAccountKey, ""), file: ServiceAccountKey, want: "no PEM private key"},
		{name: "front proxy key", damage: write(FrontProxyKeyFile, "x"), file: FrontProxyCAFile, want: "its private key"},
		{name: "gossip key not base64", damage: write(GossipKeyFile, "%%%"), file: GossipKeyFile, want: "not base64"},
		{name: "gossip key too short", damage: write(GossipKeyFile, base64.StdEncoding.EncodeToString(make([]byte, 16))), file: GossipKeyFile, want: "16 bytes instead of 32"},
		{name: "token", damage: write(TokenFile, "timonel1.abc"), file: TokenFile, want: "is not of the form"},
		{name: "cluster id", damage: write(ClusterIDFile, "prod"), file: ClusterIDFile, want: "not a UUID"},
		{name: "expired", damage: func(*testing.T, string) {}, now: time.Now().Add(11 * 365 * 24 * time.Hour), file: CAFile, want: "expired at"},
		{name: "clock behind", damage: func(*testing.T, string) {}, now: time.Now().Add(-time.Hour), file: CAFile, want: "check the clock"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newBundle(t)
			test.damage(t, b.Dir())
			now := test.now
			if now.IsZero() {
				now = time.Now()
			}
			_, err := loadBundle(b.Dir(), at(now))
			require.ErrorContains(t, err, test.want)
			require.ErrorContains(t, err, b.Dir())
			require.ErrorContains(t, err, test.file)
			require.NotContains(t, err.Error(), b.token.Secret)
		})
	}
}

func TestParseToken(t *testing.T) {
	t.Parallel()
	hash := strings.Repeat("ab", 32)
	for _, test := range []struct{ name, in, err string }{
		{"good", "timonel1." + hash + ".s3cret", ""},
		{"good with white space and capitals", " timonel1." + strings.ToUpper(hash) + ".s3cret\n", ""},
		{"empty", "  ", "is empty"},
		{"another kind", "abcdef.0123456789abcdef", "is not of the form"},
		{"another version", "timonel2." + hash + ".s3cret", "is not of the form"},
		{"cut hash", "timonel1.abcd.s3cret", "64 hexadecimal digits but 4"},
		{"no hash", "timonel1." + strings.Repeat("zz", 32) + ".s3cret", "64 hexadecimal digits"},
		{"no secret", "timonel1." + hash + ".", "secret is missing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			token, err := ParseToken(test.in)
			if test.err != "" {
				require.ErrorContains(t, err, test.err)
				require.NotContains(t, err.Error(), "s3cret")
				return
			}
			require.NoError(t, err)
			require.Equal(t, Token{CAHash: hash, Secret: "s3cret"}, token)
		})
	}
}

func TestSecretAndCA(t *testing.T) {
	t.Parallel()
	b, other := newBundle(t), newBundle(t)
	token, err := ParseToken(b.Token())
	require.NoError(t, err)
	require.Equal(t, token.Secret, b.BootstrapSecret())
	require.Equal(t, b.Token(), b.JoinToken(token.Secret))
	require.NotEqual(t, token.Secret, other.BootstrapSecret())
	require.NoError(t, token.VerifyCA(b.CA()))
	require.ErrorContains(t, token.VerifyCA(other.CA()), "does not match the token")
}

func TestSignNode(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	good, err := NewNodeRequest("a1")
	require.NoError(t, err)
	for _, test := range []struct {
		name, node string
		csr        []byte
		want       string
	}{
		{"good", "a1", good.CSR, ""},
		{"of another node", "a2", good.CSR, `is for "system:node:a1" instead of "system:node:a2"`},
		{"bad name", "A1", good.CSR, "not a DNS name"},
		{"no name", "", good.CSR, "is empty"},
		{"not a request", "a1", []byte("hello"), "parse request"},
		{"signature broken", "a1", append(good.CSR[:len(good.CSR)-1:len(good.CSR)-1], good.CSR[len(good.CSR)-1]^1), "signature"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cert, err := b.SignNode(test.csr, test.node)
			if test.want != "" {
				require.ErrorContains(t, err, test.want)
				return
			}
			require.NoError(t, err)
			parsed, err := parseCert(cert)
			require.NoError(t, err)
			require.Equal(t, Identity{RoleNode, "a1"}, IdentityOf(parsed))
			require.Equal(t, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, parsed.ExtKeyUsage)
		})
	}
}

func newNode(t *testing.T, b *Bundle, name string) *Node {
	t.Helper()
	request, err := NewNodeRequest(name)
	require.NoError(t, err)
	cert, err := b.SignNode(request.CSR, name)
	require.NoError(t, err)
	return &Node{CA: b.CA(), Pair: KeyPair{Cert: cert, Key: request.Key}, GossipKeys: [][]byte{b.GossipKey()}}
}

func TestNodeSaveAndLoad(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	dir := filepath.Join(t.TempDir(), "a1")
	_, err := LoadNode(dir, "a1")
	require.ErrorIs(t, err, fs.ErrNotExist, "not joined yet")

	node := newNode(t, b, "a1")
	require.NoError(t, node.Save(dir))
	loaded, err := LoadNode(dir, "a1")
	require.NoError(t, err)
	require.Equal(t, node, loaded)

	_, err = LoadNode(dir, "a2")
	require.ErrorContains(t, err, "not to node a2")
	_, err = loadNode(dir, "a1", time.Now().Add(2*365*24*time.Hour))
	require.ErrorContains(t, err, "join again")

	require.NoError(t, os.WriteFile(filepath.Join(dir, CAFile), newBundle(t).CA(), 0o600))
	_, err = LoadNode(dir, "a1")
	require.ErrorContains(t, err, "not signed by ca.crt")
	require.NoError(t, os.Remove(filepath.Join(dir, nodeKeyFile)))
	_, err = LoadNode(dir, "a1")
	require.ErrorContains(t, err, "node.key: missing")
	require.False(t, errors.Is(err, fs.ErrNotExist), "a half-saved node is not one that never joined")
}

// handshake runs one TLS handshake in both directions and returns what each end
// says of it, and whom the server saw.
func handshake(t *testing.T, server, client *tls.Config) (seen Identity, serverErr, clientErr error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	done := make(chan error, 1)
	go func() {
		raw, err := listener.Accept()
		if err != nil {
			done <- err
			return
		}
		defer raw.Close()
		conn := tls.Server(raw, server)
		if err := conn.Handshake(); err != nil {
			done <- err
			return
		}
		if chains := conn.ConnectionState().VerifiedChains; len(chains) > 0 {
			seen = IdentityOf(chains[0][0])
		}
		_, err = conn.Write([]byte("x"))
		done <- err
	}()
	raw, err := net.Dial("tcp", listener.Addr().String())
	require.NoError(t, err)
	conn := tls.Client(raw, client)
	if clientErr = conn.Handshake(); clientErr == nil {
		_, clientErr = conn.Read(make([]byte, 1)) // TLS 1.3 refuses a client certificate after the handshake
	}
	raw.Close()
	serverErr = <-done
	return seen, serverErr, clientErr
}

func TestTLS(t *testing.T) {
	t.Parallel()
	b, other := newBundle(t), newBundle(t)
	controller := func(b *Bundle, name string) *Controller {
		c, err := b.Controller(name, nil, nil)
		require.NoError(t, err)
		return c
	}
	nodeTLS := func(b *Bundle) *tls.Config {
		config, err := newNode(t, b, "a1").ClientTLS()
		require.NoError(t, err)
		return config
	}
	c1, c2, foreign := controller(b, "c1"), controller(b, "c2"), controller(other, "c1")
	token, otherToken := b.token, other.token
	node := newNode(t, b, "a9")
	nodeCert, err := node.Pair.TLS()
	require.NoError(t, err)
	impostor := c1.ClusterServerTLS() // a node that poses as a controller
	impostor.GetCertificate = nil
	impostor.Certificates = []tls.Certificate{nodeCert}

	expiredBundle := *b
	expiredBundle.now = at(time.Now().Add(-2 * 365 * 24 * time.Hour))
	expired := controller(&expiredBundle, "c3")

	for _, test := range []struct {
		name              string
		server, client    *tls.Config
		serverErr, cliErr string
		seen              Identity
	}{
		{name: "controller to controller", server: c1.ClusterServerTLS(), client: c2.ClusterClientTLS(), seen: Identity{RoleController, "c2"}},
		{name: "node to controller", server: c1.ClusterServerTLS(), client: nodeTLS(b), seen: Identity{RoleNode, "a1"}},
		{name: "token to controller", server: c1.ClusterServerTLS(), client: token.ClientTLS("10.0.0.1:7443")},
		{name: "raft", server: c1.RaftTLS(), client: c2.RaftTLS(), seen: Identity{RoleController, "c2"}},
		{name: "token of another cluster", server: c1.ClusterServerTLS(), client: otherToken.ClientTLS("10.0.0.1:7443"),
			serverErr: "bad certificate", cliErr: "the controller at 10.0.0.1:7443 belongs to another cluster: its CA sha256:" + b.token.CAHash[:12]},
		{name: "node of another cluster", server: c1.ClusterServerTLS(), client: nodeTLS(other), cliErr: "belongs to another cluster", serverErr: "bad certificate"},
		{name: "controller of another cluster", server: c1.ClusterServerTLS(), client: foreign.ClusterClientTLS(), cliErr: "belongs to another cluster", serverErr: "bad certificate"},
		{name: "raft of another cluster", server: c1.RaftTLS(), client: foreign.RaftTLS(), cliErr: "belongs to another cluster", serverErr: "bad certificate"},
		{name: "raft by a node", server: c1.RaftTLS(), client: nodeTLS(b), serverErr: "is not a controller", cliErr: "bad certificate"},
		{name: "raft without certificate", server: c1.RaftTLS(), client: token.ClientTLS("x"), serverErr: "didn't provide a certificate", cliErr: "certificate required"},
		{name: "node poses as a controller", server: impostor, client: nodeTLS(b), cliErr: "is not a controller", serverErr: "bad certificate"},
		{name: "expired server", server: expired.ClusterServerTLS(), client: c1.ClusterClientTLS(), cliErr: "expired", serverErr: "bad certificate"},
		{name: "expired client", server: c1.ClusterServerTLS(), client: expired.ClusterClientTLS(), serverErr: "expired", cliErr: "expired"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			seen, serverErr, clientErr := handshake(t, test.server, test.client)
			check := func(err error, want string) {
				if want == "" {
					require.NoError(t, err)
				} else {
					require.ErrorContains(t, err, want)
				}
			}
			check(clientErr, test.cliErr)
			check(serverErr, test.serverErr)
			require.Equal(t, test.seen, seen)
		})
	}
}

func TestControllerServing(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	c, err := b.Controller("c1", []net.IP{net.ParseIP("10.1.2.3")}, []string{"api.example.org"})
	require.NoError(t, err)
	cert, err := parseCert(c.Credentials().APIServing.Cert)
	require.NoError(t, err)
	for _, host := range []string{"kubernetes", "kubernetes.default.svc.cluster.local", "10.96.0.1", "10.1.2.3", "127.0.0.1", "localhost", "c1", "api.example.org"} {
		_, err := cert.Verify(x509.VerifyOptions{Roots: b.ca.pool(), DNSName: host})
		require.NoError(t, err, host)
	}
	_, err = cert.Verify(x509.VerifyOptions{Roots: b.ca.pool(), DNSName: "10.1.2.4"})
	require.Error(t, err)
	require.WithinDuration(t, time.Now().Add(leafLifetime), c.Expires(), time.Minute)

	dir := filepath.Join(t.TempDir(), "certs")
	files, err := c.WriteFiles(dir)
	require.NoError(t, err)
	_, err = tls.LoadX509KeyPair(files.APIServingCert, files.APIServingKey)
	require.NoError(t, err)
	_, err = c.WriteFiles(dir)
	require.NoError(t, err, "a restart replaces them")

	_, err = b.Controller("No Name", nil, nil)
	require.ErrorContains(t, err, "not a DNS name")
}

func TestKubeconfig(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	pair, err := b.ClientCert("admin", []string{AdminGroup})
	require.NoError(t, err)
	spec := KubeconfigSpec{CA: b.CA(), User: "admin", Client: pair, Contexts: []KubeContext{
		{"timonel", "https://10.0.0.1:6443"}, {"c2", "https://10.0.0.2:6443"},
	}}
	path := filepath.Join(t.TempDir(), "run", "kubeconfig")
	require.NoError(t, WriteKubeconfig(path, spec))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), info.Mode().Perm())

	for context, server := range map[string]string{"": "https://10.0.0.1:6443", "c2": "https://10.0.0.2:6443"} {
		config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
			&clientcmd.ClientConfigLoadingRules{ExplicitPath: path},
			&clientcmd.ConfigOverrides{CurrentContext: context}).ClientConfig()
		require.NoError(t, err)
		require.Equal(t, server, config.Host)
		require.Equal(t, pair.Cert, config.CertData)
	}

	spec.Contexts = append(spec.Contexts, KubeContext{"c2", "https://10.0.0.3:6443"})
	_, err = Kubeconfig(spec)
	require.ErrorContains(t, err, "two contexts are called c2")
	spec.Contexts, spec.Current = spec.Contexts[:2], "c9"
	_, err = Kubeconfig(spec)
	require.ErrorContains(t, err, "there is no context c9")
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	require.Empty(t, b.Warnings(30*24*time.Hour))
	require.Len(t, b.Warnings(11*365*24*time.Hour), 2)
}
