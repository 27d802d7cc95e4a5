package node

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
)

// HealthConfig holds the times after which a silent node is declared unreachable.
type HealthConfig struct {
	// Settle is how long after Health.Since nothing is judged, so that streams
	// can come back after an election or a pause. Default 5 s.
	Settle time.Duration
	// Confirm is how long both witnesses (no stream, and gossip or the probes of
	// two controllers) must agree that a node is gone. Default 1 s.
	Confirm time.Duration
	// Alone is how long a node without a stream is given while no second witness
	// agrees. Default 40 s.
	Alone time.Duration
	// Goodbye is how long an agent that announced its stop may be away. Default 40 s.
	Goodbye time.Duration
	// Probes is how many controllers' failed probes count as a second witness. Default 2.
	Probes int
	// Share is the share of a zone's nodes, between 0 and 1, from which on their loss
	// within Window is taken for our own fault or the network's. Default 0.55.
	Share float64
	// ShareMin is how many nodes must be lost at least for that. Default 2.
	ShareMin int
	// Window is within what time losses count as one. Default 5 min.
	Window time.Duration

	// EvictionRate is from how many nodes of a zone pods are evicted in a second at
	// most. Default 0.1; negative: none.
	EvictionRate float64
	// SecondaryEvictionRate is that of a zone so much of which is lost that it is taken
	// for our own fault, if the zone is large. Default 0.01; negative: none.
	SecondaryEvictionRate float64
	// LargeZone is the number of nodes above which a zone is large. Default 50.
	LargeZone int
}

// withDefaults returns the config with zero fields replaced by their defaults.
func (c HealthConfig) withDefaults() HealthConfig {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.Settle, 5*time.Second)
	set(&c.Confirm, time.Second)
	set(&c.Alone, 40*time.Second)
	set(&c.Goodbye, 40*time.Second)
	set(&c.Window, 5*time.Minute)
	if c.Probes == 0 {
		c.Probes = 2
	}
	if c.Share == 0 {
		c.Share = 0.55
	}
	if c.ShareMin == 0 {
		c.ShareMin = 2
	}
	c.EvictionRate = cmp.Or(c.EvictionRate, 0.1)
	c.SecondaryEvictionRate = cmp.Or(c.SecondaryEvictionRate, 0.01)
	c.LargeZone = cmp.Or(c.LargeZone, 50)
	return c
}

// Validate says which field has a value that makes no sense.
func (c HealthConfig) Validate() error {
	for _, f := range []struct {
		name string
		d    time.Duration
	}{{"Settle", c.Settle}, {"Confirm", c.Confirm}, {"Alone", c.Alone}, {"Goodbye", c.Goodbye}, {"Window", c.Window}} {
		if f.d < 0 {
			return fmt.Errorf("HealthConfig.%s is %s: give a time that is not negative", f.name, f.d)
		}
	}
	switch {
	case c.Probes < 0:
		return fmt.Errorf("HealthConfig.Probes is %d: give a number of controllers", c.Probes)
	case c.Share < 0 || c.Share > 1:
		return fmt.Errorf("HealthConfig.Share is %v: give a share between 0 and 1", c.Share)
	case c.ShareMin < 0:
		return errors.New("HealthConfig.ShareMin is negative: give a number of nodes")
	case c.LargeZone < 0:
		return errors.New("HealthConfig.LargeZone is negative: give a number of nodes")
	}
	return nil
}

// verdict is the judgement over one node.
type verdict struct {
	// Unreachable says that the node is to be treated as gone.
	Unreachable bool
	// Why is a sentence for people, set when Unreachable.
	Why string
	// Next is when the judgement may change with no news, zero for never.
	Next time.Time
}

// judge decides whether a node is gone. A node with a stream never is. One
// without is gone when a second witness has agreed for Confirm, or, with no
// second witness, after Alone; after a goodbye it has the time of Goodbye.
func (c HealthConfig) judge(h reconcile.Health, node string, now time.Time) verdict {
	n := h.Nodes[node]
	if n.Stream {
		return verdict{}
	}
	start := h.Since.Add(c.Settle)
	gone := n.StreamSince
	if gone.IsZero() {
		gone = h.Since
	}

	due, why := reconcile.Latest(gone, h.Since).Add(c.Alone), "its stream is gone and nobody else has seen it fail"
	if n.Goodbye {
		due, why = reconcile.Latest(gone, h.Since).Add(c.Goodbye), "its agent said goodbye and has not come back"
	} else if at, by, ok := n.MissedBy(c.Probes); ok {
		if both := reconcile.Latest(at, gone, start).Add(c.Confirm); both.Before(due) {
			due, why = both, "its stream is gone and "+by
		}
	}
	due = reconcile.Latest(due, start)
	if now.Before(due) {
		return verdict{Next: due}
	}
	return verdict{Unreachable: true, Why: why}
}

// longTainted says whether a Node's eviction taint is from before the window in
// which losses count as one, so that the Node was lost on its own.
func (c HealthConfig) longTainted(node *corev1.Node, now time.Time) bool {
	since := lostSince(node)
	return !since.IsZero() && now.Sub(since) >= c.Window
}

// lostSince is when a Node got the first of its eviction taints, zero for none.
func lostSince(node *corev1.Node) (since time.Time) {
	for i := range node.Spec.Taints {
		if t := &node.Spec.Taints[i]; isEvictionTaint(t) && t.TimeAdded != nil && (since.IsZero() || t.TimeAdded.Time.Before(since)) {
			since = t.TimeAdded.Time
		}
	}
	return since
}
