package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// peers connects to the other controllers' cluster ports, where the directory says
// that they are. Whoever answers must have the certificate of the one that is meant.
// A connection is shared by all who ask, and made again when its controller has moved.
type peers struct {
	directory *directory
	tls       func(name string) *tls.Config
	options   func() []grpc.DialOption // of one connection

	mu    sync.Mutex
	conns map[string]peerConn
}

type peerConn struct {
	addr string
	conn *grpc.ClientConn
}

func newPeers(d *directory, tlsTo func(name string) *tls.Config, options func() []grpc.DialOption) *peers {
	return &peers{directory: d, tls: tlsTo, options: options, conns: map[string]peerConn{}}
}

// conn returns the connection to the controller called name.
func (p *peers) conn(_ context.Context, name string) (grpc.ClientConnInterface, error) {
	c, ok := p.directory.find(name)
	if !ok || c.cluster == "" {
		return nil, fmt.Errorf("controller %s: it is not known where it is", name)
	}
	addr := c.cluster
	p.mu.Lock()
	defer p.mu.Unlock()
	if c, ok := p.conns[name]; ok {
		if c.addr == addr {
			return c.conn, nil
		}
		c.conn.Close()
		delete(p.conns, name)
	}
	conn, err := grpc.NewClient(addr, append(p.options(), grpc.WithTransportCredentials(credentials.NewTLS(p.tls(name))))...)
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

// tags are how a controller says which ports it has.
func (c *config) tags() map[string]string {
	port := func(n int) string { return fmt.Sprint(n) }
	return map[string]string{tagAPI: port(c.apiPort), tagCluster: port(c.clusterPort), tagRaft: port(c.raftPort), tagGossip: port(c.gossipPort)}
}

// withPort is the addresses with another port.
func withPort(addrs []string, port int) []string {
	out := make([]string, 0, len(addrs))
	for _, addr := range addrs {
		if host, _, err := net.SplitHostPort(addr); err == nil {
			out = append(out, net.JoinHostPort(host, fmt.Sprint(port)))
		}
	}
	return out
}

// moved is the addresses with their ports moved by so many.
func moved(addrs []string, by int) []string {
	out := make([]string, 0, len(addrs))
	for _, addr := range addrs {
		host, text, err := net.SplitHostPort(addr)
		var port int
		if err == nil {
			_, err = fmt.Sscan(text, &port)
		}
		if port += by; err == nil && port > 0 && port < 1<<16 {
			out = append(out, net.JoinHostPort(host, fmt.Sprint(port)))
		}
	}
	return out
}
