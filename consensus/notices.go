package consensus

import (
	"time"

	"github.com/hashicorp/raft"
)

// follower is what the transport knows of one follower in the term of this
// replica's leadership.
type follower struct {
	addr     raft.ServerAddress
	header   raft.RPCHeader
	leader   []byte
	term     uint64
	match    uint64 // last entry it acknowledged
	told     uint64 // commit index it was last sent
	sent     uint64 // messages of Raft's to it, counted
	inflight int    // pipelined messages without an answer
	bytes    int64  // of the entries of all messages without one
	wake     chan struct{}
}

// sending notes a message of the leader before it is sent.
func (t *transport) sending(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, inflight int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	args.LeaderCommitIndex = min(args.LeaderCommitIndex, t.durable())
	f := t.followers[id]
	if f == nil {
		if t.stopping {
			return
		}
		f = &follower{wake: make(chan struct{}, 1)}
		t.followers[id] = f
		t.wg.Add(1)
		go t.notices(id, f)
	}
	if args.Term > f.term {
		f.term, f.match, f.told, f.inflight, f.bytes = args.Term, 0, 0, 0, 0
	}
	f.addr, f.header, f.leader = target, args.RPCHeader, args.Leader
	f.told = max(f.told, args.LeaderCommitIndex)
	f.sent++
	f.inflight += inflight
	f.bytes += bytesOf(args)
}

// bytesOf is what a message's entries take in memory.
func bytesOf(args *raft.AppendEntriesRequest) (n int64) {
	for _, l := range args.Entries {
		n += inMemory(l)
	}
	return n
}

// flying is what the entries take that are on their way to followers, and to how many.
func (t *transport) flying() (bytes, followers int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.followers {
		if f.term == t.term {
			bytes += f.bytes
			followers++
		}
	}
	return bytes, followers
}

// answered notes a follower's answer.
func (t *transport) answered(id raft.ServerID, args *raft.AppendEntriesRequest, success bool, inflight int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.followers[id]
	if f == nil || f.term != args.Term {
		return
	}
	f.inflight = max(0, f.inflight-inflight)
	f.bytes = max(0, f.bytes-bytesOf(args))
	if !success {
		return
	}
	last := args.PrevLogEntry
	if n := len(args.Entries); n > 0 {
		last = args.Entries[n-1].Index
	}
	f.match = max(f.match, last)
	t.wake(f)
}

// told notes that a follower was sent a commit index another way.
func (t *transport) told(id raft.ServerID, term, commit uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.followers[id]; f != nil && f.term == term {
		f.told = max(f.told, commit)
	}
}

// pipelineEnded: what is on its way to a follower has no answer.
func (t *transport) pipelineEnded(id raft.ServerID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.followers[id]; f != nil {
		f.inflight, f.bytes = 0, 0
		t.wake(f)
	}
}

// applied is told by the state machine how far this replica has applied.
func (t *transport) applied(index, term uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.commit, t.term = index, term
	for _, f := range t.followers {
		t.wake(f)
	}
}

// due reports that f should be sent a notice. t.mu is held.
func (t *transport) due(f *follower) bool {
	return f.term == t.term && f.told < t.commit && f.match >= t.commit && f.inflight == 0
}

// wake starts f's notices if one is due. t.mu is held.
func (t *transport) wake(f *follower) {
	if t.due(f) {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
}

// noticeDelay is how long a commit notice waits for entries that would bring it.
const noticeDelay = 2 * time.Millisecond

// notices sends one follower its commit notices.
func (t *transport) notices(id raft.ServerID, f *follower) {
	defer t.wg.Done()
	delay := time.NewTimer(0)
	defer delay.Stop()
	for {
		select {
		case <-f.wake:
		case <-t.ctx.Done():
			return
		}
		t.mu.Lock()
		for before := uint64(0); t.due(f) && f.sent != before; {
			before = f.sent
			t.mu.Unlock()
			delay.Reset(noticeDelay)
			select {
			case <-delay.C:
			case <-t.ctx.Done():
				return
			}
			t.mu.Lock()
		}
		if !t.due(f) {
			t.mu.Unlock()
			continue
		}
		f.told = t.commit
		addr := f.addr
		args := &raft.AppendEntriesRequest{
			RPCHeader: f.header, Term: f.term, Leader: f.leader,
			PrevLogEntry: t.commit, PrevLogTerm: t.term, LeaderCommitIndex: t.commit,
		}
		t.mu.Unlock()
		// A lost notice is made good by the next message, at most CommitTimeout
		// later, so its error does not matter.
		var resp raft.AppendEntriesResponse
		_ = t.wire.AppendEntries(id, addr, args, &resp)
	}
}
