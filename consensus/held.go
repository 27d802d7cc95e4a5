package consensus

import "github.com/hashicorp/raft"

// Held is how many bytes the buffers of a replica hold, each of which has a bound.
type Held struct {
	// LogCache are the newest entries of the log: see Config.LogCacheBytes.
	LogCache int64
	// Queue is the end of a leader's log that is not on disk yet: see Config.QueueBytes.
	Queue int64
	// Proposals are the commands on their way: see Config.ProposalBytes.
	Proposals int64
	// Replication are the entries on their way to followers. ReplicationLimit is its bound:
	// MessagesOnTheirWay of Config.MaxAppendBytes to each follower; a message that has one
	// entry alone may be larger.
	Replication, ReplicationLimit int64
}

// MessagesOnTheirWay is how many messages with entries a follower is sent before it has
// answered the first: those in Raft's pipeline and the one that is being written.
const MessagesOnTheirWay = raft.DefaultMaxRPCsInFlight + 1

// Held says what the replica's buffers hold now.
func (r *Replica) Held() Held {
	out := Held{LogCache: r.disk.newest.held(), Queue: r.disk.queue.held(), Proposals: r.room.held() + r.forwarded.Load()}
	var followers int64
	out.Replication, followers = r.trans.flying()
	out.ReplicationLimit = followers * MessagesOnTheirWay * r.cfg.MaxAppendBytes
	return out
}

// Trim lets go of what the log's cache holds beyond that many bytes, and of what is
// remembered of forwarded commands for long enough. A follower that lacks those entries is
// sent them from the disk.
func (r *Replica) Trim(logCache int64) {
	r.disk.newest.trim(logCache)
	r.deduper.tidy()
}
