package workload

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
)

// What the stories of this room look at from outside.
const (
	AtOnce   = atOnce
	LastHold = lastHold
)

var FailedAtOnce = failedAtOnce

// Manage is what a pass of ReplicaSet does about the number of pods.
func Manage(in reconcile.Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, result *reconcile.Result) {
	ReplicaSet{}.manage(in, rs, pods, result)
}
