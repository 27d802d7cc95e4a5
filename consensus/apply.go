package consensus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

type termKey struct{}

// WithTerm returns a context that binds writes to a term: Apply with it, or one
// derived from it, writes only in that term and returns ErrTermChanged when it
// is over, on whichever replica it is called. Term 0 removes the bond.
func WithTerm(ctx context.Context, term uint64) context.Context {
	return context.WithValue(ctx, termKey{}, term)
}

// TermFrom returns the term that WithTerm put into ctx, 0 if none.
func TermFrom(ctx context.Context) uint64 {
	term, _ := ctx.Value(termKey{}).(uint64)
	return term
}

// Apply commits a command and returns what the state machine of this replica
// made of it, after it was applied here: a read that follows sees it. On a
// follower the command is forwarded to the leader.
//
// When much is on its way (Config.ProposalBytes), Apply waits for its turn first.
//
// Without a leader, or when one dies, Apply waits for the next one, as long as
// ctx and Config.ProposeTimeout allow, and tries again only when it is certain
// that the command was not and will not be applied. Errors: ErrBusy, ErrNoLeader,
// ErrTermChanged, ErrTooLarge, ErrRefused and ErrClosed mean that nothing was written,
// ErrUnknownOutcome that it may have been. Each wraps ctx's error if that was
// the reason.
//
// The caller must not change cmd before Apply returns.
func (r *Replica) Apply(ctx context.Context, cmd []byte) (any, error) {
	if len(cmd) > r.cfg.MaxCommandBytes {
		return nil, fmt.Errorf("%w: %d bytes, at most %d (MaxCommandBytes)", ErrTooLarge, len(cmd), r.cfg.MaxCommandBytes)
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.ProposeTimeout)
	defer cancel()
	place, err := r.room.enter(ctx, r.ctx.Done(), len(cmd))
	switch {
	case errors.Is(err, ErrClosed):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w (ProposalBytes): %w", ErrBusy, err)
	}
	defer place.leave()
	fence := TermFrom(ctx)
	for {
		v, err := r.waitLeader(ctx, fence)
		if err != nil {
			return nil, err
		}
		var o outcome
		id := newRequestID()
		w := r.machine.expect(id, v.Term)
		if v.self {
			o, err = r.attemptLocal(ctx, w, place, entry{kind: kindCommand, id: id, term: v.Term, command: cmd})
		} else {
			o, err = r.attemptRemote(ctx, w, place, v, id, cmd)
		}
		r.machine.forget(id)
		switch {
		case err != nil:
			return nil, err
		case o.kind == outcomeApplied:
			return o.result, nil
		case o.kind == outcomeUnknown:
			return nil, fmt.Errorf("%w: a snapshot was installed over it", ErrUnknownOutcome)
		}
		// Dropped: nothing was written and nothing will be.
		if err := r.pause(ctx, 2*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// pause waits for a change of leadership, or for the time given.
func (r *Replica) pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrNoLeader, context.Cause(ctx))
	case <-r.ctx.Done():
		return ErrClosed
	}
}

// waitLeader returns who leads, with the term fence if it is not 0, as soon as
// somebody does.
func (r *Replica) waitLeader(ctx context.Context, fence uint64) (leaderView, error) {
	for {
		changed := r.changed.wait()
		v, ok := r.view()
		if fence != 0 {
			if node := r.node.Load(); node != nil && node.CurrentTerm() > fence {
				return v, fmt.Errorf("%w: term %d, now %d", ErrTermChanged, fence, node.CurrentTerm())
			}
			ok = ok && v.Term == fence
		}
		if ok {
			return v, nil
		}
		t := time.NewTimer(20 * time.Millisecond) // Raft does not announce every change
		select {
		case <-changed:
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return v, fmt.Errorf("%w: %w", ErrNoLeader, context.Cause(ctx))
		case <-r.failedCh:
			t.Stop()
			return v, fmt.Errorf("%w: %w", ErrClosed, r.Err())
		case <-r.ctx.Done():
			t.Stop()
			return v, ErrClosed
		}
		t.Stop()
	}
}

// proposal is an entry given to the local Raft as the leader.
type proposal struct {
	// failed is closed when the entry was certainly not appended.
	failed chan struct{}
	// err and index are set when Raft has answered: see then.
	err   error // nil: committed and applied on this replica
	index uint64

	mu      sync.Mutex
	settled bool
	after   []func() // to be called when settled
}

// settle is told once that err and index are set.
func (p *proposal) settle() {
	if certainlyNotAppended(p.err) {
		close(p.failed)
	}
	p.mu.Lock()
	after := p.after
	p.settled, p.after = true, nil
	p.mu.Unlock()
	for _, f := range after {
		f()
	}
}

