package admission

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// fits holds what the pod requests against what the others have left. The
// first resource that is short is named, in the kubelet's order.
func fits(pod *corev1.Pod, node *Node) *Rejection {
	if most := node.Allocatable.Pods().Value(); int64(len(node.Pods))+1 > most {
		return outOfResource(corev1.ResourcePods, 1, int64(len(node.Pods)), most)
	}
	want := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	used := corev1.ResourceList{}
	for _, other := range node.Pods {
		for name, q := range resourcehelper.PodRequests(other, resourcehelper.PodResourcesOptions{}) {
			sum := used[name]
			sum.Add(q)
			used[name] = sum
		}
	}
	first := []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage}
	rest := slices.DeleteFunc(slices.Sorted(maps.Keys(want)), func(n corev1.ResourceName) bool { return slices.Contains(first, n) })
	for _, name := range append(first, rest...) {
		capacity, has := node.Allocatable[name]
		if !has && extended(name) {
			continue // a resource of the cluster's, not of any node's
		}
		asked, taken, size := amount(name, want[name]), amount(name, used[name]), amount(name, capacity)
		if asked > 0 && asked > size-taken {
			return outOfResource(name, asked, taken, size)
		}
	}
	return nil
}

// Resize says why a pod that has run so far with the resources of have cannot have those
// of want: never on this node, or not while others need what they have. nil: it can.
func Resize(have, want *corev1.Pod, node *Node) *Rejection {
	if !equality.Semantic.DeepEqual(have.Spec.Resources, want.Spec.Resources) {
		return reject(corev1.PodReasonInfeasible, "In-place resize of a pod's own resources is not supported by this node")
	}
	for c := range containers(want) {
		for _, p := range c.ResizePolicy {
			// What ends well when it is told to end would be done.
			if p.RestartPolicy == corev1.RestartContainer && !restarts(want, c) {
				return reject(corev1.PodReasonInfeasible, "In-place resize with a restart of container %s is not supported by this node in a pod that restarts %s", c.Name, want.Spec.RestartPolicy)
			}
		}
	}
	asked := resourcehelper.PodRequests(want, resourcehelper.PodResourcesOptions{})
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		if want, size := amount(name, asked[name]), amount(name, node.Allocatable[name]); want > size {
			return reject(corev1.PodReasonInfeasible, "Node didn't have enough capacity: %s, requested: %d, capacity: %d", name, want, size)
		}
	}
	if r := fits(want, node); r != nil {
		return &Rejection{Reason: corev1.PodReasonDeferred, Message: r.Message}
	}
	return nil
}

// restarts says whether a container is started anew however it ends.
func restarts(pod *corev1.Pod, c *corev1.Container) bool {
	if c.RestartPolicy != nil {
		return *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	}
	return pod.Spec.RestartPolicy == corev1.RestartPolicyAlways
}

func amount(name corev1.ResourceName, q resource.Quantity) int64 {
	if name == corev1.ResourceCPU {
		return q.MilliValue()
	}
	return q.Value()
}

func outOfResource(name corev1.ResourceName, asked, used, capacity int64) *Rejection {
	return &Rejection{
		Reason: outOf + string(name),
		Message: fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d",
			name, asked, used, capacity),
	}
}

// extended says whether a resource has a name of somebody else's domain.
func extended(name corev1.ResourceName) bool {
	domain, _, ok := strings.Cut(string(name), "/")
	return ok && domain != "kubernetes.io" && !strings.HasSuffix(domain, ".kubernetes.io")
}
