package apiserver

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Upstream takes the end of the connection to a node for the end of the command: a
// `kubectl exec` whose node dies has a part of its output and succeeds. Here the request
// is told that the connection broke, before what reads from it hears of any end, and the
// client gets that as the command's status.

// ended is the interface of pods/exec and pods/attach.
type ended interface {
	rest.Storage
	rest.Connecter
}

// tied has the requests of a subresource end with an error when their connection breaks.
type tied struct{ ended }

// Connect implements rest.Connecter.
func (t tied) Connect(ctx context.Context, name string, options runtime.Object, responder rest.Responder) (http.Handler, error) {
	handler, err := t.ended.Connect(ctx, name, options, responder)
	if err != nil {
		return nil, err
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Other clients talk with the node themselves, and no error can be put in between.
		if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
			broke, cancel := context.WithCancelCause(r.Context())
			defer cancel(nil)
			r = r.WithContext(&tie{Context: broke, cancel: cancel})
		}
		handler.ServeHTTP(w, r)
	}), nil
}

// tie is the context of a request that a broken connection ends. Its Err says how it broke.
type tie struct {
	context.Context
	cancel context.CancelCauseFunc
}

type tieKey struct{}

// Value implements context.Context.
func (t *tie) Value(key any) any {
	if key == (tieKey{}) {
		return t
	}
	return t.Context.Value(key)
}

// Err implements context.Context.
func (t *tie) Err() error {
	if t.Context.Err() == nil {
		return nil
	}
	return context.Cause(t.Context)
}

// tieConn ties a connection that was opened for a request to it.
func tieConn(ctx context.Context, conn net.Conn, say func(error) error) net.Conn {
	t, ok := ctx.Value(tieKey{}).(*tie)
	if !ok {
		return conn
	}
	return &tiedConn{Conn: conn, tie: t, say: say, closed: make(chan struct{})}
}

// tiedConn tells its request that it broke.
type tiedConn struct {
	net.Conn
	tie    *tie
	say    func(error) error
	once   sync.Once
	closed chan struct{}
}

// brokenWait is how long the end of a broken connection is held back from who reads it:
// until the request, which knows better, has closed it.
const brokenWait = 5 * time.Second

// Read implements net.Conn.
func (c *tiedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	c.tie.cancel(c.say(err))
	wait := time.NewTimer(brokenWait)
	defer wait.Stop()
	select {
	case <-c.closed:
	case <-wait.C:
	}
	return n, err
}

// Close implements net.Conn.
func (c *tiedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
