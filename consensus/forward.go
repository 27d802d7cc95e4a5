package consensus

import (
	"context"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// forwarder sends this replica's writes and reads to the leader: over one stream,
// several in a message when they come faster than it goes out. A call for each would
// cost more than all else that forwarding takes.
type forwarder struct {
	ctx  context.Context // ends with the replica
	open func(ctx context.Context, to string) (pb.Consensus_ForwardClient, error)
	// learn is told with each answer what the leader has committed.
	learn func(from string, a *pb.ForwardResponse)
	id    string // of this replica

	mu   sync.Mutex
	link *link
}

// forwarded is what the leader says of a proposal or a read.
type forwarded struct {
	index  uint64
	err    error // a gRPC status
	unsent bool  // it never left this replica
}

// link is one stream to one leader.
type link struct {
	to     string
	cancel context.CancelFunc
	out    outbox[outgoing]

	mu        sync.Mutex
	err       error // why it ended
	read      uint64
	proposals map[requestID]chan<- forwarded // that wait for an answer
	reads     map[uint64]chan<- forwarded
}

// outgoing is a proposal, or the number of a read.
type outgoing struct {
	proposal *pb.Proposal
	read     uint64
	place    *stay // of a proposal, until it is sent
}

// small reports that it goes before large proposals.
func (o outgoing) small() bool { return o.proposal == nil || len(o.proposal.Command) <= smallCommand }

// sent gives up what only sending needs.
func (o outgoing) sent() {
	if o.place != nil {
		o.place.leave()
	}
}

// fullMessage is how many bytes proposals that share a message take, with
// besideCommand for what each has beside its command.
const fullMessage, besideCommand = 64 << 10, 64

// toLeader returns the stream to a leader, which it opens if there is none.
func (f *forwarder) toLeader(id string) *link {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.link != nil {
		if f.link.to == id && f.link.ended() == nil {
			return f.link
		}
		f.link.cancel()
	}
	ctx, cancel := context.WithCancel(f.ctx)
	l := &link{
		to: id, cancel: cancel, out: newOutbox[outgoing](),
		proposals: map[requestID]chan<- forwarded{}, reads: map[uint64]chan<- forwarded{},
	}
	f.link = l
	go func() { // ends with the stream
		defer cancel()
		var rest []outgoing
		stream, err := f.open(ctx, id)
		if err == nil {
			rest, err = l.run(ctx, stream, f.id, f.learn)
		}
		l.end(rest, err)
	}()
	return l
}

// openForward opens a stream to the leader.
func (r *Replica) openForward(ctx context.Context, to string) (pb.Consensus_ForwardClient, error) {
	conn, err := r.cfg.PeerConn(ctx, to)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return pb.NewConsensusClient(conn).Forward(ctx)
}

// learnCommit has Raft know what the leader has committed.
func (r *Replica) learnCommit(from string, a *pb.ForwardResponse) {
	node := r.node.Load()
	if node == nil || a.CommitIndex <= node.CommitIndex() {
		return
	}
	addr, id := node.LeaderWithID()
	if string(id) != from {
		return
	}
	r.trans.learn(&raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(addr)},
		Term:      a.Term, Leader: []byte(addr),
		PrevLogEntry: a.CommitIndex, PrevLogTerm: a.Term, LeaderCommitIndex: a.CommitIndex,
	})
}

// propose forwards a proposal. One answer comes, unless forget is called before.
func (f *forwarder) propose(to string, p *pb.Proposal, place *stay) (answer <-chan forwarded, forget func()) {
	l, id, c := f.toLeader(to), requestID(p.RequestId), make(chan forwarded, 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		c <- forwarded{err: l.err, unsent: true}
		return c, func() {}
	}
	l.proposals[id] = c
	place.keep()
	l.out.add(outgoing{proposal: p, place: place})
	return c, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.proposals, id)
	}
}

