package consensus

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// cleanUp removes members that are dead for Config.DeadMemberCleanupAfter, in the
// manner of raft-autopilot: dead is whom Peers (gossip) does not know and no
// heartbeat reaches. A new leader counts from its election. A non-voter is removed
// for the asking, for nothing depends on it; a voter only when that helps, see
// superfluous. One at a time, so that each is judged by what is there.
func (r *Replica) cleanUp(l *leadership) {
	if r.cfg.DeadMemberCleanupAfter == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(l.ctx, r.cfg.ProposeTimeout)
	defer cancel()
	if r.members.change.lockWithin(ctx) != nil {
		return
	}
	defer r.members.change.Unlock()
	peers, dead := r.peers.get(r.cfg.Peers), r.members.deadFrom
	var old *raft.Server
	voters, healthy, now := 0, 0, time.Now()
	servers := r.configuration()
	for i, s := range servers {
		since := r.trans.sinceReached(s.ID)
		reached := string(s.ID) == r.cfg.ID || since >= 0 && since < 2*r.cfg.HeartbeatTimeout.Microseconds()
		if s.Suffrage == raft.Voter {
			voters++
			if reached {
				healthy++
			}
		}
		switch {
		case reached || peers[string(s.ID)] != "":
			delete(dead, s.ID)
		case dead[s.ID].IsZero():
			dead[s.ID] = now
		case now.Sub(dead[s.ID]) >= r.cfg.DeadMemberCleanupAfter && (old == nil || s.Suffrage != raft.Voter):
			old = &servers[i]
		}
	}
	if old == nil || old.Suffrage == raft.Voter && !superfluous(voters, healthy, r.cfg.BootstrapExpect) {
		return
	}
	if err := r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.RemoveServer(old.ID, 0, t)
	}); err != nil {
		r.log.Warn("cannot remove a dead member", "member", old.ID, "error", err)
		return
	}
	r.log.Warn("removed a dead member: others have taken its place", "member", old.ID, "address", old.Address,
		"dead for", now.Sub(dead[old.ID]).Round(time.Second), "voters left", voters-1)
	delete(dead, old.ID)
}

// superfluous reports that a dead voter may be removed for the good of the
// cluster: the healthy ones are as many as founded it, have a majority without it,
// and when all dead are gone more of them may fail than now.
func superfluous(voters, healthy, expect int) bool {
	return healthy >= max(expect, voters/2+1) && healthy/2 < voters/2
}

// askWhetherRemoved asks the others, while this replica knows no leader, whether
// it is still a member: whoever is removed is not told.
func (r *Replica) askWhetherRemoved() {
	if time.Since(r.members.asked) < time.Second {
		return
	}
	r.members.asked = time.Now()
	gen := r.generation.Load()
	for _, a := range r.helloAll(r.ctx) {
		if a.NotAMember && a.Generation == gen {
			if r.noteRemoved(true) {
				r.log.Warn(r.MemberErr().Error(), "leader", a.Id)
			}
			return
		}
	}
}

// noteRemoved remembers, on disk too, whether this replica was removed, and reports
// that it did not know.
func (r *Replica) noteRemoved(removed bool) bool {
	if !r.removed.CompareAndSwap(!removed, removed) {
		return false
	}
	r.members.start.Lock()
	defer r.members.start.Unlock()
	if err := r.folder.change(func(i *identity) { i.Removed = removed }); err != nil {
		r.log.Error("cannot note whether this replica is a member", "removed", removed, "error", err)
	}
	return true
}

// MemberErr says that this replica was removed from the cluster and what to do,
// or is nil.
func (r *Replica) MemberErr() error {
	if !r.removed.Load() {
		return nil
	}
	return fmt.Errorf("replica %s was removed from the cluster: stop it; to have it join again, remove %s and start it, or run `timonel members add %s`", r.cfg.ID, r.cfg.DataDir, r.cfg.ID)
}

// superseded is told that the cluster was recovered or restored on another
// replica: what this one holds is not the cluster's state any more. It stops, lest
// it serves that, and never starts with this data again.
func (r *Replica) superseded(peer string, gen uint64) {
	r.members.start.Lock()
	known := r.node.Load() == nil || r.folder.Superseded != 0 || gen <= r.folder.Generation
	if !known {
		r.folder.Superseded = gen
		if err := r.folder.save(); err != nil {
			r.log.Error("cannot note that this data is superseded", "error", err)
		}
	}
	r.members.start.Unlock()
	if !known {
		r.fail(errSuperseded(r.cfg.DataDir, "replica "+peer, gen))
	}
}

func errSuperseded(dir, on string, gen uint64) error {
	return fmt.Errorf("%s is from before the cluster was recovered or restored on %s at %s: remove it and start again, to join that",
		dir, on, time.UnixMicro(int64(gen)).UTC().Format(time.RFC3339))
}

// knows reports that the servers include one of the name.
func knows(servers []raft.Server, id string) bool {
	return slices.ContainsFunc(servers, func(s raft.Server) bool { return string(s.ID) == id })
}
