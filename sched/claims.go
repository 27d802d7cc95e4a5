package sched

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/dynamic-resource-allocation/resourceclaim"
	"k8s.io/dynamic-resource-allocation/structured"
	"k8s.io/klog/v2"

	"timonel/state/objects"
)

// allocatorSteps bounds how long the allocator tries for one pod, over all nodes: a claim
// whose constraints can hardly be met takes time that is exponential in what it asks for.
// Upstream bounds it by the clock, 10 s for each node.
const allocatorSteps = 20_000

// optionalNodeOperations is what a node declares that can do without some of a driver's calls.
const optionalNodeOperations = "DRAOptionalNodeOperations"

// podClaims is what filters need of a pod's ResourceClaims; upstream's DynamicResources
// plugin is what they follow.
type podClaims struct {
	claims []podClaim
	// allocator finds devices for the claims in toAllocate; nil: there are none.
	allocator  structured.Allocator
	toAllocate []*resourcev1.ResourceClaim
	steps      *steps
	// answers are what was found by slot; unavailable the claims that some node lacks.
	answers     map[int32]claimAnswer
	unavailable map[int]bool
}

// podClaim is one of a pod's claims.
type podClaim struct {
	*resourcev1.ResourceClaim
	// allocation is the claim's, or the one that is held for it; nil: it has none.
	allocation *resourcev1.AllocationResult
	// on are the nodes where the allocation is; nil: any.
	on *nodeaffinity.NodeSelector
}

// claimAnswer is what one node says.
type claimAnswer struct {
	status  *status
	results []resourcev1.AllocationResult // for toAllocate
}

// inFilter is how upstream's scheduler begins what an error of the plugin's filter says.
const inFilter = `running "DynamicResources" filter plugin`

// steps is a context that ends after so many questions whether it has, and not at some
// time: the same input gives the same plan.
type steps struct {
	context.Context
	left int
}

// Err implements context.Context. The allocator asks at each step.
func (s *steps) Err() error {
	if s.left <= 0 {
		return context.DeadlineExceeded
	}
	s.left--
	return nil
}

// userClaims returns the claims that a pod names, in its order. An error says which is not
// there yet, or is not the pod's.
func userClaims(s State, pod *corev1.Pod) ([]*resourcev1.ResourceClaim, error) {
	out := make([]*resourcev1.ResourceClaim, 0, len(pod.Spec.ResourceClaims))
	for i := range pod.Spec.ResourceClaims {
		name, mustOwn, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i])
		if err != nil {
			return nil, err
		}
		if name == nil {
			continue // it was decided that the pod needs none
		}
		claim, ok := s.ResourceClaim(pod.Namespace, *name)
		if !ok {
			return nil, fmt.Errorf("could not find ResourceClaim %q", podKey(pod.Namespace, *name))
		}
		if claim.DeletionTimestamp != nil {
			return nil, fmt.Errorf("resourceclaim %q is being deleted", claim.Name)
		}
		if mustOwn {
			if err := resourceclaim.IsForPod(pod, claim, false); err != nil {
				return nil, err
			}
		}
		out = append(out, claim)
	}
	return out, nil
}

// prepareClaims returns nil when the pod has no claims.
func (r *round) prepareClaims(c *candidate) (*podClaims, *status) {
	pod := c.p.pod
	if len(pod.Spec.ResourceClaims) == 0 || !c.profile.asks(FilterDynamicResources) {
		return nil, nil
	}
	claims, err := userClaims(r.in.State, pod)
	if err != nil {
		return nil, &status{reasons: []string{err.Error()}, unresolvable: true, cause: causeDevices, gated: true}
	}
	if len(claims) == 0 {
		return nil, nil
	}
	taken := r.devicesTaken()
	pc := &podClaims{answers: map[int32]claimAnswer{}, unavailable: map[int]bool{}}
	for _, claim := range claims {
		if slices.ContainsFunc(pc.claims, func(other podClaim) bool { return other.UID == claim.UID }) {
			continue // named twice: one reservation is enough
		}
		if r.devices.written[claim.UID] {
			return nil, &status{
				reasons:      []string{fmt.Sprintf("resource claim %s is in the process of being allocated", klog.KObj(claim))},
				unresolvable: true, cause: causeDevices, gated: true,
			}
		}
		info := podClaim{ResourceClaim: claim, allocation: claim.Status.Allocation}
		if info.allocation != nil {
			if !resourceclaim.CanBeReserved(claim) && !resourceclaim.IsReservedForPod(pod, claim, false) {
				return nil, unresolvable(causeDevices, "resourceclaim in use")
			}
		} else if held := r.devices.held[claim.UID]; held != nil {
			info.allocation = held.Status.Allocation
		}
		if info.allocation == nil {
			if s := r.checkRequests(claim); s != nil {
				return nil, s
			}
			pc.toAllocate = append(pc.toAllocate, claim)
		} else if info.allocation.NodeSelector != nil {
			if info.on, err = nodeaffinity.NewNodeSelector(info.allocation.NodeSelector); err != nil {
				return nil, &status{err: err, cause: causeError}
			}
		}
		pc.claims = append(pc.claims, info)
	}
	if len(pc.toAllocate) == 0 {
		return pc, nil
	}
	features := r.cfg.Devices
	known := r.cluster.devices.list(r.in.State, features.DeviceTaints)
	pc.steps = &steps{Context: klog.NewContext(context.Background(), logr.Discard()), left: allocatorSteps}
	pc.allocator, err = structured.NewAllocator(pc.steps, features, taken.state, classes{r.in.State}, known, r.cfg.cel)
	if err != nil {
		return nil, &status{err: err, cause: causeError}
	}
	return pc, nil
}

