package consensus

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// testCA issues controller certificates.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newTestCA(t testing.TB) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &testCA{cert: cert, key: key}
}

func (ca *testCA) config(t testing.TB, commonName, organisation string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: commonName, Organization: []string{organisation}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, &key.PublicKey, ca.key)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, RootCAs: roots}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mapFSM is a map driven by "key=value" commands; the result of a command is
// its index. It keeps the order in which commands came.
type mapFSM struct {
	mu   sync.Mutex
	data map[string]string
	hash uint64 // of all commands in order
	n    int

	hashes map[int64]uint64 // after each command
	grown  chan struct{}    // closed and renewed with every batch
}

func newMapFSM() *mapFSM {
	return &mapFSM{data: map[string]string{}, hashes: map[int64]uint64{0: 0}, grown: make(chan struct{})}
}

// Fingerprint implements Fingerprinter.
func (f *mapFSM) Fingerprint() (int64, uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(f.n), f.hash
}

// FingerprintAt implements Fingerprinter.
func (f *mapFSM) FingerprintAt(position int64) (uint64, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h, ok := f.hashes[position]
	return h, ok
}

// AwaitFingerprint implements Fingerprinter.
func (f *mapFSM) AwaitFingerprint(ctx context.Context, position int64) error {
	for {
		f.mu.Lock()
		reached, grown := int64(f.n) >= position, f.grown
		f.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// spoil changes the state as a broken memory would.
func (f *mapFSM) spoil() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hash ^= 1 << 40
}

func (f *mapFSM) ApplyBatch(entries []Entry) ([]any, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]any, len(entries))
	for i, e := range entries {
		k, v, _ := strings.Cut(string(e.Command), "=")
		f.data[k] = v
		f.n++
		for _, c := range e.Command {
			f.hash = f.hash*1099511628211 + uint64(c)
		}
		f.hash = f.hash*31 + e.Index
		f.hashes[int64(f.n)] = f.hash
		out[i] = e.Index
	}
	close(f.grown)
	f.grown = make(chan struct{})
	return out, nil
}

type mapState struct {
	Data map[string]string
	Hash uint64
	N    int
}

func (s mapState) WriteTo(w io.Writer) (int64, error) { return 0, gob.NewEncoder(w).Encode(s) }

func (f *mapFSM) state() mapState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return mapState{maps.Clone(f.data), f.hash, f.n}
}

func (f *mapFSM) Snapshot() (SnapshotWriter, error) { return f.state(), nil }

func (f *mapFSM) Restore(r io.Reader) error {
	var s mapState
	if err := gob.NewDecoder(r).Decode(&s); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.data, f.hash, f.n = s.Data, s.Hash, s.N
	f.hashes = map[int64]uint64{int64(f.n): f.hash}
	close(f.grown)
	f.grown = make(chan struct{})
	return nil
}

func (f *mapFSM) get(k string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.data[k]
}

// cluster is some replicas of this process, with real disks and real TLS over
// loopback.
type cluster struct {
	t      testing.TB
	ca     *testCA
	id     string
	dir    string
	expect int
	tune   func(*Config)
	// logStore is Config.LogStore.
	logStore string
	log      *slog.Logger

	mu    sync.Mutex
	nodes map[string]*node

	breakHello atomic.Int32 // so many calls of Hello fail
}

type node struct {
	*Replica
	fsm   *mapFSM
	grpc  *grpc.Server
	addr  string // gRPC
	raft  string
	mu    sync.Mutex
	conns map[string]*grpc.ClientConn // guarded by mu: what runs in a replica may ask for one while it is closed
}

func newCluster(t testing.TB, expect int) *cluster {
	c := &cluster{t: t, ca: newTestCA(t), id: "test", dir: t.TempDir(), expect: expect, nodes: map[string]*node{}, log: testLog(t)}
	t.Cleanup(func() {
		c.mu.Lock()
		nodes := maps.Clone(c.nodes)
		c.mu.Unlock()
		for id := range nodes {
			c.kill(id)
		}
	})
	return c
}

// forLogStores runs a test for each way to keep the log.
func forLogStores(t *testing.T, f func(t *testing.T, c *cluster)) {
	for _, kind := range logKinds {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3)
			c.logStore = kind.name
			f(t, c)
		})
	}
}

