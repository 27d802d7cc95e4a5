// Package node holds the reconcilers of Nodes: which are alive, what that means for
// their pods, and which range of addresses each has.
//
// [HealthConfig] says how a Node is judged. Two witnesses are needed to call it
// unreachable within a second: its stream is gone, and gossip or the probes of
// two controllers miss it too. One witness alone waits for a longer, safe time.
// After an election, a pause or a stall every clock starts again. When many
// Nodes are lost at once, no pod is evicted.
package node
