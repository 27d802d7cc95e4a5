package dispatch

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	pb "timonel/proto/timonel/v1"
)

const (
	chunkSize = pb.TunnelChunk
	// flushTimeout is how long a closed tunnel may take for what was written last.
	flushTimeout = 5 * time.Second
)

// chunks is either end of a tunnel's stream.
type chunks interface {
	Send(*pb.Chunk) error
	Recv() (*pb.Chunk, error)
}

// streamConn makes a [net.Conn] of a stream of chunks, with deadlines and half
// close: an empty chunk says that no more will come.
type streamConn struct {
	stream chunks
	addr   streamAddr

	in       chan []byte   // from the stream
	eof      chan struct{} // closed when nothing will come any more
	recvErr  error         // then
	received chan struct{} // closed when the stream has ended
	rest     []byte        // of a chunk that Read was too small for; readMu
	readMu   sync.Mutex

	out     chan []byte   // to the stream; nil says that no more will come
	sent    chan struct{} // closed when nothing will be sent any more
	sendErr error         // then
	writeMu sync.Mutex
	half    bool // CloseWrite was called; writeMu

	closed    chan struct{}
	closeOnce sync.Once

	readDeadline, writeDeadline deadline
}

type streamAddr string

func (streamAddr) Network() string  { return "timonel" }
func (a streamAddr) String() string { return string(a) }

func newStreamConn(stream chunks, addr string) *streamConn {
	c := &streamConn{
		stream: stream, addr: streamAddr(addr),
		in: make(chan []byte), eof: make(chan struct{}), received: make(chan struct{}),
		out: make(chan []byte), sent: make(chan struct{}), closed: make(chan struct{}),
	}
	c.readDeadline.init()
	c.writeDeadline.init()
	go c.receive() // ends with the stream
	go c.send()    // ends with the connection
	return c
}

// receive goes on after the last data until the stream's end, for drain.
func (c *streamConn) receive() {
	defer close(c.received)
	ended := false
	end := func(err error) {
		if !ended {
			ended, c.recvErr = true, err
			close(c.eof)
		}
	}
	for {
		chunk, err := c.stream.Recv()
		if err != nil {
			end(err)
			return
		}
		if len(chunk.GetData()) == 0 {
			end(io.EOF)
		}
		if ended {
			continue
		}
		select {
		case c.in <- chunk.GetData():
		case <-c.closed: // nobody reads any more
			end(net.ErrClosed)
		}
	}
}

func (c *streamConn) send() {
	defer close(c.sent)
	for {
		select {
		case data := <-c.out:
			if err := c.stream.Send(&pb.Chunk{Data: data}); err != nil {
				c.sendErr = err
				return
			}
			if data == nil {
				c.sendErr = io.ErrClosedPipe
				return
			}
		case <-c.closed:
			c.sendErr = net.ErrClosed
			return
		}
	}
}

// Read implements [net.Conn].
func (c *streamConn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if isClosed(c.closed) {
		return 0, net.ErrClosed
	}
	if isClosed(c.readDeadline.wait()) {
		return 0, os.ErrDeadlineExceeded
	}
	if len(c.rest) == 0 {
		if len(p) == 0 {
			return 0, nil
		}
		select {
		case c.rest = <-c.in:
		case <-c.eof:
			return 0, c.recvErr
		case <-c.closed:
			return 0, net.ErrClosed
		case <-c.readDeadline.wait():
			return 0, os.ErrDeadlineExceeded
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write implements [net.Conn]. It returns when the data is on its way; an error
// of sending it comes from a later call.
func (c *streamConn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.half {
		return 0, io.ErrClosedPipe
	}
	written := 0
	for len(p) > 0 {
		n := min(len(p), chunkSize)
		if err := c.put(append([]byte(nil), p[:n]...)); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

func (c *streamConn) put(data []byte) error {
	if isClosed(c.writeDeadline.wait()) {
		return os.ErrDeadlineExceeded
	}
	select {
	case c.out <- data:
		return nil
	case <-c.sent:
		return c.sendErr
	case <-c.closed:
		return net.ErrClosed
	case <-c.writeDeadline.wait():
		return os.ErrDeadlineExceeded
	}
}

// CloseWrite tells the other end that no more will come. Reading goes on.
func (c *streamConn) CloseWrite() error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.half {
		return nil
	}
	c.half = true
	return c.put(nil)
}

// Close implements [net.Conn]. What was written before is still delivered.
func (c *streamConn) Close() error {
	c.closeOnce.Do(func() { close(c.closed) })
	return nil
}

// flush waits until what was written is with gRPC.
func (c *streamConn) flush() { waitFor(c.sent) }

// drain waits until the other end has ended the stream.
func (c *streamConn) drain() { waitFor(c.received) }

func waitFor(done <-chan struct{}) {
	timer := time.NewTimer(flushTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}

// LocalAddr implements [net.Conn].
func (c *streamConn) LocalAddr() net.Addr { return streamAddr("controller") }

// RemoteAddr implements [net.Conn].
func (c *streamConn) RemoteAddr() net.Addr { return c.addr }

// SetDeadline implements [net.Conn].
func (c *streamConn) SetDeadline(t time.Time) error {
	c.readDeadline.set(t)
	c.writeDeadline.set(t)
	return nil
}

// SetReadDeadline implements [net.Conn].
func (c *streamConn) SetReadDeadline(t time.Time) error { c.readDeadline.set(t); return nil }

// SetWriteDeadline implements [net.Conn].
func (c *streamConn) SetWriteDeadline(t time.Time) error { c.writeDeadline.set(t); return nil }

// deadline is a channel that is closed at a time that may be moved.
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	passed chan struct{}
}

func (d *deadline) init() { d.passed = make(chan struct{}) }

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.passed
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.passed // it is just being closed
	}
	d.timer = nil
	if isClosed(d.passed) {
		d.passed = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	if left := time.Until(t); left > 0 {
		passed := d.passed
		d.timer = time.AfterFunc(left, func() { close(passed) })
		return
	}
	close(d.passed)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
