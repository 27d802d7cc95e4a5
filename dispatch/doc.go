// Package dispatch is the controllers' end of the agents' streams: what each
// node should run goes down, status comes up, and connections to the kubelet API
// go through.
//
//	agent ── Connect ──▶ session ◀── wake ── hub ◀── objects.Cache
//	                     │  │
//	     PodSet … Synced ┘  └ writer ──▶ API as system:node:NAME
//
// Every controller serves the agents that dialed it ([Dispatcher]). One
// goroutine, the hub, follows the decoded objects of this replica and wakes the
// sessions of the nodes a change concerns. A woken session compares what its
// node should have with what it has sent, and sends the difference; so a slow
// agent costs nobody anything, and changes that it did not see in time are
// merged. An agent that comes from elsewhere says what it has, object by object, and
// gets the difference from this replica's state: no position in the history is
// trusted, so a pod that was deleted while its node was away goes whatever this
// controller remembers. Who says nothing gets a full list.
//
// An agent's reports are written through the API as that node, so that the node
// authorizer and NodeRestriction hold for them. Of what waits only the newest per
// object counts.
//
// [Dispatcher.DialKubelet] reaches a node from any controller: over the stream
// here, or over the controller that has it.
//
// The leader runs a [Tracker], which puts together what all controllers know of
// each node: who has its stream, what gossip says, who cannot reach it. It draws
// no conclusion; that is package reconcile's.
package dispatch
