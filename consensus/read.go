package consensus

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// ReadBarrier returns when this replica has applied everything that was
// committed anywhere when it was called: a read of the local state then is
// linearizable. The leader confirms its leadership with a round to a majority,
// which all reads that wait at the time share, on all replicas.
//
// Errors: ErrNoLeader when ctx, or Config.ProposeTimeout, ended before a leader
// answered (wraps ctx's error), ErrClosed.
func (r *Replica) ReadBarrier(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.ProposeTimeout)
	defer cancel()
	for {
		v, err := r.waitLeader(ctx, 0)
		if err != nil {
			return err
		}
		rounds := &r.remote
		if v.self {
			rounds = &r.local
		}
		index, err := rounds.join(ctx)
		if err == nil {
			if err = r.machine.waitApplied(ctx, index); err != nil {
				return fmt.Errorf("wait until entry %d is applied here: %w", index, err)
			}
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w (last: %v)", ErrNoLeader, context.Cause(ctx), err)
		}
		if err := r.pause(ctx, 2*time.Millisecond); err != nil {
			return err
		}
	}
}

// batcher shares rounds among those who wait for one: a round serves all who
// asked before it began; who asks meanwhile is served by the next.
type batcher struct {
	round func() (index uint64, err error)

	mu      sync.Mutex
	next    *readRound
	running bool
}

type readRound struct {
	done  chan struct{} // closed when index and err are set
	index uint64
	err   error
}

// join waits for a round that begins after the call.
func (b *batcher) join(ctx context.Context) (uint64, error) {
	b.mu.Lock()
	if b.next == nil {
		b.next = &readRound{done: make(chan struct{})}
	}
	mine := b.next
	if !b.running {
		b.running = true
		go b.run()
	}
	b.mu.Unlock()
	select {
	case <-mine.done:
		return mine.index, mine.err
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// run does rounds until nobody waits.
func (b *batcher) run() {
	for {
		b.mu.Lock()
		n := b.next
		b.next = nil
		if n == nil {
			b.running = false
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		n.index, n.err = b.round()
		close(n.done)
	}
}

// confirmLead is a round on the leader: it returns its commit index of the time before
// a round to the voters, who confirm that nothing else was committed by then.
func (r *Replica) confirmLead() (uint64, error) {
	node, l := r.node.Load(), r.leads.get()
	if node == nil || l == nil {
		return 0, ErrNotLeader
	}
	// Before an entry of its own term is committed, a new leader's commit index
	// may be behind what its predecessor acknowledged.
	select {
	case <-l.ready:
	case <-l.ctx.Done():
		return 0, ErrNotLeader
	}
	index := node.CommitIndex()
	if err := l.rounds.confirm(); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotLeader, err)
	}
	// Its own vote: it has not been in another term since the round began.
	if node.CurrentTerm() != l.term || node.State() != raft.Leader {
		return 0, ErrNotLeader
	}
	return index, nil
}

// askReadIndex is a round on a follower: it asks the leader.
func (r *Replica) askReadIndex() (uint64, error) {
	v, ok := r.view()
	if !ok || v.self {
		return 0, ErrNoLeader
	}
	ctx, cancel := context.WithTimeout(r.ctx, r.cfg.ElectionTimeout+r.cfg.HeartbeatTimeout)
	defer cancel()
	return r.forward.readIndex(ctx, v.ID)
}
