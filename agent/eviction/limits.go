package eviction

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// Limits are what of a pod's own limits has to be measured.
type Limits struct {
	// Volumes are the size limits of emptyDirs on the node's disk.
	Volumes map[string]resource.Quantity
	// Pod is the limit of the pod's ephemeral storage: the sum of those of its
	// containers that have one. nil: none has.
	Pod *resource.Quantity
	// Containers are the limits of their own.
	Containers map[string]resource.Quantity
}

// LimitsOf returns the limits of a pod, nil when it has none.
func LimitsOf(pod *corev1.Pod) *Limits {
	l := &Limits{Volumes: map[string]resource.Quantity{}, Containers: map[string]resource.Quantity{}}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		// The kernel keeps those on memory at their size.
		if e := v.EmptyDir; e != nil && e.Medium == corev1.StorageMediumDefault && e.SizeLimit != nil && e.SizeLimit.Sign() > 0 {
			l.Volumes[v.Name] = *e.SizeLimit
		}
	}
	if total, ok := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})[corev1.ResourceEphemeralStorage]; ok {
		l.Pod = &total
	}
	add := func(c *corev1.Container) {
		if q := c.Resources.Limits.StorageEphemeral(); !q.IsZero() {
			l.Containers[c.Name] = *q
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	if len(l.Volumes) == 0 && l.Pod == nil && len(l.Containers) == 0 {
		return nil
	}
	return l
}

// OverLimit says whether a pod takes more than its own limits allow, and which,
// as upstream: emptyDirs first, then the pod as a whole, then its containers.
// ownImages says that containers' layers are on a file system of their own.
func OverLimit(pod *corev1.Pod, u *Usage, ownImages bool) (message string, over bool) {
	l := LimitsOf(pod)
	if l == nil {
		return "", false
	}
	exceeds := func(used int64, limit resource.Quantity) bool { return limit.CmpInt64(used) < 0 }
	for i := range pod.Spec.Volumes {
		name := pod.Spec.Volumes[i].Name
		if limit, ok := l.Volumes[name]; ok && exceeds(u.Volumes[name].Bytes, limit) {
			return fmt.Sprintf("Usage of EmptyDir volume %q exceeds the limit %q. ", name, limit.String()), true
		}
	}
	if l.Pod != nil && exceeds(u.ephemeral().Bytes, *l.Pod) {
		return fmt.Sprintf("Pod ephemeral local storage usage exceeds the total limit of containers %s. ", l.Pod.String()), true
	}
	for i := range u.Containers {
		c := &u.Containers[i]
		used := c.Logs.Bytes
		if !ownImages {
			used += c.Rootfs.Bytes
		}
		if limit, ok := l.Containers[c.Name]; ok && exceeds(used, limit) {
			return fmt.Sprintf("Container %s exceeded its local ephemeral storage limit %q. ", c.Name, limit.String()), true
		}
	}
	return "", false
}
