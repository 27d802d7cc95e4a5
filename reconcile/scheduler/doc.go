// Package scheduler makes a reconciler of the decisions of timonel/sched: pods that
// have no Node in, bindings and what else a placement needs out.
package scheduler
