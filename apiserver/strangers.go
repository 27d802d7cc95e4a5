package apiserver

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/internal/ports"
)

const (
	// mostStrangers is how many requests of nobody known are served at a time, and
	// mostOfSource how many from one address.
	mostStrangers, mostOfSource = 512, 128
	// mostRefusals is how many requests of a connection are answered when there is no
	// place: the next one ends it.
	mostRefusals = 4
	// strangersPatience is how long a stranger may leave his answer on a stream that he
	// gives no room.
	strangersPatience = 5 * time.Second
	// mostUnanswered is how much is read on a connection on which nobody is known until
	// something was answered, and mostHead how large a stranger's request may be without its body,
	// in memory: HTTP/2 says in one byte what takes many.
	mostUnanswered = 32 << 10
	mostHead       = 64 << 10
)

// errUnanswered ends a connection.
var errUnanswered = errors.New("too much was sent before it was known who sends it")

// strangers bounds the requests on connections of which it is not known whose they are. One
// has a place until it is authenticated, and without credentials, or with wrong ones, until
// its answer is on its way. A certificate that was shown says nothing, as it is not looked at before.
// Once somebody was authenticated on a connection, its requests need no place.
//
// The number of connections has a bound of its own (internal/ports), but HTTP/2 has a
// hundred requests on each, and ways to begin them for nothing: to reset them at once, or
// to leave no room for the answers, each of which a goroutine then waits to write.
type strangers struct {
	mu      sync.Mutex
	held    int
	sources map[netip.Addr]int
	refused uint64
}

func newStrangers() *strangers { return &strangers{sources: map[netip.Addr]int{}} }

// enter takes a place, unless there is none for this source: who has less than the others
// gets one even when there are enough.
func (s *strangers) enter(source netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	own := s.sources[source]
	if own >= mostOfSource || s.held >= mostStrangers && own*len(s.sources) >= mostStrangers {
		s.refused++
		return false
	}
	s.held++
	s.sources[source] = own + 1
	return true
}

func (s *strangers) leave(source netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held--
	if s.sources[source]--; s.sources[source] == 0 {
		delete(s.sources, source)
	}
}

// count says how many requests are served, and how many were refused.
func (s *strangers) count() (held int, refused uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held, s.refused
}

// stranger is a request of which it is not known who made it.
type stranger struct {
	of     *strangers
	source netip.Addr
	conn   *guardedConn

	mu     sync.Mutex
	left   bool // it has no place any more
	served bool // by a handler within
	gone   bool // nobody waits for the answer
}

type strangerKey struct{}

// before is in front of all handlers.
func (s *strangers) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := connOf(r)
		if conn == nil || conn.known.Load() { // in memory, or of somebody
			next.ServeHTTP(w, r)
			return
		}
		own := &stranger{of: s, source: ports.SourceOf(conn.RemoteAddr()), conn: conn}
		if headSize(r) > mostHead {
			clear(r.Header) // it is kept for as long as the answer
			own.refuse(w, r, http.StatusRequestHeaderFieldsTooLarge, "The header is too large for a request whose sender is not known yet.")
			return
		}
		if !s.enter(own.source) {
			own.refuse(w, r, http.StatusTooManyRequests, "Too many requests from your address whose sender is not known yet, please try again later.")
			return
		}
		defer own.answered(w, r)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), strangerKey{}, own)))
	})
}

// within is in front of what may go on when nobody waits for it any more: what is within
// the timeout ends by itself, however soon the client has gone.
func (s *strangers) within(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		own, ok := r.Context().Value(strangerKey{}).(*stranger)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		if !own.begin() {
			return
		}
		defer own.end()
		next.ServeHTTP(w, r)
	})
}

// after is behind authentication.
func (s *strangers) after(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if own, ok := r.Context().Value(strangerKey{}).(*stranger); ok {
			if u, ok := request.UserFrom(r.Context()); ok && u.GetName() != user.Anonymous {
				own.conn.know()
				own.mu.Lock()
				own.leave()
				own.mu.Unlock()
			}
		}
		next.ServeHTTP(w, r)
	})
}

// begin says whether there is somebody to serve.
func (o *stranger) begin() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.served = !o.gone
	return o.served
}

func (o *stranger) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.served = false; o.gone {
		o.leave()
	}
}

// answered is when all was done for the client but to send the answer.
func (o *stranger) answered(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	known := o.left
	o.mu.Unlock()
	o.conn.answered()
	if !known && r.ProtoMajor > 1 { // on HTTP/1 there is one answer at a time
		o.conn.writesEnd(w, time.Now().Add(strangersPatience))
		_ = http.NewResponseController(w).Flush() // it is lost, or the client takes it
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gone = true; !o.served {
		o.leave()
	}
}

// leave gives the place back, once. o.mu is held.
func (o *stranger) leave() {
	if !o.left {
		o.left = true
		o.of.leave(o.source)
	}
}

// refuse answers as upstream does when too many requests are served, or a header is too large.
func (o *stranger) refuse(w http.ResponseWriter, r *http.Request, code int, why string) {
	o.conn.answered()
	if o.conn.refusals.Add(1) > mostRefusals {
		o.conn.Conn.Close()
		return
	}
	if r.ProtoMajor > 1 {
		o.conn.writesEnd(w, time.Now().Add(strangersPatience))
	}
	if code == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	http.Error(w, why, code)
}
