package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/internal/fair"
	"timonel/internal/weigh"
	"timonel/state/storage"
)

const (
	// leastAnswerBytes is the least bound of what answers take.
	leastAnswerBytes = 96 << 20
	// smallAnswer is how much an answer may take that needs not wait for large ones.
	smallAnswer = 1 << 20
	// answerPatience is for how long a request waits for room, and morePatience for more
	// when it has some: two that wait for each other do so for no longer.
	answerPatience = 10 * time.Second
	morePatience   = time.Second
	// mostAnswerWaiters is how many wait for room at most, of one user a quarter. They have
	// seats of priority and fairness meanwhile.
	mostAnswerWaiters = 64
	// A large answer for which others wait is to be taken as fast as slowestAnswer bytes in a
	// second, but for the first answerGrace. Any is to be taken until the request's deadline.
	answerGrace   = 5 * time.Second
	slowestAnswer = 256 << 10
	// answerPart is how much of a large one is written at once.
	answerPart = 64 << 10
	// answerLook is how often slow ones are looked for.
	answerLook = time.Second
)

// answers bounds what answers of requests take in memory, all together: the objects that
// are read, and what is made of them for the client. Upstream bounds how many requests there
// are at once, hundreds, and none of what they ask for. Objects are counted before they are
// decoded, and the request waits until there is room for them, until its handler has
// returned, which it does when the client has taken the answer. Lists in JSON and protobuf
// are encoded an item at a time; other answers in one piece, which is counted too.
//
// There are parts for small answers, large ones, and any of the cluster's own components and
// administrators; of each, half is the most that one user, or one namespace's service
// accounts, can have, but for one that has nothing and asks for more than that.
type answers struct {
	small, large, system *fair.Room
	longRunning          func(*http.Request, *request.RequestInfo) bool

	mu   sync.Mutex
	open map[*answer]struct{} // those that hold something large
}

func newAnswers(limit int64) *answers {
	limit = max(limit, leastAnswerBytes)
	room := func(n int64) *fair.Room { return fair.New(n, mostAnswerWaiters) }
	return &answers{small: room(limit / 8), large: room(limit / 8 * 5), system: room(limit / 4), open: map[*answer]struct{}{}}
}

// bytes is what answers take, and how many requests were refused for that there was no room.
func (a *answers) bytes() (held int64, refused uint64) {
	for _, r := range []*fair.Room{a.small, a.large, a.system} {
		s := r.Stats()
		held, refused = held+s.Held, refused+s.Refused
	}
	return held, refused
}

// run looks for clients that take large answers slowly, until ctx ends.
func (a *answers) run(ctx context.Context) {
	tick := time.NewTicker(answerLook)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.look(time.Now())
		case <-ctx.Done():
			return
		}
	}
}

// look cuts off clients that take answers too slowly while others wait for room.
func (a *answers) look(now time.Time) {
	var slow []*answer
	a.mu.Lock()
	for o := range a.open {
		if o.slow(now) {
			slow = append(slow, o)
		}
	}
	a.mu.Unlock()
	for _, o := range slow {
		o.cut()
	}
}

// answerKey is the context key of a request's answer.
type answerKey struct{}

// answer is what the answer of a request takes. It implements [storage.Reserver].
type answer struct {
	http.ResponseWriter // written to by the handlers
	of                  *answers
	request             *http.Request
	form                form
	who                 string // as bodySource says
	system              bool
	large               atomic.Pointer[fair.Room] // that something large is held in
	began               atomic.Int64              // when it was written to then, in Unix nanoseconds
	written             atomic.Int64              // bytes, since

	mu    sync.Mutex
	gone  bool           // nobody waits for the answer any more
	late  bool           // it was cut off
	ended bool           // the handler has returned
	held  map[int]func() // gives back what was reserved, by order
	next  int
	bytes int64
}

// form is what is made of objects.
type form int

