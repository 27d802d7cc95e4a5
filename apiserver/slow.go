package apiserver

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/state/storage"
)

const (
	// slowAfter is for how long a client that watches may take nothing before it is slow.
	slowAfter = 5 * time.Second
	// slowPart is how much is written at once: who takes that is not slow.
	slowPart = 64 << 10
	// slowLook is how often slow clients are looked for.
	slowLook = time.Second
	// smallKept is how large the objects are that a watch may encode without being counted,
	// and keptCopies how often its encoders keep one, as measured: as an object, as an event,
	// and what buffers grow ahead; in protobuf also as what both are made in.
	smallKept      = 16 << 10
	keptCopies     = 3
	keptByProtobuf = 4
	// watchCost is what an open watch takes, some 20 KiB as measured with its connection's
	// part, and openFactor how many times the bound of slow ones all open ones may hold.
	watchCost  = 32 << 10
	openFactor = 4
	// leastWatchBytes is the least bound of what they hold.
	leastWatchBytes = 16 << 20
)

// slowWatches bounds what clients that watch and do not read keep in memory: what is being
// written to them, and the events that wait behind it, which nothing else holds once they
// have left the history. When there is more than the bound, those who have taken nothing
// for the longest time are cut off, as upstream's watch cache does: they come back, and go on
// after the last event that they have.
type slowWatches struct {
	limit      int64
	serializer runtime.NegotiatedSerializer

	mu    sync.Mutex
	open  map[*slowWatch]struct{}
	users map[string]int64 // what the watches of each hold
	held  int64            // by all of them
	cuts  uint64
}

func newSlowWatches(limit int64) *slowWatches {
	return &slowWatches{limit: max(limit, leastWatchBytes), open: map[*slowWatch]struct{}{}, users: map[string]int64{}}
}

// slowWatch is one client's watch.
type slowWatch struct {
	http.ResponseWriter
	request *http.Request
	holding storage.Holding
	began   time.Time
	who     string // as bodySource says; the mu of slowWatches guards it, and holds
	holds   int64  // itself, and in its encoders' buffers; 0 if it does not count

	since   atomic.Int64 // when the write that goes on began, in Unix nanoseconds; 0: none does
	writing atomic.Int64 // bytes of it
	conn    atomic.Pointer[net.Conn]
}

// before is in front of the handlers of all requests, behind what says what they are.
func (s *slowWatches) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if info, ok := request.RequestInfoFrom(r.Context()); !ok || info.Verb != "watch" || connOf(r) == nil {
			next.ServeHTTP(w, r)
			return
		}
		watch := &slowWatch{ResponseWriter: w, request: r, began: time.Now()}
		watch.holding.Kept = func(size int64) { s.keep(watch, size) }
		s.mu.Lock()
		s.open[watch] = struct{}{}
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			delete(s.open, watch)
			s.add(watch, -watch.holds)
			s.mu.Unlock()
		}()
		var to http.ResponseWriter = watch
		if h, ok := w.(http.Hijacker); ok {
			to = &hijackable{watch, h}
		}
		next.ServeHTTP(to, r.WithContext(context.WithValue(storage.WithHolding(r.Context(), &watch.holding), slowKey{}, watch)))
	})
}

// slowKey is the context key of a request's slowWatch.
type slowKey struct{}

