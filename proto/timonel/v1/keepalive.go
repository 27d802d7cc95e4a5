package timonelv1

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
)

// How the two ends of a connection to a cluster port find out that the other is
// gone: the server asks by pings, the client listens for them, because gRPC lets
// a client ask only every 10 s. But a server pings nobody from whom it hears something
// all the time, such as an agent that sends the log of a container: so a client that has
// heard nothing for half of Silence makes a call, of which the answer is all the same.
const (
	// PingInterval is how often a server pings a silent client.
	PingInterval = time.Second
	// PingTimeout is how long a client may take to answer.
	PingTimeout = time.Second
	// Silence is how long a client lets a server say nothing, pings included.
	Silence = 3 * time.Second
	// MaxMessage bounds one message: a pod or a Secret, and Raft commands.
	MaxMessage = 16 << 20
	// MaxHave and MaxHavePods bound what an agent lists in its Hello, in bytes and
	// pods. Who has more sends no list, and gets a full one.
	MaxHave     = 4 << 20
	MaxHavePods = 8192
	// MaxNodeMessage bounds one message of an agent. MaxStatus bounds a pod's status in
	// it: the state takes none that is longer, and a message that is refused would end
	// the stream for all pods of the node, again and again.
	MaxNodeMessage = 8 << 20
	MaxStatus      = 4 << 20
	// MaxUsage bounds what an agent says that its node takes: of some 800 containers.
	MaxUsage = 64 << 10
	// MaxCSINode bounds what an agent says of its CSI drivers.
	MaxCSINode = 256 << 10
	// StreamWindow and ConnWindow are how many bytes may be on their way, of a stream
	// and of a connection. They are fixed: to find a better size gRPC would answer
	// every message that comes alone with a ping, which the other end has to answer
	// too, and that costs a lone write of the cluster's four system calls on its way.
	StreamWindow, ConnWindow = 4 << 20, 16 << 20
	// TunnelWindow is that of a stream that carries a tunnel. So much of each is in memory
	// when its reader takes nothing, at each place that it goes through.
	TunnelWindow = 256 << 10
	// TunnelChunk is how much of a tunnel travels in one message. With what is around it, it
	// has to fit into 32 KiB: gRPC's next larger buffer has 1 MiB, and each message that
	// waits has one.
	TunnelChunk = 32<<10 - 64
	// tunnelIdle is when a connection that carries no tunnel ends.
	tunnelIdle = 30 * time.Second

	connectTimeout = 2 * time.Second
)

// Metadata keys of the calls that carry tunnels.
const (
	TunnelIDKey   = "timonel-tunnel-id" // which TunnelOpen an Agents.Tunnel answers
	TunnelNodeKey = "timonel-node"      // the node that a Peers.Dial wants
)

// ServerOptions are those of every cluster port.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: PingInterval, Timeout: PingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: PingInterval / 2, PermitWithoutStream: true}),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.StaticStreamWindowSize(StreamWindow),
		grpc.StaticConnWindowSize(ConnWindow),
	}
}

// DialOptions are those of one client of a cluster port, credentials aside.
func DialOptions() []grpc.DialOption {
	a := &asker{}
	return []grpc.DialOption{
		grpc.WithContextDialer(a.dial),
		grpc.WithChainUnaryInterceptor(a.unary),
		grpc.WithChainStreamInterceptor(a.stream),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: connectTimeout,
		}),
		// An idle connection would have to be made again in the moment it is needed.
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithStaticStreamWindowSize(StreamWindow),
		grpc.WithStaticConnWindowSize(ConnWindow),
	}
}

// TunnelDialOptions are those of a connection for tunnels alone: they are many, and are in
// nobody's way there.
func TunnelDialOptions() []grpc.DialOption {
	return append(DialOptions(), grpc.WithIdleTimeout(tunnelIdle), grpc.WithStaticStreamWindowSize(TunnelWindow))
}

// asker makes a call over a client's connection when the other end says nothing.
type asker struct {
	client atomic.Pointer[grpc.ClientConn]
	asking atomic.Bool
}

func (a *asker) unary(ctx context.Context, method string, req, reply any, c *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	a.client.Store(c)
	return call(ctx, method, req, reply, c, opts...)
}

func (a *asker) stream(ctx context.Context, desc *grpc.StreamDesc, c *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	a.client.Store(c)
	return open(ctx, desc, c, method, opts...)
}

// ask makes the call, unless one is being made. A server that does not know it or
// refuses it has answered too.
func (a *asker) ask() {
	c := a.client.Load()
	if c == nil || !a.asking.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer a.asking.Store(false)
		ctx, cancel := context.WithTimeout(context.Background(), Silence)
		defer cancel()
		_, _ = healthv1.NewHealthClient(c).Check(ctx, &healthv1.HealthCheckRequest{})
	}()
}

func (a *asker) dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: connectTimeout, Control: OwnPackets}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &listening{conn, a}, nil
}

// OwnMark is the mark of packets by which nodes and controllers talk to each other. No
// Service takes them, whatever addresses it claims.
const OwnMark = 0x2000

// OwnPackets is the Control of a dialer whose packets are marked so. Where this process
// may not mark any, they are not: it needs CAP_NET_ADMIN, as agents have.
func OwnPackets(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK, OwnMark)
	})
}

// listening is a connection whose reads fail when the other end says nothing
// for Silence.
type listening struct {
	net.Conn
	asker *asker
}

// Read implements [net.Conn].
func (l *listening) Read(p []byte) (int, error) {
	for asked := false; ; asked = true {
		if err := l.SetReadDeadline(time.Now().Add(Silence / 2)); err != nil {
			return 0, err
		}
		n, err := l.Conn.Read(p)
		var timeout net.Error
		if n > 0 || !errors.As(err, &timeout) || !timeout.Timeout() {
			return n, err
		}
		if asked {
			return 0, fmt.Errorf("%s said nothing for %s", l.RemoteAddr(), Silence)
		}
		l.asker.ask()
	}
}
