package dispatch

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// Network tells an agent what every node knows of the cluster's network.
func (d *Dispatcher) Network(stream grpc.BidiStreamingServer[pb.NetworkRequest, pb.NetworkBatch]) error {
	ctx, cancel, done, err := d.serve(stream.Context())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	id, err := caller(ctx)
	if err != nil {
		return err
	}
	if id.Role != pki.RoleNode {
		return status.Errorf(codes.PermissionDenied, "network items are told to nodes; the caller is %s", id)
	}
	lost, err := d.config.InTouch()
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	if err := d.networkCaughtUp(ctx); err != nil {
		return err
	}
	d.active.Go(func() {
		select {
		case <-lost:
			cancel(errLost)
		case <-ctx.Done():
		}
	})
	err = d.network.Serve(ctx, id.Name, stream, d.active.Go)
	if errors.Is(err, errEnded) || errors.Is(err, errLost) {
		return status.Error(codes.Unavailable, err.Error())
	}
	return err
}

// networkCaughtUp waits until what nodes are told here is not behind the cluster, so
// that no agent goes back in time.
func (d *Dispatcher) networkCaughtUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, networkTimeout)
	defer cancel()
	if err := d.config.Barrier(ctx); err != nil {
		return status.Errorf(codes.Unavailable, "controller %s does not know whether it is up to date: %v", d.config.Name, err)
	}
	revision := d.config.Store.View().Revision()
	err := d.config.Objects.WaitRevision(ctx, revision)
	if err == nil {
		err = d.network.Wait(ctx, revision)
	}
	if err != nil {
		return status.Errorf(codes.Unavailable, "controller %s is still loading: %v", d.config.Name, err)
	}
	return nil
}
