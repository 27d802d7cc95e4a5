package ports

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// open listens within limits and accepts all that comes.
func open(t *testing.T, limits Limits) (*Listener, chan *Conn) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := Limit(inner, limits)
	accepted, done := make(chan *Conn, 1024), make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c.(*Conn)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for {
			select {
			case c := <-accepted:
				c.Close()
			default:
				return
			}
		}
	})
	return l, accepted
}

// dial connects from one of the loopback addresses.
func dial(t *testing.T, l *Listener, from string) net.Conn {
	t.Helper()
	c, err := tryDial(t, l, from)
	require.NoError(t, err)
	return c
}

// tryDial is dial where the other end may refuse, so early that dialing fails.
func tryDial(t *testing.T, l *Listener, from string) (net.Conn, error) {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
	c, err := d.Dial("tcp", l.Addr().String())
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// requireEnded waits until the other end has closed c.
func requireEnded(t *testing.T, c net.Conn) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err := c.Read(make([]byte, 1))
	require.Error(t, err)
	require.False(t, errors.Is(err, syscall.ETIMEDOUT) || isTimeout(err), "it is open still")
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// requireOpen sends a byte from end to end.
func requireOpen(t *testing.T, client net.Conn, server *Conn) {
	t.Helper()
	_, err := server.Write([]byte{1})
	require.NoError(t, err)
	_, err = io.ReadFull(client, make([]byte, 1))
	require.NoError(t, err)
}

func TestHandshakeEndsInTime(t *testing.T) {
	t.Parallel()
	l, accepted := open(t, Limits{Handshake: time.Second})
	silent, proven := dial(t, l, "127.0.0.1"), dial(t, l, "127.0.0.1")
	first, second := <-accepted, <-accepted
	if first.RemoteAddr().String() != silent.LocalAddr().String() {
		first, second = second, first
	}
	require.NoError(t, second.SetDeadline(time.Now().Add(time.Second)), "a server's own deadline proves nothing")
	require.Equal(t, 2, l.Stats().Unproven)
	require.NoError(t, second.SetDeadline(time.Time{}))
	requireEnded(t, silent)
	requireOpen(t, proven, second)
	s := l.Stats()
	require.Equal(t, Stats{Open: 1, Unfinished: 1}, s)
	first.Close() // what the server does later
	require.Equal(t, s, l.Stats())
}

func TestUnprovenAreFewOfEachSource(t *testing.T) {
	t.Parallel()
	l, accepted := open(t, Limits{Unproven: 8, UnprovenPerSource: 2, Handshake: time.Minute})
	other := dial(t, l, "127.0.0.2")
	otherConn := <-accepted
	var flood []net.Conn
	for range 20 {
		flood = append(flood, dial(t, l, "127.0.0.1"))
		<-accepted
	}
	for _, c := range flood[:18] {
		requireEnded(t, c)
	}
	requireOpen(t, other, otherConn)
	require.Equal(t, Stats{Open: 3, Unproven: 3, Unfinished: 18}, l.Stats())
}

func TestUnprovenOfManySources(t *testing.T) {
	t.Parallel()
	l, accepted := open(t, Limits{Unproven: 3, UnprovenPerSource: 2, Handshake: time.Minute})
	var clients []net.Conn
	for _, from := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"} {
		clients = append(clients, dial(t, l, from))
		<-accepted
	}
	requireEnded(t, clients[0])
	requireEnded(t, clients[1])
	require.Equal(t, 3, l.Stats().Open)
}

// TestTheLargestGivesWay: an address that holds all connections loses them to others,
// the idle ones first, and cannot take theirs.
func TestTheLargestGivesWay(t *testing.T) {
	t.Parallel()
	l, accepted := open(t, Limits{Connections: 10, Idle: time.Hour})
	proven := func(from string) (net.Conn, *Conn) {
		client := dial(t, l, from)
		c := <-accepted
		c.Proven()
		return client, c
	}
	var hogs []net.Conn
	for range 10 {
		c, _ := proven("127.0.0.1")
		hogs = append(hogs, c)
	}
	mine, mineConn := proven("127.0.0.2")
	requireEnded(t, hogs[0])
	requireOpen(t, mine, mineConn)

	// Nothing of its own is idle, and others keep theirs.
	if refused, err := tryDial(t, l, "127.0.0.1"); err == nil {
		requireEnded(t, refused)
	}
	requireOpen(t, mine, mineConn)
	s := l.Stats()
	require.Equal(t, Stats{Open: 10, Evicted: 1, Refused: 1}, s)
}

func TestIdleGivesWayToTheSameSource(t *testing.T) {
	t.Parallel()
	l, accepted := open(t, Limits{Connections: 4, Idle: time.Nanosecond})
	var clients []net.Conn
	for range 5 {
		clients = append(clients, dial(t, l, "127.0.0.1"))
		c := <-accepted
		c.Proven()
	}
	requireEnded(t, clients[0])
	require.Equal(t, Stats{Open: 4, Evicted: 1}, l.Stats())
}

// TestNobodysGiveWay: as many addresses as there are places, each with a connection in use,
// keep nobody out where it is told whose connections are somebody's.
func TestNobodysGiveWay(t *testing.T) {
	t.Parallel()
	for _, authenticates := range []bool{true, false} {
		l, accepted := open(t, Limits{Connections: 3, Idle: 50 * time.Millisecond, Authenticates: authenticates})
		var clients []net.Conn
		var conns []*Conn
		for _, from := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"} {
			clients = append(clients, dial(t, l, from))
			c := <-accepted
			c.Proven()
			c.active.Store(time.Now().Add(time.Hour).UnixNano()) // says something all the time
			conns = append(conns, c)
		}
		conns[0].Known()
		time.Sleep(60 * time.Millisecond) // they are no newcomers any more
		newcomer, err := tryDial(t, l, "127.0.0.4")
		if !authenticates {
			if err == nil {
				requireEnded(t, newcomer)
			}
			require.Equal(t, uint64(1), l.Stats().Refused)
			continue
		}
		require.NoError(t, err)
		requireOpen(t, newcomer, <-accepted)
		requireEnded(t, clients[1])
		requireOpen(t, clients[0], conns[0])
		requireOpen(t, clients[2], conns[2])
	}
}

// brokenListener fails as one that has no descriptors does.
type brokenListener struct {
	net.Listener
	errs chan error
}

func (b *brokenListener) Accept() (net.Conn, error) {
	if err := <-b.errs; err != nil {
		return nil, err
	}
	c, other := net.Pipe()
	other.Close()
	return c, nil
}

func TestFailing(t *testing.T) {
	t.Parallel()
	b := &brokenListener{errs: make(chan error, 3)}
	l := Limit(b, Limits{})
	since, _ := l.Failing()
	require.True(t, since.IsZero())
	b.errs <- syscall.EMFILE
	b.errs <- syscall.EMFILE
	_, err := l.Accept()
	require.ErrorIs(t, err, syscall.EMFILE)
	first, _ := l.Failing()
	_, _ = l.Accept()
	since, err = l.Failing()
	require.Equal(t, first, since)
	require.ErrorIs(t, err, syscall.EMFILE)
	b.errs <- nil
	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	since, _ = l.Failing()
	require.True(t, since.IsZero())
}
