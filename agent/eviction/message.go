package eviction

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// Starved is the eviction of a pod because the node is short of something, with
// upstream's words and annotations.
func Starved(pod *corev1.Pod, u *Usage, at Threshold, shortOf []Threshold, seen Observations) Eviction {
	name := at.Signal.resource()
	e := Eviction{Pod: pod, Disruption: true, Message: fmt.Sprintf("The node was low on resource: %s. ", name), Annotations: map[string]string{}}
	// The first that is about the same resource is told, as upstream does.
	if i := slices.IndexFunc(shortOf, func(t Threshold) bool { return t.Signal.resource() == name }); i >= 0 {
		o := seen[shortOf[i].Signal]
		format := resource.BinarySI
		if name == resourceInodes || name == resourcePids {
			format = resource.DecimalSI
		}
		e.Message += fmt.Sprintf("Threshold quantity: %s, available: %s. ",
			shortOf[i].Value.of(o.Capacity), resource.NewQuantity(o.Available, format))
	}
	if u == nil {
		return e
	}
	if name == corev1.ResourceMemory && resourcehelper.IsPodLevelResourcesSet(pod) {
		if asked, ok := pod.Spec.Resources.Requests[name]; ok {
			used := resource.NewQuantity(u.Memory, resource.BinarySI)
			e.Message += fmt.Sprintf("Pod %s was using %s, request is %s, has larger consumption of %s. ", pod.Name, used, asked.String(), name)
			e.Annotations["offending_pod"], e.Annotations["offending_pod_usage"] = pod.Name, used.String()
		}
	}
	var names, amounts []string
	for i := range u.Containers {
		c := &u.Containers[i]
		spec := containerOf(pod, c.Name)
		if spec == nil {
			continue
		}
		var taken int64
		switch name {
		case corev1.ResourceMemory:
			taken = c.Memory
		case corev1.ResourceEphemeralStorage:
			taken = c.Rootfs.Bytes + c.Logs.Bytes
		default:
			continue
		}
		asked, used := spec.Resources.Requests[name], resource.NewQuantity(taken, resource.BinarySI)
		if used.Cmp(asked) <= 0 {
			continue
		}
		e.Message += fmt.Sprintf("Container %s was using %s, request is %s, has larger consumption of %s. ", c.Name, used, asked.String(), name)
		names, amounts = append(names, c.Name), append(amounts, used.String())
	}
	e.Annotations["offending_containers"] = strings.Join(names, ",")
	e.Annotations["offending_containers_usage"] = strings.Join(amounts, ",")
	e.Annotations["starved_resource"] = string(name)
	return e
}

func containerOf(pod *corev1.Pod, name string) *corev1.Container {
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}
