package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"timonel/consensus"
	"timonel/internal/replicated"
	"timonel/pki"
	"timonel/state"
)

// logCluster is replicas of consensus and state without an API, in this process:
// real disks, and TLS over loopback between them.
type logCluster struct {
	bundle *pki.Bundle
	dir    string
	mu     sync.Mutex
	nodes  map[string]*logNode
	raft   map[string]string // addresses, kept over a restart
	conns  map[string]*grpc.ClientConn
}

type logNode struct {
	id, grpcAddress string
	store           *state.Store
	replica         *consensus.Replica
	server          *grpc.Server
}

func newLogCluster(t testing.TB, dir string) *logCluster {
	bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
	if err != nil {
		t.Fatal(err)
	}
	c := &logCluster{bundle: bundle, dir: dir, nodes: map[string]*logNode{}, raft: map[string]string{}, conns: map[string]*grpc.ClientConn{}}
	t.Cleanup(func() {
		for id := range c.nodes {
			c.stop(id)
		}
		for _, conn := range c.conns {
			conn.Close()
		}
	})
	return c
}

func (c *logCluster) peers() []consensus.Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []consensus.Server
	for id := range c.nodes {
		out = append(out, consensus.Server{ID: id, Addr: c.raft[id]})
	}
	return out
}

func (c *logCluster) start(t testing.TB, id string) *logNode {
	identity, err := c.bundle.Controller(id, []net.IP{net.IPv4(127, 0, 0, 1)}, []string{id})
	if err != nil {
		t.Fatal(err)
	}
	address := c.raft[id]
	if address == "" {
		address = "127.0.0.1:0"
	}
	raft, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &logNode{id: id, grpcAddress: cluster.Addr().String(), store: state.New(state.Options{}),
		server: grpc.NewServer(grpc.Creds(credentials.NewTLS(identity.ClusterServerTLS())))}
	n.replica, err = consensus.Open(context.Background(), consensus.Config{
		ID: id, ClusterID: c.bundle.ClusterID(), DataDir: filepath.Join(c.dir, id), Listener: raft, TLS: identity.RaftTLS(),
		Peers: c.peers, BootstrapExpect: 3, Logger: slog.New(slog.DiscardHandler),
		PeerConn: func(_ context.Context, peer string) (grpc.ClientConnInterface, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			p := c.nodes[peer]
			if p == nil {
				return nil, errors.New(peer + " does not run")
			}
			if c.conns[id+p.grpcAddress] == nil {
				conn, err := grpc.NewClient("passthrough:///"+p.grpcAddress, grpc.WithTransportCredentials(credentials.NewTLS(identity.ClusterClientTLS())))
				if err != nil {
					return nil, err
				}
				c.conns[id+p.grpcAddress] = conn
			}
			return c.conns[id+p.grpcAddress], nil
		},
	}, replicated.Machine{Store: n.store})
	if err != nil {
		t.Fatal(err)
	}
	n.replica.Register(n.server)
	go func() { _ = n.server.Serve(cluster) }() // ends with stop
	c.mu.Lock()
	c.nodes[id], c.raft[id] = n, raft.Addr().String()
	c.mu.Unlock()
	return n
}

func (c *logCluster) stop(id string) {
	c.mu.Lock()
	n := c.nodes[id]
	delete(c.nodes, id)
	c.mu.Unlock()
	if n != nil {
		n.server.Stop()
		n.replica.Close()
	}
}

func (c *logCluster) wipe(t testing.TB, id string) {
	if err := os.RemoveAll(filepath.Join(c.dir, id)); err != nil {
		t.Fatal(err)
	}
}

// await returns the leader once there is one.
func (c *logCluster) await(t testing.TB, ctx context.Context) *logNode {
	var leader *logNode
	if err := until(ctx, "a leader", nil, func(context.Context) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, n := range c.nodes {
			if id, _, ok := n.replica.Leader(); ok && c.nodes[id] != nil {
				leader = c.nodes[id]
				return nil
			}
		}
		return errors.New("nobody leads")
	}); err != nil {
		t.Fatal(err)
	}
	return leader
}

