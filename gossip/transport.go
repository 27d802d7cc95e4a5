package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// sealed is memberlist's transport with encryption, which memberlist could do itself
// but for two things: what comes is bounded in bytes, connections and time before
// anything of it is decoded, and the keys may be changed while the pool works.
type sealed struct {
	memberlist.NodeAwareTransport
	pool *Pool

	packets chan *memberlist.Packet
	streams chan net.Conn
	budget  budget
	conns   connections

	stop   chan struct{} // nothing is handed on any more
	silent chan struct{} // and nothing comes
	done   sync.WaitGroup
	once   sync.Once
}

// Bounds of what is taken in.
const (
	maxConns        = 64  // connections that others have opened, at a time
	maxConnsPerHost = 4   // of them from one address
	stateSize       = 512 // bytes that a member takes in all that another knows, on average at most
	leastState      = 64 << 10
	readChunk       = 32 << 10
)

// maxState is how many bytes another may send of all that it knows.
func (c *Config) maxState() int { return leastState + c.MaxMembers*stateSize }

func newSealed(p *Pool, inner memberlist.NodeAwareTransport) *sealed {
	s := &sealed{
		NodeAwareTransport: inner, pool: p,
		packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), stop: make(chan struct{}), silent: make(chan struct{}),
	}
	s.budget.most = int64(p.config.MaxReceiveBytes)
	s.conns.hosts = make(map[string]int)
	s.done.Go(s.takePackets)
	s.done.Go(s.takeStreams)
	return s
}

// PacketCh implements memberlist.Transport.
func (s *sealed) PacketCh() <-chan *memberlist.Packet { return s.packets }

// StreamCh implements memberlist.Transport.
func (s *sealed) StreamCh() <-chan net.Conn { return s.streams }

// Shutdown implements memberlist.Transport. What comes meanwhile is taken and dropped:
// the transport below ends only when it is rid of what it has read.
func (s *sealed) Shutdown() (err error) {
	s.once.Do(func() {
		close(s.stop)
		err = s.NodeAwareTransport.Shutdown()
		close(s.silent)
	})
	s.done.Wait()
	return err
}

func (s *sealed) takePackets() {
	for {
		select {
		case <-s.silent:
			return
		case packet := <-s.NodeAwareTransport.PacketCh():
			if len(packet.Buf) > maxPacket+sealSize {
				s.pool.refuse(refusedMessage, packet.From.String(), fmt.Errorf("%w: a packet of %d bytes", errMessage, len(packet.Buf)))
				continue
			}
			plain, err := s.pool.ring.open(packet.Buf, nil)
			if err == nil {
				plain, err = openPacket(plain)
			}
			if err != nil {
				s.pool.refuseFrom(packet.From.String(), err)
				continue
			}
			packet.Buf = plain
			select {
			case s.packets <- packet:
			case <-s.stop:
			}
		}
	}
}

// takeStreams lets so many connections in as may be open at a time.
func (s *sealed) takeStreams() {
	for {
		select {
		case <-s.silent:
			return
		case conn := <-s.NodeAwareTransport.StreamCh():
			host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
			if !s.conns.add(host) {
				conn.Close()
				s.pool.refuse(refusedConnection, host, errors.New("too many connections at a time"))
				continue
			}
			// memberlist sets the time that all of it may take.
			c := &sealedConn{Conn: conn, s: s, accepted: true, closed: func() { s.conns.remove(host) }}
			select {
			case s.streams <- c:
			case <-s.stop:
				c.Close()
			}
		}
	}
}

// WriteTo implements memberlist.Transport.
func (s *sealed) WriteTo(b []byte, addr string) (time.Time, error) {
	return s.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (s *sealed) WriteToAddress(b []byte, addr memberlist.Address) (time.Time, error) {
	return s.NodeAwareTransport.WriteToAddress(s.pool.ring.seal(make([]byte, 0, len(b)+sealSize), b, nil), addr)
}

// DialTimeout implements memberlist.Transport.
func (s *sealed) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return s.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (s *sealed) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	conn, err := s.NodeAwareTransport.DialAddressTimeout(addr, timeout)
	if err != nil {
		return nil, err
	}
	return &sealedConn{Conn: conn, s: s, closed: func() {}}, nil
}

// sealedConn carries one message each way, as memberlist's connections do: each
// Write is one, and what is read is one that was checked as a whole.
type sealedConn struct {
	net.Conn
	s      *sealed
	plain  []byte
	read   bool
	closed func()
	once   sync.Once
	held   int64 // bytes of the budget

	accepted bool // the other opened it
}

