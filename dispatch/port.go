package dispatch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// What a cluster port lets each kind of caller have. Strangers are those without a
// certificate of this cluster, who may ask to join and no more.
const (
	handshakeTimeout = 5 * time.Second

	strangerConns   = 128              // of all strangers
	strangerPerHost = 16               // of one address
	strangerMessage = 32 << 10         // a token and a certificate request are less than 4 KiB
	strangerWindow  = 64 << 10         // the least that gRPC takes
	strangerStreams = 4                // calls at once on a connection
	strangerAge     = 15 * time.Second // of a connection
	nodeConns       = 8                // of one node, which may come again before the last is known to be gone
	nodeStreams     = 512              // at once on a connection
	nodeConnects    = 8                // calls of each method of one agent at once, likewise; of tunnels, as many as it was asked for
	nodeStreamBytes = pb.TunnelWindow  // on their way, of a stream
	nodeConnBytes   = 4 << 20          // and of a connection
	headerBytes     = 16 << 10
)

// class is what a caller's certificate makes of it.
type class int

const (
	strangers class = iota
	nodes
	controllers
)

func classOf(id pki.Identity) class {
	switch id.Role {
	case pki.RoleController:
		return controllers
	case pki.RoleNode:
		return nodes
	}
	return strangers // administrators too: they only ask for the status
}

// Port serves a cluster port: it finishes each TLS handshake by itself, and gives the
// connection to one of three gRPC servers, by what the caller's certificate says. So
// nothing is read of a caller beyond what one of its kind may send: a stranger's
// message is never as large as a controller's, and a call that is not its to make is
// refused before it has a message.
type Port struct {
	d       *Dispatcher
	tls     *tls.Config
	servers [3]*grpc.Server
	lanes   [3]*lane

	mu      sync.Mutex
	conns   map[connOwner][]*portConn
	strange int              // connections of strangers
	streams map[nodeCall]int // open calls of each node
	ctx     context.Context  // ends with Stop
	cancel  context.CancelFunc
	wait    sync.WaitGroup
}

// connOwner is whom connections are counted for: a node, or a stranger's address.
type connOwner struct {
	class class
	name  string
}

// NewPort makes the cluster port, whose servers serve nobody whom the state has
// revoked; a stream of such a one ends while it is open.
func (d *Dispatcher) NewPort(config *tls.Config) *Port {
	p := &Port{d: d, tls: config.Clone(), conns: map[connOwner][]*portConn{}, streams: map[nodeCall]int{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if !slices.Contains(p.tls.NextProtos, "h2") {
		p.tls.NextProtos = append(slices.Clone(p.tls.NextProtos), "h2")
	}
	common := append(pb.ServerOptions(),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			return d.guardStream(srv, stream, handle)
		}),
		grpc.Creds(handshaken{}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxHeaderListSize(headerBytes),
		grpc.InTapHandle(p.tap))
	p.servers[controllers] = grpc.NewServer(common...)
	p.servers[nodes] = grpc.NewServer(append(slices.Clone(common),
		grpc.MaxRecvMsgSize(pb.MaxNodeMessage), grpc.MaxConcurrentStreams(nodeStreams),
		grpc.StaticStreamWindowSize(nodeStreamBytes), grpc.StaticConnWindowSize(nodeConnBytes))...)
	p.servers[strangers] = grpc.NewServer(append(slices.Clone(common),
		grpc.MaxRecvMsgSize(strangerMessage), grpc.MaxConcurrentStreams(strangerStreams),
		grpc.StaticStreamWindowSize(strangerWindow), grpc.StaticConnWindowSize(strangerWindow),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: pb.PingInterval, Timeout: pb.PingTimeout, MaxConnectionAge: strangerAge, MaxConnectionAgeGrace: handshakeTimeout,
		}))...)
	for i := range p.lanes {
		p.lanes[i] = &lane{conns: make(chan net.Conn), ended: p.ctx.Done()}
	}
	return p
}

// Register calls register with each server.
func (p *Port) Register(register func(grpc.ServiceRegistrar)) {
	for _, s := range p.servers {
		register(s)
	}
}

// Serve takes connections until Stop, and returns nil then. It may be called once.
func (p *Port) Serve(listener net.Listener) error {
	defer p.wait.Wait()
	for i, s := range p.servers {
		p.lanes[i].addr = listener.Addr()
		p.wait.Go(func() { _ = s.Serve(p.lanes[i]) }) // ends with Stop
	}
	unblock := make(chan struct{})
	defer close(unblock)
	p.wait.Go(func() {
		select {
		case <-p.ctx.Done():
			listener.Close()
		case <-unblock:
		}
	})
	pause := 5 * time.Millisecond
	for {
		raw, err := listener.Accept()
		switch {
		case err == nil:
			pause = 5 * time.Millisecond
			p.wait.Go(func() { p.shake(raw) })
			continue
		case p.ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			p.Stop()
			return err
		}
		select {
		case <-time.After(pause): // out of descriptors, as a rule
			pause = min(2*pause, time.Second)
		case <-p.ctx.Done():
			return nil
		}
	}
}

// Stop ends all connections.
func (p *Port) Stop() {
	p.cancel()
	for _, s := range p.servers {
		s.Stop()
	}
}

