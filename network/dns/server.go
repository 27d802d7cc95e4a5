package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"k8s.io/apimachinery/pkg/util/validation"

	"timonel/network/feed"
)

const (
	// DefaultCacheBytes is how much of other servers' answers is kept.
	DefaultCacheBytes = 8 << 20
	// receiveBuffer is how many bytes of queries the kernel keeps while we are busy.
	receiveBuffer = 4 << 20
	// idle is how long a connection may say nothing.
	idle = 10 * time.Second
	// maxQuery is how long a query may be by TCP.
	maxQuery = 4096
	// maxAliases is how many names an alias may lead over.
	maxAliases = 8
	// retryListen is when an address that could not be had is tried again.
	retryListen = 2 * time.Second
)

// Config says what a [Server] answers, and where.
type Config struct {
	// Domain is the cluster's, such as cluster.local.
	Domain string
	// Addresses are where the server listens, by UDP and TCP. They must be addresses of
	// this machine by then.
	Addresses []netip.Addr
	// Port to listen on. Default: 53.
	Port uint16
	// Pods are the networks of the cluster's pods: they are answered, and this machine.
	// None: everybody is.
	Pods []netip.Prefix
	// Store has the Services and their endpoints.
	Store *feed.Store
	// ResolvConf is the node's resolv.conf, whose name servers are asked for all that is
	// not the cluster's. It is read again when it changes. Empty: nobody is asked.
	ResolvConf string
	// Stubs are domains with name servers of their own.
	Stubs map[string][]netip.AddrPort
	// CacheBytes bounds what is kept of other servers' answers. Default:
	// DefaultCacheBytes.
	CacheBytes int
	Logger     *slog.Logger
}

// Validate names the first field that cannot work.
func (c *Config) Validate() error {
	switch {
	case len(validation.IsDNS1123Subdomain(c.Domain)) > 0:
		return fmt.Errorf("dns config: Domain %q is not a DNS name", c.Domain)
	case len(c.Addresses) == 0:
		return errors.New("dns config: Addresses is empty")
	case c.Store == nil:
		return errors.New("dns config: Store is missing")
	case c.CacheBytes < 0:
		return fmt.Errorf("dns config: CacheBytes %d is negative", c.CacheBytes)
	}
	for domain, servers := range c.Stubs {
		if _, ok := dns.IsDomainName(domain); !ok || len(servers) == 0 {
			return fmt.Errorf("dns config: Stubs: %q is not a domain with servers", domain)
		}
	}
	return nil
}

// Server is the DNS server of one node.
type Server struct {
	cfg     Config
	log     *slog.Logger
	zone    *zone
	forward *forwarder
	sources *sources
	clients *clients
	turn    atomic.Uint32
	wait    sync.WaitGroup // of what serves one client
}

// New returns a server that does not listen yet.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Port == 0 {
		cfg.Port = 53
	}
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = DefaultCacheBytes
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	log := cfg.Logger.With("component", "dns")
	var own []netip.AddrPort
	for _, a := range cfg.Addresses {
		own = append(own, netip.AddrPortFrom(a, cfg.Port))
	}
	return &Server{
		cfg: cfg, log: log, sources: newSources(), clients: newClients(cfg.Pods),
		zone:    newZone(strings.ToLower(cfg.Domain), cfg.Addresses),
		forward: newForwarder(own, cfg.Stubs, cfg.CacheBytes, waitingAll, log),
	}, nil
}

// Run answers until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer s.forward.wait.Wait() // which those before start
	defer s.wait.Wait()
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel()
	s.zone.apply(feed.Changes{View: s.cfg.Store.View(), Reset: true}, time.Now())
	// Before the first question: a name would not be looked up for want of servers.
	servers := new(nameServers)
	changed := s.readResolvConf(servers)
	wait.Go(func() { s.follow(ctx) })
	wait.Go(func() { s.forward.run(ctx) })
	wait.Go(func() { s.followResolvConf(ctx, servers, changed) })
	for _, a := range s.cfg.Addresses {
		wait.Go(func() { s.listen(ctx, netip.AddrPortFrom(a, s.cfg.Port)) })
	}
	<-ctx.Done()
	return nil
}

// follow keeps the zone that of the newest view.
func (s *Server) follow(ctx context.Context) {
	for {
		c, err := s.cfg.Store.Changes(ctx, s.zone.view.Load().Revision())
		if err != nil {
			return
		}
		s.zone.apply(c, time.Now())
	}
}

