package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Leader says who leads. The zero value: nobody is known to.
type Leader struct {
	// ID is the leading replica's name.
	ID string
	// Addr is the host:port of its Raft listener.
	Addr string
	// Term is the term it leads.
	Term uint64
}

// leadership is one term that this replica leads.
type leadership struct {
	term   uint64
	ctx    context.Context // ends with the leadership
	cancel context.CancelCauseFunc
	ready  chan struct{} // closed when all earlier entries are applied here
	rounds *voterRounds  // for reads
}

func (l *leadership) isReady() bool {
	select {
	case <-l.ready:
		return l.ctx.Err() == nil
	default:
		return false
	}
}

// leaderships holds the current one, nil while this replica does not lead.
type leaderships struct {
	mu      sync.Mutex
	current *leadership
}

func (l *leaderships) get() *leadership {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current
}

func (l *leaderships) set(n *leadership) (old *leadership) {
	l.mu.Lock()
	defer l.mu.Unlock()
	old, l.current = l.current, n
	return old
}

var errDeposed = errors.New("this replica does not lead any more")

// watchLeadership follows Raft's word on whether this replica leads.
func (r *Replica) watchLeadership(node *raft.Raft, notify <-chan bool) {
	end := func() {
		if old := r.leads.set(nil); old != nil {
			old.cancel(errDeposed)
			r.log.Info("leadership lost", "term", old.term)
		}
		r.changed.send()
	}
	defer end()
	for {
		select {
		case leads := <-notify:
			end()
			if !leads {
				continue
			}
			l := &leadership{term: node.CurrentTerm(), ready: make(chan struct{})}
			l.ctx, l.cancel = context.WithCancelCause(r.ctx)
			l.rounds = r.newVoterRounds(l)
			r.leads.set(l)
			r.changed.send()
			r.goFunc(func() { r.confirm(l) })
		case <-r.ctx.Done():
			return
		}
	}
}

// confirm commits the marker that opens the term. When it is applied here, so is
// everything before it, and the leader's commit index is valid for reads. On
// every replica it also settles what became of entries of earlier terms.
func (r *Replica) confirm(l *leadership) {
	for l.ctx.Err() == nil {
		id := newRequestID()
		w := r.machine.expect(id, l.term)
		p := r.propose(id, entry{kind: kindMarker, id: id, term: l.term})
		var o outcome
		select {
		case o = <-w.done:
		case <-p.failed:
			o.kind = outcomeDropped
		case <-l.ctx.Done():
		}
		r.machine.forget(id)
		if l.ctx.Err() == nil && o.kind == outcomeApplied {
			r.log.Info("this replica leads", "term", l.term)
			close(l.ready)
			r.changed.send()
			return
		}
		if r.pause(l.ctx, 10*time.Millisecond) != nil { // about to end, or a transfer that may fail
			return
		}
	}
}

// Lead runs fn whenever this replica leads, once per leadership, after it has
// applied everything that earlier leaders committed. fn's context ends with the
// leadership or with ctx, and fences writes to the term (see WithTerm). Lead
// waits for fn to return before it runs it again. It returns ctx's error when
// ctx ends, ErrClosed when the replica closes, and fn's error if fn fails while
// the replica leads; a nil error then waits for the next leadership.
func (r *Replica) Lead(ctx context.Context, fn func(ctx context.Context, term uint64) error) error {
	var last *leadership
	for {
		changed := r.changed.wait()
		l := r.leads.get()
		if l == nil || l == last || !l.isReady() {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-r.ctx.Done():
				return ErrClosed
			}
		}
		last = l
		fctx, cancel := context.WithCancelCause(WithTerm(ctx, l.term))
		stop := context.AfterFunc(l.ctx, func() { cancel(context.Cause(l.ctx)) })
		err := fn(fctx, l.term)
		stop()
		cancel(nil)
		if err != nil && l.ctx.Err() == nil && ctx.Err() == nil {
			return err
		}
	}
}

// leaderView is who leads as this replica sees it.
type leaderView struct {
	Leader
	self bool
}