// after is behind authentication. A watch counts from here on: when there are too many, who
// has most gets no more, and for others one of his ends.
func (s *slowWatches) after(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		watch, ok := r.Context().Value(slowKey{}).(*slowWatch)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		who, _ := bodySource(r)
		s.mu.Lock()
		watch.who = who
		s.add(watch, watchCost)
		end := s.beyond()
		refused := slices.Contains(end, watch)
		s.mu.Unlock()
		endAll(end)
		if refused {
			responsewriters.ErrorNegotiated(apierrors.NewTooManyRequests("You have too many watches on this API server, please end some, or try again later.", 5), s.serializer, schema.GroupVersion{}, w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// keep notes that a watch's encoders keep buffers for objects of a size. When all watches
// hold more than the bound, some end: clients go on after the last event that they have, and
// their new watches keep no buffers.
func (s *slowWatches) keep(w *slowWatch, size int64) {
	if size <= smallKept {
		return
	}
	copies := int64(keptCopies)
	if strings.Contains(w.request.Header.Get("Accept"), "protobuf") {
		copies = keptByProtobuf
	}
	s.mu.Lock()
	if _, ok := s.open[w]; ok {
		s.add(w, watchCost+copies*size-w.holds)
	}
	end := s.beyond()
	s.mu.Unlock()
	endAll(end)
}

// add has a watch hold n bytes more. s.mu is held.
func (s *slowWatches) add(w *slowWatch, n int64) {
	w.holds += n
	s.held += n
	if s.users[w.who] += n; s.users[w.who] == 0 {
		delete(s.users, w.who)
	}
}

// beyond takes those out of the count that are to end for all to hold no more than the
// bound: the largest of who has most, of those the last. s.mu is held.
func (s *slowWatches) beyond() (end []*slowWatch) {
	for s.held > openFactor*s.limit {
		most := ""
		for who, bytes := range s.users {
			if bytes > s.users[most] {
				most = who
			}
		}
		var first *slowWatch
		for w := range s.open {
			if w.who == most && w.holds > 0 && (first == nil || w.holds > first.holds || w.holds == first.holds && w.began.After(first.began)) {
				first = w
			}
		}
		if first == nil {
			return end
		}
		slog.Warn("ended a watch: all on this controller held too much, and most of that was this user's", "user", first.who, "from", first.request.RemoteAddr,
			"client", first.request.UserAgent(), "path", first.request.URL.Path, "bytes", first.holds, "limit", openFactor*s.limit)
		s.add(first, -first.holds)
		s.cuts++
		end = append(end, first)
	}
	return end
}

func endAll(watches []*slowWatch) {
	for _, w := range watches {
		w.holding.End()
	}
}

// run looks after slow clients until ctx ends.
func (s *slowWatches) run(ctx context.Context) {
	tick := time.NewTicker(slowLook)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.look(time.Now())
		case <-ctx.Done():
			return
		}
	}
}

// stalled are the watches whose clients have taken nothing for some time, the slowest
// first, and how much they hold.
func (s *slowWatches) stalled(now time.Time) (stalled []*slowWatch, bytes int64) {
	began := map[*slowWatch]int64{}
	s.mu.Lock()
	for w := range s.open {
		if since := w.since.Load(); since != 0 && now.UnixNano()-since >= int64(slowAfter) {
			stalled = append(stalled, w)
			began[w] = since
			bytes += w.bytes()
		}
	}
	s.mu.Unlock()
	slices.SortFunc(stalled, func(a, b *slowWatch) int { return int(min(max(began[a]-began[b], -1), 1)) })
	return stalled, bytes
}

// look cuts off the slowest clients, if slow ones hold too much.
func (s *slowWatches) look(now time.Time) {
	stalled, bytes := s.stalled(now)
	for _, w := range stalled {
		if bytes <= s.limit {
			return
		}
		held := w.bytes()
		bytes -= held
		s.mu.Lock()
		s.cuts++
		s.mu.Unlock()
		slog.Warn("cut off a client that watches and does not read; it may come back", "from", w.request.RemoteAddr,
			"client", w.request.UserAgent(), "path", w.request.URL.Path, "bytes", held, "limit", s.limit)
		w.cut()
	}
}

// holds is what all open watches hold, and what they may.
func (s *slowWatches) holds() (bytes, limit int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held, openFactor * s.limit
}

// cut is how many watches were cut off, ended or refused.
func (s *slowWatches) cut() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cuts
}

// bytes is what the client has not taken.
func (w *slowWatch) bytes() int64 { return w.writing.Load() + w.holding.Bytes() }

// cut has the write that goes on fail, and with it the watch.
func (w *slowWatch) cut() {
	if conn := w.conn.Load(); conn != nil {
		(*conn).Close()
		return
	}
	connOf(w.request).writesEnd(w.ResponseWriter, time.Unix(1, 0))
}

// write writes to the client, in parts, so that one who takes them slowly is not taken for
// one who takes nothing.
func (w *slowWatch) write(to io.Writer, b []byte) (n int, err error) {
	w.writing.Store(int64(len(b)))
	for part := range slices.Chunk(b, slowPart) {
		w.since.Store(time.Now().UnixNano())
		var m int
		m, err = to.Write(part)
		if n += m; err != nil {
			break
		}
	}
	w.since.Store(0)
	w.writing.Store(0)
	return n, err
}

// Write implements [http.ResponseWriter].
func (w *slowWatch) Write(b []byte) (int, error) { return w.write(w.ResponseWriter, b) }

// Flush implements [http.Flusher].
func (w *slowWatch) Flush() {
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		w.since.Store(time.Now().UnixNano())
		f.Flush()
		w.since.Store(0)
	}
}

// CloseNotify implements what upstream's filters ask of a writer.
func (w *slowWatch) CloseNotify() <-chan bool {
	if c, ok := w.ResponseWriter.(interface{ CloseNotify() <-chan bool }); ok {
		return c.CloseNotify()
	}
	return nil
}

// Unwrap is for [http.ResponseController].
func (w *slowWatch) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// hijackable is a watch over HTTP/1, which may become one over a WebSocket.
type hijackable struct {
	*slowWatch
	hijacker http.Hijacker
}

// Hijack implements [http.Hijacker].
func (h *hijackable) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := h.hijacker.Hijack()
	if err != nil {
		return nil, nil, err
	}
	h.conn.Store(&conn)
	slow := &slowConn{Conn: conn, watch: h.slowWatch}
	return slow, bufio.NewReadWriter(buffered.Reader, bufio.NewWriter(slow)), nil
}

// slowConn is the connection of a watch over a WebSocket.
type slowConn struct {
	net.Conn
	watch *slowWatch
}

// Write implements [net.Conn].
func (c *slowConn) Write(b []byte) (int, error) { return c.watch.write(c.Conn, b) }
