package consensus

import (
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// Status is what a replica knows of itself.
type Status struct {
	ID, ClusterID string
	// Address is the host:port at which others reach this replica's Raft.
	Address string
	// Role is "leader", "follower", "candidate", "non-voter", "joining" (no data
	// yet), "removed" (not a member any more) or "closed".
	Role string
	// Leader is who leads, as far as this replica knows.
	Leader Leader
	// Term is the current term, which may have no leader yet.
	Term uint64
	// FirstIndex and LastIndex are those of the log on disk. CommitIndex is
	// known to be committed, AppliedIndex applied to this replica's state.
	FirstIndex, LastIndex, CommitIndex, AppliedIndex uint64
	// SnapshotIndex and SnapshotTerm are those of the newest snapshot, 0 if none.
	SnapshotIndex, SnapshotTerm uint64
	// SnapshotSize is its size in bytes.
	SnapshotSize int64
	// LastContact is when the leader was last heard of; zero on the leader.
	LastContact time.Time
	// Members is the latest configuration.
	Members []Member
	// Fsync is the median time of a sync, measured at start.
	Fsync time.Duration
	// Disk has figures of the log's appends since the start.
	Disk DiskStats
	// InTouch says whether this replica knows what the cluster knows.
	InTouch bool
	// Problems are sentences for the operator; empty when all is well.
	Problems []string
}

// Status returns what this replica knows of itself now.
func (r *Replica) Status() Status {
	s := Status{ID: r.cfg.ID, ClusterID: r.cfg.ClusterID, Address: r.advertise, Role: "joining", Fsync: r.fsync}
	s.Problems = append(s.Problems, r.notes...)
	s.AppliedIndex, _ = r.machine.position()
	s.Disk, _ = r.disk.stats()
	if err := r.DiskErr(); err != nil {
		s.Problems = append(s.Problems, err.Error())
	}
	if err := r.Err(); err != nil {
		s.Problems = append(s.Problems, fmt.Sprintf("stopped: %v", err))
	}
	if d := r.diverged.Load(); d != nil && *d != "" {
		s.Problems = append(s.Problems, *d)
	}
	if v, ok := r.view(); ok {
		s.Leader = v.Leader
	}
	s.InTouch = true
	if _, err := r.InTouch(); err != nil {
		s.InTouch = false
		if r.node.Load() != nil && !r.removed.Load() {
			s.Problems = append(s.Problems, err.Error())
		}
	}
	if err := r.MemberErr(); err != nil {
		s.Problems = append(s.Problems, err.Error())
	}
	node := r.node.Load()
	if node == nil {
		s.Problems = append(s.Problems, "no data yet: waiting to found or to join the cluster")
		return s
	}
	s.Members = r.Members()
	s.Term = node.CurrentTerm()
	s.CommitIndex, s.LastIndex = node.CommitIndex(), node.LastIndex()
	if r.ctx.Err() == nil {
		s.FirstIndex, _ = r.disk.FirstIndex()
	}
	if list, err := r.snapshots.List(); err == nil && len(list) > 0 {
		s.SnapshotIndex, s.SnapshotTerm, s.SnapshotSize = list[0].Index, list[0].Term, list[0].Size
	}
	voter := false
	for _, m := range s.Members {
		voter = voter || m.ID == r.cfg.ID && m.Voter
	}
	switch node.State() {
	case raft.Leader:
		s.Role = "leader"
	case raft.Candidate:
		s.Role = "candidate"
	case raft.Shutdown:
		s.Role = "closed"
	default:
		s.Role = "follower"
		if !voter {
			s.Role = "non-voter"
		}
	}
	if r.removed.Load() {
		s.Role = "removed"
	}
	if s.Role != "leader" {
		s.LastContact = node.LastContact()
		if s.Leader.ID == "" {
			s.Problems = append(s.Problems, "no leader is known")
		}
	}
	return s
}

// isRefused reports that nobody listens at the address dialled.
func isRefused(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" && errors.Is(err, syscall.ECONNREFUSED)
}
