package consensus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// transport is Raft's network transport with six things of ours.
//
// Commit notices: Raft's leader tells followers a new commit index with the
// next entries, or after CommitTimeout, so a lone write would reach followers'
// state machines some 50 ms late. The transport sees which entries each
// follower has acknowledged and, when the leader has applied one, nothing
// else is on its way to a follower that has it, and no entry comes within
// noticeDelay, sends that follower an AppendEntries without entries, as the leader
// itself might. A follower at which somebody waits is told sooner, with what answers
// what it forwarded: see learn.
//
// Patience with a follower that is down: see awaitPeer.
//
// Durability: followers are told of no commit that this replica has not on disk, and
// no other leader is told that it has an entry before (see disk.StoreLogs).
//
// Heartbeats: see SetHeartbeatHandler.
//
// Small messages: see portion.go.
//
// Injected elections: elect makes the local Raft stand for election now (see
// deathwatch).
type transport struct {
	wire
	rpcs  chan raft.RPC
	beats chan raft.RPC // heartbeats that are answered already
	// commits is for messages about commits that came another way.
	commits chan *raft.AppendEntriesRequest
	// leads reports that this replica leads the term and the peer is a member.
	leads func(term uint64, id raft.ServerID) bool
	// holds reports that a snapshot sent to this replica brings nothing new.
	holds func(*raft.InstallSnapshotRequest) bool
	// shorten takes from a leader's message what this replica has applied, if Raft
	// could not tell that it has it.
	shorten func(*raft.AppendEntriesRequest)
	// contradicted returns the last entry of a snapshot that contradicts what Raft
	// remembers of its log; index 0 for none.
	contradicted func() (index, term uint64)

	// follows reports that this replica follows the sender in the message's term, and
	// the last index of its log.
	follows func(*raft.AppendEntriesRequest) (last uint64, ok bool)
	// heard is told of each message of a leader that this replica follows; confirmed of
	// each member that answered a heartbeat that was sent at a time of clock in a term.
	heard     func()
	confirmed func(id raft.ServerID, term uint64, sent int64)
	clock     func() int64
	// durable is the last index of this replica's log that is on disk; flush waits
	// until all of it is.
	durable func() uint64
	flush   func() error
	// fill and portions keep messages to followers small: see disk.fill.
	fill     func(*raft.AppendEntriesRequest) error
	portions func(*raft.AppendEntriesRequest, func(*raft.AppendEntriesRequest) error) error

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	commit    uint64 // last index that this replica applied
	term      uint64 // and its term
	followers map[raft.ServerID]*follower
	// known is the last message about commits that came another way, passed the last
	// index of the entries that were given to Raft after it.
	known    *raft.AppendEntriesRequest
	passed   uint64
	reached  map[raft.ServerID]time.Time // last heartbeat that was answered
	stopping bool
}

func newTransport(inner wire) *transport {
	t := &transport{
		wire: inner, rpcs: make(chan raft.RPC), leads: func(uint64, raft.ServerID) bool { return false },
		holds:        func(*raft.InstallSnapshotRequest) bool { return false },
		contradicted: func() (uint64, uint64) { return 0, 0 }, shorten: func(*raft.AppendEntriesRequest) {},
		durable: func() uint64 { return math.MaxUint64 }, flush: func() error { return nil },
		fill: func(*raft.AppendEntriesRequest) error { return nil },
		portions: func(args *raft.AppendEntriesRequest, send func(*raft.AppendEntriesRequest) error) error {
			return send(args)
		},
		follows: func(*raft.AppendEntriesRequest) (uint64, bool) { return 0, false },
		heard:   func() {}, confirmed: func(raft.ServerID, uint64, int64) {}, clock: func() int64 { return 0 }, beats: make(chan raft.RPC, 1), commits: make(chan *raft.AppendEntriesRequest, 1),
		followers: map[raft.ServerID]*follower{}, reached: map[raft.ServerID]time.Time{},
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// start takes messages in. The callbacks must be set before.
func (t *transport) start() {
	t.wg.Add(2)
	go t.receive()
	go t.passHeartbeats()
}

// SetHeartbeatHandler implements raft.Transport. Raft's own handler would deal with
// heartbeats beside its main loop, so that these do not wait for the disk, and race
// with it: a late one of the leader that hands over can set the term of its heir, who
// has just won, back (hashicorp/raft 1.8, found by test/sim). Here a heartbeat that
// changes nothing is answered at once, and the main loop sees it when it can; all
// others wait for the main loop.
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) { t.wire.SetHeartbeatHandler(t.beat) }

func (t *transport) beat(rpc raft.RPC) {
	req := rpc.Command.(*raft.AppendEntriesRequest)
	last, ok := t.follows(req)
	if !ok {
		select {
		case t.rpcs <- rpc:
		case <-t.ctx.Done():
		}
		return
	}
	t.heard()
	rpc.Respond(&raft.AppendEntriesResponse{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}, Term: req.Term, LastLog: last, Success: true}, nil)
	select {
	case t.beats <- raft.RPC{Command: req, RespChan: make(chan raft.RPCResponse, 1)}:
	default: // one waits already
	}
}

