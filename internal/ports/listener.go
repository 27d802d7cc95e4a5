package ports

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Limits are those of one port. Zero values mean the default.
type Limits struct {
	// Name of the port, for whoever shows its Stats.
	Name string
	// Connections is how many there may be at once. Default 1024.
	Connections int
	// Unproven is how many of them may be without a finished handshake, and
	// UnprovenPerSource how many of one address. When there are more, the longest
	// waiting one is closed. Defaults 1024 and 256.
	Unproven, UnprovenPerSource int
	// Handshake is how long one may take. Default 5 s.
	Handshake time.Duration
	// Idle is after how long without a byte a connection may be closed to make room
	// for another of the same address. Default 5 s.
	Idle time.Duration
	// Authenticates says that who serves the port calls [Conn.Known] of connections on
	// which somebody was authenticated. When there is no room, others that are older than
	// Idle are closed, whatever they do: so no number of addresses keeps newcomers out.
	Authenticates bool
}

func (l Limits) withDefaults() Limits {
	def := func(n *int, v int) {
		if *n <= 0 {
			*n = v
		}
	}
	def(&l.Connections, 1024)
	def(&l.Unproven, min(1024, l.Connections))
	def(&l.UnprovenPerSource, min(256, l.Unproven))
	if l.Handshake <= 0 {
		l.Handshake = 5 * time.Second
	}
	if l.Idle <= 0 {
		l.Idle = 5 * time.Second
	}
	return l
}

// Stats are counts of one port.
type Stats struct {
	Open, Unproven int
	// Of all time: connections closed because they were not proven in time or too
	// many were not, to make room for others, and refused because there was no room.
	Unfinished, Evicted, Refused uint64
}

// Listener is a net.Listener within limits.
type Listener struct {
	net.Listener
	limits Limits

	mu       sync.Mutex
	sources  map[netip.Addr]*source
	open     int
	unproven []*Conn // in the order they came; proven and closed ones are dropped lazily
	waiting  int     // of them
	stats    Stats

	failing atomic.Pointer[failure]
}

type failure struct {
	since time.Time
	err   error
}

// source is what comes from one address.
type source struct {
	conns    map[*Conn]struct{}
	unproven int
}

// Limit returns inner within limits.
func Limit(inner net.Listener, limits Limits) *Listener {
	return &Listener{Listener: inner, limits: limits.withDefaults(), sources: map[netip.Addr]*source{}}
}

// Name is that of the limits.
func (l *Listener) Name() string { return l.limits.Name }

// Capacity is how many connections there may be.
func (l *Listener) Capacity() int { return l.limits.Connections }

// Stats returns the counts as of now.
func (l *Listener) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Open, s.Unproven = l.open, l.waiting
	return s
}

// Failing says since when no connection can be accepted, and why; the zero time when
// they can.
func (l *Listener) Failing() (since time.Time, err error) {
	if f := l.failing.Load(); f != nil {
		return f.since, f.err
	}
	return time.Time{}, nil
}

// Accept returns the next connection that there is room for. Those that are refused
// are closed at once.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) && l.failing.Load() == nil {
				l.failing.Store(&failure{time.Now(), err})
			}
			return nil, err
		}
		l.failing.Store(nil)
		if c := l.admit(raw); c != nil {
			return c, nil
		}
		reset(raw)
	}
}

// admit makes room for a connection, or returns nil.
func (l *Listener) admit(raw net.Conn) *Conn {
	now := time.Now()
	c := &Conn{Conn: raw, l: l, begun: now, source: SourceOf(raw.RemoteAddr())}
	c.active.Store(now.UnixNano())
	var gone []*Conn
	l.mu.Lock()
	from := l.sources[c.source]
	if from == nil {
		from = &source{conns: map[*Conn]struct{}{}}
		l.sources[c.source] = from
	}
	if from.unproven >= l.limits.UnprovenPerSource {
		gone = append(gone, l.dropUnproven(func(u *Conn) bool { return u.source == c.source })...)
	} else if l.waiting >= l.limits.Unproven {
		gone = append(gone, l.dropUnproven(func(*Conn) bool { return true })...)
	}
	if l.open >= l.limits.Connections {
		gone = append(gone, l.evict(c.source, now)...)
	}
	if l.open >= l.limits.Connections && l.limits.Authenticates {
		gone = append(gone, l.evictUnknown(now)...)
	}
	fits := l.open < l.limits.Connections
	if fits {
		from.conns[c] = struct{}{}
		from.unproven++
		l.open++
		l.waiting++
		if len(l.unproven) > 2*l.waiting+64 {
			l.unproven = slices.DeleteFunc(l.unproven, (*Conn).settled)
		}
		l.unproven = append(l.unproven, c)
		c.timer = time.AfterFunc(l.limits.Handshake, c.expire)
	} else {
		l.stats.Refused++
		if len(from.conns) == 0 {
			delete(l.sources, c.source)
		}
	}
	l.mu.Unlock()
	for _, g := range gone {
		reset(g.Conn)
	}
	if !fits {
		return nil
	}
	return c
}

