package sched

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	resourcehelper "k8s.io/component-helpers/resource"
)

// Requests assumed in scoring, and only there, for containers that state none:
// otherwise pods without requests would all pile up on one node.
const (
	assumedMilliCPU = 100
	assumedMemory   = 200 << 20
)

// resources are amounts in plain integers: CPU in thousandths of a core, the
// others in their own unit. Scalars are sorted by name; the slice is copied
// before it is changed.
type resources struct {
	milliCPU, memory, ephemeralStorage, pods int64
	scalars                                  []scalar
}

type scalar struct {
	name  corev1.ResourceName
	value int64
}

func makeResources(list corev1.ResourceList) resources {
	var r resources
	for name, q := range list {
		switch name {
		case corev1.ResourceCPU:
			r.milliCPU = q.MilliValue()
		case corev1.ResourceMemory:
			r.memory = q.Value()
		case corev1.ResourceEphemeralStorage:
			r.ephemeralStorage = q.Value()
		case corev1.ResourcePods:
			r.pods = q.Value()
		default:
			if isScalar(name) {
				r.scalars = append(r.scalars, scalar{name, q.Value()})
			}
		}
	}
	slices.SortFunc(r.scalars, func(a, b scalar) int { return strings.Compare(string(a.name), string(b.name)) })
	return r
}

func (r *resources) scalar(name corev1.ResourceName) int64 {
	for _, s := range r.scalars {
		if s.name == name {
			return s.value
		}
	}
	return 0
}

// add adds sign times o. The scalars of r must be its own (see clone).
func (r *resources) add(o *resources, sign int64) {
	r.milliCPU += sign * o.milliCPU
	r.memory += sign * o.memory
	r.ephemeralStorage += sign * o.ephemeralStorage
	for _, s := range o.scalars {
		at, found := slices.BinarySearchFunc(r.scalars, s.name, func(a scalar, name corev1.ResourceName) int {
			return strings.Compare(string(a.name), string(name))
		})
		if !found {
			r.scalars = slices.Insert(r.scalars, at, scalar{name: s.name})
		}
		r.scalars[at].value += sign * s.value
	}
}

func (r resources) clone() resources {
	r.scalars = slices.Clone(r.scalars)
	return r
}

// podRequests returns what the pod takes from a node and, for scoring, its CPU
// and memory with assumed amounts for containers that state none. For a running
// pod that is being resized it is the larger of wanted and actual.
func podRequests(pod *corev1.Pod) (req resources, scoredCPU, scoredMemory int64) {
	if r, ok := plainRequests(pod); ok {
		return r.resources, r.scoredCPU, r.scoredMemory
	}
	opts := resourcehelper.PodResourcesOptions{
		UseStatusResources: true,
		InPlacePodLevelResourcesVerticalScalingEnabled: true,
	}
	list := resourcehelper.PodRequests(pod, opts)
	req = makeResources(list)
	req.pods = 0

	assumed := corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewMilliQuantity(assumedMilliCPU, resource.DecimalSI),
		corev1.ResourceMemory: *resource.NewQuantity(assumedMemory, resource.BinarySI),
	}
	if resourcehelper.IsPodLevelRequestsSet(pod) {
		for name := range list {
			delete(assumed, name)
		}
	}
	if len(assumed) == 0 {
		return req, req.milliCPU, req.memory
	}
	opts.NonMissingContainerRequests = assumed
	list = resourcehelper.PodRequests(pod, opts)
	return req, list.Cpu().MilliValue(), list.Memory().Value()
}

type plainRequest struct {
	resources
	scoredCPU, scoredMemory int64
}

// plainRequests is a shortcut for the common pod, which has only ordinary
// containers and was never resized; ok is false for any other.
func plainRequests(pod *corev1.Pod) (r plainRequest, ok bool) {
	if len(pod.Spec.InitContainers) != 0 || len(pod.Spec.Overhead) != 0 || pod.Spec.Resources != nil ||
		pod.Status.Resources != nil || len(pod.Status.AllocatedResources) != 0 ||
		len(pod.Status.NodeAllocatableResourceClaimStatuses) != 0 {
		return r, false
	}
	for i := range pod.Status.ContainerStatuses {
		if s := &pod.Status.ContainerStatuses[i]; s.Resources != nil || len(s.AllocatedResources) != 0 {
			return r, false
		}
	}
	for i := range pod.Spec.Containers {
		requests := pod.Spec.Containers[i].Resources.Requests
		hasCPU, hasMemory := false, false
		for name, q := range requests {
			switch name {
			case corev1.ResourceCPU:
				hasCPU = true
				r.milliCPU += q.MilliValue()
			case corev1.ResourceMemory:
				hasMemory = true
				r.memory += q.Value()
			case corev1.ResourceEphemeralStorage:
				r.ephemeralStorage += q.Value()
			default:
				return r, false
			}
		}
		if !hasCPU {
			r.scoredCPU += assumedMilliCPU
		}
		if !hasMemory {
			r.scoredMemory += assumedMemory
		}
	}
	r.scoredCPU += r.milliCPU
	r.scoredMemory += r.memory
	return r, true
}

