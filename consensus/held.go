package consensus

// Held is how many bytes the buffers of a replica hold, each of which has a bound.
type Held struct {
	// LogCache are the newest entries of the log: see Config.LogCacheBytes.
	LogCache int64
	// Queue is the end of a leader's log that is not on disk yet: see Config.QueueBytes.
	Queue int64
	// Proposals are the commands on their way: see Config.ProposalBytes.
	Proposals int64
}

// Held says what the replica's buffers hold now.
func (r *Replica) Held() Held {
	return Held{LogCache: r.disk.newest.held(), Queue: r.disk.queue.held(), Proposals: r.room.held() + r.forwarded.Load()}
}

// Trim lets go of what the log's cache holds beyond that many bytes, and of what is
// remembered of forwarded commands for long enough. A follower that lacks those entries is
// sent them from the disk.
func (r *Replica) Trim(logCache int64) {
	r.disk.newest.trim(logCache)
	r.deduper.tidy()
}
