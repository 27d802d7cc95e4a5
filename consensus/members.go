package consensus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	pb "timonel/proto/timonel/v1"
)

// promoteWithin is how many entries a non-voter may lack of the leader's commit
// index to be made a voter.
const promoteWithin = 64

// membersState guards what changes the membership.
type membersState struct {
	start  gate // the start of Raft, and the promise
	change gate // changes of the configuration, on the leader

	// Of upkeep's goroutine alone: how long each member has been fit to vote, or
	// dead, in the term of this leadership.
	term     uint64
	fitSince map[raft.ServerID]time.Time
	deadFrom map[raft.ServerID]time.Time
	asked    time.Time // when others were asked whether this is a member
}

// gate is a lock that is held while the disk or other replicas are waited for.
// Unlike a sync.Mutex, it lets simulated time go on meanwhile.
type gate chan struct{}

func newGate() gate    { return make(gate, 1) }
func (g gate) Lock()   { g <- struct{}{} }
func (g gate) Unlock() { <-g }

// lockWithin locks it unless ctx ends first.
func (g gate) lockWithin(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Member is one member of the Raft configuration.
type Member struct {
	Server
	// Voter tells voters from members that only receive the log.
	Voter bool
}

// Members returns the latest configuration that this replica knows.
func (r *Replica) Members() []Member {
	var out []Member
	for _, s := range r.configuration() {
		out = append(out, Member{Server: Server{ID: string(s.ID), Addr: string(s.Address)}, Voter: s.Suffrage == raft.Voter})
	}
	return out
}

// AddVoter makes a replica a voter, or changes the address of one. The leader
// promotes joining replicas by itself. ErrNotLeader on other replicas.
func (r *Replica) AddVoter(ctx context.Context, id, addr string) error {
	return r.change(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.AddVoter(raft.ServerID(id), raft.ServerAddress(addr), 0, t)
	})
}

// AddNonvoter adds a replica that receives the log and does not vote, or changes
// the address of one. The leader makes it a voter when it has caught up.
// ErrNotLeader on other replicas.
func (r *Replica) AddNonvoter(ctx context.Context, id, addr string) error {
	return r.change(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.AddNonvoter(raft.ServerID(id), raft.ServerAddress(addr), 0, t)
	})
}

// RemoveServer removes a member. It comes back only through AddVoter or
// AddNonvoter, or with an empty data folder. ErrNotLeader on other replicas.
func (r *Replica) RemoveServer(ctx context.Context, id string) error {
	return r.change(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.RemoveServer(raft.ServerID(id), 0, t)
	})
}

func (r *Replica) change(ctx context.Context, f func(*raft.Raft, time.Duration) raft.Future) error {
	if err := r.members.change.lockWithin(ctx); err != nil {
		return fmt.Errorf("wait for another change of the members: %w", err)
	}
	defer r.members.change.Unlock()
	return r.changeLocked(ctx, f)
}

// changeLocked makes one change of the configuration and waits until it is
// committed. r.members.change is held.
func (r *Replica) changeLocked(ctx context.Context, f func(*raft.Raft, time.Duration) raft.Future) error {
	node, l := r.node.Load(), r.leads.get()
	if node == nil || l == nil {
		return ErrNotLeader
	}
	timeout := r.cfg.ProposeTimeout
	if d, ok := ctx.Deadline(); ok {
		timeout = min(timeout, max(time.Until(d), time.Millisecond))
	}
	done := make(chan error, 1)
	go func() { done <- f(node, timeout).Error() }() // Raft's future does not end with a shutdown
	select {
	case err := <-done:
		if errors.Is(err, raft.ErrNotLeader) {
			return ErrNotLeader
		}
		return err
	case <-l.ctx.Done():
		return fmt.Errorf("%w: leadership ended while the members were changed", ErrNotLeader)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// admitEmpty lets a replica without data in: first out of the configuration,
// should it be a member that lost its data, then in as a non-voter.
func (r *Replica) admitEmpty(ctx context.Context, id, addr string, incarnation []byte) error {
	l := r.leads.get()
	if l == nil || !l.isReady() {
		return ErrNotLeader
	}
	// Is whom the cluster knows by this name really the one who asks, and empty?
	a, err := r.hello(ctx, id, pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil)
	switch {
	case err != nil:
		return fmt.Errorf("cannot ask replica %s back: %w", id, err)
	case !bytes.Equal(a.Incarnation, incarnation):
		return fmt.Errorf("another replica that calls itself %q is running at %s: give each its own name", id, a.Address)
	case a.HasState:
		return fmt.Errorf("replica %s has data", id)
	}
	r.members.change.Lock()
	defer r.members.change.Unlock()
	if why := r.tooOld(a.NewestVersion); why != "" {
		return fmt.Errorf("replica %s is not let in: %s", id, why)
	}
	for _, s := range r.configuration() {
		if string(s.ID) != id {
			continue
		}
		r.log.Warn("a member came back without its data: it stops voting until it has caught up", "member", id)
		if err := r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
			return n.RemoveServer(s.ID, 0, t)
		}); err != nil {
			return fmt.Errorf("remove the member that lost its data: %w", err)
		}
	}
	r.log.Info("letting a replica in", "member", id, "address", addr)
	return r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.AddNonvoter(raft.ServerID(id), raft.ServerAddress(addr), 0, t)
	})
}

