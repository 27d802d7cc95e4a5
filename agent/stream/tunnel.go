package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"google.golang.org/grpc/metadata"

	pb "timonel/proto/timonel/v1"
)

// tunnel dials back for one TunnelOpen and carries its bytes until either side
// closes.
func (s *session) tunnel(ctx context.Context, id, target string) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.carrier.Tunnel(metadata.AppendToOutgoingContext(ctx, pb.TunnelIDKey, id))
	if err != nil {
		s.client.log.Warn("answer a tunnel", "id", id, "error", short(err))
		return
	}
	// A pipe has the deadlines that an HTTP server needs of a connection.
	near, far := net.Pipe()
	s.client.cfg.Tunnel(target, far)

	received := make(chan struct{})
	go func() {
		defer close(received)
		defer near.Close()
		for {
			chunk, err := stream.Recv()
			if err != nil {
				return
			}
			if _, err := near.Write(chunk.Data); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, pb.TunnelChunk)
	for {
		n, err := near.Read(buf)
		if n > 0 {
			if stream.Send(&pb.Chunk{Data: buf[:n]}) != nil {
				break
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
				s.client.log.Debug("tunnel", "id", id, "error", err)
			}
			break
		}
	}
	_ = stream.CloseSend()
	near.Close()
	// What was sent last is delivered before the stream is torn down.
	select {
	case <-received:
	case <-time.After(5 * time.Second):
	}
}
