package sched

import (
	"iter"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/state/objects"
)

// Planner plans one snapshot after another and keeps what it derived between
// them, so that a plan costs what changed and what is to be tried, not what exists.
// Its plans are those that [Schedule] makes from the same snapshot. It has one
// user at a time.
type Planner struct {
	// Queue says which pods to try.
	*Queue
	cfg      *compiled
	snapshot *objects.Snapshot
	cluster  *Cluster
}

// NewPlanner returns a Planner that has seen nothing. It fails on a Config that
// Validate refuses.
func NewPlanner(c Config) (*Planner, error) {
	cfg, err := c.compile()
	if err != nil {
		return nil, err
	}
	return &Planner{Queue: newQueue(cfg), cfg: cfg}, nil
}

// Follow moves on to a later snapshot. The first changes it is given, and any
// with Reset set, may be incomplete; all others must be those since the
// snapshot it has.
func (p *Planner) Follow(changes objects.Changes, now time.Time) {
	p.snapshot = changes.Snapshot
	state := FromObjects(changes.Snapshot)
	if p.cluster == nil || changes.Reset {
		changes.Reset = true
		p.cluster = Build(state)
	} else {
		p.cluster = p.cluster.Advance(state, Refs(changes.Changed))
	}
	p.follow(changes, p.cluster, state, now)
}

// Plan plans the pending pods of the snapshot that it followed to last. See
// [Input] for the arguments.
func (p *Planner) Plan(now time.Time, seed uint64, pods iter.Seq[*corev1.Pod]) (Plan, error) {
	return p.cfg.schedule(Input{Now: now, Seed: seed, Snapshot: p.snapshot, Cluster: p.cluster, Pods: pods, Held: p.heldClaims()})
}