// checkRequests says what of a claim's requests cannot be understood.
func (r *round) checkRequests(claim *resourcev1.ResourceClaim) *status {
	class := func(name, request string) *status {
		if name == "" {
			return failed("request %s: unsupported request type", request)
		}
		if _, ok := r.in.State.DeviceClass(name); !ok {
			return unresolvable(causeDevices, fmt.Sprintf("request %s: device class %s does not exist", request, name))
		}
		return nil
	}
	for i := range claim.Spec.Devices.Requests {
		request := &claim.Spec.Devices.Requests[i]
		switch {
		case request.Exactly != nil:
			if s := class(request.Exactly.DeviceClassName, request.Name); s != nil {
				return s
			}
		case len(request.FirstAvailable) > 0 && !r.cfg.Devices.PrioritizedList:
			return unresolvable(causeDevices, fmt.Sprintf("resource claim %s, request %s: has subrequests, but the DRAPrioritizedList feature is disabled", klog.KObj(claim), request.Name))
		case len(request.FirstAvailable) > 0:
			for j := range request.FirstAvailable {
				sub := &request.FirstAvailable[j]
				if s := class(sub.DeviceClassName, request.Name+"/"+sub.Name); s != nil {
					return s
				}
			}
		default:
			return unresolvable(causeDevices, fmt.Sprintf("resource claim %s, request %s: unknown request type", klog.KObj(claim), request.Name))
		}
	}
	return nil
}

// filterClaims says whether the pod's claims are on the node, or devices for them are.
func (r *round) filterClaims(c *candidate, n *nodeInfo) *status {
	pc := c.claims
	answer, known := pc.answers[n.slot]
	if !known {
		answer = r.askForDevices(c, n)
		pc.answers[n.slot] = answer
	}
	return answer.status
}

func (r *round) askForDevices(c *candidate, n *nodeInfo) (answer claimAnswer) {
	pc := c.claims
	var lacks []int
	for i := range pc.claims {
		info := &pc.claims[i]
		switch {
		case info.allocation == nil:
		case info.on != nil && !info.on.Match(n.node),
			skipsOperations(info.allocation) && !slices.Contains(n.node.Status.DeclaredFeatures, optionalNodeOperations),
			r.cfg.Devices.DeviceBindingAndStatus && info.Status.Allocation != nil && bindingIsLost(info.ResourceClaim, r.in.Now, c.profile.DeviceBindingTimeout):
			lacks = append(lacks, i)
		}
	}
	if pc.allocator != nil {
		results, err := pc.allocator.Allocate(pc.steps, n.node, pc.toAllocate)
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			answer.status = failed("%s: node %s: timed out trying to allocate devices", inFilter, n.name)
		case errors.Is(err, structured.ErrFailedAllocationOnNode):
			answer.status = unresolvable(causeDevices, err.Error())
		case err != nil:
			answer.status = failed("%s: %w", inFilter, err)
		case len(results) != len(pc.toAllocate):
			answer.status = unresolvable(causeDevices, "cannot allocate all claims")
		}
		if answer.status != nil {
			return answer
		}
		answer.results = results
	}
	if len(lacks) > 0 {
		for _, i := range lacks {
			pc.unavailable[i] = true
		}
		answer.status = unresolvable(causeDevices, "resourceclaim not available on the node")
	}
	return answer
}

func skipsOperations(a *resourcev1.AllocationResult) bool {
	return slices.ContainsFunc(a.Devices.Results, func(r resourcev1.DeviceRequestAllocationResult) bool { return len(r.SkipNodeOperations) > 0 })
}

