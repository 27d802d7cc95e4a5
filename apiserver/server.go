package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/rest"
)

const (
	// stateAttempt bounds one attempt to read the state at the start.
	stateAttempt = 5 * time.Second
	// stateRetry is the time between two.
	stateRetry = 50 * time.Millisecond
)

// Server serves the Kubernetes API of one controller.
type Server struct {
	config    Config
	host      string
	address   net.Addr
	transport *inProcess
	handler   http.Handler
	run       func(context.Context) error
	life      lifecycle
	direct    *directParts
	installed map[string]<-chan struct{} // closed when all paths are
	cancel    context.CancelFunc
}

// New listens and builds the server. Requests are answered once Run is called;
// connections that come before wait. What New started ends with ctx, or with Run.
func New(ctx context.Context, c Config) (*Server, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	ctx, cancel := context.WithCancel(ctx)
	server, err := build(ctx, c)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("build the API server: %w", err)
	}
	server.cancel = cancel
	return server, nil
}

func build(ctx context.Context, c Config) (_ *Server, err error) {
	options, err := newOptions(ctx, c)
	if err != nil {
		return nil, err
	}
	transport := newInProcess()
	shared, err := newShared(ctx, c, options, transport)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			shared.generic.SecureServing.Listener.Close()
		}
	}()
	chain, err := newChain(shared)
	if err != nil {
		return nil, err
	}
	installPaths(chain.GenericAPIServer.Handler.NonGoRestfulMux, c.Paths)
	// Shutdown gives connections this long to become idle.
	chain.GenericAPIServer.ShutdownTimeout = c.DrainTimeout
	prepared, err := chain.PrepareRun()
	if err != nil {
		return nil, fmt.Errorf("prepare to serve: %w", err)
	}
	// All specifications are rendered now. If one is ever built again its
	// definitions are made anew.
	shared.generic.OpenAPIV3Config.Definitions = nil

	return &Server{
		config:    c,
		host:      shared.network.Host,
		address:   shared.generic.SecureServing.Listener.Addr(),
		transport: transport,
		handler:   chain.GenericAPIServer.Handler,
		run:       prepared.Run,
		life:      shared.life,
		direct:    shared.direct,
		installed: chain.GenericAPIServer.MuxAndDiscoveryCompleteSignals(),
	}, nil
}

// Run serves until ctx ends, then stops taking requests and waits for those in
// flight, for Config.DrainTimeout at most. It may be called once.
func (s *Server) Run(ctx context.Context) error {
	defer s.cancel()
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()

	waiting, stopWaiting := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer stopWaiting()
	wait.Go(func() { s.openWithState(waiting) })
	wait.Go(func() { s.life.follow(s.installed, waiting.Done()) })
	wait.Go(func() { s.life.slow.run(waiting) })
	wait.Go(func() { s.life.answers.run(waiting) })
	unguarded := make(chan error, 1)
	if s.life.guard != nil {
		wait.Go(func() { unguarded <- s.life.guard.Run(waiting) })
	}
	defer context.AfterFunc(ctx, func() { close(s.life.stopping) })()

	select {
	case err := <-done:
		return s.stopped(ctx, err)
	case err := <-unguarded:
		return s.stopped(ctx, err)
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return s.stopped(ctx, err)
	case <-time.After(s.config.DrainTimeout + time.Second):
		slog.Warn("API server stops with requests in flight", "waited", s.config.DrainTimeout)
		return nil
	}
}

// openWithState lets requests in memory through once the state can be read. Most
// are the server's own informers', which would be slow to try again after
// failures: a replica that found no leader for minutes should be ready as soon
// as there is one.
func (s *Server) openWithState(ctx context.Context) {
	for ctx.Err() == nil {
		attempt, cancel := context.WithTimeout(ctx, stateAttempt)
		err := s.config.Backend.ReadBarrier(attempt)
		cancel()
		if err == nil {
			s.transport.open(s.handler)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(stateRetry):
		}
	}
}

func (s *Server) stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return nil
	}
	if err == nil {
		err = errors.New("it stopped by itself")
	}
	return fmt.Errorf("run the API server: %w", err)
}

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.address }

// SlowWatches is how many bytes wait for clients that watch and do not read, and how many
// of these were cut off: see Config.WatchBytes.
func (s *Server) SlowWatches() (bytes int64, cut uint64) {
	_, bytes = s.life.slow.stalled(time.Now())
	return bytes, s.life.slow.cut()
}

// Watches is how many bytes all open watches hold, and how many they may: four times
// Config.WatchBytes.
func (s *Server) Watches() (bytes, limit int64) { return s.life.slow.holds() }

// Bodies is how many bytes the bodies of requests take, and how many requests were refused
// for that there was no room: see Config.BodyBytes.
func (s *Server) Bodies() (bytes int64, refused uint64) { return s.life.bodies.bytes() }

// NodeStreams is how many bytes the open streams from nodes are counted with, and how many
// were refused: see Config.TunnelBytes.
func (s *Server) NodeStreams() (bytes int64, refused uint64) {
	return s.life.tunnels.room.Stats().Held, s.life.tunnels.refused.Load()
}

// Answers is how many bytes the answers of requests take, and how many requests were refused
// for that there was no room: see Config.AnswerBytes.
func (s *Server) Answers() (bytes int64, refused uint64) { return s.life.answers.bytes() }

// Strangers is how many requests of nobody known are served, and how many were refused for
// that there were too many.
func (s *Server) Strangers() (served int, refused uint64) { return s.life.strangers.count() }

// InProcess returns a client configuration that calls this server in memory as
// the given user: the whole of authorization, admission and validation, without
// socket, TLS and rate limit. The handler sees the values of the request's
// context. Requests wait until the server runs and the state can be read. Built-in
// kinds travel as protobuf.
func (s *Server) InProcess(u user.Info) *rest.Config { return s.transport.config(s.host, u) }