func (c *sealedConn) Write(b []byte) (int, error) {
	head := []byte{kindEncrypted, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(head[1:], uint32(len(b)+sealSize))
	out := append(make([]byte, 0, len(head)+len(b)+sealSize), head...)
	if _, err := c.Conn.Write(c.s.pool.ring.seal(out, b, head)); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (c *sealedConn) Read(b []byte) (int, error) {
	if !c.read {
		c.read = true
		plain, err := c.receive()
		if err != nil {
			if errors.Is(err, errKey) && c.accepted {
				// What it cannot open tells the other that the keys differ. {"Error": ""}
				_, _ = c.Write([]byte{kindError, 0x81, 0xa5, 'E', 'r', 'r', 'o', 'r', 0xa0})
			}
			var broken *net.OpError // the connection, or the other took too long
			if !errors.As(err, &broken) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				c.s.pool.refuseFrom(c.RemoteAddr().String(), err)
			}
			return 0, err
		}
		c.plain = plain
	}
	if len(c.plain) == 0 {
		return 0, io.EOF
	}
	n := copy(b, c.plain)
	c.plain = c.plain[n:]
	return n, nil
}

// receive reads, opens and checks the message.
func (c *sealedConn) receive() ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(c.Conn, head[:]); err != nil {
		return nil, err
	}
	if head[0] != kindEncrypted {
		return nil, errors.New("remote state is not encrypted")
	}
	most := c.s.pool.config.maxState()
	size := int64(binary.BigEndian.Uint32(head[1:]))
	if size > int64(most) {
		return nil, fmt.Errorf("%w: %d bytes, %d are the most", errMessage, size, most)
	}
	// What is announced costs nothing until it comes.
	var text []byte
	for int64(len(text)) < size {
		n := min(size-int64(len(text)), readChunk)
		if err := c.hold(n); err != nil {
			return nil, err
		}
		at := len(text)
		text = append(text, make([]byte, n)...)
		if _, err := io.ReadFull(c.Conn, text[at:]); err != nil {
			return nil, err
		}
	}
	plain, err := c.s.pool.ring.open(text, head[:])
	if err != nil {
		return nil, err
	}
	if err := c.hold(int64(most)); err != nil { // for what it may be when unpacked
		return nil, err
	}
	plain, err = openStream(plain, most, c.s.pool.config.MaxMembers)
	c.held -= int64(most - len(plain))
	c.s.budget.give(int64(most - len(plain)))
	return plain, err
}

func (c *sealedConn) hold(n int64) error {
	if !c.s.budget.take(n) {
		return fmt.Errorf("more than %d bytes of gossip wait to be read", c.s.budget.most)
	}
	c.held += n
	return nil
}

func (c *sealedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.s.budget.give(c.held)
		c.closed()
	})
	return err
}

// budget bounds the bytes that all connections hold together.
type budget struct {
	most int64
	held atomic.Int64
}

func (b *budget) take(n int64) bool {
	if b.held.Add(n) > b.most {
		b.held.Add(-n)
		return false
	}
	return true
}

func (b *budget) give(n int64) { b.held.Add(-n) }

// connections counts those that others have opened.
type connections struct {
	mu    sync.Mutex
	all   int
	hosts map[string]int
}

func (c *connections) add(host string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= maxConns || c.hosts[host] >= maxConnsPerHost && !strings.HasPrefix(host, "127.") {
		return false
	}
	c.all++
	c.hosts[host]++
	return true
}

func (c *connections) remove(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.hosts[host]--; c.hosts[host] <= 0 {
		delete(c.hosts, host)
	}
}

// listen opens the pool's ports, as memberlist would.
func listen(c *Config, p *Pool) (memberlist.NodeAwareTransport, int, error) {
	tries := 1
	if c.Port == 0 {
		tries = 10 // the UDP port of the number that TCP got may be taken
	}
	var err error
	for range tries {
		var t *memberlist.NetTransport
		t, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{
			BindAddrs: []string{c.BindAddr}, BindPort: c.Port, Logger: newBridge(c.Logger, p),
		})
		if err == nil {
			return t, t.GetAutoBindPort(), nil
		}
		if !strings.Contains(err.Error(), "address already in use") {
			break
		}
	}
	return nil, 0, err
}
