// Package policy folds NetworkPolicies, the cluster's policies, namespaces and pods into
// what nodes are told: addresses instead of selectors.
//
//	pods ─────────┐ selections: a selector of pods within a namespace, or within those that
//	namespaces ───┤   a selector of namespaces matches; each once, however many name it
//	policies ─────┘      │                     │
//	                     ▼                     ▼
//	             NetworkPod, Policy     NetworkGroup, in parts of some addresses
//	                     └──────────┬──────────┘
//	                                ▼
//	                 Follower of a node: what its pods need, and what changed of that
//
// A [Fold] is equal to one that was built anew, to the byte of each item, on whichever
// controller: so an agent that comes from another has what this one would tell it. What a
// change costs is what it changes: the pods whose policies are others now, the parts that
// addresses came to or left, and the nodes that need one of these. Selections are found by
// a pair that their selectors demand, not by asking each.
//
// What is too much is left out so that less is allowed: a policy without its rules
// isolates, a group without its members lets nobody in, and a rule of the cluster that
// denies to a group that is left out denies to all.
package policy
