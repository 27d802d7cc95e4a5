package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"
)

const (
	// maxAnswer bounds what is no content: tokens, errors, the bodies of redirects.
	maxAnswer = 1 << 20
	maxHeader = 64 << 10
)

// place says of whom something is asked.
type place int

const (
	elsewhere place = iota // where a registry redirects to, or wants tokens asked for
	own                    // what the image's name says
	admin                  // what the administrator says, and where that leads
)

type placeKey struct{}

type contentKey struct{}

// asContent marks what is asked of a registry as content.
type asContent struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (c asContent) RoundTrip(r *http.Request) (*http.Response, error) {
	return c.RoundTripper.RoundTrip(r.WithContext(context.WithValue(r.Context(), contentKey{}, true)))
}

// guard bounds answers.
type guard struct {
	next     *http.Transport
	resolver *Resolver
	stall    time.Duration
}

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	stalled := fmt.Errorf("%s said nothing for %s", r.URL.Host, g.stall)
	timer := time.AfterFunc(g.stall, func() { cancel(stalled) })
	ask := r.WithContext(context.WithValue(ctx, placeKey{}, g.place(r)))
	if ctx.Value(contentKey{}) != nil && !g.resolver.knows(r.URL.Host) {
		// Go's client has it follow to another port.
		ask.Header = r.Header.Clone()
		ask.Header.Del("Authorization")
	}
	resp, err := g.next.RoundTrip(ask)
	if err != nil {
		timer.Stop()
		err = because(ctx, err)
		cancel(nil)
		return nil, err
	}
	b := &body{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, timer: timer, stall: g.stall, left: -1}
	if ctx.Value(contentKey{}) == nil || resp.StatusCode >= 300 {
		b.left = maxAnswer
	}
	timer.Stop() // what is done with the answer is not the registry's time
	resp.Body = b
	return resp, nil
}

// place says who named where a request goes.
func (g *guard) place(r *http.Request) place {
	if g.next.Proxy != nil {
		if proxy, err := g.next.Proxy(r); err == nil && proxy != nil {
			return admin // the proxy is the administrator's, and knows where it goes
		}
	}
	return g.resolver.place(r.URL.Host)
}

// because is why ctx ended, if that is what err says.
func because(ctx context.Context, err error) error {
	if why := context.Cause(ctx); why != nil && errors.Is(err, context.Canceled) {
		return why
	}
	return err
}

// body is an answer.
type body struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
	left   int64 // -1: as many as come
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, fmt.Errorf("an answer of a registry is longer than %d bytes", maxAnswer)
	}
	if b.left > 0 && int64(len(p)) > b.left {
		p = p[:b.left]
	}
	b.timer.Reset(b.stall)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if b.left > 0 {
		b.left -= int64(n)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = because(b.ctx, err)
	}
	return n, err
}

// Close implements io.Closer.
func (b *body) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// connect connects where a request may go: see [reachable].
func connect(ctx context.Context, network, address string) (net.Conn, error) {
	from, _ := ctx.Value(placeKey{}).(place)
	d := net.Dialer{
		Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, FallbackDelay: 300 * time.Millisecond,
		// After names were looked up: a name may lead anywhere.
		Control: func(_, to string, _ syscall.RawConn) error { return reachable(to, from) },
	}
	return d.DialContext(ctx, network, address)
}

// reachable refuses addresses that are not a registry's.
func reachable(address string, from place) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address of a registry: %w", err)
	}
	ip := ap.Addr().Unmap()
	switch {
	case from == admin:
		return nil
	case ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip == netip.MustParseAddr("fd00:ec2::254"):
		return fmt.Errorf("no image is fetched from %s, unless the administrator configures it as a registry's host", ip)
	case from == elsewhere && (ip.IsLoopback() || ip.IsUnspecified()):
		return fmt.Errorf("a registry that leads to %s, this machine, is not followed", ip)
	}
	return nil
}