const (
	streamed form = iota // an item at a time
	whole                // in one piece, as a table
	indented             // in one piece, with lines
	asYAML               // in one piece, by way of maps
)

// before is in front of what may give an answer up while its handler goes on.
func (a *answers) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, ok := request.RequestInfoFrom(r.Context())
		if !ok || !info.IsResourceRequest || connOf(r) == nil || a.longRunning(r, info) {
			next.ServeHTTP(w, r)
			return
		}
		own := &answer{ResponseWriter: w, of: a, request: r}
		defer own.taken()
		next.ServeHTTP(own, r.WithContext(context.WithValue(r.Context(), answerKey{}, own)))
	})
}

// after is behind authentication.
func (a *answers) after(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		own, ok := r.Context().Value(answerKey{}).(*answer)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		own.form = formOf(r)
		own.who, _ = bodySource(r)
		own.system = isSystem(r)
		defer own.done()
		next.ServeHTTP(w, r.WithContext(storage.WithReserver(r.Context(), own)))
	})
}

// isSystem is whether a request is of an administrator or one of the cluster's components.
func isSystem(r *http.Request) bool {
	u, ok := request.UserFrom(r.Context())
	if !ok {
		return false
	}
	return slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) || strings.HasPrefix(u.GetName(), "system:kube-") ||
		strings.HasPrefix(u.GetName(), serviceaccount.ServiceAccountUsernamePrefix+"kube-system:")
}

// formOf says what upstream makes of objects for a request.
func formOf(r *http.Request) form {
	accept := r.Header.Get("Accept")
	switch {
	case strings.Contains(accept, "yaml"):
		return asYAML
	case isPretty(r):
		return indented
	case strings.Contains(accept, "Table"):
		return whole
	}
	return streamed
}

// isPretty is whether upstream indents JSON for a request, see isPrettyPrint of
// k8s.io/apiserver/pkg/endpoints/handlers/negotiation.
func isPretty(r *http.Request) bool {
	if strings.Contains(r.URL.RawQuery, "pretty") {
		if p := r.URL.Query().Get("pretty"); p != "" {
			pretty, _ := strconv.ParseBool(p)
			return pretty
		}
	}
	agent := r.UserAgent()
	return strings.HasPrefix(agent, "curl") || strings.HasPrefix(agent, "Wget") || strings.HasPrefix(agent, "Mozilla/5.0")
}

// Cost implements [storage.Reserver].
func (o *answer) Cost(value []byte, decoded int64) int64 {
	size := int64(len(value))
	switch o.form {
	case whole:
		return 2*decoded + 8*size
	case indented:
		return decoded + 4*(2*size+weigh.Indented(value))
	case asYAML:
		return 4*decoded + 8*size + 4*weigh.Indented(value)
	}
	return decoded + size
}

// Reserve implements [storage.Reserver].
func (o *answer) Reserve(ctx context.Context, n int64, wait bool) (release func(), err error) {
	room := o.of.small
	switch {
	case o.system:
		room = o.of.system
	case n > smallAnswer:
		room = o.of.large
	}
	if o.form != streamed && n > room.Limit() {
		return nil, apierrors.NewRequestEntityTooLargeError("the answer is too large to be made in one piece: ask for JSON without 'pretty', or for less of it with 'limit'")
	}
	o.mu.Lock()
	patience := answerPatience
	if len(o.held) > 0 {
		patience = morePatience
	}
	ended := o.ended
	o.mu.Unlock()
	if ended {
		return nil, apierrors.NewTimeoutError("the request has ended", 1)
	}
	if !wait {
		patience = 0
	}
	give, err := takeWithin(ctx, patience, room, o.who, n)
	switch {
	case err != nil && !wait:
		return nil, storage.ErrFull
	case err != nil && ctx.Err() != nil:
		return nil, apierrors.NewTimeoutError("request did not complete within requested timeout", 1)
	case err != nil:
		return nil, apierrors.NewTooManyRequests("Too much is being read from this API server, please try again later, and ask for less at once.", 1)
	}
	return o.hold(ctx, room, give, n), nil
}