// isScalar reports whether a resource is counted in whole units by name:
// extended resources, huge pages and attachable volumes.
func isScalar(name corev1.ResourceName) bool {
	s := string(name)
	if strings.HasPrefix(s, corev1.ResourceHugePagesPrefix) ||
		strings.HasPrefix(s, corev1.ResourceAttachableVolumesPrefix) ||
		strings.Contains(s, corev1.ResourceDefaultNamespacePrefix) {
		return true
	}
	if !strings.Contains(s, "/") || strings.HasPrefix(s, corev1.DefaultResourceRequestsPrefix) {
		return false
	}
	return len(validation.IsQualifiedName(corev1.DefaultResourceRequestsPrefix+s)) == 0
}

// isExtended reports whether a resource is one of a vendor's.
func isExtended(name corev1.ResourceName) bool {
	return strings.Contains(string(name), "/") && !strings.Contains(string(name), corev1.ResourceDefaultNamespacePrefix) && isScalar(name)
}

// hasRoom reports whether the pod fits into what the node has left.
func (n *nodeInfo) hasRoom(p *podInfo, by *profile) bool {
	if int64(len(n.pods))+1 > n.allocatable.pods {
		return false
	}
	fits := func(want, allocatable, used int64) bool { return want <= 0 || want <= allocatable-used }
	if !fits(p.req.milliCPU, n.allocatable.milliCPU, n.requested.milliCPU) ||
		!fits(p.req.memory, n.allocatable.memory, n.requested.memory) ||
		!fits(p.req.ephemeralStorage, n.allocatable.ephemeralStorage, n.requested.ephemeralStorage) {
		return false
	}
	for _, s := range p.req.scalars {
		if !fits(s.value, n.allocatable.scalar(s.name), n.requested.scalar(s.name)) && !by.ignored(s.name) {
			return false
		}
	}
	return true
}

// What a node can lack, as bits.
const (
	lacksPods = 1 << iota
	lacksCPU
	lacksMemory
	lacksStorage
	lacksForever // the pod would not fit into the empty node either
	lackings
)

// insufficiencies are the statuses of all that a node can lack but scalars.
var insufficiencies = func() (out [lackings]*status) {
	for bits := 1; bits < lackings; bits++ {
		s := &status{unresolvable: bits&lacksForever != 0, cause: causeResources}
		for i, reason := range []string{"Too many pods", "Insufficient cpu", "Insufficient memory", "Insufficient ephemeral-storage"} {
			if bits&(1<<i) != 0 {
				s.reasons = append(s.reasons, reason)
			}
		}
		out[bits] = s
	}
	return out
}()

// insufficient returns why the pod does not fit into what the node has left, nil if it
// does. It is unresolvable when the pod would not fit into the empty node either.
func (n *nodeInfo) insufficient(p *podInfo, by *profile) *status {
	if n.hasRoom(p, by) {
		return nil
	}
	lacks := 0
	if int64(len(n.pods))+1 > n.allocatable.pods {
		lacks |= lacksPods
	}
	check := func(bit int, want, allocatable, used int64) {
		if want > 0 && want > allocatable-used {
			if lacks |= bit; want > allocatable {
				lacks |= lacksForever
			}
		}
	}
	check(lacksCPU, p.req.milliCPU, n.allocatable.milliCPU, n.requested.milliCPU)
	check(lacksMemory, p.req.memory, n.allocatable.memory, n.requested.memory)
	check(lacksStorage, p.req.ephemeralStorage, n.allocatable.ephemeralStorage, n.requested.ephemeralStorage)
	var scalars []string
	for _, s := range p.req.scalars {
		allocatable, used := n.allocatable.scalar(s.name), n.requested.scalar(s.name)
		if s.value > 0 && s.value > allocatable-used && !by.ignored(s.name) {
			scalars = append(scalars, "Insufficient "+string(s.name))
			check(0, s.value, allocatable, used)
		}
	}
	known := insufficiencies[lacks]
	if len(scalars) == 0 {
		return known
	}
	out := &status{unresolvable: lacks&lacksForever != 0, cause: causeResources, reasons: scalars}
	if known != nil {
		out.reasons = append(slices.Clone(known.reasons), scalars...)
	}
	return out
}
