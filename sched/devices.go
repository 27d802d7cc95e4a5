package sched

import (
	"maps"
	"slices"
	"sync"

	resourcev1 "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/dynamic-resource-allocation/structured"
)

// Devices says which parts of upstream's dynamic resource allocation there are: its
// features of the names DRA….
type Devices = structured.Features

// defaultDevices are those that v1.37 has on (TestFeaturesOfDevicesAreUpstreams).
func defaultDevices() Devices {
	return Devices{
		AdminAccess:            true,
		PrioritizedList:        true,
		PartitionableDevices:   true,
		DeviceTaints:           true,
		DeviceBindingAndStatus: true,
		ConsumableCapacity:     true,
	}
}

// devices is what a Cluster knows of devices, worked out when a pod first asks: which
// there are, and which are taken. Its methods get the State that the Cluster is of.
type devices struct {
	mu     sync.Mutex
	taken  *taken
	slices []*resourcev1.ResourceSlice
	listed bool
}

// allocated returns which devices are taken. It must not be changed.
func (d *devices) allocated(s State) *taken {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.taken == nil {
		d.taken = newTaken()
		for claim := range s.ResourceClaims() {
			d.taken.set(podKey(claim.Namespace, claim.Name), claim)
		}
	}
	return d.taken
}

// list returns the ResourceSlices, with the taints that DeviceTaintRules give their
// devices, as upstream's ResourceSlice tracker does.
func (d *devices) list(s State, taints bool) []*resourcev1.ResourceSlice {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listed {
		return d.slices
	}
	d.listed = true
	var rules []*resourcev1.DeviceTaintRule
	if taints {
		rules = slices.Collect(s.DeviceTaintRules())
	}
	for slice := range s.ResourceSlices() {
		d.slices = append(d.slices, withTaints(slice, rules))
	}
	return d.slices
}

// withTaints returns the slice as the rules have it.
func withTaints(slice *resourcev1.ResourceSlice, rules []*resourcev1.DeviceTaintRule) *resourcev1.ResourceSlice {
	out := slice
	for _, rule := range rules {
		of := rule.Spec.DeviceSelector
		if of == nil || of.Driver != nil && *of.Driver != slice.Spec.Driver || of.Pool != nil && *of.Pool != slice.Spec.Pool.Name {
			continue
		}
		for i := range slice.Spec.Devices {
			if of.Device != nil && *of.Device != slice.Spec.Devices[i].Name {
				continue
			}
			if out == slice {
				out = slice.DeepCopy()
			}
			out.Spec.Devices[i].Taints = append(out.Spec.Devices[i].Taints, rule.Spec.Taint)
		}
	}
	return out
}

// advance returns what a later State knows, given what changed since.
func (d *devices) advance(s State, changed []Ref) *devices {
	var claims []Ref
	relist := false
	for _, ref := range changed {
		switch ref.Kind {
		case KindResourceClaim:
			claims = append(claims, ref)
		case KindResourceSlice, KindDeviceTaintRule:
			relist = true
		}
	}
	if len(claims) == 0 && !relist {
		return d
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	next := &devices{taken: d.taken}
	if !relist {
		next.slices, next.listed = d.slices, d.listed
	}
	if len(claims) > 0 && next.taken != nil {
		next.taken = next.taken.clone()
		for _, ref := range claims {
			claim, _ := s.ResourceClaim(ref.Namespace, ref.Name)
			next.taken.set(podKey(ref.Namespace, ref.Name), claim)
		}
	}
	return next
}

// taken is which devices claims have, and how much of those that several share.
type taken struct {
	claims map[string]*resourcev1.ResourceClaim // the allocated ones, by namespace/name
	state  structured.AllocatedState
	// owners counts the claims that have a device to themselves: one, unless somebody
	// else than this scheduler has allocated too.
	owners map[structured.DeviceID]int
}

func newTaken() *taken {
	return &taken{
		claims: map[string]*resourcev1.ResourceClaim{},
		state: structured.AllocatedState{
			AllocatedDevices:         sets.New[structured.DeviceID](),
			AllocatedSharedDeviceIDs: sets.New[structured.SharedDeviceID](),
			AggregatedCapacity:       structured.NewConsumedCapacityCollection(),
		},
		owners: map[structured.DeviceID]int{},
	}
}

func (t *taken) clone() *taken {
	return &taken{
		claims: maps.Clone(t.claims),
		state: structured.AllocatedState{
			AllocatedDevices:         t.state.AllocatedDevices.Clone(),
			AllocatedSharedDeviceIDs: t.state.AllocatedSharedDeviceIDs.Clone(),
			AggregatedCapacity:       t.state.AggregatedCapacity.Clone(),
		},
		owners: maps.Clone(t.owners),
	}
}

// set makes a claim, nil for none, the one of that name.
func (t *taken) set(key string, claim *resourcev1.ResourceClaim) {
	if old := t.claims[key]; old != nil {
		t.count(old.Status.Allocation, -1)
		delete(t.claims, key)
	}
	if claim != nil && claim.Status.Allocation != nil {
		t.claims[key] = claim
		t.count(claim.Status.Allocation, 1)
	}
}

// count notes that an allocation came (1) or went (-1). Devices that are looked at with
// admin access stay free.
func (t *taken) count(a *resourcev1.AllocationResult, sign int) {
	for i := range a.Devices.Results {
		result := &a.Devices.Results[i]
		if result.AdminAccess != nil && *result.AdminAccess {
			continue
		}
		id := structured.MakeDeviceID(result.Driver, result.Pool, result.Device)
		if result.ShareID != nil {
			share := structured.MakeSharedDeviceID(id, result.ShareID)
			used := structured.NewDeviceConsumedCapacity(id, result.ConsumedCapacity)
			if sign > 0 {
				t.state.AllocatedSharedDeviceIDs.Insert(share)
				t.state.AggregatedCapacity.Insert(used)
			} else {
				t.state.AllocatedSharedDeviceIDs.Delete(share)
				t.state.AggregatedCapacity.Remove(used)
			}
			continue
		}
		if t.owners[id] += sign; t.owners[id] > 0 {
			t.state.AllocatedDevices.Insert(id)
		} else {
			t.state.AllocatedDevices.Delete(id)
			delete(t.owners, id)
		}
	}
}

// deviceRound is what a round decided about devices so far.
type deviceRound struct {
	taken *taken // the round's own; nil until a pod asks
	// written are the claims that the plan writes, by UID.
	written map[types.UID]bool
	held    map[types.UID]*resourcev1.ResourceClaim
}

// devicesTaken returns the round's view of which devices are taken: the Cluster's, those that
// are held, and those of this round.
func (r *round) devicesTaken() *taken {
	if r.devices.taken == nil {
		r.devices.taken = r.cluster.devices.allocated(r.in.State).clone()
		r.devices.written = map[types.UID]bool{}
		r.devices.held = map[types.UID]*resourcev1.ResourceClaim{}
		for _, claim := range r.in.Held {
			r.devices.held[claim.UID] = claim
			r.devices.taken.count(claim.Status.Allocation, 1)
		}
	}
	return r.devices.taken
}

// classes finds DeviceClasses for the allocator.
type classes struct{ State }

// Get returns a class.
func (c classes) Get(name string) (*resourcev1.DeviceClass, error) {
	if class, ok := c.DeviceClass(name); ok {
		return class, nil
	}
	return nil, apierrors.NewNotFound(resourcev1.Resource("deviceclass"), name)
}

// List returns all.
func (c classes) List() ([]*resourcev1.DeviceClass, error) {
	return slices.Collect(c.DeviceClasses()), nil
}