// passHeartbeats gives the main loop heartbeats that are answered already, and what
// was learned about commits.
func (t *transport) passHeartbeats() {
	defer t.wg.Done()
	for {
		var rpc raft.RPC
		select {
		case rpc = <-t.beats:
		case req := <-t.commits:
			rpc = raft.RPC{Command: req, RespChan: make(chan raft.RPCResponse, 1)}
		case <-t.ctx.Done():
			return
		}
		if _, ok := t.follows(rpc.Command.(*raft.AppendEntriesRequest)); !ok {
			continue // it does not any more
		}
		select {
		case t.rpcs <- rpc:
		case <-t.ctx.Done():
			return
		}
	}
}

// learn takes in what the leader has committed, as the message that it would send,
// which came with an answer to something else. It may come before the entry itself
// does: see raise.
func (t *transport) learn(req *raft.AppendEntriesRequest) {
	last, ok := t.follows(req)
	t.mu.Lock()
	if t.known == nil || t.known.Term < req.Term || t.known.Term == req.Term && t.known.LeaderCommitIndex < req.LeaderCommitIndex {
		t.known = req
	}
	ready := ok && max(last, t.passed) >= req.PrevLogEntry
	t.mu.Unlock()
	if !ready {
		return
	}
	select {
	case t.rpcs <- raft.RPC{Command: req, RespChan: make(chan raft.RPCResponse, 1)}:
		return
	default: // Raft is busy
	}
	for {
		select {
		case t.commits <- req:
			return
		default:
		}
		select {
		case old := <-t.commits: // the later of the two will do
			if old.Term > req.Term || old.Term == req.Term && old.LeaderCommitIndex > req.LeaderCommitIndex {
				req = old
			}
		default:
		}
	}
}

// raise lets a message with entries say what was learned to be committed of them.
func (t *transport) raise(req *raft.AppendEntriesRequest) {
	if len(req.Entries) == 0 {
		return
	}
	last := req.Entries[len(req.Entries)-1].Index
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.passed = last; t.known != nil && t.known.Term == req.Term && string(t.known.ID) == string(req.ID) {
		req.LeaderCommitIndex = max(req.LeaderCommitIndex, min(t.known.LeaderCommitIndex, last))
	}
}

// receive gives incoming messages to Raft.
func (t *transport) receive() {
	defer t.wg.Done()
	for {
		select {
		case rpc := <-t.wire.Consumer():
			if req, ok := rpc.Command.(*raft.AppendEntriesRequest); ok {
				t.shorten(req)
				t.raise(req)
				if _, ok := t.follows(req); ok {
					t.heard()
				}
				// What it may acknowledge was appended here before it was sent.
				if err := t.flush(); err != nil {
					rpc.Respond(nil, err)
					continue
				}
			}
			if req, ok := rpc.Command.(*raft.InstallSnapshotRequest); ok {
				t.follow(req)
				if t.holds(req) {
					t.wg.Add(1)
					go t.skipSnapshot(rpc, req)
					continue
				}
				rpc = t.watchSnapshot(rpc, req)
			}
			select {
			case t.rpcs <- rpc:
			case <-t.ctx.Done():
				return
			}
		case <-t.ctx.Done():
			return
		}
	}
}

