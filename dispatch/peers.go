package dispatch

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/gossip"
	pb "timonel/proto/timonel/v1"
)

// Sessions tells another controller which agents are connected here.
func (d *Dispatcher) Sessions(_ *pb.SessionsRequest, stream grpc.ServerStreamingServer[pb.SessionsResponse]) error {
	ctx, _, done, err := d.serve(stream.Context())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	nodes, feed := d.hub.subscribe()
	defer d.hub.unsubscribe(feed)
	if err := stream.Send(&pb.SessionsResponse{Full: true, Nodes: nodes}); err != nil {
		return err
	}
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for {
		out := &pb.SessionsResponse{}
		select {
		case <-ctx.Done():
			return status.Error(codes.Unavailable, context.Cause(ctx).Error())
		case <-beat.C:
		case <-feed.wake:
			for node, p := range feed.take() {
				switch p {
				case up:
					out.Nodes = append(out.Nodes, node)
				case left:
					out.Goodbye = append(out.Goodbye, node)
				default:
					out.Gone = append(out.Gone, node)
				}
			}
			slices.Sort(out.Nodes)
			slices.Sort(out.Gone)
			slices.Sort(out.Goodbye)
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}

// Probe pings an agent for another controller.
func (d *Dispatcher) Probe(ctx context.Context, r *pb.ProbeRequest) (*pb.ProbeResponse, error) {
	rtt, err := d.probe(ctx, r.GetNodeName(), r.GetAddress())
	if errors.Is(err, gossip.ErrNoAnswer) {
		return &pb.ProbeResponse{}, nil
	}
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &pb.ProbeResponse{Alive: true, RttMicroseconds: rtt.Microseconds()}, nil
}

// probe pings a node's gossip where the pool knows it, else at addr.
func (d *Dispatcher) probe(ctx context.Context, node, addr string) (time.Duration, error) {
	rtt, err := d.config.Gossip.Probe(ctx, node)
	if errors.Is(err, gossip.ErrUnknownMember) && addr != "" {
		return d.config.Gossip.ProbeAddr(ctx, node, addr)
	}
	return rtt, err
}

// Status is what `timonel status` shows of this controller.
func (d *Dispatcher) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	out := d.config.Status(ctx)
	if out == nil {
		return nil, status.Error(codes.Unavailable, "this controller is starting")
	}
	out.Agents = d.hub.connected()
	return out, nil
}
