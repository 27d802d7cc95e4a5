package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"timonel/consensus"
	"timonel/gossip"
)

// Tags that a controller gossips, so that the others find its ports.
const (
	tagAPI     = "api"
	tagCluster = "cluster"
	tagRaft    = "raft"
)

// peers connects to the other controllers' cluster ports, where gossip says that
// they are. A connection is shared by all who ask, and made again when its
// controller has moved.
type peers struct {
	pool *gossip.Pool
	tls  *tls.Config
	opts []grpc.DialOption

	mu    sync.Mutex
	conns map[string]peerConn
}

type peerConn struct {
	addr string
	conn *grpc.ClientConn
}

func newPeers(pool *gossip.Pool, tlsConfig *tls.Config, opts ...grpc.DialOption) *peers {
	return &peers{pool: pool, tls: tlsConfig, opts: opts, conns: map[string]peerConn{}}
}

// conn returns the connection to the controller called name.
func (p *peers) conn(_ context.Context, name string) (grpc.ClientConnInterface, error) {
	m, ok := p.pool.Member(name)
	if !ok || m.Role != gossip.RoleController || m.Tags[tagCluster] == "" {
		return nil, fmt.Errorf("controller %s: gossip does not know where it is", name)
	}
	addr := net.JoinHostPort(m.Host(), m.Tags[tagCluster])
	p.mu.Lock()
	defer p.mu.Unlock()
	if c, ok := p.conns[name]; ok {
		if c.addr == addr {
			return c.conn, nil
		}
		c.conn.Close()
		delete(p.conns, name)
	}
	conn, err := grpc.NewClient(addr, append([]grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(p.tls))}, p.opts...)...)
	if err != nil {
		return nil, fmt.Errorf("controller %s at %s: %w", name, addr, err)
	}
	p.conns[name] = peerConn{addr, conn}
	return conn, nil
}

// close ends all connections.
func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, c := range p.conns {
		c.conn.Close()
		delete(p.conns, name)
	}
}

// controllers returns the controllers that gossip knows and does not hold for
// gone.
func controllers(pool *gossip.Pool) []gossip.Member {
	var out []gossip.Member
	for _, m := range pool.Members() {
		if m.Role == gossip.RoleController && (m.State == gossip.Alive || m.State == gossip.Suspect) {
			out = append(out, m)
		}
	}
	return out
}

// raftServers is where the replicas' Raft listeners are.
func raftServers(pool *gossip.Pool) []consensus.Server {
	var out []consensus.Server
	for _, m := range controllers(pool) {
		if port := m.Tags[tagRaft]; port != "" {
			out = append(out, consensus.Server{ID: m.Name, Addr: net.JoinHostPort(m.Host(), port)})
		}
	}
	return out
}

// controllerIPs is where the API is served, for the kubernetes Service.
func controllerIPs(pool *gossip.Pool) []net.IP {
	var out []net.IP
	for _, m := range controllers(pool) {
		if ip := net.ParseIP(m.Host()); ip != nil && m.State == gossip.Alive {
			out = append(out, ip)
		}
	}
	return out
}