// then calls f when the proposal is settled, which may be now.
func (p *proposal) then(f func()) {
	p.mu.Lock()
	settled := p.settled
	if !settled {
		p.after = append(p.after, f)
	}
	p.mu.Unlock()
	if settled {
		f()
	}
}

// propose gives an entry to Raft. It does not wait.
func (r *Replica) propose(id requestID, e entry) *proposal {
	p := &proposal{failed: make(chan struct{})}
	node := r.node.Load()
	if node == nil || r.handingOver.Load() {
		p.err = raft.ErrNotLeader
		p.settle()
		return p
	}
	if r.cfg.Admit != nil && e.kind == kindCommand {
		settled, err := r.cfg.Admit(e.command)
		if err != nil {
			p.err = fmt.Errorf("%w: %w", ErrRefused, err)
			p.settle()
			return p
		}
		p.then(settled)
	}
	e.version = byte(r.cfg.ClusterVersion())
	data := e.encode()
	go func() { // ends with Raft's answer, or with the process when Raft shuts down first
		f := node.ApplyLog(raft.Log{Data: data}, r.cfg.ProposeTimeout)
		p.err = f.Error()
		p.index = f.Index()
		p.settle()
	}()
	return p
}

// certainlyNotAppended reports that Raft refused an entry before it had a place
// in any log.
func certainlyNotAppended(err error) bool {
	return errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipTransferInProgress) ||
		errors.Is(err, raft.ErrEnqueueTimeout) || errors.Is(err, ErrRefused)
}

// attemptLocal proposes on this replica, which leads. An entry that Raft gave up
// on after appending it is waited for: it is either applied here, or dropped
// when the first entry of a later term is.
func (r *Replica) attemptLocal(ctx context.Context, w *waiter, place *stay, e entry) (outcome, error) {
	place.keep()
	p := r.propose(e.id, e)
	p.then(place.leave)
	select {
	case o := <-w.done:
		return o, nil
	case <-p.failed:
		if errors.Is(p.err, ErrRefused) {
			return outcome{}, p.err
		}
		return outcome{kind: outcomeDropped}, nil
	case <-ctx.Done():
		return outcome{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, context.Cause(ctx))
	case <-r.ctx.Done():
		return outcome{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed)
	}
}

// attemptRemote forwards a command to the leader and waits until it is applied
// here. What breaks on its way is repeated with the same request id while the same
// leader leads: it recognises the request. Once the term is over, the local log
// tells what became of it.
func (r *Replica) attemptRemote(ctx context.Context, w *waiter, place *stay, v leaderView, id requestID, cmd []byte) (outcome, error) {
	req := &pb.Proposal{RequestId: id[:], Command: cmd, Term: v.Term}
	answers, forget := r.forward.propose(v.ID, req, place)
	defer func() { forget() }()
	sent := false
	for {
		select {
		case o := <-w.done:
			return o, nil
		case a := <-answers:
			answers = nil
			switch status.Code(a.err) {
			case codes.OK:
				r.machine.placed(id, a.index)
				continue // the local state machine has the last word
			case codes.FailedPrecondition:
				if !sent {
					return outcome{kind: outcomeDropped}, nil
				}
				continue // an earlier copy may have been appended: the log will tell
			case codes.Aborted: // so may it
				continue
			case codes.ResourceExhausted: // of this proposal alone too
				if !sent {
					return outcome{}, fmt.Errorf("%w: %s", ErrRefused, status.Convert(a.err).Message())
				}
				continue
			case codes.InvalidArgument: // of this proposal alone: what ends the stream leaves it open
				if !sent {
					return outcome{}, fmt.Errorf("%w: the leader %s refuses it: %w", ErrTooLarge, v.ID, a.err)
				}
			}
			sent = sent || !a.unsent
			if !sent {
				return outcome{kind: outcomeDropped}, r.pause(ctx, 10*time.Millisecond)
			}
			if err := r.pause(ctx, 10*time.Millisecond); err != nil {
				return outcome{}, fmt.Errorf("%w: forward to the leader %s: %w", ErrUnknownOutcome, v.ID, errors.Join(a.err, context.Cause(ctx)))
			}
			if now, ok := r.view(); ok && now.Term == v.Term {
				forget()
				again := &pb.Proposal{RequestId: id[:], Command: cmd, Term: v.Term, Again: true}
				answers, forget = r.forward.propose(v.ID, again, place)
			}
		case <-ctx.Done():
			return outcome{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, context.Cause(ctx))
		case <-r.ctx.Done():
			return outcome{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed)
		}
	}
}
