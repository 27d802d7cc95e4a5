// Package consensus is one replica of the cluster's Raft log: hashicorp/raft
// with raft-boltdb, a journal before it, and file snapshots, over mutual TLS, with
// forwarding, a linearizable read barrier, founding and joining a cluster.
//
//	replica, err := consensus.Open(ctx, consensus.Config{
//		ID: "c1", ClusterID: "prod", DataDir: "/var/lib/timonel/raft",
//		TLS: tlsConfig, PeerConn: dialClusterPort, Peers: gossipControllers,
//		BootstrapExpect: 3,
//	}, fsm)
//	...
//	replica.Register(grpcServer)              // what replicas ask each other
//	result, err := replica.Apply(ctx, cmd)    // on any replica; applied here when it returns
//	err = replica.ReadBarrier(ctx)            // local reads after it are linearizable
//	err = replica.Lead(ctx, func(ctx context.Context, term uint64) error {
//		...                                   // while this replica leads; writes with ctx are fenced
//	})
//
// # How a write lives
//
// Apply gives the command a random request id and wraps it in an entry (see
// entry.go) that is fenced to the leader's term: in any other term no state
// machine sees it. On a follower it goes to the leader, over one gRPC stream that all
// share (forward.go). Raft appends what concurrent callers bring in one batch with one
// sync, on the leader and on the followers at the same time (disk.StoreLogs,
// queue.go): the leader applies and acknowledges nothing that it has not on disk
// itself. The reply is the result of the local state machine, found by request id, so
// that the caller reads its own write on the replica it asked. Which entries are
// committed comes with the leader's answer, sooner than Raft would tell
// (transport.learn).
//
// When a leader dies, the local log tells what became of an entry: each leader
// opens its term with a marker, and once that is applied, an entry of an earlier
// term that has not come never will. Apply then tries again with the new leader.
// So a write that a failover interrupts is late, rarely unknown.
//
// # How a read lives
//
// ReadBarrier asks the leader for its commit index, confirmed by a round to a
// majority of the voters that began after the call (voterRounds), and waits until this
// replica has applied it. All reads that wait share one round. An answer counts for the
// rounds that had begun when its question was sent, and for none that began later.
//
// # What time may carry
//
// No promise about what was written or read depends on a clock: not on timeouts, leases,
// how long a message takes, or a process or machine that stood still meanwhile. Terms,
// votes, quorums and what is on disk carry them all. Time decides when to try: when to
// stand for election (HeartbeatTimeout, ElectionTimeout, pre-vote, ElectionStagger), when
// a leader without a majority gives up (LeaderLeaseTimeout), when a disk or peer counts as
// stalled (DiskStallTimeout, TransportTimeout), when a voter is asked again (askAgain),
// when a member counts as healthy or dead for an operator or for DeadMemberCleanupAfter,
// and how long a caller waits (ProposeTimeout). Wrong, it costs speed or availability.
//
// # How a replica knows that it is behind
//
// InTouch says whether this replica follows (or is) a leader with a majority behind
// it, and has applied what was committed not long ago: see touch.go. Who serves from
// the local state without a barrier asks it, and stops when it ends.
//
// # How a leader is replaced
//
// Its process died: the kernel closes its connections; followers probe its
// address and, when it is refused, stand for election in the order of their
// names (watch.go). Its machine or network died: Raft's HeartbeatTimeout, with
// pre-vote. Its disk fails: it hands over. Its disk stalls: it falls silent by
// itself. Its log turns out to be damaged when it is read: it stops.
//
// # What is not as in hashicorp/raft
//
// Simulation (test/sim) found states that Raft 1.8 does not come out of, or must not
// get into. Handled around it, each with a test: the end of a log that an installed
// snapshot contradicts (disk.dropStale, transport.forget), an append or a truncation
// that fails after the log's end was cut off (disk.StoreLogs, disk.truncate), a vote
// cut off between its two writes (disk.Set), a transfer of leadership that never ends
// (Replica.transfer), heartbeats that race with the main loop
// (transport.SetHeartbeatHandler), a pipeline that waits for ever after an answer that
// is not a success (pipeline.forward), a leader that goes by a change of members that
// it could not append (disk.StoreLogs), and a snapshot within the log whose
// installation forgets such a change (Replica.holdsSnapshot).
//
// # What it holds in memory
//
// What is kept has a bound in bytes, and Replica.Held tells what is held: the newest
// entries (Config.LogCacheBytes, cache.go), and what a leader has appended and not on its
// disk yet (QueueBytes, queue.go), and the commands on their way from Apply until they are
// applied, on the replica that was asked and on the leader (ProposalBytes, room.go). What is
// remembered of forwarded commands, to recognise one that comes again, are ids (deduper.go).
// What is on its way to a follower that lags is some messages of MaxAppendBytes each
// (portion.go). The log on disk is bounded in bytes as well: by
// SnapshotBytes a snapshot is due, and TrailingBytes of it stay after one (weigh.go).
//
// A command that waits for room is its caller's. What Raft hands the state machine of a
// replica that is behind, at a start too, are ApplyBytes; the entries beyond come without
// data, which the state machine reads a few MiB at a time (portion.go).
//
// # How a replica finds its cluster
//
// See join.go: a replica without data asks its peers, through Membership.Hello,
// and founds a cluster only with BootstrapExpect others that have none either.
// A replica whose data folder was wiped comes back as a non-voter and votes
// again when it has caught up.
package consensus
