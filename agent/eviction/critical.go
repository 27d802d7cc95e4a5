package eviction

import corev1 "k8s.io/api/core/v1"

// criticalPriority is the least of what the cluster or a node cannot do without,
// as the classes system-cluster-critical and system-node-critical have it.
const criticalPriority = 2_000_000_000

// Critical says whether a pod is never evicted. Only its priority counts, which
// admission sets: upstream's annotations of static pods are for kubelets that
// read pods from files, and anybody could write them.
func Critical(pod *corev1.Pod) bool {
	return pod.Spec.Priority != nil && *pod.Spec.Priority >= criticalPriority
}
