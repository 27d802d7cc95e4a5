package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/rest"

	"timonel/state/storage"
)

// streamBuffer is how much of an answer waits for its reader before the
// handler that writes it does.
const streamBuffer = 1 << 20

// userKey is the context key of the user of a request that is made in memory.
// No request from the network can carry it.
type userKey struct{}

// inProcess calls the server's whole handler chain in memory. Requests made
// before it is opened wait.
type inProcess struct {
	opened  chan struct{}
	handler http.Handler
}

func newInProcess() *inProcess { return &inProcess{opened: make(chan struct{})} }

// open gives requests their handler. It must be called once.
func (p *inProcess) open(handler http.Handler) {
	p.handler = handler
	close(p.opened)
}

// config returns a client configuration as the given user; host is only a name.
func (p *inProcess) config(host string, u user.Info) *rest.Config {
	return &rest.Config{
		Host: host,
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
		Transport:          transportAs{p, authenticated(u)},
		DisableCompression: true,
		QPS:                -1,
	}
}

// loopback is the configuration of the server's own clients.
func (p *inProcess) loopback(host string) *rest.Config {
	return p.config(host, &user.DefaultInfo{Name: user.APIServerUser, Groups: []string{user.SystemPrivilegedGroup}})
}

// authenticated returns u as a member of system:authenticated.
func authenticated(u user.Info) user.Info {
	if slices.Contains(u.GetGroups(), user.AllAuthenticated) {
		return u
	}
	return &user.DefaultInfo{
		Name: u.GetName(), UID: u.GetUID(), Extra: u.GetExtra(),
		Groups: append(slices.Clone(u.GetGroups()), user.AllAuthenticated),
	}
}

// inProcessAuthenticator trusts the user in the context of a request made in
// memory, and asks next about all others.
type inProcessAuthenticator struct{ next authenticator.Request }

// AuthenticateRequest implements authenticator.Request.
func (a inProcessAuthenticator) AuthenticateRequest(r *http.Request) (*authenticator.Response, bool, error) {
	if u, ok := r.Context().Value(userKey{}).(user.Info); ok {
		return &authenticator.Response{User: u}, true, nil
	}
	return a.next.AuthenticateRequest(r)
}

// transportAs is the transport of one user.
type transportAs struct {
	server *inProcess
	user   user.Info
}

// RoundTrip implements http.RoundTripper. The handler's context is the
// request's, with its values; it ends when the caller closes the body.
func (t transportAs) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case <-t.server.opened:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	ctx, cancel := context.WithCancel(context.WithValue(r.Context(), userKey{}, t.user))
	if t.user.GetName() == user.APIServerUser { // this server's informers
		ctx = storage.WithOwn(ctx)
	}
	in := r.Clone(ctx)
	if in.Body == nil {
		in.Body = http.NoBody
	}
	in.RequestURI = in.URL.RequestURI()
	in.RemoteAddr = "127.0.0.1:0"
	in.Proto, in.ProtoMajor, in.ProtoMinor = "HTTP/2.0", 2, 0
	if in.Host == "" {
		in.Host = in.URL.Host
	}

	w := newMemoryResponse(cancel)
	go func() {
		defer in.Body.Close()
		defer func() {
			var err error
			if p := recover(); p != nil {
				err = fmt.Errorf("handler of %s %s gave up", r.Method, r.URL.Path)
				if p != any(http.ErrAbortHandler) {
					slog.Error("API handler panicked", "method", r.Method, "path", r.URL.Path, "panic", p)
				}
			}
			w.finish(err)
		}()
		t.server.handler.ServeHTTP(w, in)
	}()

	select {
	case <-w.started:
	case <-ctx.Done():
		w.Close()
		return nil, context.Cause(ctx)
	}
	if w.status == 0 { // the handler ended without an answer
		w.Close()
		return nil, w.failure()
	}
	return &http.Response{
		Status:        fmt.Sprintf("%d %s", w.status, http.StatusText(w.status)),
		StatusCode:    w.status,
		Proto:         "HTTP/2.0",
		ProtoMajor:    2,
		Header:        w.sent,
		Body:          w,
		ContentLength: w.length,
		Request:       r,
	}, nil
}

// memoryResponse is an http.ResponseWriter and the body that its caller reads.
// What a handler writes is buffered; the answer starts when the handler is done,
// flushes, or has filled the buffer.
type memoryResponse struct {
	cancel  context.CancelFunc
	header  http.Header
	started chan struct{}

	mu     sync.Mutex
	change sync.Cond // of what follows
	status int
	sent   http.Header // as of WriteHeader
	length int64       // -1 while not known
	begun  bool        // started is closed
	buffer []byte
	read   int // how much of buffer was read
	done   bool
	err    error
	closed bool
}

func newMemoryResponse(cancel context.CancelFunc) *memoryResponse {
	w := &memoryResponse{cancel: cancel, header: http.Header{}, started: make(chan struct{}), length: -1}
	w.change.L = &w.mu
	return w
}

// Header implements http.ResponseWriter.
func (w *memoryResponse) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *memoryResponse) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(status)
}

func (w *memoryResponse) writeHeader(status int) {
	if w.status != 0 || status < 200 {
		return
	}
	w.status, w.sent = status, w.header.Clone()
}

// begin lets the caller have the answer.
func (w *memoryResponse) begin() {
	if !w.begun {
		w.begun = true
		close(w.started)
	}
}

// Write implements http.ResponseWriter.
func (w *memoryResponse) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	for len(w.buffer)-w.read >= streamBuffer && !w.closed {
		w.begin()
		w.change.Wait()
	}
	if w.closed {
		return 0, errors.New("the caller closed the response")
	}
	if w.read == len(w.buffer) {
		w.buffer, w.read = w.buffer[:0], 0
	}
	w.buffer = append(w.buffer, p...)
	w.change.Broadcast()
	return len(p), nil
}

// Flush implements http.Flusher.
func (w *memoryResponse) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	w.begin()
}

// CloseNotify implements http.CloseNotifier, which upstream takes as the sign of
// a response writer that it may flush. Nobody uses the channel: handlers wait
// for the request's context.
func (w *memoryResponse) CloseNotify() <-chan bool { return make(chan bool) }

// finish ends the answer after the handler returned.
func (w *memoryResponse) finish(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.writeHeader(http.StatusOK)
	}
	if !w.begun {
		w.length = int64(len(w.buffer))
	}
	w.done, w.err = true, err
	w.begin()
	w.change.Broadcast()
}

func (w *memoryResponse) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Read implements io.Reader for the caller.
func (w *memoryResponse) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.read == len(w.buffer) && !w.done && !w.closed {
		w.change.Wait()
	}
	switch {
	case w.closed:
		return 0, http.ErrBodyReadAfterClose
	case w.read == len(w.buffer) && w.err != nil:
		return 0, w.err
	case w.read == len(w.buffer):
		return 0, io.EOF
	}
	n := copy(p, w.buffer[w.read:])
	w.read += n
	w.change.Broadcast()
	return n, nil
}

// Close implements io.Closer for the caller, and ends the handler's context.
func (w *memoryResponse) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.cancel()
	w.change.Broadcast()
	return nil
}
