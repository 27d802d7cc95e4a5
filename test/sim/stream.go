package sim

import (
	"context"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// NewStream implements grpc.ClientConnInterface. A message that is lost ends the
// stream, after the time that either end takes to notice; none after it arrives.
func (c *conn) NewStream(ctx context.Context, _ *grpc.StreamDesc, name string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	peer := c.from.network.find(c.to)
	if peer == nil || c.from.ctx.Err() != nil {
		return nil, status.Error(codes.Unavailable, errRefused.Error())
	}
	peer.mu.Lock()
	handler := peer.streams[name]
	peer.mu.Unlock()
	if handler == nil {
		return nil, status.Errorf(codes.Unimplemented, "no stream %s", name)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := []func() bool{
		context.AfterFunc(peer.ctx, func() { cancel(errRefused) }), context.AfterFunc(c.from.ctx, func() { cancel(errRefused) }),
	}
	// The server's context knows nothing of the client's but its end.
	serverContext, serverCancel := context.WithCancel(context.Background())
	up, down := c.from.newLane(ctx, c.to, cancel), peer.newLane(ctx, c.from.name, cancel)
	go up.carry()
	go down.carry()
	go func() {
		<-ctx.Done()
		serverCancel()
		for _, s := range stop {
			s()
		}
	}()
	go func() {
		err := handler(&serverStream{streamEnd: streamEnd{ctx: serverContext, in: up, out: down}})
		if err == nil {
			err = io.EOF
		}
		cancel(err)
	}()
	return &clientStream{streamEnd{ctx: ctx, in: down, out: up}}, nil
}

// lane carries the messages of one direction, in order.
type lane struct {
	from    *end
	to      string
	ctx     context.Context
	fail    context.CancelCauseFunc
	sent    chan proto.Message
	arrived chan proto.Message
}

func (e *end) newLane(ctx context.Context, to string, fail context.CancelCauseFunc) *lane {
	return &lane{from: e, to: to, ctx: ctx, fail: fail, sent: make(chan proto.Message, underWay), arrived: make(chan proto.Message, underWay)}
}

func (l *lane) carry() {
	for {
		var m proto.Message
		select {
		case m = <-l.sent:
		case <-l.ctx.Done():
			return
		}
		delay, lost, _ := l.from.network.leg(l.from.name, l.to)
		if lost {
			delay = patience
		}
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-l.ctx.Done():
			t.Stop()
			return
		}
		if lost {
			l.fail(errLost)
			return
		}
		select {
		case l.arrived <- m:
		case <-l.ctx.Done():
			return
		}
	}
}

// streamEnd is one end of a stream.
type streamEnd struct {
	ctx     context.Context
	in, out *lane
}

// Context implements grpc.ClientStream and grpc.ServerStream.
func (s *streamEnd) Context() context.Context { return s.ctx }

// SendMsg implements grpc.ClientStream and grpc.ServerStream.
func (s *streamEnd) SendMsg(m any) error {
	select {
	case s.out.sent <- proto.Clone(m.(proto.Message)):
		return nil
	case <-s.out.ctx.Done():
		return io.EOF
	}
}

// RecvMsg implements grpc.ClientStream and grpc.ServerStream.
func (s *streamEnd) RecvMsg(m any) error {
	select {
	case got := <-s.in.arrived:
		proto.Merge(m.(proto.Message), got)
		return nil
	case <-s.in.ctx.Done():
		err := context.Cause(s.in.ctx)
		if _, ok := status.FromError(err); ok || err == io.EOF {
			return err
		}
		return status.Error(codes.Unavailable, err.Error())
	}
}

type clientStream struct{ streamEnd }

// Header implements grpc.ClientStream.
func (*clientStream) Header() (metadata.MD, error) { return nil, nil }

// Trailer implements grpc.ClientStream.
func (*clientStream) Trailer() metadata.MD { return nil }

// CloseSend implements grpc.ClientStream.
func (s *clientStream) CloseSend() error { return nil }

type serverStream struct{ streamEnd }

// SetHeader implements grpc.ServerStream.
func (*serverStream) SetHeader(metadata.MD) error { return nil }

// SendHeader implements grpc.ServerStream.
func (*serverStream) SendHeader(metadata.MD) error { return nil }

// SetTrailer implements grpc.ServerStream.
func (*serverStream) SetTrailer(metadata.MD) {}
