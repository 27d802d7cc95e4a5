package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Config says what to forward where.
type Config struct {
	Listen     string        // host:port
	Backends   []string      // host:port of each controller's API
	CAFile     string        // PEM, verifies the backends
	ServerName string        // name in the backends' certificates
	Interval   time.Duration // between two looks at a backend; default 500 ms
	Timeout    time.Duration // for a look and for a dial; default 1 s
	Log        *slog.Logger
}

func (c *Config) complete() error {
	if c.Listen == "" {
		return errors.New("--listen is empty: give host:port")
	}
	if len(c.Backends) == 0 {
		return errors.New("--backend is missing: give the address of at least one controller")
	}
	if c.Interval == 0 {
		c.Interval = 500 * time.Millisecond
	}
	if c.Timeout == 0 {
		c.Timeout = time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return nil
}

// Run forwards until ctx ends.
func Run(ctx context.Context, c Config) error {
	if err := c.complete(); err != nil {
		return err
	}
	roots, err := loadRoots(c.CAFile)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("listen on --listen %s: %w", c.Listen, err)
	}
	p := &proxy{config: c}
	group, ctx := errgroup.WithContext(ctx)
	for _, address := range c.Backends {
		b := newBackend(address, c, roots)
		p.backends = append(p.backends, b)
	}
	for _, b := range p.backends { // which watch one another
		group.Go(func() error { return b.watch(ctx, p.othersReady) })
	}
	group.Go(func() error { return p.accept(ctx, group, listener) })
	group.Go(func() error {
		<-ctx.Done()
		return listener.Close()
	})
	if err := group.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

func loadRoots(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read --ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--ca %s holds no PEM certificate", file)
	}
	return roots, nil
}

type proxy struct {
	config   Config
	backends []*backend
	next     atomic.Uint64
}

func (p *proxy) accept(ctx context.Context, group *errgroup.Group, listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		group.Go(func() error {
			p.forward(ctx, conn.(*net.TCPConn))
			return nil
		})
	}
}

// forward joins a client with the first backend that takes the connection:
// ready ones in turn, then, in case the looks are out of date, the others.
func (p *proxy) forward(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	turn := int(p.next.Add(1))
	for _, wantReady := range []bool{true, false} {
		for i := range p.backends {
			b := p.backends[(turn+i)%len(p.backends)]
			if b.ready.Load() != wantReady {
				continue
			}
			server, err := b.dial(ctx)
			if err != nil {
				continue
			}
			b.join(ctx, client, server)
			return
		}
	}
}

// othersReady says whether another backend than b is ready.
func (p *proxy) othersReady(b *backend) bool {
	for _, other := range p.backends {
		if other != b && other.ready.Load() {
			return true
		}
	}
	return false
}

// backend is one controller's API.
type backend struct {
	address string
	config  Config
	client  *http.Client
	ready   atomic.Bool

	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func newBackend(address string, c Config, roots *x509.CertPool) *backend {
	transport := &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots, ServerName: c.ServerName, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: c.Timeout, MaxIdleConns: 1,
	}
	return &backend{address: address, config: c, conns: map[net.Conn]struct{}{},
		client: &http.Client{Transport: transport, Timeout: c.Timeout}}
}

// watch looks at the backend again and again, and ends its connections when it
// has not answered twice in a row, or has said twice that it is not ready while
// another is: a watch that stays on a controller that is cut off hears nothing.
func (b *backend) watch(ctx context.Context, othersReady func(*backend) bool) error {
	ticker := time.NewTicker(b.config.Interval)
	defer ticker.Stop()
	failed, notReady := 0, 0
	for {
		answered, err := b.look(ctx)
		if answered {
			failed = 0
		} else {
			failed++
		}
		if err == nil {
			notReady = 0
		} else {
			notReady++
		}
		if ready := err == nil; b.ready.Swap(ready) != ready {
			b.config.Log.Info("backend changed", "backend", b.address, "ready", ready, "reason", err)
		}
		if failed == 2 {
			b.client.CloseIdleConnections()
			b.closeAll()
		} else if notReady >= 2 && othersReady(b) {
			b.closeAll()
		}
		select {
		case <-ctx.Done():
			b.closeAll()
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

func (b *backend) look(ctx context.Context) (answered bool, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+b.address+"/readyz", nil)
	if err != nil {
		return false, err
	}
	response, err := b.client.Do(request)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return false, err
	}
	if response.StatusCode != http.StatusOK {
		return true, fmt.Errorf("/readyz: %s", response.Status)
	}
	return true, nil
}

func (b *backend) dial(ctx context.Context) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, b.config.Timeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", b.address)
	if err != nil {
		b.ready.Store(false) // until the next look
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// join copies both ways until both ends are done.
func (b *backend) join(ctx context.Context, client, server *net.TCPConn) {
	b.track(server, true)
	defer b.track(server, false)
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pipe(server, client)
	}()
	pipe(client, server)
	<-done
	server.Close()
}

// pipe copies until from ends; an orderly end is passed on as one, a broken
// connection ends both.
func pipe(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.SetLinger(0)
		to.Close()
		from.Close()
		return
	}
	to.CloseWrite()
}

func (b *backend) track(conn net.Conn, open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if open {
		b.conns[conn] = struct{}{}
	} else {
		delete(b.conns, conn)
	}
}

func (b *backend) closeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for conn := range b.conns {
		conn.Close()
	}
}