var errNoPatience = errors.New("no room now")

func takeWithin(ctx context.Context, patience time.Duration, room *fair.Room, who string, n int64) (func(), error) {
	if patience == 0 {
		if give, ok := room.TryTake(who, n); ok {
			return give, nil
		}
		return nil, errNoPatience
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return room.Take(ctx, who, n)
}

// hold keeps what was taken from a room until the handler has returned.
func (o *answer) hold(ctx context.Context, room *fair.Room, give func(), n int64) (release func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		give()
		return func() {}
	}
	if o.held == nil {
		o.held = map[int]func(){}
	}
	key := o.next
	o.next++
	o.held[key] = give
	if o.bytes += n; o.bytes > smallAnswer && o.large.Load() == nil && !o.gone {
		o.large.Store(room)
		o.of.mu.Lock()
		o.of.open[o] = struct{}{}
		o.of.mu.Unlock()
		// A write that goes on keeps upstream's filter, which ends the request at its
		// deadline, from that.
		if deadline, ok := ctx.Deadline(); ok {
			connOf(o.request).writesEnd(o.ResponseWriter, deadline)
		}
	}
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if give, ok := o.held[key]; ok {
			delete(o.held, key)
			o.bytes -= n
			give()
		}
	}
}

// done is when the handler has returned.
func (o *answer) done() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	for _, give := range o.held {
		give()
	}
	clear(o.held)
	o.bytes = 0
}

// taken is when the client has the answer, or was told something else.
func (o *answer) taken() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.gone = true
	if o.large.Load() == nil {
		return
	}
	o.of.mu.Lock()
	delete(o.of.open, o)
	o.of.mu.Unlock()
	if o.request.ProtoMajor < 2 { // the connection goes on
		connOf(o.request).writesEnd(o.ResponseWriter, time.Time{})
	}
}

// slow is whether others wait for what the answer holds, and the client takes it slowly.
func (o *answer) slow(now time.Time) bool {
	began := o.began.Load()
	if began == 0 || o.large.Load().Stats().Waiting == 0 {
		return false
	}
	late := now.Sub(time.Unix(0, began)) - answerGrace
	return late > 0 && float64(o.written.Load()) < slowestAnswer*late.Seconds()
}

// cut has the write that goes on fail, and with it the answer.
func (o *answer) cut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gone || o.bytes == 0 || o.late {
		return
	}
	o.late = true
	slog.Warn("cut off a client that takes its answer slowly while others wait for theirs", "from", o.request.RemoteAddr, "user", o.who,
		"client", o.request.UserAgent(), "path", o.request.URL.Path, "bytes", o.bytes, "taken", o.written.Load())
	connOf(o.request).writesEnd(o.ResponseWriter, time.Unix(1, 0))
}

// Write implements [http.ResponseWriter].
func (o *answer) Write(b []byte) (n int, err error) {
	if o.large.Load() == nil {
		return o.ResponseWriter.Write(b)
	}
	o.began.CompareAndSwap(0, time.Now().UnixNano())
	for part := range slices.Chunk(b, answerPart) {
		m, err := o.ResponseWriter.Write(part)
		o.written.Add(int64(m))
		if n += m; err != nil {
			return n, err
		}
	}
	return n, nil
}

// Flush implements [http.Flusher].
func (o *answer) Flush() {
	if f, ok := o.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// CloseNotify implements what upstream's filters ask of a writer.
func (o *answer) CloseNotify() <-chan bool {
	if c, ok := o.ResponseWriter.(interface{ CloseNotify() <-chan bool }); ok {
		return c.CloseNotify()
	}
	return nil
}

// Unwrap is for [http.ResponseController].
func (o *answer) Unwrap() http.ResponseWriter { return o.ResponseWriter }