// testLog logs to the test when CONSENSUS_LOG is set.
func testLog(t testing.TB) *slog.Logger {
	if os.Getenv("CONSENSUS_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// peers is what gossip would see: replicas that run, and those that ran.
func (c *cluster) peers() []Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Server
	for id, n := range c.nodes {
		out = append(out, Server{ID: id, Addr: n.raft})
	}
	return out
}

func (c *cluster) config(id string) Config {
	return Config{
		ID: id, ClusterID: c.id, DataDir: filepath.Join(c.dir, id), BindAddress: "127.0.0.1:0",
		TLS: c.ca.config(c.t, "timonel:controller:"+id, "timonel:controllers"), Peers: c.peers,
		LogStore:        c.logStore,
		BootstrapExpect: c.expect, UpkeepInterval: 50 * time.Millisecond, StabilizationTime: 100 * time.Millisecond, Logger: c.log,
		SlowFsync: time.Minute,
	}
}

// open opens a replica that does not take part in c.nodes.
func (c *cluster) open(cfg Config) (*Replica, error) {
	r, err := Open(context.Background(), cfg, newMapFSM())
	if err == nil {
		c.t.Cleanup(func() { r.close(false) })
	}
	return r, err
}

func (c *cluster) start(id string) *node {
	c.t.Helper()
	n, err := c.tryStart(id)
	must(c.t, err)
	return n
}

func (c *cluster) tryStart(id string) (*node, error) {
	n := &node{fsm: newMapFSM(), conns: map[string]*grpc.ClientConn{}}
	cfg := c.config(id)
	c.mu.Lock()
	if old := c.nodes[id]; old != nil { // a replica keeps its address
		cfg.BindAddress = old.raft
		n.addr = old.addr
	}
	c.mu.Unlock()
	if c.tune != nil {
		c.tune(&cfg)
	}
	cfg.PeerConn = func(ctx context.Context, peer string) (grpc.ClientConnInterface, error) {
		c.mu.Lock()
		p := c.nodes[peer]
		c.mu.Unlock()
		if p == nil {
			return nil, fmt.Errorf("no such peer: %s", peer)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.conns[p.addr] == nil {
			conn, err := grpc.NewClient("passthrough:"+p.addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
					if method == pb.Membership_Hello_FullMethodName && c.breakHello.Add(-1) >= 0 {
						return status.Error(codes.Unavailable, "the connection broke")
					}
					return invoke(ctx, method, req, reply, cc, opts...)
				}),
				grpc.WithConnectParams(grpc.ConnectParams{
					MinConnectTimeout: 5 * time.Second, // else a busy machine has the 20 ms
					Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
				}))
			if err != nil {
				return nil, err
			}
			n.conns[p.addr] = conn
		}
		return n.conns[p.addr], nil
	}
	r, err := Open(context.Background(), cfg, n.fsm)
	if err != nil {
		return nil, err
	}
	n.Replica, n.raft = r, r.advertise
	if n.addr == "" {
		n.addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", n.addr)
	if err != nil {
		r.close(false)
		return nil, err
	}
	n.addr = ln.Addr().String()
	n.grpc = grpc.NewServer()
	r.Register(n.grpc)
	go n.grpc.Serve(ln)
	c.mu.Lock()
	c.nodes[id] = n
	c.mu.Unlock()
	return n, nil
}

// kill ends a replica without any courtesy.
func (c *cluster) kill(id string) {
	n := c.node(id)
	n.grpc.Stop()
	n.Replica.close(false)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, conn := range n.conns {
		conn.Close()
	}
}

func (c *cluster) wipe(id string) { must(c.t, os.RemoveAll(filepath.Join(c.dir, id))) }

func (c *cluster) node(id string) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nodes[id]
}

// startAll starts replicas c1 to cn and waits until one leads.
func (c *cluster) startAll(n int) *cluster {
	c.t.Helper()
	for i := range n {
		c.start(fmt.Sprintf("c%d", i+1))
	}
	c.leader()
	return c
}

// leader waits until a replica leads with all earlier entries applied.
func (c *cluster) leader() *node {
	c.t.Helper()
	var leader *node
	eventually(c.t, "a leader", func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, n := range c.nodes {
			if l := n.leads.get(); l != nil && l.isReady() && n.ctx.Err() == nil {
				leader = n
				return nil
			}
		}
		return errors.New("none")
	})
	return leader
}

func (c *cluster) followers() []*node {
	c.t.Helper()
	leader := c.leader()
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*node
	for _, n := range c.nodes {
		if n != leader && n.ctx.Err() == nil {
			out = append(out, n)
		}
	}
	return out
}

// eventually waits until f returns nil.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s: %v", what, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (n *node) put(t testing.TB, k, v string) uint64 {
	t.Helper()
	res, err := n.Apply(context.Background(), []byte(k+"="+v))
	if err != nil {
		t.Fatalf("put %s=%s on %s: %v", k, v, n.cfg.ID, err)
	}
	return res.(uint64)
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
