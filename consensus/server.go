package consensus

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// Register registers the services that replicas offer one another. The server
// must let in callers with a controller's certificate only, and take messages
// (grpc.MaxRecvMsgSize) of Config.MaxCommandBytes and 1 KiB more.
func (r *Replica) Register(s grpc.ServiceRegistrar) {
	pb.RegisterConsensusServer(s, &consensusServer{r: r})
	pb.RegisterMembershipServer(s, &membershipServer{r: r})
}

type consensusServer struct {
	pb.UnimplementedConsensusServer
	r *Replica
}

// Propose implements the Consensus service.
func (s *consensusServer) Propose(ctx context.Context, req *pb.ProposeRequest) (*pb.ProposeResponse, error) {
	r := s.r
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
	p := r.deduper.do(id, func() *proposal {
		return r.propose(id, entry{kind: kindCommand, id: id, term: v.Term, command: req.Command})
	})
	select {
	case <-p.settled:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-r.ctx.Done():
		return nil, status.Error(codes.Unavailable, "the leader shuts down, outcome unknown")
	}
	switch {
	case p.err == nil:
		return &pb.ProposeResponse{Index: p.index, Term: p.term}, nil
	case certainlyNotAppended(p.err):
		return nil, status.Errorf(codes.FailedPrecondition, "not appended: %v", p.err)
	}
	return nil, status.Errorf(codes.Unavailable, "outcome unknown: %v", p.err)
}

// ReadIndex implements the Consensus service.
func (s *consensusServer) ReadIndex(ctx context.Context, _ *pb.ReadIndexRequest) (*pb.ReadIndexResponse, error) {
	l := s.r.leads.get()
	if l == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "replica %s does not lead", s.r.cfg.ID)
	}
	index, err := s.r.local.join(ctx)
	if err != nil {
		code := codes.Unavailable
		if errors.Is(err, ErrNotLeader) {
			code = codes.FailedPrecondition
		}
		return nil, status.Error(code, err.Error())
	}
	return &pb.ReadIndexResponse{Index: index, Term: l.term}, nil
}

// deduper recognises a request that is forwarded again because its first answer
// was lost. A leader that died leads another term when it is back, and entries
// are fenced to theirs, so memory of this process is enough.
type deduper struct {
	keep time.Duration // for at least how long a request is known

	mu       sync.Mutex
	new, old map[requestID]*proposal
	turned   time.Time
}

func (d *deduper) do(id requestID, propose func() *proposal) *proposal {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); now.Sub(d.turned) > d.keep || d.new == nil {
		d.old, d.new, d.turned = d.new, map[requestID]*proposal{}, now
	}
	if p := d.new[id]; p != nil {
		return p
	}
	if p := d.old[id]; p != nil {
		return p
	}
	p := propose()
	d.new[id] = p
	return p
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
