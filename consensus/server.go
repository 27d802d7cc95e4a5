package consensus

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// Register registers the services that replicas offer one another. The server
// must let in callers with a controller's certificate only, and take messages
// (grpc.MaxRecvMsgSize) of Config.MaxCommandBytes, or 64 KiB if that is more, and 1
// KiB beside.
func (r *Replica) Register(s grpc.ServiceRegistrar) {
	pb.RegisterConsensusServer(s, &consensusServer{r: r})
	pb.RegisterMembershipServer(s, &membershipServer{r: r})
}

type consensusServer struct {
	pb.UnimplementedConsensusServer
	r *Replica
}

// Forward implements the Consensus service.
func (s *consensusServer) Forward(stream pb.Consensus_ForwardServer) error {
	answers, ended := newOutbox[*pb.ForwardResponse](), make(chan struct{})
	in := newIntake(s.r.cfg.ProposalBytes/sharers, &s.r.forwarded)
	var from atomic.Pointer[string]
	go func() { // ends with the stream
		defer close(ended)
		for in.await(stream.Context().Done(), s.r.ctx.Done()) {
			req, err := stream.Recv()
			if err != nil {
				return
			}
			if req.From != "" {
				from.Store(&req.From)
			}
			s.r.takeForwarded(stream.Context(), req, in, answers.add)
		}
	}()
	for {
		select {
		case <-answers.wake:
		case <-ended:
			return nil
		case <-s.r.ctx.Done():
			return status.Error(codes.Unavailable, "the leader shuts down, outcome unknown")
		}
		all := new(pb.ForwardResponse)
		for _, a := range answers.take() {
			all.Proposed = append(all.Proposed, a.Proposed...)
			all.Reads = append(all.Reads, a.Reads...)
		}
		if len(all.Proposed)+len(all.Reads) == 0 {
			continue // they went with those before
		}
		// Of an entry of its own term alone, which it made: whatever this replica does
		// by now, all up to there in the log of that term's leader is committed.
		if l := s.r.leads.get(); l != nil {
			if index, term := s.r.machine.position(); l.term == term {
				all.Term, all.CommitIndex = term, index
			}
		}
		if err := stream.Send(all); err != nil {
			return err
		}
		if id := from.Load(); id != nil && all.Term != 0 {
			s.r.trans.told(raft.ServerID(*id), all.Term, all.CommitIndex)
		}
	}
}

// takeForwarded deals with what another replica forwards, and answers each.
func (r *Replica) takeForwarded(ctx context.Context, req *pb.ForwardRequest, in *intake, answer func(*pb.ForwardResponse)) {
	for _, p := range req.Proposals {
		id, bytes := p.RequestId, int64(len(p.Command))+besideProposal
		in.take(bytes)
		done := func(index uint64, err error) { // it must not hold the command
			st := status.Convert(err)
			in.give(bytes)
			answer(&pb.ForwardResponse{Proposed: []*pb.Proposed{{RequestId: id, Index: index, Code: uint32(st.Code()), Message: st.Message()}}})
		}
		proposal, err := r.takeProposal(p)
		if err != nil {
			done(0, err)
			continue
		}
		proposal.then(func() {
			switch {
			case proposal.err == nil:
				done(proposal.index, nil)
			case errors.Is(proposal.err, ErrRefused):
				done(0, status.Error(codes.ResourceExhausted, strings.TrimPrefix(proposal.err.Error(), ErrRefused.Error()+": ")))
			case certainlyNotAppended(proposal.err):
				done(0, status.Errorf(codes.FailedPrecondition, "not appended: %v", proposal.err))
			default:
				done(0, status.Errorf(codes.Unavailable, "outcome unknown: %v", proposal.err))
			}
		})
	}
	for _, n := range req.Reads {
		go func() { // ends with the round, or the stream
			index, err := r.readIndex(ctx)
			st := status.Convert(err)
			answer(&pb.ForwardResponse{Reads: []*pb.ReadIndex{{Read: n, Index: index, Code: uint32(st.Code()), Message: st.Message()}}})
		}()
	}
}

