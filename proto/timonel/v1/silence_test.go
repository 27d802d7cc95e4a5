package timonelv1

import (
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

type listener struct {
	UnimplementedAgentsServer
}

func (listener) Tunnel(stream grpc.BidiStreamingServer[Chunk, Chunk]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

// TestWhoTalksAllTheTimeIsHeard: a server that is told something every moment, and has
// nothing to say, is not taken for one that is gone.
func TestWhoTalksAllTheTimeIsHeard(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(ServerOptions()...)
	RegisterAgentsServer(s, listener{})
	go func() { _ = s.Serve(l) }()
	defer s.Stop()
	conn, err := grpc.NewClient(l.Addr().String(), append(DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := NewAgentsClient(conn).Tunnel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < 2*Silence; time.Sleep(100 * time.Millisecond) {
		if err := stream.Send(&Chunk{Data: []byte("a line\n")}); err != nil {
			t.Fatalf("after %v: %v; %v", time.Since(began), err, stream.RecvMsg(new(Chunk)))
		}
	}
}
