package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	attemptTimeout = 2 * time.Second
	// hedge is how long the next server waits for the one before.
	hedge = 400 * time.Millisecond
	// strays are answers to other questions at the port of one, after which it is asked by
	// TCP: who guesses the id of one in 65,536 has as many tries.
	strays = 16
	// failures in a row make a server one that is asked last.
	failures = 3
)

// upstream is another DNS server.
type upstream struct {
	addr netip.AddrPort

	mu     sync.Mutex
	failed int
	loops  bool // what it is asked comes back to us
}

func (u *upstream) down() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failed >= failures
}

func (u *upstream) looping() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.loops
}

// result notes how a question went, and says whether that made the server one that
// does not answer.
func (u *upstream) result(err error) (fell bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err == nil {
		u.failed = 0
		return false
	}
	u.failed++
	return u.failed == failures
}

// answerError is an answer that says no more than that there is none.
type answerError struct {
	server netip.AddrPort
	rcode  int
}

func (e *answerError) Error() string {
	return fmt.Sprintf("%s answers %s", e.server, dns.RcodeToString[e.rcode])
}

// ask puts a question to the server: by UDP from a port of its own, by TCP when the
// answer is too long for that. The answer is one to the question.
func (u *upstream) ask(ctx context.Context, question dns.Question, do, cd bool) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	m := &dns.Msg{Question: []dns.Question{question}}
	m.Id, m.RecursionDesired, m.CheckingDisabled = uint16(rand.Uint32()), true, cd
	m.SetEdns0(1232, do)
	raw, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("write the question: %w", err)
	}
	reply, err := u.udp(ctx, m, raw)
	if err == nil && reply.Truncated {
		reply, err = u.tcp(ctx, m, raw)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", u.addr, err)
	}
	switch reply.Rcode {
	case dns.RcodeSuccess, dns.RcodeNameError:
		return reply, nil
	}
	return nil, &answerError{u.addr, reply.Rcode}
}

func (u *upstream) dial(ctx context.Context, network string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, u.addr.String())
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (u *upstream) udp(ctx context.Context, m *dns.Msg, raw []byte) (*dns.Msg, error) {
	conn, err := u.dial(ctx, "udp")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })() // when another server was faster
	if _, err := conn.Write(raw); err != nil {
		return nil, err
	}
	buf := make([]byte, maxUDP)
	for range strays {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		// Somebody who guesses, or an answer to an older question: the right one may
		// still come.
		if reply, err := check(m, buf[:n]); err == nil {
			return reply, nil
		}
	}
	// Somebody knows the port and tries ids. By TCP he would have to know much more.
	return &dns.Msg{MsgHdr: dns.MsgHdr{Truncated: true}}, nil
}

func (u *upstream) tcp(ctx context.Context, m *dns.Msg, raw []byte) (*dns.Msg, error) {
	conn, err := u.dial(ctx, "tcp")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, err
	}
	return check(m, buf)
}

// check reads an answer and says why it is none to m.
func check(m *dns.Msg, raw []byte) (*dns.Msg, error) {
	if len(raw) < headerSize || binary.BigEndian.Uint16(raw) != m.Id {
		return nil, errors.New("an answer to another question")
	}
	reply := new(dns.Msg)
	if err := reply.Unpack(raw); err != nil {
		if raw[2]&(flagTC>>8) == 0 || raw[2]&(flagQR>>8) == 0 {
			return nil, fmt.Errorf("an answer that is damaged: %w", err)
		}
		reply = &dns.Msg{MsgHdr: dns.MsgHdr{Id: m.Id, Response: true, Truncated: true}, Question: m.Question} // cut anywhere
	}
	if !reply.Response || reply.Opcode != dns.OpcodeQuery || len(reply.Question) != 1 && reply.Rcode == dns.RcodeSuccess {
		return nil, errors.New("not an answer")
	}
	if len(reply.Question) == 1 {
		q, asked := reply.Question[0], m.Question[0]
		if q.Qtype != asked.Qtype || q.Qclass != asked.Qclass || !strings.EqualFold(q.Name, asked.Name) {
			return nil, errors.New("an answer to another question")
		}
	}
	reply.Question = m.Question
	return reply, nil
}

// askAll asks servers in their order, the next when one has not answered for a while
// or says that it cannot, each of them twice if need be, and returns the first answer
// that says something. fell is told of a server that now counts as dead.
func askAll(ctx context.Context, servers []*upstream, question dns.Question, do, cd bool, fell func(*upstream)) (*dns.Msg, error) {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		from  *upstream
		reply *dns.Msg
		err   error
	}
	left := slices.Concat(servers, servers)
	outcomes := make(chan outcome, len(left))
	refused := make(map[*upstream]bool)
	var errs []error
	running := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		for len(left) > 0 && refused[left[0]] {
			left = left[1:]
		}
		next := timer.C
		if len(left) == 0 {
			if next = nil; running == 0 {
				return nil, errors.Join(errs...)
			}
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(append(errs, ctx.Err())...)
		case <-next:
			u := left[0]
			left = left[1:]
			running++
			wait.Go(func() {
				reply, err := u.ask(ctx, question, do, cd)
				if ctx.Err() == nil || err == nil { // it did not end because another was faster
					lost := err
					if errors.As(err, new(*answerError)) {
						lost = nil
					}
					if u.result(lost) {
						fell(u)
					}
				}
				outcomes <- outcome{u, reply, err}
			})
			timer.Reset(hedge)
		case o := <-outcomes:
			running--
			if o.err == nil {
				return o.reply, nil
			}
			errs = append(errs, o.err)
			refused[o.from] = errors.As(o.err, new(*answerError))
			timer.Reset(0)
		}
	}
}