// upkeep looks after the membership while this replica leads: it promotes
// non-voters that have caught up and corrects addresses. Before there is a
// leader, the founder reminds the others to start.
func (r *Replica) upkeep() {
	tick := time.NewTicker(r.cfg.UpkeepInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-r.ctx.Done():
			return
		}
		if r.node.Load() == nil {
			continue
		}
		if l := r.leads.get(); l != nil && l.isReady() {
			r.noteRemoved(false)
			r.tendMembers(l)
			r.cleanUp(l)
		} else if _, ok := r.view(); !ok {
			r.startOthers()
			r.askWhetherRemoved()
		} else if r.noteRemoved(false) {
			r.log.Info("this replica is a member again")
		}
	}
}

func (r *Replica) tendMembers(l *leadership) {
	if m := &r.members; m.term != l.term {
		m.term, m.fitSince, m.deadFrom = l.term, map[raft.ServerID]time.Time{}, map[raft.ServerID]time.Time{}
	}
	peers := r.peers.get(r.cfg.Peers)
	ctx, cancel := context.WithTimeout(l.ctx, r.cfg.ProposeTimeout)
	defer cancel()
	for _, s := range r.configuration() {
		var err error
		switch addr := peers[string(s.ID)]; {
		case string(s.ID) == r.cfg.ID:
			if string(s.Address) != r.advertise {
				err = r.moveMember(ctx, s, r.advertise)
			}
		case addr != "" && addr != string(s.Address):
			var a *pb.HelloResponse
			if a, err = r.hello(ctx, string(s.ID), pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil); err == nil && a.HasState && a.Address == addr {
				err = r.moveMember(ctx, s, addr)
			}
		case s.Suffrage != raft.Voter:
			err = r.promote(ctx, s)
		}
		if err != nil && ctx.Err() == nil {
			r.log.Debug("cannot look after a member now", "member", s.ID, "error", err)
		}
	}
}

// moveMember records the address that a member has now.
func (r *Replica) moveMember(ctx context.Context, s raft.Server, addr string) error {
	r.log.Info("a member's address changed", "member", s.ID, "from", s.Address, "to", addr)
	if s.Suffrage == raft.Voter {
		return r.AddVoter(ctx, string(s.ID), addr)
	}
	return r.AddNonvoter(ctx, string(s.ID), addr)
}

// promote makes a non-voter a voter if it has caught up.
func (r *Replica) promote(ctx context.Context, s raft.Server) error {
	r.members.change.Lock()
	defer r.members.change.Unlock()
	node := r.node.Load()
	commit := node.CommitIndex()
	a, err := r.hello(ctx, string(s.ID), pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil)
	if err != nil || r.unfit(a, nil) != "" || a.AppliedIndex+promoteWithin < commit {
		delete(r.members.fitSince, s.ID)
		return err
	}
	if r.members.fitSince[s.ID].IsZero() {
		r.members.fitSince[s.ID] = time.Now()
	}
	if time.Since(r.members.fitSince[s.ID]) < r.cfg.StabilizationTime {
		return nil
	}
	r.log.Info("a member has caught up and votes now", "member", s.ID, "applied", a.AppliedIndex, "commit", commit)
	return r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.AddVoter(s.ID, s.Address, 0, t)
	})
}

// Snapshot takes a snapshot now, which also shortens the log. It returns nil
// when nothing was applied since the last one.
func (r *Replica) Snapshot() error {
	node := r.node.Load()
	if node == nil {
		return errors.New("snapshot: this replica has no data")
	}
	done := make(chan error, 1)
	go func() { done <- node.Snapshot().Error() }() // Raft's future does not end with a shutdown
	select {
	case err := <-done:
		if errors.Is(err, raft.ErrNothingNewToSnapshot) {
			return nil
		}
		return err
	case <-r.ctx.Done():
		return ErrClosed
	}
}

// incarnation identifies this data folder's life.
func (r *Replica) incarnation() []byte { return r.life }