// bindingIsLost says whether a device of a claim has failed to become ready, or has not in time.
func bindingIsLost(claim *resourcev1.ResourceClaim, now time.Time, timeout time.Duration) bool {
	ready, failed := readyForBinding(claim)
	if failed || ready {
		return failed
	}
	since := claim.Status.Allocation.AllocationTimestamp
	return since != nil && since.Add(timeout).Before(now) &&
		slices.ContainsFunc(claim.Status.Allocation.Devices.Results, func(r resourcev1.DeviceRequestAllocationResult) bool { return r.BindingConditions != nil })
}

// readyForBinding says whether all that an allocated claim's devices must be before their
// pod is bound, they are; or that one has failed.
func readyForBinding(claim *resourcev1.ResourceClaim) (ready, failed bool) {
	for i := range claim.Status.Allocation.Devices.Results {
		result := &claim.Status.Allocation.Devices.Results[i]
		if len(result.BindingConditions) == 0 {
			continue
		}
		at := slices.IndexFunc(claim.Status.Devices, func(d resourcev1.AllocatedDeviceStatus) bool {
			return d.Driver == result.Driver && d.Pool == result.Pool && d.Device == result.Device
		})
		if at < 0 {
			return false, false
		}
		conditions := claim.Status.Devices[at].Conditions
		for _, name := range result.BindingFailureConditions {
			if apimeta.IsStatusConditionTrue(conditions, name) {
				return false, true
			}
		}
		for _, name := range result.BindingConditions {
			if !apimeta.IsStatusConditionTrue(conditions, name) {
				return false, false
			}
		}
	}
	return true, false
}

// assumeClaims settles the pod's claims on a node and returns what is to be written. ready
// says that the pod may be bound once that is.
func (r *round) assumeClaims(c *candidate, slot int32) (writes []ClaimWrite, ready bool) {
	pod, results := c.p.pod, c.claims.answers[slot].results
	ready = true
	var protects []ClaimWrite
	for i := range c.claims.claims {
		info := &c.claims.claims[i]
		claim := info.ResourceClaim
		if claim.Status.Allocation != nil && resourceclaim.IsReservedForPod(pod, claim, false) {
			ready = ready && r.isReady(claim)
			continue
		}
		claim = claim.DeepCopy()
		if claim.Status.Allocation == nil {
			allocation := info.allocation // held
			if allocation == nil {
				allocation = &results[0]
				results = results[1:]
				r.nameShares(claim, allocation)
				if r.cfg.Devices.DeviceBindingAndStatus && allocation.AllocationTimestamp == nil {
					allocation.AllocationTimestamp = &metav1.Time{Time: r.in.Now.Truncate(time.Second)}
				}
				r.devices.taken.count(allocation, 1)
			}
			if !slices.Contains(claim.Finalizers, resourcev1.Finalizer) {
				protected := claim.DeepCopy()
				protected.Finalizers = append(protected.Finalizers, resourcev1.Finalizer)
				protects = append(protects, ClaimWrite{Claim: protected})
			}
			claim.Status.Allocation = allocation
		}
		claim.Status.ReservedFor = append(claim.Status.ReservedFor, resourcev1.ResourceClaimConsumerReference{Resource: "pods", Name: pod.Name, UID: pod.UID})
		ready = ready && r.isReady(claim)
		r.devices.written[claim.UID] = true
		writes = append(writes, ClaimWrite{Claim: claim, Status: true})
	}
	if len(protects) > 0 {
		return protects, false
	}
	return writes, ready
}

func (r *round) isReady(claim *resourcev1.ResourceClaim) bool {
	if !r.cfg.Devices.DeviceBindingAndStatus {
		return true
	}
	ready, _ := readyForBinding(claim)
	return ready
}

// nameShares gives the shares of devices names that follow from the input, where the
// allocator draws them: a claim has each but once, and a claim's versions have others.
func (r *round) nameShares(claim *resourcev1.ResourceClaim, a *resourcev1.AllocationResult) {
	for i := range a.Devices.Results {
		if a.Devices.Results[i].ShareID == nil {
			continue
		}
		h := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d", claim.UID, claim.ResourceVersion, i))
		h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80 // a UUID of version 8
		id := types.UID(fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16]))
		a.Devices.Results[i].ShareID = &id
	}
}

// releaseClaim takes from the pod's claims one that no node could do with, if only this
// pod has it, so that other devices can be tried. It returns what to add to the message.
func (r *round) releaseClaim(c *candidate) string {
	if c.claims == nil {
		return ""
	}
	for i := range c.claims.claims {
		claim := c.claims.claims[i].ResourceClaim
		reserved := claim.Status.ReservedFor
		if !c.claims.unavailable[i] || r.devices.written[claim.UID] || len(reserved) > 1 || len(reserved) == 1 && reserved[0].UID != c.p.pod.UID {
			continue
		}
		claim = claim.DeepCopy()
		r.devices.written[claim.UID] = true
		if claim.Status.Allocation == nil {
			r.plan.Releases = append(r.plan.Releases, Release{c.p.pod, unprotected(claim)})
			return ""
		}
		claim.Status.ReservedFor, claim.Status.Allocation, claim.Status.Devices = nil, nil, nil
		r.plan.Releases = append(r.plan.Releases, Release{c.p.pod, ClaimWrite{Claim: claim, Status: true}})
		return " deallocation of ResourceClaim completed,"
	}
	return ""
}

