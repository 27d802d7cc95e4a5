// Package sched decides which node each pending pod runs on.
//
// It is a pure function. [Schedule] takes a configuration and an immutable view
// of the cluster ([State]) and returns a [Plan]: bindings, pods that fit nowhere
// and why, pods to evict to make room, and volume claims to tie to a node. It
// does no I/O, reads no clock, starts no goroutine, and draws randomness only
// from the seed it is given; the same input gives the same plan, byte for byte.
// The runner on the leader commits the plan.
//
//	State ──Build──▶ Cluster ──Schedule──▶ Plan
//	                   │  ▲
//	                   └──┘ Advance(changed pods and nodes)
//
// # Semantics
//
// They are those of the Kubernetes v1.37 scheduler, with its default plugins or as the
// [Profile] says that a pod names, and so are the words of the failure messages. Pods are taken by priority,
// then age. A node is feasible when it passes, in this order: unschedulable
// mark, taints, node selector and affinity, host ports, resources (requests
// of init containers and sidecars, overhead, pod-level and extended resources,
// pod count), volumes (disk conflicts, ReadWriteOncePod, attach limits, bound
// and delayed claims, zones), topology spread, inter-pod affinity, devices (resource
// claims) and declared features. The feasible nodes are scored by taints (weight 3), node affinity
// (2), topology spread (2), inter-pod affinity (2), free resources (1), balance
// of resources (1), images already present (1), how full the volumes would be that
// its claims are bound to (1) and how much its claims like the devices there (2). Ties are broken by the seed.
// A pod placed in a call is seen by every later pod of that call.
//
// # Trying again
//
// A [Queue] holds the pending pods. One that fits nowhere is tried again when a
// change comes that may cure what spoke against it (hints.go, upstream's queueing
// hints), no sooner than its back-off of 1 to 10 s allows, or after five minutes; it
// is then behind those of its priority that were tried longer ago. So a cluster whose
// pending pods nothing can cure is at rest, and they hold up no others.
//
// # Devices
//
// Which devices a pod's ResourceClaims get is upstream's allocator's to say
// (k8s.io/dynamic-resource-allocation/structured), with the features that v1.37 has on by
// default. A plan names the claims as they are to be written, each in the version that the
// plan was made from, and the pod is bound once they are: a claim gets its finalizer in one
// plan and its devices in the next. What was asked for and had no answer is held (held.go),
// so that no device is ever two claims'. The allocator's search is bounded by its steps.
//
// # Scale
//
// A [Cluster] holds per-node sums, parsed pods and counts of pods that match
// the selectors in use. [Cluster.Advance] derives the next one from a list of
// changed objects, sharing everything that did not change; the result is the
// same as building it anew. In large clusters only a share of the feasible
// nodes is scored ([Profile.PercentageOfNodesToScore]).
//
// # Left out
//
// Extended resources that DeviceClasses back (spec.extendedResourceName): such a request is
// met by a node's device plugin alone. Claims of pod groups, scheduler extenders, gang
// scheduling (upstream's feature GenericWorkload, which is off) and translation of in-tree
// cloud volumes to CSI.
package sched