// listen answers at one address, as soon as it can be had and for as long.
func (s *Server) listen(ctx context.Context, addr netip.AddrPort) {
	said := ""
	for {
		err := s.serve(ctx, addr)
		if ctx.Err() != nil {
			return
		}
		if text := err.Error(); text != said {
			said = text
			s.log.Error("pods cannot look up names: the cluster's DNS address cannot be listened on; trying again. "+
				"Stop what has it, or switch this server off with --cluster-dns", "address", addr, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryListen):
		}
	}
}

func (s *Server) serve(ctx context.Context, addr netip.AddrPort) error {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetReadBuffer(receiveBuffer) // as much as the kernel grants
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return err
	}
	defer l.Close()
	s.log.Info("answers DNS queries", "address", addr, "domain", s.cfg.Domain)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { conn.Close(); l.Close() })()
	var wait sync.WaitGroup
	for range runtime.GOMAXPROCS(0) + 1 {
		wait.Go(func() { cancel(s.udp(ctx, conn)) })
	}
	wait.Go(func() { cancel(s.tcp(ctx, l)) })
	wait.Wait()
	return context.Cause(ctx)
}

// udp answers what is known at once, and leaves what is to be asked for to others.
func (s *Server) udp(ctx context.Context, conn *net.UDPConn) error {
	in, out := make([]byte, maxUDP), make([]byte, 0, maxTCP)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(in)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return err
			}
			continue // an ICMP message about an earlier answer
		}
		ip := from.Addr().Unmap()
		if !s.clients.has(ip) || !s.sources.allow(ip) {
			continue
		}
		began := time.Now()
		q, rcode, ok := parse(in[:n])
		if !ok {
			continue
		}
		b, pending := s.now(out, &q, rcode, q.size)
		if pending == nil {
			_, _ = conn.WriteToUDPAddrPort(b, from)
			s.sources.charge(ip, time.Since(began))
			continue
		}
		drop, ok := s.sources.hold(ip, holdsQuery)
		if !ok {
			_, _ = conn.WriteToUDPAddrPort(refuse(out, &q, dns.RcodeServerFailure), from)
			continue
		}
		q.question = slices.Clone(q.question)
		s.wait.Go(func() {
			defer drop()
			_, _ = conn.WriteToUDPAddrPort(s.later(ctx, &q, pending, q.size), from)
		})
	}
}

// tcp answers one query after the other of each connection.
func (s *Server) tcp(ctx context.Context, l *net.TCPListener) error {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return err
			}
			time.Sleep(10 * time.Millisecond) // no file descriptor is left
			continue
		}
		from, ok := conn.RemoteAddr().(*net.TCPAddr)
		if !ok {
			conn.Close()
			continue
		}
		ip := from.AddrPort().Addr().Unmap()
		if !s.clients.has(ip) {
			conn.Close()
			continue
		}
		drop, ok := s.sources.hold(ip, holdsConnection)
		if !ok {
			conn.Close()
			continue
		}
		s.wait.Go(func() {
			defer drop()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			s.talk(ctx, conn, ip)
		})
	}
}

func (s *Server) talk(ctx context.Context, conn *net.TCPConn, ip netip.Addr) {
	var size [2]byte
	var in, out []byte
	for {
		if err := conn.SetDeadline(time.Now().Add(idle)); err != nil {
			return
		}
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(size[:]))
		if n > maxQuery {
			return
		}
		in = slices.Grow(in[:0], n)[:n]
		if _, err := io.ReadFull(conn, in); err != nil || !s.sources.allow(ip) {
			return
		}
		began := time.Now()
		q, rcode, ok := parse(in)
		if !ok {
			return
		}
		var pending *pending
		out, pending = s.now(out, &q, rcode, maxTCP)
		if pending != nil {
			drop, ok := s.sources.hold(ip, holdsQuery)
			if ok {
				out = s.later(ctx, &q, pending, maxTCP)
				drop()
			} else {
				out = refuse(out, &q, dns.RcodeServerFailure)
			}
		} else {
			s.sources.charge(ip, time.Since(began))
		}
		binary.BigEndian.PutUint16(size[:], uint16(len(out)))
		bufs := net.Buffers{size[:], out}
		if _, err := bufs.WriteTo(conn); err != nil {
			return
		}
	}
}

// pending is what of an answer others have to say.
type pending struct {
	aliases []string // that were followed; the last is the name to look up
}