// readIndex asks a leader for a commit index that a read has to wait for.
func (f *forwarder) readIndex(ctx context.Context, to string) (uint64, error) {
	l, c := f.toLeader(to), make(chan forwarded, 1)
	l.mu.Lock()
	err := l.err
	l.read++
	n := l.read
	if err == nil {
		l.reads[n] = c
		l.out.add(outgoing{read: n})
	}
	l.mu.Unlock()
	var a forwarded
	if err == nil {
		select {
		case a = <-c:
			err = a.err
		case <-ctx.Done():
			l.mu.Lock()
			delete(l.reads, n)
			l.mu.Unlock()
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("ask the leader %s: %w", to, err)
	}
	return a.index, nil
}

// run sends what is put out, until the stream or ctx ends: reads and small proposals
// first, and between these one large proposal after the other. It returns what it has
// taken and not sent, and why it ended.
func (l *link) run(ctx context.Context, stream pb.Consensus_ForwardClient, from string, learn func(string, *pb.ForwardResponse)) ([]outgoing, error) {
	received := make(chan error, 1)
	go func() { received <- l.receive(stream, learn) }() // ends with the stream, and so with ctx
	for {
		select {
		case <-l.out.wake:
		case err := <-received:
			return nil, err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		var small, large []outgoing
		for {
			for _, o := range l.out.take() {
				if o.small() {
					small = append(small, o)
				} else {
					large = append(large, o)
				}
			}
			if len(small)+len(large) == 0 {
				break
			}
			var err error
			if small, err = sendOne(stream, &from, small); err == nil {
				large, err = sendOne(stream, &from, large)
			}
			if err != nil {
				return append(small, large...), <-received // which says why
			}
		}
	}
}

// sendOne sends a message of the first, as many as it has room for, and returns the rest.
func sendOne(stream pb.Consensus_ForwardClient, from *string, out []outgoing) (rest []outgoing, err error) {
	if len(out) == 0 {
		return out, nil
	}
	req, n := &pb.ForwardRequest{From: *from}, 0
	*from = ""
	for size := 0; n < len(out); n++ {
		p := out[n].proposal
		if p == nil {
			req.Reads = append(req.Reads, out[n].read)
			continue
		}
		if size += len(p.Command) + besideCommand; size > fullMessage && len(req.Proposals) > 0 {
			break
		}
		req.Proposals = append(req.Proposals, p)
	}
	err = stream.Send(req)
	for i := range out[:n] {
		out[i].sent()
		out[i] = outgoing{}
	}
	return out[n:], err
}

// receive gives the leader's answers to who waits for them.
func (l *link) receive(stream pb.Consensus_ForwardClient, learn func(string, *pb.ForwardResponse)) error {
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if resp.Term != 0 {
			learn(l.to, resp)
		}
		l.mu.Lock()
		for _, a := range resp.Proposed {
			if len(a.RequestId) == len(requestID{}) {
				tell(l.proposals, requestID(a.RequestId), forwarded{index: a.Index, err: status.Error(codes.Code(a.Code), a.Message)})
			}
		}
		for _, a := range resp.Reads {
			tell(l.reads, a.Read, forwarded{index: a.Index, err: status.Error(codes.Code(a.Code), a.Message)})
		}
		l.mu.Unlock()
	}
}

// tell gives an answer to who waits for it, if anybody does.
func tell[K comparable](waiting map[K]chan<- forwarded, k K, a forwarded) {
	if c, ok := waiting[k]; ok {
		delete(waiting, k)
		c <- a // has room
	}
}

// end tells all who wait that the stream has ended. rest was not sent.
func (l *link) end(rest []outgoing, err error) {
	// What was sent before may have been appended, whatever has ended the stream.
	err = status.Errorf(codes.Unavailable, "the stream to %s ended: %v", l.to, err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	for _, o := range append(rest, l.out.take()...) {
		o.sent()
		if o.proposal != nil {
			tell(l.proposals, requestID(o.proposal.RequestId), forwarded{err: err, unsent: true})
		}
	}
	for id := range l.proposals {
		tell(l.proposals, id, forwarded{err: err})
	}
	for n := range l.reads {
		tell(l.reads, n, forwarded{err: err})
	}
}

// ended is why the stream has ended, nil if it has not.
func (l *link) ended() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// outbox holds what one goroutine is to send, in the order it came.
type outbox[T any] struct {
	wake chan struct{} // something came

	mu    sync.Mutex
	items []T
}

func newOutbox[T any]() outbox[T] { return outbox[T]{wake: make(chan struct{}, 1)} }

func (o *outbox[T]) add(item T) {
	o.mu.Lock()
	o.items = append(o.items, item)
	o.mu.Unlock()
	poke(o.wake)
}

// take returns all that came, and forgets it.
func (o *outbox[T]) take() []T {
	o.mu.Lock()
	defer o.mu.Unlock()
	items := o.items
	o.items = nil
	return items
}