// BenchmarkLog is etcd's own workload on consensus and state, and on three members
// of etcd when `make bench` has built it: 8-byte keys, 256-byte values; writes, reads
// of one key and of a range of 100 (linearizable), and events to 1,000 watchers.
//
// Timonel's callers are on a follower, so that every call crosses the network with
// TLS once, as a client's of etcd does; its three replicas and the callers are one
// process, etcd's members are processes of their own. Timonel's watchers are in the
// process of the replica, as its API server's are; etcd's are on one client
// connection, as kube-apiserver's are.
func BenchmarkLog(b *testing.B) {
	for _, side := range []struct {
		name  string
		start func(b *testing.B) keyValues
	}{{"timonel", startLog}, {"etcd", startEtcd}} {
		b.Run(side.name, func(b *testing.B) {
			kv := side.start(b)
			for _, row := range []struct {
				name string
				call func(context.Context, int) error
			}{{"put", kv.put}, {"get", kv.get}, {"range", kv.list}} {
				for _, clients := range []int{1, 100} {
					b.Run(fmt.Sprintf("%s/clients=%d", row.name, clients), func(b *testing.B) {
						benchCalls(b, clients, row.call)
					})
				}
			}
			b.Run("watch/watchers=1000", func(b *testing.B) { benchWatch(b, kv) })
		})
	}
}

// keyValues is one side of BenchmarkLog.
type keyValues struct {
	put, get, list func(ctx context.Context, i int) error
	// watch calls seen for each event under the prefix "0" until ctx ends, and
	// started once the watch is there.
	watch func(ctx context.Context, started func(), seen func()) error
}

func keyOf(i int) string { return fmt.Sprintf("%08d", i%100_000) }

// benchCalls reports calls per second and the median.
func benchCalls(b *testing.B, clients int, call func(context.Context, int) error) {
	calls := make(chan int)
	took := make([]time.Duration, b.N)
	var work sync.WaitGroup
	for range clients {
		work.Go(func() {
			for i := range calls {
				began := time.Now()
				if err := call(b.Context(), i); err != nil {
					b.Error(err)
				}
				took[i] = time.Since(began)
			}
		})
	}
	b.ResetTimer()
	for i := range b.N {
		calls <- i
	}
	close(calls)
	work.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
}

