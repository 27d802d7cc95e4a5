package consensus

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// scriptedLeader answers a stream as the test says.
type scriptedLeader struct {
	pb.UnimplementedConsensusServer
	forward func(pb.Consensus_ForwardServer) error
}

func (s *scriptedLeader) Forward(stream pb.Consensus_ForwardServer) error { return s.forward(stream) }

// forwardTo returns a forwarder to a leader with that behaviour.
func forwardTo(t *testing.T, forward func(pb.Consensus_ForwardServer) error) *forwarder {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := grpc.NewServer()
	pb.RegisterConsensusServer(server, &scriptedLeader{forward: forward})
	go server.Serve(ln)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:"+ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return &forwarder{ctx: t.Context(), id: "c1",
		open: func(ctx context.Context, to string) (pb.Consensus_ForwardClient, error) {
			if to == "nobody" {
				return nil, errors.New("no such peer")
			}
			return pb.NewConsensusClient(conn).Forward(ctx)
		},
		learn: func(string, *pb.ForwardResponse) {},
	}
}

func newProposal(size int) *pb.Proposal {
	id := newRequestID()
	return &pb.Proposal{RequestId: id[:], Command: make([]byte, size)}
}

// newStay is a place in a room of its own.
func newStay(t *testing.T) *stay {
	t.Helper()
	s, err := newRoom(1<<20).enter(t.Context(), nil, 1)
	must(t, err)
	return s
}

func answerOf(t *testing.T, answer <-chan forwarded) forwarded {
	t.Helper()
	select {
	case a := <-answer:
		return a
	case <-time.After(10 * time.Second):
		t.Fatal("no answer came")
		return forwarded{}
	}
}

// What left this replica may have been appended, whatever ended the stream; what did
// not leave it was not. The next proposal opens another stream.
func TestForwardStreamBreaks(t *testing.T) {
	t.Parallel()
	broken := true
	f := forwardTo(t, func(s pb.Consensus_ForwardServer) error {
		for {
			req, err := s.Recv()
			if err != nil {
				return err
			}
			if broken {
				broken = false
				return status.Error(codes.ResourceExhausted, "a message is too large")
			}
			for _, p := range req.Proposals {
				s.Send(&pb.ForwardResponse{Proposed: []*pb.Proposed{{RequestId: p.RequestId, Index: 7}}})
			}
			for _, n := range req.Reads {
				s.Send(&pb.ForwardResponse{Reads: []*pb.ReadIndex{{Read: n, Code: uint32(codes.FailedPrecondition), Message: "it does not lead"}}})
			}
		}
	})
	answer, _ := f.propose("c2", newProposal(10), newStay(t))
	if a := answerOf(t, answer); status.Code(a.err) != codes.Unavailable || a.unsent {
		t.Errorf("%+v, want that it may have been appended", a)
	}
	answer, _ = f.propose("c2", newProposal(10), newStay(t))
	if a := answerOf(t, answer); a.err != nil || a.index != 7 {
		t.Errorf("on the next stream: %+v", a)
	}
	if _, err := f.readIndex(t.Context(), "c2"); status.Code(errors.Unwrap(err)) != codes.FailedPrecondition {
		t.Errorf("a read: %v", err)
	}
	answer, _ = f.propose("nobody", newProposal(10), newStay(t))
	if a := answerOf(t, answer); status.Code(a.err) != codes.Unavailable || !a.unsent {
		t.Errorf("%+v, want that it was not sent", a)
	}
}

// Proposals that come faster than they go out share messages, but for large ones, which
// come after the small ones.
func TestForwardShares(t *testing.T) {
	t.Parallel()
	hold := make(chan struct{})
	sizes := make(chan []int, 100)
	f := forwardTo(t, func(s pb.Consensus_ForwardServer) error {
		for {
			req, err := s.Recv()
			if err != nil {
				return err
			}
			if req.From != "c1" && len(sizes) == 0 {
				return status.Error(codes.InvalidArgument, "the first message does not say from whom it is")
			}
			var all []int
			resp := new(pb.ForwardResponse)
			for _, p := range req.Proposals {
				all = append(all, len(p.Command))
				resp.Proposed = append(resp.Proposed, &pb.Proposed{RequestId: p.RequestId})
			}
			sizes <- all
			s.Send(resp)
		}
	})
	inner := f.open
	f.open = func(ctx context.Context, to string) (pb.Consensus_ForwardClient, error) {
		<-hold
		return inner(ctx, to)
	}
	var answers []<-chan forwarded
	for _, size := range []int{100, 200, fullMessage, 10, fullMessage + 1, 20} {
		answer, _ := f.propose("c2", newProposal(size), newStay(t))
		answers = append(answers, answer)
	}
	close(hold)
	for _, answer := range answers {
		if a := answerOf(t, answer); a.err != nil {
			t.Fatal(a.err)
		}
	}
	for i, want := range [][]int{{100, 200, 10, 20}, {fullMessage}, {fullMessage + 1}} {
		got := <-sizes
		if len(got) != len(want) || got[0] != want[0] {
			t.Errorf("message %d holds commands of %v bytes, want %v", i, got, want)
		}
	}
}

// A replica that has no data yet, and no Raft, answers that it does not lead.
func TestForwardToOneWithoutData(t *testing.T) {
	t.Parallel()
	f := forwardTo(t, (&consensusServer{r: &Replica{ctx: t.Context()}}).Forward)
	answer, _ := f.propose("c2", newProposal(0), newStay(t))
	if a := answerOf(t, answer); status.Code(a.err) != codes.FailedPrecondition {
		t.Errorf("%+v", a)
	}
	if _, err := f.readIndex(t.Context(), "c2"); status.Code(errors.Unwrap(err)) != codes.FailedPrecondition {
		t.Errorf("a read: %v", err)
	}
}
