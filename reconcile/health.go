package reconcile

import (
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

// MissedBy returns since when, and by whom, a node without a stream is also missed: by
// gossip, or by the probes of so many controllers.
func (n NodeHealth) MissedBy(probes int) (since time.Time, by string, ok bool) {
	switch n.Gossip {
	case GossipSuspect:
		return n.GossipSince, "gossip suspects it", true
	case GossipDead, GossipLeft:
		return n.GossipSince, "gossip says that it is gone", true
	}
	if n.ProbesFailed >= probes {
		return n.ProbesSince, fmt.Sprintf("%d controllers cannot reach it", n.ProbesFailed), true
	}
	return time.Time{}, "", false
}

// Health is what is known of all nodes' liveness. It is never changed once given out.
type Health struct {
	// Since is when the watch over the nodes began: the election, or the end of
	// the last pause or stall. Every node's clock starts there.
	Since time.Time
	// Nodes is by node name. A node that is missing has shown no stream since Since.
	Nodes map[string]NodeHealth
}

// String renders health for logs.
func (h Health) String() string {
	streams := 0
	for _, n := range h.Nodes {
		if n.Stream {
			streams++
		}
	}
	return fmt.Sprintf("%d of %d nodes with a stream", streams, len(h.Nodes))
}
