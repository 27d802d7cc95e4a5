package dispatch

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"timonel/gossip"
	"timonel/internal/ports"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

// joinTimeout bounds what a join waits for the log.
const joinTimeout = 8 * time.Second

// Join gives a node its certificate for a join token, or a new one of the same key
// for the one it has. Who may is for the replicated state to say, so it is the same
// on every controller.
func (d *Dispatcher) Join(ctx context.Context, r *pb.JoinRequest) (*pb.JoinResponse, error) {
	ctx, cancel, done, err := d.serve(ctx)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	defer time.AfterFunc(joinTimeout, func() { cancel(context.DeadlineExceeded) }).Stop()
	var from net.Addr
	if p, ok := peer.FromContext(ctx); ok {
		from = p.Addr
	}
	source := ports.SourceOf(from)
	if wait, ok := d.joins.allowed(source); !ok {
		return nil, status.Errorf(codes.ResourceExhausted, "too many joins from your address were refused: try again in %s", wait.Round(time.Second))
	}
	request, err := pki.ParseNodeCSR(r.GetCsr(), r.GetNodeName())
	if err != nil {
		d.refused(source, r, err)
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	key, expires := trust.KeyOfInfo(request.PublicKeyInfo), time.Now().Add(d.config.NodeLifetime)
	again, until := d.config.NodeLifetime/50, time.Time{}
	if r.GetToken() == "" {
		until, err = d.mayRenew(ctx, r.GetNodeName(), key, expires, again)
	} else {
		var node trust.Node
		node, err = d.config.Trust.Join(ctx, trust.Join{Secret: r.GetToken(), Node: r.GetNodeName(), Key: key, Expires: expires, Within: again})
		until = node.Expires
	}
	var refused *trust.RefusedError
	switch {
	case errors.As(err, &refused), errors.Is(err, trust.ErrToken):
		d.refused(source, r, err)
		return nil, status.Error(codes.PermissionDenied, err.Error())
	case status.Code(err) != codes.Unknown && err != nil:
		return nil, err
	case err != nil:
		return nil, status.Errorf(codes.Unavailable, "the cluster could not record the join: %v", err)
	}
	ring, err := d.config.Trust.GossipRing(pki.PoolNodes)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	cert, err := d.config.Bundle.SignNodeUntil(request, until)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	switch {
	case until.Before(expires.Truncate(time.Second)):
		d.log.Debug("a node was given a certificate that it had asked for before", "node", r.GetNodeName(), "expires", until)
	case r.GetToken() == "":
		d.log.Info("a node's certificate was renewed", "node", r.GetNodeName(), "expires", until)
	default:
		d.log.Info("a node joined", "node", r.GetNodeName(), "from", source)
	}
	out := &pb.JoinResponse{
		Certificate: cert,
		Ca:          d.config.Bundle.CA(),
		GossipKey:   ring.Secrets[0],
		GossipKeys:  ring.Secrets,
		Controllers: d.config.Controllers(),
	}
	for _, m := range d.config.Gossip.Members() {
		if m.Role == gossip.RoleController && m.State != gossip.Left {
			out.GossipPeers = append(out.GossipPeers, m.Addr)
		}
	}
	return out, nil
}

// refused counts and logs a refusal.
func (d *Dispatcher) refused(source netip.Addr, r *pb.JoinRequest, err error) {
	name := r.GetNodeName()
	if len(name) > 64 {
		name = name[:64] + "…"
	}
	if log, unlogged := d.joins.failed(source); log {
		d.log.Warn("refused a node that wants to join", "node", name, "from", source, "unlogged", unlogged, "err", err)
	}
}

// mayRenew says whether the caller may have a new certificate instead of the one
// that he shows: for the same name and key, while the name is bound to that key and
// its Node exists. It returns until when that is valid.
func (d *Dispatcher) mayRenew(ctx context.Context, name, key string, expires time.Time, again time.Duration) (time.Time, error) {
	cert, err := pki.PeerCertificate(ctx)
	if err != nil {
		return time.Time{}, status.Error(codes.Unauthenticated, err.Error())
	}
	if cert == nil {
		return time.Time{}, trust.ErrToken
	}
	if id := pki.IdentityOf(cert); id != (pki.Identity{Role: pki.RoleNode, Name: name}) {
		return time.Time{}, &trust.RefusedError{Reason: "the certificate is that of " + id.String() + ", the request is for node " + name}
	}
	if trust.KeyOf(cert) != key {
		return time.Time{}, &trust.RefusedError{Reason: "a certificate is renewed for the key it is of: this request is for another"}
	}
	ctx, cancel := context.WithTimeout(ctx, barrierTimeout)
	defer cancel()
	if err := d.config.Barrier(ctx); err != nil {
		return time.Time{}, err
	}
	if err := d.config.Objects.WaitRevision(ctx, d.config.Store.View().Revision()); err != nil {
		return time.Time{}, err
	}
	if _, ok := d.config.Objects.Snapshot().Nodes().Get("", name); !ok {
		return time.Time{}, &trust.RefusedError{Reason: "there is no Node " + name + " any more: its certificate is not renewed"}
	}
	return d.config.Trust.Renew(ctx, name, key, expires, again)
}
