package dispatch

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"timonel/gossip"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// Join gives a node its certificate for the join token's secret, or a new one
// for the one it has.
func (d *Dispatcher) Join(ctx context.Context, r *pb.JoinRequest) (*pb.JoinResponse, error) {
	if !d.joins.Allow() {
		return nil, status.Error(codes.ResourceExhausted, "too many nodes join at once: try again in a moment")
	}
	from := "?"
	if p, ok := peer.FromContext(ctx); ok {
		from = p.Addr.String()
	}
	if err := d.mayJoin(ctx, r); err != nil {
		d.log.Warn("refused a node that wants to join", "node", r.GetNodeName(), "from", from, "err", err)
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	cert, err := d.config.Bundle.SignNode(r.GetCsr(), r.GetNodeName())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	d.log.Info("a node joined", "node", r.GetNodeName(), "from", from)
	out := &pb.JoinResponse{
		Certificate: cert,
		Ca:          d.config.Bundle.CA(),
		GossipKey:   d.config.Bundle.GossipKey(),
		Controllers: d.config.Controllers(),
	}
	for _, m := range d.config.Gossip.Members() {
		if m.Role == gossip.RoleController && m.State != gossip.Left {
			out.GossipPeers = append(out.GossipPeers, m.Addr)
		}
	}
	return out, nil
}

func (d *Dispatcher) mayJoin(ctx context.Context, r *pb.JoinRequest) error {
	if id, err := pki.PeerIdentity(ctx); err == nil && id == (pki.Identity{Role: pki.RoleNode, Name: r.GetNodeName()}) {
		return nil // renewal
	}
	if !d.config.Bundle.CheckSecret(r.GetToken()) {
		return errors.New("the join token's secret is wrong: take the token of this cluster (`timonel token` on a controller)")
	}
	if d.hub.session(r.GetNodeName()) != nil {
		return errors.New("a node called " + r.GetNodeName() + " is connected already: give this one another name, or stop that one")
	}
	return nil
}