// skipSnapshot acknowledges a snapshot without installing it. Raft would put the
// state back to it, and forward again only with the next commit.
func (t *transport) skipSnapshot(rpc raft.RPC, req *raft.InstallSnapshotRequest) {
	defer t.wg.Done()
	_, err := io.Copy(io.Discard, rpc.Reader)
	t.forget(req)
	rpc.Respond(&raft.InstallSnapshotResponse{Term: req.Term, Success: err == nil}, err)
}

// watchSnapshot has a snapshot's answer wait until Raft has forgotten the log that
// it contradicts.
func (t *transport) watchSnapshot(rpc raft.RPC, req *raft.InstallSnapshotRequest) raft.RPC {
	answers, to := make(chan raft.RPCResponse, 1), rpc.RespChan
	rpc.RespChan = answers
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		select {
		case a := <-answers:
			t.forget(req)
			to <- a // has room: whoever asks waits for one answer
		case <-t.ctx.Done():
		}
	}()
	return rpc
}

// follow has Raft follow the sender of a snapshot, as after a heartbeat of its: from
// then on no message of an older leader changes the log.
func (t *transport) follow(req *raft.InstallSnapshotRequest) {
	t.give(&raft.AppendEntriesRequest{RPCHeader: req.RPCHeader, Term: req.Term, Leader: req.Leader})
}

// forget makes Raft forget the end of a log that was removed because a snapshot
// contradicts it: Raft keeps its index and term in memory, and would refuse what
// the leader sends after the snapshot. The snapshot's last entry is given to it,
// as if by the leader, in the place of the one it remembers. What the entry holds
// does not matter: it counts as applied, and as the one before it is missing, it
// is never sent to anybody.
func (t *transport) forget(req *raft.InstallSnapshotRequest) {
	index, term := t.contradicted()
	if index == 0 {
		return
	}
	t.give(&raft.AppendEntriesRequest{
		RPCHeader: req.RPCHeader, Term: req.Term, Leader: req.Leader,
		Entries: []*raft.Log{{Index: index, Term: term, Type: raft.LogNoop}},
	})
}

// give has Raft's main loop deal with a message, and waits until it has.
func (t *transport) give(req *raft.AppendEntriesRequest) {
	answer := make(chan raft.RPCResponse, 1)
	select {
	case t.rpcs <- raft.RPC{RespChan: answer, Command: req}:
	case <-t.ctx.Done():
		return
	}
	select {
	case <-answer:
	case <-t.ctx.Done():
	}
}

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC { return t.rpcs }

// Close implements raft.WithClose.
func (t *transport) Close() error {
	t.mu.Lock()
	t.stopping = true
	t.mu.Unlock()
	t.cancel()
	err := t.wire.Close()
	t.wire.CloseStreams()
	t.wg.Wait()
	return err
}

// elect makes the local Raft a candidate of the next term at once, as the
// leader's TimeoutNow message does in a leadership transfer.
func (t *transport) elect() error {
	answer := make(chan raft.RPCResponse, 1)
	rpc := raft.RPC{Command: &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}}, RespChan: answer}
	select {
	case t.rpcs <- rpc:
	case <-t.ctx.Done():
		return ErrClosed
	case <-time.After(time.Second):
		return errors.New("Raft is busy")
	}
	select {
	case a := <-answer:
		return a.Error
	case <-t.ctx.Done():
		return ErrClosed
	}
}

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if args.PrevLogEntry == 0 && len(args.Entries) == 0 && args.LeaderCommitIndex == 0 { // heartbeat
		sent := t.clock()
		err := t.wire.AppendEntries(id, target, args, resp)
		if err == nil {
			t.mu.Lock()
			t.reached[id] = time.Now()
			t.mu.Unlock()
			if resp.Success && resp.Term == args.Term {
				t.confirmed(id, args.Term, sent)
			}
		}
		return err
	}
	if err := t.fill(args); err != nil {
		return err
	}
	t.sending(id, target, args, 0)
	err := t.wire.AppendEntries(id, target, args, resp)
	if err != nil && t.awaitPeer(id, args.Term, time.Now()) {
		err = t.wire.AppendEntries(id, target, args, resp)
	}
	t.answered(id, args, err == nil && resp.Success, 0)
	return err
}

