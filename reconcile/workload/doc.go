// Package workload holds the reconcilers that keep as many pods, of the right
// template, as their owners ask for, or one on each node. Those of work that ends
// are in a folder of their own, timonel/reconcile/workload/job.
//
// ReplicaSets and ReplicationControllers share one engine; StatefulSets and
// DaemonSets share the history of their templates ([StatefulSet], history.go).
//
// Where a StatefulSet differs from Kubernetes 1.37: a pod that cannot be made,
// because somebody else's pod has its name or its claim is being deleted, holds up
// no other pod of a parallel set; a revision is compared with the template as it is
// encoded now, without filling in defaults that came after it was written; a set that
// is being deleted gets no new revision; and all pods of a parallel set are asked for at
// once, by the hundred, also when the first are refused.
//
// Where a DaemonSet differs from Kubernetes 1.37: how often pods have failed on a node
// in a row is counted in an annotation of the pod that replaces them, not in memory, so
// that the pace outlasts a change of leader, and a set that surges keeps it too; a new
// pod of that kind is created together with the deletion of the failed one. Of nodes
// that are alike, those that come first by name are updated first.
package workload