// takeProposal gives a forwarded proposal to Raft, once.
func (r *Replica) takeProposal(req *pb.Proposal) (*proposal, error) {
	var id requestID
	if len(req.RequestId) != len(id) {
		return nil, status.Errorf(codes.InvalidArgument, "request_id: %d bytes, must be %d", len(req.RequestId), len(id))
	}
	if len(req.Command) > r.cfg.MaxCommandBytes {
		return nil, status.Errorf(codes.InvalidArgument, "command: %d bytes, at most %d", len(req.Command), r.cfg.MaxCommandBytes)
	}
	copy(id[:], req.RequestId)
	v, ok := r.view()
	if !ok || !v.self {
		return nil, status.Errorf(codes.FailedPrecondition, "replica %s does not lead", r.cfg.ID)
	}
	if req.Term != 0 && req.Term != v.Term {
		return nil, status.Errorf(codes.FailedPrecondition, "replica %s leads term %d, not %d", r.cfg.ID, v.Term, req.Term)
	}
	p, err := r.deduper.do(id, v.Term, req.Again, func() *proposal {
		return r.propose(id, entry{kind: kindCommand, id: id, term: v.Term, command: req.Command})
	})
	switch {
	case errors.Is(err, ErrNotLeader):
		return nil, status.Errorf(codes.FailedPrecondition, "replica %s does not lead term %d any more", r.cfg.ID, v.Term)
	case err != nil:
		return nil, status.Error(codes.Aborted, err.Error())
	}
	return p, nil
}

// readIndex is a commit index that held while a majority followed this replica.
func (r *Replica) readIndex(ctx context.Context) (uint64, error) {
	if r.leads.get() == nil {
		return 0, status.Errorf(codes.FailedPrecondition, "replica %s does not lead", r.cfg.ID)
	}
	index, err := r.local.join(ctx)
	if err == nil { // the answer then says that it is committed
		err = r.machine.waitApplied(ctx, index)
	}
	switch {
	case errors.Is(err, ErrNotLeader):
		return 0, status.Error(codes.FailedPrecondition, err.Error())
	case err != nil:
		return 0, status.Error(codes.Unavailable, err.Error())
	}
	return index, nil
}

type membershipServer struct {
	pb.UnimplementedMembershipServer
	r *Replica
}

// Hello implements the Membership service.
func (s *membershipServer) Hello(ctx context.Context, req *pb.HelloRequest) (*pb.HelloResponse, error) {
	r := s.r
	if err := r.sameCluster(req.ClusterId, req.Id); err != nil {
		return nil, err
	}
	resp := &pb.HelloResponse{
		ClusterId: r.cfg.ClusterID, Id: r.cfg.ID, Address: r.advertise, Expect: uint32(r.cfg.BootstrapExpect),
	}
	if req.Step != pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED {
		resp.Accepted, resp.Refusal = r.bootstrapStep(req)
	}
	resp.Incarnation = r.incarnation()
	if node := r.node.Load(); node != nil {
		resp.HasState = true
		resp.Term, resp.LastIndex = node.CurrentTerm(), node.LastIndex()
		resp.AppliedIndex, _ = r.machine.position()
	}
	resp.Generation = r.generation.Load()
	if l := r.leads.get(); l != nil && l.isReady() {
		resp.NotAMember = !knows(r.configuration(), req.Id)
	}
	resp.Version, resp.DiskFailed = r.cfg.Version, r.DiskErr() != nil
	resp.NewestVersion = uint32(r.cfg.NewestVersion)
	if v, ok := r.view(); ok {
		resp.LeaderId = v.ID
	}
	return resp, nil
}

// Enter implements the Membership service.
func (s *membershipServer) Enter(ctx context.Context, req *pb.EnterRequest) (*pb.EnterResponse, error) {
	r := s.r
	if err := r.sameCluster(req.ClusterId, req.Id); err != nil {
		return nil, err
	}
	if req.Id == r.cfg.ID {
		return nil, status.Errorf(codes.InvalidArgument, "a replica that calls itself %q, as this one does, wants to join: give each its own name", req.Id)
	}
	if err := checkHostPort(req.Address, false); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "address: %v", err)
	}
	err := r.admitEmpty(ctx, req.Id, req.Address, req.Incarnation)
	switch {
	case errors.Is(err, ErrNotLeader):
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	case err != nil:
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &pb.EnterResponse{Generation: r.generation.Load()}, nil
}

func (r *Replica) sameCluster(clusterID, id string) error {
	if clusterID != r.cfg.ClusterID {
		return status.Errorf(codes.PermissionDenied, "replica %q is of cluster %q, this is %q of cluster %q", id, clusterID, r.cfg.ID, r.cfg.ClusterID)
	}
	return nil
}
