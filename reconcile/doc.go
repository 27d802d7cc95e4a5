// Package reconcile holds the controllers of the cluster, and the runner that
// drives them on the leader.
//
// A [Reconciler] is a pure function from an [Input] (the time, a seed, an
// immutable snapshot of the state, what is known of the nodes' health) and a
// [Key] to a [Result]: the changes to make, and when to look again. Each is in
// a file of its own, and is tested by stories in testdata that show objects in
// and changes out.
//
//	state ──▶ objects.Cache ──changes──▶ queue ──key──▶ Reconcile ──changes──▶ API
//	  ▲                                    ▲                                    │
//	  └──────────── Raft ◀─────────────────┼────────────────────────────────────┘
//	                             health, timers, back-off
//
// The [Runner] queues the keys that a change concerns, evaluates them on the
// newest snapshot, makes the changes through the API, many at a time, so that
// defaulting, validation, admission and quota hold for them and Raft shares
// appends, and lets a key run again only once the cache shows what its last
// pass has changed. So a reconciler needs no memory of what it has asked for.
// A change that found another state than the snapshot's is simply decided anew.
//
//	reconcilers, err := reconcile.Standard(reconcile.StandardConfig{…})
//	runner, err := reconcile.NewRunner(reconcile.Config{Cache: cache, Client: api, Reconcilers: reconcilers, …})
//	err = replica.Lead(ctx, runner.Run)
//
// A cluster at rest makes no change: nothing here writes unless something
// differs from what it should be.
//
// # Who is alive
//
// [HealthConfig] says how a Node is judged. Two witnesses are needed to call it
// unreachable within a second: its stream is gone, and gossip or the probes of
// two controllers miss it too. One witness alone waits for a longer, safe time.
// After an election, a pause or a stall every clock starts again. When many
// Nodes are lost at once, no pod is evicted.
package reconcile