// benchWatch reports how many events a second reach 1,000 watchers together.
func benchWatch(b *testing.B, kv keyValues) {
	const watchers = 1000
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	var started, work sync.WaitGroup
	var seen atomic.Int64
	started.Add(watchers)
	for range watchers {
		work.Go(func() {
			if err := kv.watch(ctx, started.Done, func() { seen.Add(1) }); err != nil && ctx.Err() == nil {
				b.Error(err)
			}
		})
	}
	started.Wait()
	b.ResetTimer()
	var writers sync.WaitGroup
	next := make(chan int)
	for range 8 {
		writers.Go(func() {
			for i := range next {
				if err := kv.put(ctx, i); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for i := range b.N {
		next <- i
	}
	close(next)
	writers.Wait()
	for want := int64(b.N) * watchers; seen.Load() < want && !b.Failed(); {
		time.Sleep(time.Millisecond)
	}
	b.ReportMetric(float64(b.N)*watchers/b.Elapsed().Seconds(), "events/s")
	b.StopTimer()
	cancel()
	work.Wait()
}

// startLog starts three replicas in this process.
func startLog(b *testing.B) keyValues {
	c := newLogCluster(b, b.TempDir())
	for _, id := range []string{"c1", "c2", "c3"} {
		c.start(b, id)
	}
	leader := c.await(b, b.Context())
	var follower *logNode
	for _, n := range c.nodes {
		if n != leader {
			follower = n
		}
	}
	value := make([]byte, 256)
	put := func(ctx context.Context, i int) error {
		txn := state.Txn{Changes: []state.Change{{Key: keyOf(i), Value: value}}}
		result, err := follower.replica.Apply(ctx, txn.Marshal())
		if err == nil {
			err = result.(state.Result).Err
		}
		return err
	}
	for i := range 200 { // for get and list
		if err := put(b.Context(), i); err != nil {
			b.Fatal(err)
		}
	}
	return keyValues{
		put: put,
		get: func(ctx context.Context, i int) error {
			if err := follower.replica.ReadBarrier(ctx); err != nil {
				return err
			}
			if _, ok := follower.store.View().Get(keyOf(i % 200)); !ok {
				return errors.New("the key is not there")
			}
			return nil
		},
		list: func(ctx context.Context, _ int) error {
			if err := follower.replica.ReadBarrier(ctx); err != nil {
				return err
			}
			n := 0
			for kv := range follower.store.View().Range("000000", "") {
				if n += min(1, len(kv.Value)); n == 100 {
					return nil
				}
			}
			return fmt.Errorf("%d keys", n)
		},
		watch: func(ctx context.Context, started, seen func()) error {
			w, err := follower.store.Watch("0", follower.store.View().Revision())
			if err != nil {
				return err
			}
			defer w.Close()
			started()
			for {
				events, err := w.Next(ctx)
				if err != nil {
					return err
				}
				for range events {
					seen()
				}
			}
		},
	}
}

// startEtcd starts three members of etcd.
func startEtcd(b *testing.B) keyValues {
	program, err := filepath.Abs("../../bin/bench/etcd")
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		b.Skipf("`make bench` builds etcd: %v", err)
	}
	dir := b.TempDir()
	bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
	if err != nil {
		b.Fatal(err)
	}
	identity, err := bundle.Controller("bench", []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	if err != nil {
		b.Fatal(err)
	}
	files, err := identity.WriteFiles(filepath.Join(dir, "pki"))
	if err != nil {
		b.Fatal(err)
	}
	endpoints, members, err := etcdMembers(3)
	if err != nil {
		b.Fatal(err)
	}
	for i, endpoint := range endpoints {
		p, err := start(dir, fmt.Sprint("etcd", i+1), program, etcdFlags(dir, i, endpoint, members, files)...)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(p.kill)
	}
	pair, err := bundle.ClientCert("bench", nil)
	if err != nil {
		b.Fatal(err)
	}
	certificate, err := pair.TLS()
	if err != nil {
		b.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle.CA())
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{certificate}},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { client.Close() })
	value := string(make([]byte, 256))
	put := func(ctx context.Context, i int) error {
		_, err := client.Put(ctx, keyOf(i), value)
		return err
	}
	if err := until(b.Context(), "etcd", nil, func(ctx context.Context) error { return put(ctx, 0) }); err != nil {
		b.Fatal(err)
	}
	for i := range 200 {
		if err := put(b.Context(), i); err != nil {
			b.Fatal(err)
		}
	}
	return keyValues{
		put: put,
		get: func(ctx context.Context, i int) error {
			r, err := client.Get(ctx, keyOf(i%200))
			if err == nil && len(r.Kvs) != 1 {
				err = errors.New("the key is not there")
			}
			return err
		},
		list: func(ctx context.Context, _ int) error {
			r, err := client.Get(ctx, "000000", clientv3.WithPrefix(), clientv3.WithLimit(100))
			if err == nil && len(r.Kvs) != 100 {
				err = fmt.Errorf("%d keys", len(r.Kvs))
			}
			return err
		},
		watch: func(ctx context.Context, started, seen func()) error {
			events := client.Watch(ctx, "0", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			for r := range events {
				if r.Created {
					started()
				}
				if err := r.Err(); err != nil {
					return err
				}
				for range r.Events {
					seen()
				}
			}
			return ctx.Err()
		},
	}
}