// shake finishes a handshake and hands the connection on.
func (p *Port) shake(raw net.Conn) {
	ctx, cancel := context.WithTimeout(p.ctx, handshakeTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })()
	conn := tls.Server(raw, p.tls)
	if err := conn.HandshakeContext(ctx); err != nil || conn.ConnectionState().NegotiatedProtocol != "h2" {
		raw.Close()
		return
	}
	id := identityOf(conn.ConnectionState())
	c := &portConn{Conn: conn, port: p, owner: connOwner{classOf(id), id.Name}}
	if c.owner.class == strangers {
		c.owner.name, _, _ = net.SplitHostPort(raw.RemoteAddr().String())
	}
	for _, old := range p.keep(c) {
		old.Close()
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		c.Close()
		return
	}
	select {
	case p.lanes[c.owner.class].conns <- c:
	case <-p.ctx.Done():
		c.Close()
	}
}

// keep counts a connection, and returns those that it takes the place of: the
// oldest of the same owner, or of the stranger who has most.
func (p *Port) keep(c *portConn) (old []*portConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := nodeConns
	switch c.owner.class {
	case controllers: // few, and each trusted with the log
		return nil
	case strangers:
		limit = strangerPerHost
		if p.strange >= strangerConns {
			most := c.owner
			for o, conns := range p.conns {
				if o.class == strangers && len(conns) > len(p.conns[most]) {
					most = o
				}
			}
			old = append(old, p.conns[most][:1]...)
		}
		p.strange++
	}
	conns := append(p.conns[c.owner], c)
	p.conns[c.owner] = conns
	if len(conns) > limit {
		old = append(old, conns[0])
	}
	return old
}

// forget counts a connection no more.
func (p *Port) forget(c *portConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	conns := p.conns[c.owner]
	i := slices.Index(conns, c)
	if i < 0 {
		return
	}
	if c.owner.class == strangers {
		p.strange--
	}
	if conns = slices.Delete(conns, i, i+1); len(conns) == 0 {
		delete(p.conns, c.owner)
		return
	}
	p.conns[c.owner] = conns
}

// Connections counts those of strangers and of nodes.
func (p *Port) Connections() (ofStrangers, ofNodes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for o, conns := range p.conns {
		if o.class == nodes {
			ofNodes += len(conns)
		}
	}
	return p.strange, ofNodes
}

// tap decides on a call when its headers have come, before any message is read.
func (p *Port) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if err := p.d.mayCall(ctx, info.FullMethodName); err != nil {
		return nil, err
	}
	id, err := pki.PeerIdentity(ctx)
	if err != nil || id.Role != pki.RoleNode {
		return ctx, nil // mayCall has looked
	}
	switch info.FullMethodName {
	case pb.Agents_Tunnel_FullMethodName:
		if !p.d.tunnels.waits(header(ctx, pb.TunnelIDKey), id.Name) {
			return nil, status.Errorf(codes.NotFound, "no controller waits for this tunnel of node %s", id.Name)
		}
	default:
		// Others too: each call may hold a message that is nearly whole, for as long as its
		// caller likes.
		if !p.begin(ctx, nodeCall{id.Name, info.FullMethodName}) {
			return nil, status.Errorf(codes.ResourceExhausted, "node %s has %d calls of %s at once to this controller: only one process may run as a node", id.Name, nodeConnects, info.FullMethodName)
		}
	}
	return ctx, nil
}

// nodeCall is what calls are counted by.
type nodeCall struct{ node, method string }

// begin counts a node's call for as long as its context lasts.
func (p *Port) begin(ctx context.Context, of nodeCall) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.streams[of] >= nodeConnects {
		return false
	}
	p.streams[of]++
	context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.streams[of]--; p.streams[of] == 0 {
			delete(p.streams, of)
		}
	})
	return true
}

func identityOf(state tls.ConnectionState) pki.Identity {
	if len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return pki.Identity{}
	}
	return pki.IdentityOf(state.VerifiedChains[0][0])
}

// portConn is a connection that is counted.
type portConn struct {
	*tls.Conn
	port  *Port
	owner connOwner
}

// Close implements [net.Conn].
func (c *portConn) Close() error {
	c.port.forget(c)
	return c.Conn.Close()
}

// lane brings one class' connections to its server.
type lane struct {
	conns chan net.Conn
	ended <-chan struct{}
	addr  net.Addr
}

// Accept implements [net.Listener].
func (l *lane) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *lane) Close() error { return nil }

// Addr implements [net.Listener].
func (l *lane) Addr() net.Addr { return l.addr }

// handshaken are the credentials of connections whose handshake the port has done.
type handshaken struct{}

// ServerHandshake implements [credentials.TransportCredentials].
func (handshaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, ok := c.(*portConn)
	if !ok {
		return nil, nil, fmt.Errorf("a connection of type %T is not one of a cluster port", c)
	}
	return conn, credentials.TLSInfo{
		State:          conn.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// ClientHandshake implements [credentials.TransportCredentials].
func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are credentials of a server")
}

// Info implements [credentials.TransportCredentials].
func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls", SecurityVersion: "1.3"}
}

// Clone implements [credentials.TransportCredentials].
func (h handshaken) Clone() credentials.TransportCredentials { return h }

// OverrideServerName implements [credentials.TransportCredentials].
func (handshaken) OverrideServerName(string) error { return nil }