// unprotected takes its finalizer from a claim for which an allocation is held: nobody knows
// whether that is still to be written, and it cannot be once the claim has changed.
func unprotected(claim *resourcev1.ResourceClaim) ClaimWrite {
	claim = claim.DeepCopy()
	claim.Finalizers = slices.DeleteFunc(claim.Finalizers, func(f string) bool { return f == resourcev1.Finalizer })
	return ClaimWrite{Claim: claim}
}

// releaseHeld gives up what is held for claims that no pod waits with any more.
func (r *round) releaseHeld() {
	for _, held := range r.in.Held {
		claim, ok := r.in.State.ResourceClaim(held.Namespace, held.Name)
		if !ok || claim.UID != held.UID || claim.ResourceVersion != held.ResourceVersion {
			continue
		}
		wanted := false
		r.cluster.queue.Scan(func(p *podInfo) bool {
			wanted = namesClaim(p.pod, claim)
			return !wanted
		})
		if !wanted {
			r.plan.Releases = append(r.plan.Releases, Release{ClaimWrite: unprotected(claim)})
		}
	}
}

// scoreDevices prefers nodes where what the pod's claims would rather have is free. The
// first of several is worth as many points as there may be, the next one less.
func (r *round) scoreDevices(c *candidate, feasible []int32, scores []int64) bool {
	if c.claims == nil || !r.cfg.Devices.PrioritizedList {
		return false
	}
	for i, slot := range feasible {
		results := c.claims.answers[slot].results
		for j := range c.claims.claims {
			info := &c.claims.claims[j]
			allocation := info.allocation
			if allocation == nil {
				allocation, results = &results[0], results[1:]
			}
			scores[i] += scoreAllocation(info.ResourceClaim, allocation)
		}
	}
	normalize(scores, false)
	return true
}

func scoreAllocation(claim *resourcev1.ResourceClaim, a *resourcev1.AllocationResult) (sum int64) {
	for i := range claim.Spec.Devices.Requests {
		request := &claim.Spec.Devices.Requests[i]
		for j := range request.FirstAvailable {
			ref := resourceclaim.CreateSubRequestRef(request.Name, request.FirstAvailable[j].Name)
			if slices.ContainsFunc(a.Devices.Results, func(r resourcev1.DeviceRequestAllocationResult) bool { return r.Request == ref }) {
				sum += int64(resourcev1.FirstAvailableDeviceRequestMaxSize - j)
			}
		}
	}
	return sum
}

// namesClaim says whether a pod names a claim.
func namesClaim(pod *corev1.Pod, claim *resourcev1.ResourceClaim) bool {
	if pod.Namespace != claim.Namespace {
		return false
	}
	for i := range pod.Spec.ResourceClaims {
		if name, _, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i]); err == nil && name != nil && *name == claim.Name {
			return true
		}
	}
	return false
}

// deviceHints are those of claims, and of what is known of devices. Upstream asks for every
// update of a pod's own claim whose status differs; here any does, for a claim that has got
// its finalizer is one to allocate.
func deviceHints(ch objects.Changed) []hint {
	switch ch.Meta().Object.(type) {
	case *resourcev1.ResourceClaim:
		before, after := typed[*resourcev1.ResourceClaim](ch.Old), typed[*resourcev1.ResourceClaim](ch.New)
		if before != nil && before.Status.Allocation != nil && (after == nil || after.Status.Allocation == nil || after.UID != before.UID) {
			return always(causeDevices)
		}
		if after == nil {
			return nil
		}
		if before == nil || !slices.Contains(before.Finalizers, resourcev1.Finalizer) && slices.Contains(after.Finalizers, resourcev1.Finalizer) {
			// Devices were kept for it in the plan that asked for this. It may get others now.
			return always(causeDevices)
		}
		return []hint{{concerns: causeDevices, cures: func(p *podInfo, _ Causes) bool { return namesClaim(p.pod, after) }}}
	case *resourcev1.DeviceClass, *resourcev1.ResourceSlice:
		if ch.New != nil {
			return always(causeDevices)
		}
	case *resourcev1.DeviceTaintRule:
		return always(causeDevices)
	}
	return nil
}
