package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"timonel/consensus"
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
	}, logMachine{n.store})
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

// logMachine lets Raft drive a store, as cmd/controller does.
type logMachine struct{ store *state.Store }

func (m logMachine) ApplyBatch(entries []consensus.Entry) []any {
	batch := make([]state.Entry, len(entries))
	for i, e := range entries {
		batch[i] = state.Entry{Index: e.Index, Term: e.Term, Command: e.Command}
	}
	out := make([]any, len(entries))
	for i, r := range m.store.ApplyBatch(batch) {
		out[i] = r
	}
	return out
}

func (m logMachine) Snapshot() (consensus.SnapshotWriter, error) { return m.store.View(), nil }
func (m logMachine) Restore(r io.Reader) error                   { return m.store.Restore(r) }

// BenchmarkLog is etcd's own workload on the log and the state: 8-byte keys,
// 256-byte values. The callers are on a follower, so that every call crosses the
// network with TLS once, as a client's of etcd does.
func BenchmarkLog(b *testing.B) {
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
		txn := state.Txn{Changes: []state.Change{{Key: fmt.Sprintf("%08d", i%1_000_000), Value: value}}}
		result, err := follower.replica.Apply(ctx, txn.Marshal())
		if err == nil {
			err = result.(state.Result).Err
		}
		return err
	}
	get := func(ctx context.Context, i int) error {
		if err := follower.replica.ReadBarrier(ctx); err != nil {
			return err
		}
		_, _ = follower.store.View().Get(fmt.Sprintf("%08d", i%1000))
		return nil
	}
	for _, row := range []struct {
		name string
		call func(context.Context, int) error
	}{{"put", put}, {"get", get}} {
		for _, clients := range []int{1, 100} {
			b.Run(fmt.Sprintf("%s/clients=%d", row.name, clients), func(b *testing.B) {
				b.SetParallelism(1)
				calls := make(chan int)
				var wg sync.WaitGroup
				for range clients {
					wg.Go(func() {
						for i := range calls {
							if err := row.call(b.Context(), i); err != nil {
								b.Error(err)
							}
						}
					})
				}
				began := time.Now()
				n := 0
				for b.Loop() {
					calls <- n
					n++
				}
				close(calls)
				wg.Wait()
				b.ReportMetric(float64(n)/time.Since(began).Seconds(), "ops/s")
			})
		}
	}
}
