package consensus

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	pb "timonel/proto/timonel/v1"
)

// alpn keeps other TLS services from being mistaken for Raft's.
const alpn = "timonel-raft/1"

// errMuted is why nothing can be sent while this replica's disk stalls.
var errMuted = errors.New("this replica's disk stalls: it stays silent so that another leads")

// stream is Raft's transport below its messages: mutual TLS between replicas of
// one cluster, who tell each other by a greeting who they are. It implements
// raft.StreamLayer; addresses it is asked to dial are "id@host:port" (see
// encodeAddr), so that an answer by another replica is noticed.
type stream struct {
	id, clusterID string
	advertise     raft.ServerAddress
	boot          [16]byte // of this process, told in the greeting
	inner         net.Listener
	serverTLS     *tls.Config
	clientTLS     *tls.Config
	verify        func(*x509.Certificate, string) error
	dialTimeout   time.Duration
	log           *slog.Logger
	logLimit      *logLimiter

	// lost is told when a connection that a peer opened ends. It must not
	// block.
	lost func(peer string, boot [16]byte)
	// leads reports that this replica leads and is fit to; peers are told.
	leads func() bool
	// generation is that of this replica's data; ok is false if it has none.
	generation func() (gen uint64, ok bool)
	// superseded is told of a peer whose data is of a later generation.
	superseded func(peer string, gen uint64)
	// refuse says why no peer is taken in at all now, or nil.
	refuse func() error

	accepted chan net.Conn
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu    sync.Mutex
	muted bool
	out   map[net.Conn]struct{} // connections this replica opened
	in    map[net.Conn]struct{} // and those it accepted
}

func newStream(c Config, ln net.Listener, advertise string) *stream {
	s := &stream{
		id: c.ID, clusterID: c.ClusterID, advertise: raft.ServerAddress(advertise),
		inner: ln, verify: c.VerifyPeer, dialTimeout: c.DialTimeout,
		log: c.Logger, logLimit: newLogLimiter(10 * time.Second),
		lost: func(string, [16]byte) {}, leads: func() bool { return false }, refuse: func() error { return nil },
		generation: func() (uint64, bool) { return 0, false }, superseded: func(string, uint64) {},
		accepted: make(chan net.Conn),
		out:      map[net.Conn]struct{}{}, in: map[net.Conn]struct{}{},
	}
	rand.Read(s.boot[:])
	s.ctx, s.cancel = context.WithCancel(context.Background())

	s.serverTLS = c.TLS.Clone()
	s.serverTLS.MinVersion = tls.VersionTLS13
	s.serverTLS.NextProtos = []string{alpn}
	s.serverTLS.ClientAuth = tls.RequireAndVerifyClientCert
	if s.serverTLS.ClientCAs == nil {
		s.serverTLS.ClientCAs = s.serverTLS.RootCAs
	}
	s.clientTLS = c.TLS.Clone()
	s.clientTLS.MinVersion = tls.VersionTLS13
	s.clientTLS.NextProtos = []string{alpn}
	// Replicas are known by the name in their certificate, not by their address,
	// which may change: verify the chain here and the name in the greeting.
	roots := s.clientTLS.RootCAs
	s.clientTLS.InsecureSkipVerify = true
	s.clientTLS.VerifyConnection = func(cs tls.ConnectionState) error {
		opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		for _, cert := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		_, err := cs.PeerCertificates[0].Verify(opts)
		return err
	}
	return s
}

// start accepts connections. The callbacks must be set before.
func (s *stream) start() {
	s.wg.Add(1)
	go s.acceptLoop()
}

// encodeAddr joins the identity and the address of a peer for stream.Dial.
func encodeAddr(id raft.ServerID, addr raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(id) + "@" + addr
}

// decodeAddr takes apart what encodeAddr joined; id is empty for a bare address.
func decodeAddr(addr raft.ServerAddress) (id, hostPort string) {
	if id, hostPort, ok := strings.Cut(string(addr), "@"); ok {
		return id, hostPort
	}
	return "", string(addr)
}

// Addr implements net.Listener with the address that others dial.
func (s *stream) Addr() net.Addr { return streamAddr(s.advertise) }