// sinceReached returns how many microseconds ago the peer answered a heartbeat,
// -1 if it never did.
func (t *transport) sinceReached(id raft.ServerID) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	at, ok := t.reached[id]
	if !ok {
		return -1
	}
	return time.Since(at).Microseconds()
}

// heartbeat sends one of the leader's heartbeats and reports whether the peer
// follows it. The answer is to this one: a connection on which one did not come in time
// is closed.
func (t *transport) heartbeat(to raft.Server, id, addr string, term uint64) (follows bool, err error) {
	self := []byte(encodeAddr(raft.ServerID(id), raft.ServerAddress(addr)))
	req := raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: self},
		Term:      term, Leader: self,
	}
	var resp raft.AppendEntriesResponse
	if err := t.wire.AppendEntries(to.ID, to.Address, &req, &resp); err != nil {
		return false, err
	}
	return resp.Success && resp.Term == term, nil
}

// holdsLog reports that a follower acknowledged the log up to an index in the term,
// and answered a heartbeat not long ago.
func (t *transport) holdsLog(id raft.ServerID, term, index uint64, within time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.followers[id]
	return f != nil && f.term == term && f.match >= index && time.Since(t.reached[id]) < within
}

// standForElection makes a peer a candidate of the next term at once.
func (t *transport) standForElection(to raft.Server, id, addr string) error {
	req := raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(encodeAddr(raft.ServerID(id), raft.ServerAddress(addr))),
	}}
	if err := t.wire.TimeoutNow(to.ID, to.Address, &req, new(raft.TimeoutNowResponse)); err != nil {
		return fmt.Errorf("ask %s to stand for election: %w", to.ID, err)
	}
	return nil
}

// awaitPeer waits until a heartbeat reaches the peer again and reports whether
// one did. Raft backs off from a follower that is down up to 10 s per try, and
// would leave it behind for as long when it is back; so a failed try is not
// reported while the follower is down.
func (t *transport) awaitPeer(id raft.ServerID, term uint64, since time.Time) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for t.leads(term, id) {
		t.mu.Lock()
		back := t.reached[id].After(since)
		t.mu.Unlock()
		if back {
			return true
		}
		select {
		case <-tick.C:
		case <-t.ctx.Done():
			return false
		}
	}
	return false
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	inner, err := t.wire.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopping {
		inner.Close()
		return nil, raft.ErrPipelineShutdown
	}
	if f := t.followers[id]; f != nil {
		f.inflight, f.bytes = 0, 0
	}
	p := &pipeline{AppendPipeline: inner, t: t, id: id, target: target, done: make(chan raft.AppendFuture), closed: make(chan struct{})}
	t.wg.Add(1)
	go p.forward()
	return p, nil
}

// pipeline notes what goes through one of Raft's pipelines.
type pipeline struct {
	raft.AppendPipeline
	t      *transport
	id     raft.ServerID
	target raft.ServerAddress
	done   chan raft.AppendFuture
	once   sync.Once
	closed chan struct{}
}

// AppendEntries implements raft.AppendPipeline.
// Each part has an answer of its own, which Raft takes from Consumer.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, _ *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	var last raft.AppendFuture
	err := p.t.portions(args, func(part *raft.AppendEntriesRequest) (err error) {
		p.t.sending(p.id, p.target, part, 1)
		last, err = p.AppendPipeline.AppendEntries(part, new(raft.AppendEntriesResponse))
		return err
	})
	return last, err
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.done }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() {
		close(p.closed)
		p.t.pipelineEnded(p.id)
	})
	return p.AppendPipeline.Close()
}

// forward hands answers on. Raft takes none after one that is not a success; the
// pipeline ends with it then, for Raft's sender would wait for room in it, for ever,
// and that follower get no entries any more (hashicorp/raft 1.8, pipelineDecode and
// netPipeline.AppendEntries, found by test/chaos).
func (p *pipeline) forward() {
	defer p.t.wg.Done()
	for {
		select {
		case f := <-p.AppendPipeline.Consumer():
			success := f.Error() == nil && f.Response().Success
			p.t.answered(p.id, f.Request(), success, 1)
			select {
			case p.done <- f:
			case <-p.closed:
				return
			}
			if !success {
				p.AppendPipeline.Close()
				return
			}
		case <-p.closed:
			return
		}
	}
}
