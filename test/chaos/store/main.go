// Store is one replica of the log and the state as a process of its own, without an
// API server: what test/chaos breaks to test the two by themselves. Its address is
// that of --peers under its name; Raft is on port 7444, the other replicas' calls on
// 7443 and those of clients (timonel/test/replica) on 7000.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"timonel/consensus"
	"timonel/internal/replicated"
	"timonel/pki"
	"timonel/state"
	"timonel/test/replica"
)

func main() {
	name := flag.String("name", "", "the replica's name")
	peers := flag.String("peers", "", "all replicas: name=IP,…")
	data := flag.String("data-dir", "", "folder of the log")
	bundle := flag.String("bundle", "", "the cluster's secrets")
	flag.Parse()
	if err := run(*name, *peers, *data, *bundle); err != nil {
		fmt.Fprintln(os.Stderr, "store:", err)
		os.Exit(1)
	}
}

func run(name, list, data, bundleDir string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ips := map[string]string{}
	var peers []consensus.Server
	for peer := range strings.SplitSeq(list, ",") {
		id, ip, ok := strings.Cut(peer, "=")
		if !ok {
			return fmt.Errorf("--peers: %q is not name=IP", peer)
		}
		ips[id] = ip
		peers = append(peers, consensus.Server{ID: id, Addr: net.JoinHostPort(ip, "7444")})
	}
	if ips[name] == "" {
		return fmt.Errorf("--name %q is not among --peers %s", name, list)
	}
	bundle, err := pki.LoadBundle(bundleDir)
	if err != nil {
		return err
	}
	identity, err := bundle.Controller(name, []net.IP{net.ParseIP(ips[name])}, []string{name})
	if err != nil {
		return err
	}
	cluster, err := net.Listen("tcp", net.JoinHostPort(ips[name], "7443"))
	if err != nil {
		return err
	}
	clients, err := net.Listen("tcp", net.JoinHostPort(ips[name], "7000"))
	if err != nil {
		return err
	}

	conns := connections{ips: ips, open: map[string]*grpc.ClientConn{}, options: []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(identity.ClusterClientTLS())),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond}}),
	}}
	store := state.New(state.Options{})
	log, err := consensus.Open(ctx, consensus.Config{
		ID: name, ClusterID: bundle.ClusterID(), DataDir: data, BindAddress: net.JoinHostPort(ips[name], "7444"), TLS: identity.RaftTLS(),
		PeerConn: conns.get, Peers: func() []consensus.Server { return peers }, BootstrapExpect: len(peers),
		SnapshotInterval: 2 * time.Second, SnapshotThreshold: 500, TrailingLogs: 100,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, replicated.Machine{Store: store})
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(identity.ClusterServerTLS())))
	log.Register(server)
	broken := make(chan error, 2)
	go func() { broken <- server.Serve(cluster) }()
	go func() { broken <- replica.Serve(clients, replica.Local{Log: log, Store: store}) }()
	select {
	case <-ctx.Done():
	case err = <-broken:
	case <-log.Failed():
		err = log.Err()
	}
	server.Stop()
	return errors.Join(err, log.Close())
}

// connections are those to the other replicas.
type connections struct {
	ips     map[string]string
	options []grpc.DialOption

	mu   sync.Mutex
	open map[string]*grpc.ClientConn
}

func (c *connections) get(_ context.Context, id string) (grpc.ClientConnInterface, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[id] == nil {
		conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(c.ips[id], "7443"), c.options...)
		if err != nil {
			return nil, err
		}
		c.open[id] = conn
	}
	return c.open[id], nil
}