type streamAddr string

func (a streamAddr) Network() string { return "tcp" }
func (a streamAddr) String() string  { return string(a) }

func (s *stream) acceptLoop() {
	defer s.wg.Done()
	for {
		conn, err := s.inner.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Error("cannot accept Raft connections", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
				continue
			case <-s.ctx.Done():
				return
			}
		}
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			s.handshake(conn)
		}()
	}
}

// handshake brings one accepted connection to Accept, or closes it.
func (s *stream) handshake(raw net.Conn) {
	remote := raw.RemoteAddr().String()
	tuneTCP(raw)
	stop := context.AfterFunc(s.ctx, func() { raw.Close() })
	defer stop()
	raw.SetDeadline(time.Now().Add(5 * time.Second))
	conn := tls.Server(raw, s.serverTLS)
	if err := conn.HandshakeContext(s.ctx); err != nil {
		raw.Close()
		s.refused(remote, tlsHint(err))
		return
	}
	g, err := readGreeting(conn)
	if err != nil {
		conn.Close()
		if !errors.Is(err, io.EOF) {
			s.refused(remote, err)
		}
		return
	}
	gen, hasData := s.generation()
	answer := greeting{ClusterID: s.clusterID, ID: s.id, Boot: s.boot, Leads: s.leads(), Gen: gen}
	err = s.admit(conn, g)
	if err == nil && hasData && g.Gen != gen {
		err = s.otherGeneration(g, gen)
	}
	if err != nil {
		answer.Refusal = err.Error()
		writeGreeting(conn, answer)
		conn.Close()
		s.refused(remote, err)
		return
	}
	if err := s.refuse(); err != nil {
		answer.Refusal = err.Error() // normal while it starts: not logged here
		writeGreeting(conn, answer)
		conn.Close()
		return
	}
	if err := writeGreeting(conn, answer); err != nil || g.Probe {
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	c := &inConn{Conn: conn, s: s, peer: g.ID, boot: g.Boot}
	s.track(s.in, c, true)
	select {
	case s.accepted <- c:
	case <-s.ctx.Done():
		c.Close()
	}
}

// admit checks who greets us.
func (s *stream) admit(conn *tls.Conn, g greeting) error {
	if g.ClusterID != s.clusterID {
		return fmt.Errorf("replica %q is of cluster %q, this is replica %q of cluster %q: check its join address and cluster id", g.ID, g.ClusterID, s.id, s.clusterID)
	}
	if g.Want != "" && g.Want != s.id {
		return fmt.Errorf("replica %q looks for %q here, this is %q", g.ID, g.Want, s.id)
	}
	if g.ID == s.id && g.Boot != s.boot {
		return fmt.Errorf("another running replica also calls itself %q: give each its own name and data folder", s.id)
	}
	return s.verify(conn.ConnectionState().PeerCertificates[0], g.ID)
}

// otherGeneration says why a peer with data of another generation is refused, and
// which of the two has to go.
func (s *stream) otherGeneration(g greeting, gen uint64) error {
	if g.Gen > gen {
		s.superseded(g.ID, g.Gen)
		return fmt.Errorf("replica %q has data from before the cluster was recovered or restored on %q: it stops", s.id, g.ID)
	}
	return fmt.Errorf("replica %q has data from before the cluster was recovered or restored: stop it, remove its data folder and start it again, to join", g.ID)
}

func (s *stream) refused(remote string, err error) {
	host, _, _ := net.SplitHostPort(remote)
	if s.ctx.Err() == nil && s.logLimit.allow(host+err.Error()) {
		s.log.Warn("refused a Raft connection", "remote", remote, "error", err)
	}
}

// tlsHint adds to a handshake error what a person should look at.
func tlsHint(err error) error {
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) || strings.Contains(err.Error(), "unknown certificate authority") || strings.Contains(err.Error(), "bad certificate") {
		return fmt.Errorf("%w: the peer's certificate is of another cluster's CA; check which bundle each replica uses", err)
	}
	return fmt.Errorf("TLS handshake: %w", err)
}

