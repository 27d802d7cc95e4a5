package reconcile

import (
	"errors"
	"fmt"
	"time"
)

// GossipState is what the controllers' gossip pool says of a node.
type GossipState string

// The states of a gossip member. GossipUnknown means that the pool has never heard of it.
const (
	GossipUnknown GossipState = ""
	GossipAlive   GossipState = "Alive"
	GossipSuspect GossipState = "Suspect"
	GossipDead    GossipState = "Dead"
	GossipLeft    GossipState = "Left"
)

// NodeHealth is what is known of one node's liveness, merged over all controllers.
type NodeHealth struct {
	// Stream says that some controller holds the agent's stream.
	Stream bool
	// StreamSince is when Stream became what it is.
	StreamSince time.Time
	// Goodbye says that the agent announced its stop before its stream ended.
	Goodbye bool
	// Gossip is the pool's opinion, GossipSince when it became that.
	Gossip      GossipState
	GossipSince time.Time
	// ProbesFailed counts the controllers whose direct probe of the node failed
	// since the stream went, ProbesSince when the last of them failed.
	ProbesFailed int
	ProbesSince  time.Time
}

// Health is what is known of all nodes' liveness. It is never changed once given out.
type Health struct {
	// Since is when the watch over the nodes began: the election, or the end of
	// the last pause or stall. Every node's clock starts there.
	Since time.Time
	// Nodes is by node name. A node that is missing has shown no stream since Since.
	Nodes map[string]NodeHealth
}

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
	// Share is the share of the nodes, between 0 and 1, above which a loss within
	// Window is taken for our own fault or the network's: no node is then given a
	// NoExecute taint. Default 0.55.
	Share float64
	// ShareMin is how many nodes must be lost at least for that. Default 2.
	ShareMin int
	// Window is within what time losses count as one. Default 5 min.
	Window time.Duration
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
func (c HealthConfig) judge(h Health, node string, now time.Time) verdict {
	n := h.Nodes[node]
	if n.Stream {
		return verdict{}
	}
	start := h.Since.Add(c.Settle)
	gone := n.StreamSince
	if gone.IsZero() {
		gone = h.Since
	}

	due, why := latest(gone, h.Since).Add(c.Alone), "its stream is gone and nobody else has seen it fail"
	if n.Goodbye {
		due, why = latest(gone, h.Since).Add(c.Goodbye), "its agent said goodbye and has not come back"
	} else if at, by, ok := c.secondWitness(n); ok {
		if both := latest(at, gone, start).Add(c.Confirm); both.Before(due) {
			due, why = both, "its stream is gone and "+by
		}
	}
	due = latest(due, start)
	if now.Before(due) {
		return verdict{Next: due}
	}
	return verdict{Unreachable: true, Why: why}
}

// secondWitness returns since when, and by whom, a node without a stream is also missed.
func (c HealthConfig) secondWitness(n NodeHealth) (time.Time, string, bool) {
	switch n.Gossip {
	case GossipSuspect:
		return n.GossipSince, "gossip suspects it", true
	case GossipDead, GossipLeft:
		return n.GossipSince, "gossip says that it is gone", true
	}
	if n.ProbesFailed >= c.Probes {
		return n.ProbesSince, fmt.Sprintf("%d controllers cannot reach it", n.ProbesFailed), true
	}
	return time.Time{}, "", false
}

// latest returns the last of the times.
func latest(times ...time.Time) time.Time {
	var out time.Time
	for _, t := range times {
		if t.After(out) {
			out = t
		}
	}
	return out
}