// dropUnproven forgets the longest waiting unproven connection that is chosen.
func (l *Listener) dropUnproven(chosen func(*Conn) bool) []*Conn {
	l.unproven = slices.DeleteFunc(l.unproven, (*Conn).settled)
	for _, c := range l.unproven {
		if chosen(c) {
			l.stats.Unfinished++
			l.forget(c)
			return []*Conn{c}
		}
	}
	return nil
}

// evictShare of the connections is closed at once when there is no room, so that
// looking for them costs little for each that comes.
const evictShare = 64

// evict makes room for one of newcomer's address: the address with the most
// connections loses those that are idle longest. From the newcomer's own address only
// idle ones go, from another also those in use, if it has twice as many.
func (l *Listener) evict(newcomer netip.Addr, now time.Time) []*Conn {
	var largest netip.Addr
	most := 0
	for addr, s := range l.sources {
		if n := len(s.conns); n > most || n == most && addr == newcomer {
			largest, most = addr, n
		}
	}
	idleOnly := largest == newcomer || most < 2*(len(l.sources[newcomer].conns)+1)
	var able []*Conn
	for c := range l.sources[largest].conns {
		if !idleOnly || now.Sub(time.Unix(0, c.active.Load())) > l.limits.Idle {
			able = append(able, c)
		}
	}
	slices.SortFunc(able, func(a, b *Conn) int { return cmp.Compare(a.active.Load(), b.active.Load()) })
	return l.evictFirst(able)
}

// evictUnknown makes room by those that came first and are nobody's.
func (l *Listener) evictUnknown(now time.Time) []*Conn {
	var able []*Conn
	for _, s := range l.sources {
		for c := range s.conns {
			if !c.known.Load() && now.Sub(c.begun) > l.limits.Idle {
				able = append(able, c)
			}
		}
	}
	slices.SortFunc(able, func(a, b *Conn) int { return a.begun.Compare(b.begun) })
	return l.evictFirst(able)
}

// evictFirst closes a share of the connections, or all of the given ones if these are fewer.
func (l *Listener) evictFirst(able []*Conn) []*Conn {
	able = able[:min(len(able), max(1, l.limits.Connections/evictShare))]
	for _, c := range able {
		l.stats.Evicted++
		l.forget(c)
	}
	return able
}

// forget takes a connection off the books, once. l.mu is held.
func (l *Listener) forget(c *Conn) {
	if c.gone {
		return
	}
	c.gone = true
	c.timer.Stop()
	s := l.sources[c.source]
	delete(s.conns, c)
	l.open--
	if !c.proven {
		s.unproven--
		l.waiting--
	}
	if len(s.conns) == 0 {
		delete(l.sources, c.source)
	}
}

// SourceOf is whom what comes from an address counts for: an IPv4 address, or the /64 of an
// IPv6 one, as one host has all of it. It is not valid for what is no address of IP.
func SourceOf(a net.Addr) netip.Addr {
	var ip netip.Addr
	if tcp, ok := a.(*net.TCPAddr); ok {
		ip = tcp.AddrPort().Addr()
	} else if a != nil {
		if p, err := netip.ParseAddrPort(a.String()); err == nil {
			ip = p.Addr()
		}
	}
	ip = ip.Unmap().WithZone("")
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return ip
}

// reset closes a connection without leaving the kernel anything to wait for.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}