// now is the answer to a query, in buf, when it is known; otherwise pending says what
// is to be asked for.
func (s *Server) now(buf []byte, q *query, rcode, limit int) ([]byte, *pending) {
	switch {
	case rcode != dns.RcodeSuccess:
		return refuse(buf, q, rcode), nil
	case q.class != dns.ClassINET || q.kind == dns.TypeAXFR || q.kind == dns.TypeIXFR || q.kind == dns.TypeOPT:
		return refuse(buf, q, dns.RcodeRefused), nil
	}
	turn := s.turn.Add(1)
	r := newReply(buf, q, dns.RcodeSuccess, true, limit)
	rcode, alias, mine := s.zone.answer(r, q, turn)
	switch {
	case alias != "":
		return r.b, &pending{[]string{alias}}
	case mine:
		if rcode == dns.RcodeServerFailure {
			return refuse(buf, q, rcode), nil
		}
		r.b[3] |= byte(rcode)
		return r.finish(rcode), nil
	case s.forward.looped(q):
		return refuse(buf, q, dns.RcodeNameError), nil
	case !q.rd:
		return refuse(buf, q, dns.RcodeRefused), nil // we have nothing of others but what we ask for
	}
	if e := s.forward.kept(q); e != nil {
		return e.write(buf, q, s.forward.now(), limit, turn), nil
	}
	return r.b, &pending{}
}

// later is the answer for which others are asked.
func (s *Server) later(ctx context.Context, q *query, p *pending, limit int) []byte {
	turn := s.turn.Add(1)
	if len(p.aliases) > 0 {
		return s.chase(ctx, q, p.aliases[0], limit, turn)
	}
	e, err := s.forward.resolve(ctx, q)
	if err != nil {
		return s.failed(q, err)
	}
	return e.write(nil, q, s.forward.now(), limit, turn)
}

// failed is the answer when nobody else has one.
func (s *Server) failed(q *query, err error) []byte {
	s.log.Debug("no answer", "name", strings.Join(q.labels, "."), "type", dns.TypeToString[q.kind], "error", err)
	return refuse(nil, q, dns.RcodeServerFailure)
}

// chase follows an alias of the cluster to what is asked for.
func (s *Server) chase(ctx context.Context, q *query, alias string, limit int, turn uint32) []byte {
	r := newReply(nil, q, dns.RcodeSuccess, true, limit)
	owner := pointer(0)
	for range maxAliases {
		target := nameOf(strings.ToLower(alias))
		if target == nil {
			break
		}
		if !r.add(answerSection, owner, dns.TypeCNAME, ttl, target) {
			return r.finish(0)
		}
		owner = target
		next := query{labels: labelsOf(target), kind: q.kind, class: q.class, do: q.do, cd: q.cd, rd: true, size: maxTCP}
		next.question = append(slices.Clone(target), q.question[len(q.question)-4:]...)
		inner := newReply(nil, &next, dns.RcodeSuccess, true, maxTCP)
		rcode, further, mine := s.zone.answer(inner, &next, turn)
		if further != "" {
			alias = further
			continue
		}
		var raw []byte
		switch {
		case mine && rcode == dns.RcodeServerFailure:
			return refuse(nil, q, rcode)
		case mine:
			inner.b[3] |= byte(rcode)
			raw = inner.b
		default:
			if !q.rd {
				return r.finish(0) // the client asks others itself
			}
			e, err := s.forward.resolve(ctx, &next)
			if err != nil {
				return s.failed(q, err)
			}
			raw = e.write(nil, &next, s.forward.now(), maxTCP, turn)
		}
		return s.join(r, q, raw)
	}
	return s.failed(q, fmt.Errorf("more than %d aliases, or one that is no name: %s", maxAliases, alias))
}

// join adds what raw says of an alias' target to the answer about the alias.
func (s *Server) join(r *reply, q *query, raw []byte) []byte {
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil {
		return s.failed(q, err)
	}
	type part struct {
		section int
		list    []dns.RR
	}
	parts := []part{{answerSection, m.Answer}}
	if !answers(m) {
		parts = append(parts, part{authoritySection, m.Ns}) // how long there is nothing
	}
	for _, p := range parts {
		for _, rr := range p.list {
			whole := make([]byte, dns.Len(rr)+16)
			n, err := dns.PackRR(rr, whole, 0, nil, false)
			if err != nil {
				return s.failed(q, err)
			}
			whole = whole[:n]
			end := skipName(whole, 0)
			if !r.add(p.section, name(whole[:end]), rr.Header().Rrtype, rr.Header().Ttl, whole[end+10:]) {
				return r.finish(0)
			}
		}
	}
	r.b[3] |= byte(m.Rcode & 0xf)
	return r.finish(m.Rcode)
}

// labelsOf are those of a name without compression.
func labelsOf(n name) (out []string) {
	for at := 0; n[at] != 0; at += 1 + int(n[at]) {
		out = append(out, string(n[at+1:at+1+int(n[at])]))
	}
	return out
}
