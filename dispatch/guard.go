package dispatch

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/pki"
	"timonel/trust"
)

// partyOf is who calls, as the state knows them; the zero Party for a caller
// without a certificate.
func partyOf(ctx context.Context) (trust.Party, error) {
	cert, err := pki.PeerCertificate(ctx)
	if err != nil || cert == nil {
		return trust.Party{}, err
	}
	p := trust.Party{Key: trust.KeyOf(cert)}
	if id := pki.IdentityOf(cert); id.Role == pki.RoleNode {
		p.Node = id.Name
	}
	return p, nil
}

// refusal is how a caller hears that the state says no.
func refusal(err error) error {
	var refused *trust.RefusedError
	if errors.As(err, &refused) {
		return status.Error(codes.PermissionDenied, refused.Reason)
	}
	return status.Error(codes.Unavailable, err.Error())
}

// guarded is a stream whose context ends when its caller is revoked.
type guarded struct {
	grpc.ServerStream
	ctx context.Context
}

func (g *guarded) Context() context.Context { return g.ctx }

// checkCall refuses a call of somebody who was revoked.
func (d *Dispatcher) checkCall(ctx context.Context) error {
	p, err := partyOf(ctx)
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	if err := d.config.Trust.Check(p); err != nil {
		return refusal(err)
	}
	return nil
}

// guardStream handles a stream whose caller is good for as long as he is.
func (d *Dispatcher) guardStream(srv any, stream grpc.ServerStream, handle grpc.StreamHandler) error {
	p, err := partyOf(stream.Context())
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	release, err := d.guard.Hold(p, func(why error) { cancel(refusal(why)) })
	if err != nil {
		return refusal(err)
	}
	defer release()
	if p.Node != "" {
		cert, err := pki.PeerCertificate(ctx)
		if err != nil {
			return status.Error(codes.Unauthenticated, err.Error())
		}
		defer d.endWith(cert.NotAfter, p, cancel)()
	}
	err = handle(srv, &guarded{stream, ctx})
	if cause := context.Cause(ctx); cause != nil && status.Code(cause) == codes.PermissionDenied {
		return cause
	}
	return err
}

// endWith ends a stream when its certificate does, unless that was renewed: the
// newer one is of the same key, which the caller has shown.
func (d *Dispatcher) endWith(expires time.Time, p trust.Party, cancel context.CancelCauseFunc) (stop func()) {
	var mu sync.Mutex
	var timer *time.Timer
	stopped := false
	var arm func(time.Time)
	arm = func(at time.Time) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		timer = time.AfterFunc(time.Until(at), func() {
			if node, _, err := d.config.Trust.Node(p.Node); err == nil && node.Key == p.Key && node.Expires.After(time.Now()) {
				arm(node.Expires)
				return
			}
			cancel(status.Error(codes.PermissionDenied, "the certificate of this stream has expired"))
		})
	}
	arm(expires)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}
