package consensus

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// greeting is what both ends of a Raft connection say first, inside TLS: the
// one who dialled, then the one who answers. On the wire: magic, length
// (16 bit, big endian), JSON.
type greeting struct {
	ClusterID string   `json:"cluster"`
	ID        string   `json:"id"`
	Boot      [16]byte `json:"boot"`              // of the process: a restarted replica has another
	Want      string   `json:"want,omitempty"`    // whom the dialler means to reach
	Probe     bool     `json:"probe,omitempty"`   // the dialler hangs up after the answer
	Leads     bool     `json:"leads,omitempty"`   // the answerer leads, and its disk is well
	Gen       uint64   `json:"gen,omitempty"`     // generation of its data, see identity
	Refusal   string   `json:"refusal,omitempty"` // the answerer will not talk to the dialler
}

const greetingMagic = "TMNR\x01"

func writeGreeting(w io.Writer, g greeting) error {
	body, err := json.Marshal(g)
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint16([]byte(greetingMagic), uint16(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

func readGreeting(r io.Reader) (g greeting, err error) {
	var h [len(greetingMagic) + 2]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return g, err
	}
	if string(h[:len(greetingMagic)]) != greetingMagic {
		return g, fmt.Errorf("not a Timonel replica, or of a version that cannot talk to this one")
	}
	body := make([]byte, binary.BigEndian.Uint16(h[len(greetingMagic):]))
	if _, err := io.ReadFull(r, body); err != nil {
		return g, err
	}
	if err := json.Unmarshal(body, &g); err != nil {
		return g, fmt.Errorf("greeting: %w", err)
	}
	return g, nil
}

// tcpUserTimeout is TCP_USER_TIMEOUT of Linux, which package syscall lacks.
const tcpUserTimeout = 18

// tuneTCP makes the kernel give up on a peer whose machine went away within
// seconds, so that a healed network is not waited for on old connections.
func tuneTCP(c net.Conn) {
	if w, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = w.NetConn()
	}
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	tc.SetNoDelay(true)
	tc.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 3})
	if rc, err := tc.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, 2000)
		})
	}
}

// logLimiter lets each message through once per period.
type logLimiter struct {
	period time.Duration
	mu     sync.Mutex
	last   map[string]time.Time
}

func newLogLimiter(period time.Duration) *logLimiter {
	return &logLimiter{period: period, last: map[string]time.Time{}}
}

func (l *logLimiter) allow(message string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if t, ok := l.last[message]; ok && now.Sub(t) < l.period {
		return false
	}
	if len(l.last) >= 1000 {
		clear(l.last)
	}
	l.last[message] = now
	return true
}
