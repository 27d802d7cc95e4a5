// Package policy lets through what network policies allow between the pods of one node
// and others, and holds the pods to their own addresses, in nftables.
//
//	rules, err := policy.New(policy.Config{Table: "timonel-policy", Bridge: "timonel0", Store: store, Logger: log})
//	rules.SetPod(policy.Pod{UID: uid, Namespace: "default", Name: "web-0", Addresses: ips, Device: "veth1"})
//	err = rules.Ready(uid, revision) // nil: nothing of the pod's may be sent past its policies
//	err = rules.Run(ctx)
//
// Who selects whom is decided by the controllers: a View of network/feed has the pods
// of this node for which a policy holds, the policies without their selectors, and groups of
// addresses. Here they become two tables of one name.
//
// The table of family inet has, in the kernel's hook forward, a chain for what pods send
// (egress) and one for what they get (ingress):
//
//	@egress4, @egress6     address of a pod of this node → the chain of its policies
//	@ingress4, @ingress6   the same, for what is sent to it
//	pod-HASH-out, -in      which policies hold, in order, and what follows when none decides;
//	                       all pods that have the same policies share one
//	policy-HASH-out, -in   the rules of one policy
//	@g4-GROUP, @g6-GROUP   the addresses of a group; rules of all policies share it
//	@t4-GROUP, @t6-GROUP   its addresses with ports that have a name
//	@guarded4, @guarded6   addresses and ports of the cluster's own that pods do not reach, and
//	                       that nobody reaches through a Service
//
// What the node itself sends to its pods and gets from them does not pass the hook, and what
// belongs to a connection that was allowed is let through without more questions.
//
// The table of family bridge has a chain per device of a pod: frames with another's
// address, by IP, ARP, NDP or as the sender of the frame, with a VLAN tag, and of other
// protocols, are dropped.
//
// Both are functions of what is known ([compile], [guard]); the difference between what
// the kernel has and what it should becomes one transaction. Nothing is taken back when
// the agent ends. The first transaction of a new agent, which knows then the pods that
// run, replaces all at once. A policy that the kernel refuses is closed for its pods: nothing
// goes through in its directions, and the rest of the rules is in force.
package policy
