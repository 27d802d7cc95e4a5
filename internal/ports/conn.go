package ports

import (
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// Conn is a connection that a [Listener] accepted. It is proven when whoever serves it
// takes its deadline away, as net/http, gRPC and Raft's stream do after the handshake.
type Conn struct {
	net.Conn
	l      *Listener
	source netip.Addr
	begun  time.Time
	active atomic.Int64 // Unix nanoseconds of the last byte
	timer  *time.Timer  // ends the handshake
	known  atomic.Bool

	proven, gone bool // l.mu guards them
}

// NetConn returns the connection underneath, for who has options to set.
func (c *Conn) NetConn() net.Conn { return c.Conn }

// Read implements [net.Conn].
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.active.Store(time.Now().UnixNano())
	}
	return n, err
}

// Write implements [net.Conn].
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if n > 0 {
		c.active.Store(time.Now().UnixNano())
	}
	return n, err
}

// SetDeadline implements [net.Conn].
func (c *Conn) SetDeadline(t time.Time) error {
	if t.IsZero() {
		c.Proven()
	}
	return c.Conn.SetDeadline(t)
}

// SetReadDeadline implements [net.Conn].
func (c *Conn) SetReadDeadline(t time.Time) error {
	if t.IsZero() {
		c.Proven()
	}
	return c.Conn.SetReadDeadline(t)
}

// Known says that somebody was authenticated on the connection.
func (c *Conn) Known() { c.known.Store(true) }

// Proven says that the handshake is done.
func (c *Conn) Proven() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.proven || c.gone {
		return
	}
	c.proven = true
	c.timer.Stop()
	c.l.sources[c.source].unproven--
	c.l.waiting--
}

// settled reports that it is not waited for any more. l.mu is held.
func (c *Conn) settled() bool { return c.proven || c.gone }

// expire ends a handshake that takes too long.
func (c *Conn) expire() {
	c.l.mu.Lock()
	late := !c.settled()
	if late {
		c.l.stats.Unfinished++
		c.l.forget(c)
	}
	c.l.mu.Unlock()
	if late {
		reset(c.Conn)
	}
}

// Close implements [net.Conn].
func (c *Conn) Close() error {
	c.l.mu.Lock()
	c.l.forget(c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}
