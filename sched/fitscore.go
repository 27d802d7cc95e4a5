package sched

import (
	"math"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/storage/volume"
)

// scored is how much of a resource a pod counts for in the score of what is free.
func (p *podInfo) scored(name corev1.ResourceName) int64 {
	switch name {
	case corev1.ResourceCPU:
		return p.scoredCPU
	case corev1.ResourceMemory:
		return p.scoredMemory
	}
	return p.req.of(name)
}

// scored is how much of a resource a node's pods count for in the score of what is free.
func (n *nodeInfo) scored(name corev1.ResourceName) int64 {
	switch name {
	case corev1.ResourceCPU:
		return n.scoredCPU
	case corev1.ResourceMemory:
		return n.scoredMemory
	}
	return n.requested.of(name)
}

// of is the amount of a resource, 0 of one that is not scored.
func (r *resources) of(name corev1.ResourceName) int64 {
	switch name {
	case corev1.ResourceCPU:
		return r.milliCPU
	case corev1.ResourceMemory:
		return r.memory
	case corev1.ResourceEphemeralStorage:
		return r.ephemeralStorage
	}
	return r.scalar(name)
}

// scoreFit scores nodes by how much of their resources is taken with the pod.
func (r *round) scoreFit(c *candidate, feasible []int32, scores []int64) bool {
	if c.profile.plainFit {
		r.scorePlainFit(c, feasible, scores)
		return true
	}
	fit := &c.profile.Fit
	ratio := fit.Strategy == RequestedToCapacityRatio
	for i, slot := range feasible {
		n := r.nodes[slot]
		var sum, weights int64
		for _, resource := range fit.Resources {
			asked, allocatable := c.p.scored(resource.Name), n.allocatable.of(resource.Name)
			if allocatable == 0 || asked == 0 && isScalar(resource.Name) {
				continue
			}
			requested := n.scored(resource.Name) + asked
			var score int64
			switch {
			case ratio:
				if score = utilized(fit.Shape, requested, allocatable); score == 0 {
					continue
				}
			case fit.Strategy == MostAllocated:
				score = min(requested, allocatable) * maxScore / allocatable
			default:
				score = max(allocatable-requested, 0) * maxScore / allocatable
			}
			sum += score * resource.Weight
			weights += resource.Weight
		}
		switch {
		case weights == 0:
		case ratio:
			scores[i] = int64(math.Round(float64(sum) / float64(weights)))
		default:
			scores[i] = sum / weights
		}
	}
	return true
}

// scorePlainFit is scoreFit by default: it prefers nodes with much CPU and memory left.
func (r *round) scorePlainFit(c *candidate, feasible []int32, scores []int64) {
	free := func(requested, allocatable int64) int64 {
		if requested > allocatable {
			return 0
		}
		return (allocatable - requested) * maxScore / allocatable
	}
	for i, slot := range feasible {
		n := r.nodes[slot]
		var sum, count int64
		if a := n.allocatable.milliCPU; a > 0 {
			sum += free(n.scoredCPU+c.p.scoredCPU, a)
			count++
		}
		if a := n.allocatable.memory; a > 0 {
			sum += free(n.scoredMemory+c.p.scoredMemory, a)
			count++
		}
		if count > 0 {
			scores[i] = sum / count
		}
	}
}

// scoreBalance prefers nodes whose shares of used resources the pod makes more equal.
// Pods that request none of them are not scored.
func (r *round) scoreBalance(c *candidate, feasible []int32, scores []int64) bool {
	asks := false
	for _, name := range c.profile.Balanced {
		asks = asks || c.p.req.of(name) != 0
	}
	if !asks {
		return false
	}
	with, without := make([]float64, 0, len(c.profile.Balanced)), make([]float64, 0, len(c.profile.Balanced))
	for i, slot := range feasible {
		n := r.nodes[slot]
		with, without = with[:0], without[:0]
		for _, name := range c.profile.Balanced {
			asked, allocatable := c.p.req.of(name), n.allocatable.of(name)
			if allocatable == 0 || asked == 0 && isScalar(name) {
				continue
			}
			used := n.requested.of(name)
			with = append(with, min(float64(used+asked)/float64(allocatable), 1))
			without = append(without, min(float64(used)/float64(allocatable), 1))
		}
		scores[i] = maxScore/2 + (maxScore/2+evenness(with)-evenness(without))/2
	}
	return true
}

// evenness is the higher the more alike the shares are: what their standard deviation
// leaves of [maxScore].
func evenness(shares []float64) int64 {
	deviation := 0.0
	switch len(shares) {
	case 0, 1: // one resource alone is always in balance
	case 2:
		deviation = math.Abs((shares[0] - shares[1]) / 2)
	default:
		var mean, squares float64
		for _, s := range shares {
			mean += s
		}
		mean /= float64(len(shares))
		for _, s := range shares {
			squares += (s - mean) * (s - mean)
		}
		deviation = math.Sqrt(squares / float64(len(shares)))
	}
	return int64((1 - deviation) * maxScore)
}

// scoreVolumes scores nodes by how much is requested, class by class, of the volumes there
// that the pod's claims would be bound to, or else of the room that their drivers have to
// make some. Pods without such claims are not scored.
func (r *round) scoreVolumes(c *candidate, feasible []int32, scores []int64) bool {
	if c.volumes == nil || len(c.volumes.delayed) == 0 {
		return false
	}
	type amounts struct{ requested, capacity int64 }
	for i, slot := range feasible {
		decisions, rooms, _, _ := r.decideClaims(c.volumes, r.nodes[slot])
		classes := map[string]amounts{}
		for _, d := range decisions {
			if d.Volume == nil {
				continue
			}
			class := volume.GetPersistentVolumeClaimClass(d.Claim)
			sum := classes[class]
			sum.requested += d.Claim.Spec.Resources.Requests.Storage().Value()
			sum.capacity += d.Volume.Spec.Capacity.Storage().Value()
			classes[class] = sum
		}
		if len(classes) == 0 {
			for _, room := range rooms {
				class := volume.GetPersistentVolumeClaimClass(room.claim)
				classes[class] = amounts{classes[class].requested + room.claim.Spec.Resources.Requests.Storage().Value(), room.left}
			}
		}
		var sum int64
		for _, a := range classes {
			sum += utilized(c.profile.VolumeShape, a.requested, a.capacity)
		}
		if len(classes) > 0 {
			scores[i] = int64(math.Round(float64(sum) / float64(len(classes))))
		}
	}
	return true
}
