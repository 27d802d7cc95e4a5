// Package network is the controllers' end of the network feed: what every node knows of
// Services, their EndpointSlices and the nodes' pod ranges, and what each knows of the
// policies that hold for its own pods.
//
//	objects.Cache ── changes ──▶ Feed ── published ──▶ stream of each agent
//	                             │  encodes an object once, for all
//	                             └  Log: every item once, in the order of their last changes
//
// A [Feed] follows the decoded objects of this replica, strips them of what no node
// needs, and keeps each as it goes over the wire. A stream is a position in its [Log]:
// it sends what changed after, each item as it is now. So a slow agent costs nobody
// anything, and what it missed is merged.
//
// An agent that comes says what it has as digests of 256 buckets of names, and gets the
// buckets that differ: no position is trusted that another controller, or this one
// before, has given. With what it sends last, a stream tells the digest of all, and
// who has another asks.
//
// Policies are no part of the Log, as a node is told of those alone that concern its pods:
// they come from [timonel/dispatch/network/policy], which knows what each node with a
// stream here needs, and are sent whole, as of a revision of the state that the last batch
// says. A pod for which policies may hold is sent with a revision ([Holding]); its node
// starts it when the feed has told so far, or its policies.
//
// Nothing that a node may not know is in an item: no labels or annotations but those
// that say how a Service is to be served, and nothing of Secrets, ConfigMaps or pods but
// the addresses and named ports of those that policies of its own pods select.
package network
