package eviction

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"
	schedulinghelpers "k8s.io/component-helpers/scheduling/corev1"
)

// Rank orders pods by which is to be evicted first when a node is short of what a
// signal is about, as upstream does: those that take more than they requested, the
// less important first, and of those the one that takes most beyond its request.
// Process ids are not requested: importance and number count. Critical pods are
// left out, they are never evicted. A pod of which nothing is known comes first.
// ownImages says that containers' layers are on a file system of their own.
func Rank(signal Signal, pods []*corev1.Pod, usage map[types.UID]*Usage, ownImages bool) []*corev1.Pod {
	type ranked struct {
		pod      *corev1.Pod
		unknown  bool
		exceeds  bool
		priority int32
		beyond   int64
	}
	var list []ranked
	for _, pod := range pods {
		if Critical(pod) {
			continue
		}
		r := ranked{pod: pod, priority: schedulinghelpers.PodPriority(pod)}
		u, ok := usage[pod.UID]
		switch {
		case !ok:
			r.unknown = true
		case signal == PIDAvailable:
			r.beyond = u.Processes
		case signal == MemoryAvailable:
			r.beyond = u.Memory - request(pod, corev1.ResourceMemory)
			r.exceeds = r.beyond > 0
		default:
			taken := u.on(signal, ownImages)
			r.beyond = taken.Bytes - request(pod, corev1.ResourceEphemeralStorage)
			r.exceeds = r.beyond > 0
			if signal.resource() == resourceInodes {
				// Nobody requests them; upstream takes the request of bytes from their
				// number all the same.
				r.exceeds = taken.Inodes > 0
				r.beyond = taken.Inodes - request(pod, corev1.ResourceEphemeralStorage)
			}
		}
		list = append(list, r)
	}
	first := func(a, b bool) int { // true comes first
		switch {
		case a == b:
			return 0
		case a:
			return -1
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b ranked) int {
		if signal == PIDAvailable {
			return cmp.Or(cmp.Compare(a.priority, b.priority), first(a.unknown, b.unknown), cmp.Compare(b.beyond, a.beyond))
		}
		return cmp.Or(first(a.unknown, b.unknown), first(a.exceeds, b.exceeds), cmp.Compare(a.priority, b.priority), cmp.Compare(b.beyond, a.beyond))
	})
	out := make([]*corev1.Pod, len(list))
	for i := range list {
		out[i] = list[i].pod
	}
	return out
}

// request is how much a pod asks for.
func request(pod *corev1.Pod, name corev1.ResourceName) int64 {
	q := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})[name]
	return q.Value()
}

// on is what a pod takes of the file system that a signal is about.
func (u *Usage) on(signal Signal, ownImages bool) Disk {
	layers, rest := u.parts()
	switch {
	case !ownImages:
		return layers.add(rest)
	case signal == ImageFsAvailable || signal == ImageFsInodesFree:
		return layers
	}
	return rest
}
