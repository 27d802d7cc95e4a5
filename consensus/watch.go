package consensus

import (
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// lostPeer is a connection that a peer had opened and that ended.
type lostPeer struct {
	id   string
	boot [16]byte
}

func (r *Replica) peerLost(id string, boot [16]byte) {
	select {
	case r.lostCh <- lostPeer{id, boot}:
	default: // enough others say the same
	}
}

// deathwatch notices at once that the leader's process died, by its closed
// connections, where Raft would wait for HeartbeatTimeout and more: it asks the
// leader's address, and when nobody answers there, or another process, or one
// that does not lead any more, stands for election. The followers do so one
// after the other, by name, so that they do not split the vote. An election is
// safe at any time; the checks are there to spare a healthy leader.
func (r *Replica) deathwatch() {
	for {
		select {
		case lost := <-r.lostCh:
			v, ok := r.view()
			if !ok || v.self || v.ID != lost.id || !r.leaderDied(v, lost.boot) {
				continue
			}
			r.succeed(v)
		case <-r.ctx.Done():
			return
		}
	}
}

// leaderDied reports that the leader is certainly not leading any more.
func (r *Replica) leaderDied(v leaderView, boot [16]byte) bool {
	addr, err := r.ServerAddr(raft.ServerID(v.ID))
	if err != nil {
		return false
	}
	for range 3 {
		g, err := r.stream.probe(addr, r.cfg.HeartbeatTimeout/2)
		switch {
		case err == nil:
			return g.Boot != boot || !g.Leads
		case isRefused(err):
			return true
		case r.ctx.Err() != nil || strings.Contains(err.Error(), "timeout") || strings.Contains(err.Error(), "deadline"):
			return false // the network, perhaps: let Raft's own timeouts decide
		}
		// A listener that is being closed answers with all sorts of errors.
		if r.pause(r.ctx, 5*time.Millisecond) != nil {
			return false
		}
	}
	return false
}

// succeed stands for election when it is this replica's turn and nobody else
// leads by then.
func (r *Replica) succeed(dead leaderView) {
	var heirs []string
	for _, s := range r.configuration() {
		if s.Suffrage == raft.Voter && string(s.ID) != dead.ID {
			heirs = append(heirs, string(s.ID))
		}
	}
	slices.Sort(heirs)
	rank := slices.Index(heirs, r.cfg.ID)
	if rank < 0 {
		return
	}
	if !r.sleep(time.Duration(rank) * r.cfg.ElectionStagger) {
		return
	}
	node := r.node.Load()
	if node.CurrentTerm() != dead.Term && !r.sleep(r.cfg.ElectionStagger) { // an election is under way: give it time
		return
	}
	if v, ok := r.view(); (ok && (v.ID != dead.ID || v.Term != dead.Term)) || node.State() != raft.Follower || r.stalled.Load() || !r.disk.fit() {
		return
	}
	r.log.Info("the leader is gone: standing for election", "leader", dead.ID, "term", dead.Term)
	if err := r.trans.elect(); err != nil {
		r.log.Debug("cannot stand for election", "error", err)
	}
}

// freeCandidate makes a candidate forget a leader that it does not follow. Raft's
// handler takes a late message of the leader that asked this replica to stand for
// election for that of a leader, and stays a candidate (hashicorp/raft 1.8,
// appendEntries with candidateFromLeadershipTransfer); when the election fails, it
// refuses its vote to all others for ever, as it has a leader. Found by test/sim.
func (r *Replica) freeCandidate() {
	tick := time.NewTicker(r.cfg.ElectionTimeout)
	defer tick.Stop()
	believed := raft.ServerID("")
	for {
		select {
		case <-tick.C:
		case <-r.ctx.Done():
			return
		}
		node := r.node.Load()
		if node == nil {
			continue
		}
		_, leader := node.LeaderWithID()
		if node.State() != raft.Candidate {
			leader = ""
		}
		if leader != "" && leader == believed {
			if err := r.trans.elect(); err != nil { // which begins by forgetting the leader
				r.log.Debug("cannot stand for election anew", "error", err)
			}
			leader = ""
		}
		believed = leader
	}
}

// sleep waits, and reports false when the replica closes meanwhile.
func (r *Replica) sleep(d time.Duration) bool {
	if d <= 0 {
		return r.ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.ctx.Done():
		return false
	}
}

// watchDisk makes a replica whose disk fails or stalls give up leadership: while a write
// hangs, it falls silent, so that the others elect a leader, as Raft's
// heartbeats would go on without the disk; afterwards it hands over.
func (r *Replica) watchDisk() {
	tick := time.NewTicker(max(10*time.Millisecond, min(100*time.Millisecond, r.cfg.DiskStallTimeout/4)))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-r.ctx.Done():
			return
		}
		// What a leader cannot write, others have or may write.
		if node := r.node.Load(); r.disk.queue.failure() != nil && node != nil && node.State() == raft.Leader {
			if err := r.transfer(""); err != nil {
				r.log.Debug("hand over leadership, as the disk fails", "error", err)
			}
		}
		stalls := r.disk.held.Load() || r.disk.busy() > r.cfg.DiskStallTimeout
		if stalls == r.stalled.Load() {
			continue
		}
		r.stalled.Store(stalls)
		r.mute(stalls)
		if stalls {
			r.log.Error("the disk stalls or fails: this replica falls silent until its writes go through, so that another leads", "folder", r.cfg.DataDir, "longer than", r.cfg.DiskStallTimeout)
			continue
		}
		r.log.Warn("the disk answers again", "folder", r.cfg.DataDir)
		if node := r.node.Load(); node != nil && node.State() == raft.Leader {
			if err := r.transfer(""); err != nil {
				r.log.Debug("hand over leadership after a disk stall", "error", err)
			}
		}
	}
}
