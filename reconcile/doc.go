// Package reconcile is the contract of a controller of the cluster, and the runner
// that drives all of them on the leader.
//
// A [Reconciler] is a pure function from an [Input] (the time, a seed, an
// immutable snapshot of the state, what is known of the nodes' health) and a
// [Key] to a [Result]: the requests to make, and when to look again. What the
// runner must know of it beside that are its [Traits]. The reconcilers are in
// rooms, each in a file of its own, told by stories in the room's testdata that
// show objects in and requests out (timonel/reconcile/storytest):
//
//	workload   as many pods of a template as their owner asks for, or one on each node
//	service    which pods are behind a Service, for old clients too
//	node       who is alive, and what that means for pods
//	scheduler  pods to nodes, as timonel/sched decides
//	storage    which claim has which volume, and how it comes to be
//	cleanup    what nobody wants any more
//	policy     what a namespace allows and gives
//	standard   the list of those that every cluster runs
//
//	state ──▶ objects.Cache ──changes──▶ queue ──key──▶ Reconcile ──requests──▶ API
//	  ▲                                    ▲                                     │
//	  └──────────── Raft ◀─────────────────┼─────────────────────────────────────┘
//	                             health, timers, back-off
//
// The [Runner] queues the keys that a change concerns, evaluates them on the
// newest snapshot, makes the requests through the API, many at a time, so that
// defaulting, validation, admission and quota hold for them and Raft shares
// appends, those that are many without HTTP ([Direct]), and lets a key run again only
// once the cache shows what its last pass has changed. So a reconciler needs no memory
// of what it has asked for.
// A request that found another state than the snapshot's is simply decided anew. A key
// for which something was refused waits, longer each time, until its own object is
// edited. No reconciler takes all the slots there are, and those that judge the
// nodes' health have slots of their own.
//
//	reconcilers, err := standard.Reconcilers(standard.Config{…})
//	runner, err := reconcile.NewRunner(reconcile.Config{Cache: cache, Client: api, Reconcilers: reconcilers, …})
//	err = replica.Lead(ctx, runner.Run)
//
// A cluster at rest makes no request: nothing here writes unless something
// differs from what it should be.
package reconcile
