package reconcile

import (
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"timonel/state/objects"
)

// Reconciler decides what must change for one object, or for one small group
// of objects, to bring the cluster nearer to what its users asked for.
//
// A Reconciler is pure: it does no I/O, reads no clock, starts no goroutine,
// keeps nothing between calls and never changes an object it was given.
// The Runner may call one Reconciler for different keys at the same time.
type Reconciler interface {
	// Name is short and stable: it appears in logs and as the source of events.
	Name() string
	// All returns every key there is. The Runner asks once, when a term begins.
	All(s *objects.Snapshot) []Key
	// Keys returns the keys that one changed object concerns. s is a snapshot
	// that has the change, and perhaps later ones.
	Keys(c objects.Changed, s *objects.Snapshot) []Key
	// Reconcile decides for one key. An error means that the key is to be tried
	// again after a back-off; the changes returned beside it are still made.
	Reconcile(in Input, key Key) (Result, error)
}

// HealthReconciler is a Reconciler whose keys also depend on the health of nodes.
type HealthReconciler interface {
	Reconciler
	// HealthKeys returns the keys to look at again when health went from before to after.
	HealthKeys(before, after Health, s *objects.Snapshot) []Key
}

// Traits are what the Runner must know of a Reconciler beside what it decides.
type Traits struct {
	// Pace is the shortest time between two passes over one key, for reconcilers
	// that look at many objects at once.
	Pace time.Duration
	// Steady says that the reconciler works on many objects under one key and decides
	// itself when to try again what the API has refused: it is not put off as a
	// whole, and finds what was refused in Input.Failed at once.
	Steady bool
	// Kinds says that it looks at Input.Kinds, so that all of its keys are looked at
	// again when the API begins to serve another kind.
	Kinds bool
}

// traitsOf returns the Traits of a reconciler that has a method for them, and none
// of another.
func traitsOf(r Reconciler) Traits {
	if t, ok := r.(interface{ Traits() Traits }); ok {
		return t.Traits()
	}
	return Traits{}
}

// Key names what a Reconciler works on. Which fields are set is the Reconciler's choice.
type Key struct {
	Group, Kind     string
	Namespace, Name string
	UID             types.UID
}

// Singleton is the key of a reconciler that works on the cluster as a whole.
var Singleton = Key{Name: "cluster"}

// String renders the key for logs, without the fields that are empty.
func (k Key) String() string {
	out := k.Name
	if k.Namespace != "" {
		out = k.Namespace + "/" + out
	}
	if k.Kind != "" {
		kind := k.Kind
		if k.Group != "" {
			kind += "." + k.Group
		}
		out = kind + " " + out
	}
	return out
}

// Input is everything that a decision may depend on.
type Input struct {
	// Now is the time of the decision.
	Now time.Time
	// Seed is different for every pass; random choices come from it alone.
	Seed uint64
	// Snapshot is the cluster's state.
	Snapshot *objects.Snapshot
	// Changes returns what changed after a revision, with a snapshot that is
	// perhaps newer than Snapshot. It never waits. It is for reconcilers that keep
	// a derived view from pass to pass, and may be nil in tests of others.
	Changes func(after int64) objects.Changes
	// Health says what the controllers know of the nodes' liveness.
	Health Health
	// Kinds says which resources the API serves.
	Kinds Kinds
	// Failed holds the changes of this key's previous pass that the API refused.
	Failed []Failure
	// Since is when the first of the passes was that all asked to be looked at again
	// (Result.Next) or were refused something, up to the last one. Zero: the last one
	// asked for nothing. It dates what a reconciler found and the state does not: it
	// begins anew with a term.
	Since time.Time
}

// Failure is a change that could not be made, and why.
type Failure struct {
	Request Request
	Err     error
}

// Refused returns the first refused change with the verb and resource, or nil.
func (in Input) Refused(verb Verb, resource schema.GroupVersionResource) *Failure {
	for i := range in.Failed {
		if in.Failed[i].Request.Verb == verb && in.Failed[i].Request.Resource == resource {
			return &in.Failed[i]
		}
	}
	return nil
}

// Result is a decision.
type Result struct {
	// Requests are made at the same time, in no order. A change that must come
	// after another is in the other's Then.
	Requests []Request
	// Events are recorded whatever becomes of the changes.
	Events []Event
	// Next is when to look again even if nothing changed; zero means only on a change.
	Next time.Time
}

// Add adds c to the result.
func (r *Result) Add(c Request) { r.Requests = append(r.Requests, c) }

// At asks for another pass at t, unless an earlier one is asked for already.
func (r *Result) At(t time.Time) {
	if t.IsZero() {
		return
	}
	if r.Next.IsZero() || t.Before(r.Next) {
		r.Next = t
	}
}