// view returns who leads now; ok is false when nobody is known to.
func (r *Replica) view() (v leaderView, ok bool) {
	node := r.node.Load()
	if node == nil {
		return v, false
	}
	term := node.CurrentTerm()
	addr, id := node.LeaderWithID()
	if id == "" || node.CurrentTerm() != term {
		return v, false
	}
	_, hostPort := decodeAddr(addr)
	v = leaderView{Leader: Leader{ID: string(id), Addr: hostPort, Term: term}, self: string(id) == r.cfg.ID}
	if v.self && node.State() != raft.Leader {
		return v, false
	}
	return v, true
}

// Leader returns who leads, as far as this replica knows.
func (r *Replica) Leader() (id, addr string, ok bool) {
	v, ok := r.view()
	if !ok {
		return "", "", false
	}
	return v.ID, v.Addr, true
}

// LeaderChanges returns a channel with who leads: the current one at once, then
// each change. A reader that is slow gets the newest only. The channel is closed
// when ctx ends or the replica closes.
func (r *Replica) LeaderChanges(ctx context.Context) <-chan Leader {
	out := make(chan Leader, 1)
	if r.ctx.Err() != nil {
		close(out)
		return out
	}
	r.goFunc(func() {
		defer close(out)
		var last Leader
		for first := true; ; first = false {
			changed := r.changed.wait()
			var now Leader
			if v, ok := r.view(); ok {
				now = v.Leader
			}
			if first || now != last {
				select {
				case <-out: // replace what was not read
				default:
				}
				out <- now
				last = now
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			case <-r.ctx.Done():
				return
			}
		}
	})
	return out
}

// TransferLeadership makes another replica lead: the one named, or the one with
// the most complete log when id is empty. ErrNotLeader if this one does not.
func (r *Replica) TransferLeadership(id string) error {
	node := r.node.Load()
	if node == nil || node.State() != raft.Leader {
		return ErrNotLeader
	}
	if id == r.cfg.ID {
		return nil
	}
	if id != "" && !slices.ContainsFunc(r.configuration(), func(s raft.Server) bool { return string(s.ID) == id && s.Suffrage == raft.Voter }) {
		return errors.New("transfer leadership: no voter " + id + " in the configuration")
	}
	return r.transfer(id)
}

// transfer hands leadership over to the voter named, or to any when id is empty
// (Ongaro, Consensus: Bridging Theory and Practice, 3.10): it takes no more entries,
// waits until one voter has all of the log, and has that one stand for election at
// once. It gives up after ElectionTimeout, and leads on.
//
// Raft has the same, and it can end for ever: its goroutine waits for a replication
// that has ended meanwhile, and when this replica leads again it refuses all entries
// (hashicorp/raft 1.8, leadershipTransfer; found by test/sim).
func (r *Replica) transfer(id string) error {
	node := r.node.Load()
	if node == nil || node.State() != raft.Leader {
		return ErrNotLeader
	}
	if !r.handingOver.CompareAndSwap(false, true) {
		return errors.New("leadership is being handed over already")
	}
	defer r.handingOver.Store(false)
	term, deadline := node.CurrentTerm(), time.Now().Add(r.cfg.ElectionTimeout)
	asked := map[raft.ServerID]bool{}
	refused := make(chan error, len(r.configuration()))
	why := errors.New("no voter has all of the log")
	for node.State() == raft.Leader && node.CurrentTerm() == term {
		if time.Now().After(deadline) {
			return fmt.Errorf("leadership is not handed over within %v: %w", r.cfg.ElectionTimeout, why)
		}
		if heir, ok := r.heir(id, term, node.LastIndex()); ok && !asked[heir.ID] {
			asked[heir.ID] = true
			why = fmt.Errorf("%s does not take over", heir.ID)
			go func() { refused <- r.trans.standForElection(heir, r.cfg.ID, r.advertise) }() // ends with the transport
		}
		select {
		case err := <-refused:
			if err != nil {
				why = err
			}
		case <-time.After(2 * time.Millisecond):
		case <-r.ctx.Done():
			return ErrClosed
		}
	}
	return nil
}

// heir returns a voter that has the log up to an index and answers heartbeats.
func (r *Replica) heir(id string, term, last uint64) (raft.Server, bool) {
	for _, s := range r.configuration() {
		if s.Suffrage == raft.Voter && string(s.ID) != r.cfg.ID && (id == "" || string(s.ID) == id) &&
			r.trans.holdsLog(s.ID, term, last, r.cfg.HeartbeatTimeout) {
			return s, true
		}
	}
	return raft.Server{}, false
}
