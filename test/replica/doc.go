// Package replica is what clients do with the log and the state of a replica, as an
// API server does, without one in between: conditional writes, linearizable reads
// and lists, lists by pages from other replicas, and watches that resume on them.
// The simulation (test/sim) and the real cluster (test/chaos) share it; what the
// clients see goes into a [timonel/test/history.Recorder].
package replica