// Accept implements net.Listener: connections of admitted peers only.
func (s *stream) Accept() (net.Conn, error) {
	select {
	case c := <-s.accepted:
		return c, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Dial implements raft.StreamLayer.
func (s *stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	s.mu.Lock()
	muted := s.muted
	s.mu.Unlock()
	if muted {
		return nil, errMuted
	}
	conn, _, err := s.connect(address, min(timeout, s.dialTimeout), false)
	if err != nil {
		return nil, err
	}
	c := &outConn{Conn: conn, s: s}
	s.track(s.out, c, true)
	s.mu.Lock()
	muted = s.muted
	s.mu.Unlock()
	if muted || s.ctx.Err() != nil {
		c.Close()
		return nil, errMuted
	}
	return c, nil
}

// probe asks the replica at the address for its greeting and hangs up.
func (s *stream) probe(address raft.ServerAddress, timeout time.Duration) (greeting, error) {
	conn, g, err := s.connect(address, timeout, true)
	if err == nil {
		conn.Close()
	}
	return g, err
}

func (s *stream) connect(address raft.ServerAddress, timeout time.Duration, probe bool) (net.Conn, greeting, error) {
	want, hostPort := decodeAddr(address)
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	raw, err := (&net.Dialer{Control: pb.OwnPackets}).DialContext(ctx, "tcp", hostPort)
	if err != nil {
		return nil, greeting{}, err
	}
	tuneTCP(raw)
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	conn := tls.Client(raw, s.clientTLS)
	fail := func(err error) (net.Conn, greeting, error) {
		stop()
		raw.Close()
		return nil, greeting{}, fmt.Errorf("replica %s at %s: %w", want, hostPort, err)
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		return fail(tlsHint(err))
	}
	gen, hasData := s.generation()
	if err := writeGreeting(conn, greeting{ClusterID: s.clusterID, ID: s.id, Boot: s.boot, Want: want, Probe: probe, Gen: gen}); err != nil {
		return fail(err)
	}
	g, err := readGreeting(conn)
	if err != nil {
		return fail(tlsHint(err))
	}
	if hasData && g.Gen > gen && g.ClusterID == s.clusterID && s.verify(conn.ConnectionState().PeerCertificates[0], g.ID) == nil {
		s.superseded(g.ID, g.Gen)
	}
	if g.Refusal != "" {
		return fail(fmt.Errorf("refused: %s", g.Refusal))
	}
	if err := s.verify(conn.ConnectionState().PeerCertificates[0], g.ID); err != nil {
		return fail(err)
	}
	if g.ClusterID != s.clusterID || (want != "" && g.ID != want) {
		return fail(fmt.Errorf("replica %q of cluster %q answers there", g.ID, g.ClusterID))
	}
	if !stop() {
		return fail(context.Cause(ctx))
	}
	conn.SetDeadline(time.Time{})
	return conn, g, nil
}

// mute closes every connection this replica opened and opens no more until
// called with false: a leader that cannot write must not look alive.
func (s *stream) mute(on bool) {
	s.mu.Lock()
	s.muted = on
	var conns []net.Conn
	if on {
		for c := range s.out {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

func (s *stream) track(set map[net.Conn]struct{}, c net.Conn, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if on {
		set[c] = struct{}{}
	} else {
		delete(set, c)
	}
}

// Close implements net.Listener; it also closes all connections.
func (s *stream) Close() error {
	s.cancel()
	err := s.inner.Close()
	s.mu.Lock()
	var conns []net.Conn
	for c := range s.out {
		conns = append(conns, c)
	}
	for c := range s.in {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	s.wg.Wait()
	return err
}

type outConn struct {
	net.Conn
	s *stream
}

func (c *outConn) Close() error {
	c.s.track(c.s.out, c, false)
	return c.Conn.Close()
}

// inConn is a connection that a peer opened; its end may mean the peer's.
type inConn struct {
	net.Conn
	s    *stream
	peer string
	boot [16]byte
	once sync.Once
}

func (c *inConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(func() { c.s.lost(c.peer, c.boot) })
	}
	return n, err
}

func (c *inConn) Close() error {
	c.s.track(c.s.in, c, false)
	return c.Conn.Close()
}
