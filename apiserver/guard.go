package apiserver

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/pki"
	"timonel/trust"
)

// guardFilter ends what somebody has open when the replicated state revokes him:
// watches, exec and whatever else of his runs.
//
//   - Of a client certificate, the whole connection, whatever is on it: HTTP/2 streams,
//     and those that were upgraded to something else. Nothing of it is anybody else's.
//   - Of a token that was issued for a pod on a node, its request. An HTTP/2
//     connection may be that of a proxy, and other streams those of others.
//
// What comes afterwards, [trusted] refuses.
type guardFilter struct {
	guard      *trust.Guard // nil: nobody is ever revoked
	serializer runtime.NegotiatedSerializer
}

// before is in front of all that takes time.
func (f guardFilter) before(next http.Handler) http.Handler {
	if f.guard == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := connOf(r)
		if conn == nil { // in memory
			next.ServeHTTP(w, r)
			return
		}
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			conn.hold(f.guard, r.TLS.PeerCertificates[0])
		}
		tokens := tokensOf(r)
		if len(tokens) == 0 {
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancelCause(r.Context())
		o := &openRequest{tokens: tokens, conn: conn, proto: r.ProtoMajor, w: w, cancel: cancel}
		defer o.done()
		next.ServeHTTP(w, r.WithContext(context.WithValue(ctx, openKey{}, o)))
	})
}

// after is behind authentication, which says of which node a token is.
func (f guardFilter) after(next http.Handler) http.Handler {
	if f.guard == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o, _ := r.Context().Value(openKey{}).(*openRequest)
		u, ok := request.UserFrom(r.Context())
		if o != nil && ok {
			for _, node := range u.GetExtra()[nodeNameExtra] {
				if err := o.hold(f.guard, trust.Party{Node: node, Since: issuedAt(o.tokens)}); err != nil {
					responsewriters.ErrorNegotiated(apierrors.NewUnauthorized("Unauthorized"), f.serializer, schema.GroupVersion{}, w, r)
					return
				}
			}
		}
		next.ServeHTTP(w, r)
	})
}

// partyOf is who shows a client certificate.
func partyOf(leaf *x509.Certificate) trust.Party {
	p := trust.Party{Key: trust.KeyOf(leaf)}
	if id := pki.IdentityOf(leaf); id.Role == pki.RoleNode {
		p.Node = id.Name
	}
	return p
}

// openKey is the context key of a request's openRequest.
type openKey struct{}

// openRequest is a request that a token was shown with.
type openRequest struct {
	tokens []string
	conn   *guardedConn
	proto  int

	mu       sync.Mutex
	w        http.ResponseWriter // nil when the handler has returned
	cancel   context.CancelCauseFunc
	releases []func()
}

func (o *openRequest) hold(g *trust.Guard, p trust.Party) error {
	release, err := g.Hold(p, o.end)
	if err != nil {
		return err
	}
	o.mu.Lock()
	gone := o.w == nil
	if !gone {
		o.releases = append(o.releases, release)
	}
	o.mu.Unlock()
	if gone { // given up by what is around this handler
		release()
	}
	return nil
}

// end ends the request. Nothing that its handler writes later reaches the client.
func (o *openRequest) end(why error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.w == nil {
		return
	}
	slog.Warn("ended a request to the API whose token was revoked", "from", o.conn.RemoteAddr(), "why", why)
	o.cancel(why)
	if o.proto < 2 { // the connection is this request's alone, upgraded or not
		o.conn.Conn.Close()
		return
	}
	o.conn.writesEnd(o.w, time.Unix(1, 0))
}

func (o *openRequest) done() {
	o.mu.Lock()
	o.w = nil
	releases := o.releases
	o.mu.Unlock()
	o.cancel(nil)
	for _, release := range releases {
		release()
	}
}

// guardedListener gives out connections that requests find again.
type guardedListener struct{ net.Listener }

// Accept implements [net.Listener].
func (l guardedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return newGuardedConn(c), nil
}

// guardedConn is a connection that ends when the client whose certificate it was
// opened with is revoked.
type guardedConn struct {
	net.Conn

	held     atomic.Bool // hold has nothing more to do
	known    atomic.Bool // somebody was authenticated on it: see strangers
	refusals atomic.Int32
	// unanswered is what was read since the last answer, while nobody is known on it, and
	// answers says that there was one.
	unanswered atomic.Int64
	answers    chan struct{}

	mu      sync.Mutex
	closed  bool
	release func()
}

func newGuardedConn(c net.Conn) *guardedConn {
	return &guardedConn{Conn: c, answers: make(chan struct{}, 1)}
}

// Read implements [net.Conn]. Of nobody known no more is read than a request that shows who
// it is of needs: what comes of headers and bodies is in memory before it is looked at.
func (c *guardedConn) Read(p []byte) (int, error) {
	if c.known.Load() {
		return c.Conn.Read(p)
	}
	if !c.mayRead() {
		patience := time.NewTimer(strangersPatience)
		defer patience.Stop()
		for !c.mayRead() {
			select {
			case <-c.answers:
			case <-patience.C:
				return 0, errUnanswered
			}
		}
	}
	n, err := c.Conn.Read(p)
	c.unanswered.Add(int64(n))
	return n, err
}

func (c *guardedConn) mayRead() bool {
	return c.known.Load() || c.unanswered.Load() < mostUnanswered
}

// answered notes that all that was read has been looked at.
func (c *guardedConn) answered() {
	c.unanswered.Store(0)
	select {
	case c.answers <- struct{}{}:
	default:
	}
}

// hold ends the connection when the owner of its certificate is good no more. Of one
// who is not good now each request is refused.
func (c *guardedConn) hold(g *trust.Guard, leaf *x509.Certificate) {
	if c.held.Load() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.release != nil {
		return
	}
	release, err := g.Hold(partyOf(leaf), func(why error) {
		slog.Warn("ended a connection to the API whose certificate was revoked", "client", leaf.Subject.CommonName, "from", c.RemoteAddr(), "why", why)
		c.Conn.Close() // not Close, which needs the lock that is held here
	})
	if err == nil {
		c.release = release
		c.held.Store(true)
	}
}

// know notes that somebody was authenticated on the connection.
func (c *guardedConn) know() {
	if c.known.Swap(true) {
		return
	}
	c.answered()
	if port, ok := c.Conn.(interface{ Known() }); ok { // a ports.Conn: it is not closed for newcomers
		port.Known()
	}
}

// writesEnd has what is left to write of an answer end by then: an HTTP/2 stream is reset,
// and a connection of HTTP/1 ends.
func (c *guardedConn) writesEnd(w http.ResponseWriter, by time.Time) {
	if err := http.NewResponseController(w).SetWriteDeadline(by); err != nil {
		c.Conn.Close()
	}
}

// Close implements [net.Conn].
func (c *guardedConn) Close() error {
	c.mu.Lock()
	release := c.release
	c.closed, c.release = true, nil
	c.mu.Unlock()
	if release != nil {
		release()
	}
	return c.Conn.Close()
}

// LocalAddr implements [net.Conn]. It is what net/http and HTTP/2 put into the
// context of each request, and so leads from there to the connection.
func (c *guardedConn) LocalAddr() net.Addr { return guardedAddr{c.Conn.LocalAddr(), c} }

type guardedAddr struct {
	net.Addr
	conn *guardedConn
}

// connOf is the connection that a request came by; nil for one made in memory.
func connOf(r *http.Request) *guardedConn {
	if addr, ok := r.Context().Value(http.LocalAddrContextKey).(guardedAddr); ok {
		return addr.conn
	}
	return nil
}
