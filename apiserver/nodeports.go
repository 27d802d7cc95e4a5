package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	storeerr "k8s.io/apiserver/pkg/storage/errors"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/registry/core/service/allocator"
)

const (
	// nodePortKey is upstream's, below /registry.
	nodePortKey = "/ranges/servicenodeports"
	// nodePortTimeout bounds one allocation: the allocator's interface has no
	// context.
	nodePortTimeout = 15 * time.Second
)

// errTaken stops a transaction that cannot give out a port.
var errTaken = errors.New("port is taken or the range is full")

// portRegistry keeps which node ports are given out, as one bitmap in the state
// that each replica changes on condition that nobody else did meanwhile. It
// keeps nothing in memory between calls. It implements allocator.Interface and
// rangeallocation.RangeRegistry.
type portRegistry struct {
	storage  storage.Interface
	resource schema.GroupResource
	destroy  func()
	empty    func() *allocator.AllocationBitmap

	mu sync.Mutex // one change at a time in this replica: fewer conflicts
}

// newPortRegistry opens the registry. Its stored form is Services' (protobuf v1).
func newPortRegistry(s *shared) (*portRegistry, error) {
	config, err := s.storage.NewConfig(core.Resource("services"), &core.Service{})
	if err != nil {
		return nil, fmt.Errorf("choose the encoding of node port allocations: %w", err)
	}
	resource := core.Resource("servicenodeportallocations")
	store, destroy, err := s.decorator(config.ForResource(resource), nodePortKey, nil,
		func() runtime.Object { return &core.RangeAllocation{} }, nil, nil, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("open the storage of node port allocations: %w", err)
	}
	return &portRegistry{storage: store, resource: resource, destroy: sync.OnceFunc(destroy)}, nil
}

// allocator is an allocator.AllocatorWithOffsetFactory that returns r.
func (r *portRegistry) allocator(size int, rangeSpec string, offset int) (allocator.Interface, error) {
	r.empty = func() *allocator.AllocationBitmap {
		return allocator.NewAllocationMapWithOffset(size, rangeSpec, offset)
	}
	return r, nil
}

// Allocate gives out the port at offset, or says that it is taken.
func (r *portRegistry) Allocate(offset int) (bool, error) {
	err := r.update(func(ports *allocator.AllocationBitmap) error {
		ok, err := ports.Allocate(offset)
		if err == nil && !ok {
			return errTaken
		}
		return err
	})
	if errors.Is(err, errTaken) {
		return false, nil
	}
	return err == nil, err
}

// AllocateNext gives out a free port, or says that there is none.
func (r *portRegistry) AllocateNext() (int, bool, error) {
	var offset int
	err := r.update(func(ports *allocator.AllocationBitmap) error {
		next, ok, err := ports.AllocateNext()
		if err == nil && !ok {
			return errTaken
		}
		offset = next
		return err
	})
	if errors.Is(err, errTaken) {
		return 0, false, nil
	}
	return offset, err == nil, err
}

// Release takes a port back.
func (r *portRegistry) Release(offset int) error {
	return r.update(func(ports *allocator.AllocationBitmap) error { return ports.Release(offset) })
}

// update applies change to the ports given out, again when others changed them
// meanwhile.
func (r *portRegistry) update(change func(*allocator.AllocationBitmap) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), nodePortTimeout)
	defer cancel()
	err := r.storage.GuaranteedUpdate(ctx, nodePortKey, &core.RangeAllocation{}, true, nil,
		storage.SimpleUpdate(func(current runtime.Object) (runtime.Object, error) {
			stored := current.(*core.RangeAllocation)
			if stored.ResourceVersion == "" {
				return nil, apierrors.NewServiceUnavailable("node ports cannot be allocated before the leader has listed those in use; try again in a few seconds")
			}
			ports := r.empty()
			if err := ports.Restore(stored.Range, stored.Data); err != nil {
				return nil, fmt.Errorf("read the node ports in use (%s): %w", stored.Range, err)
			}
			if err := change(ports); err != nil {
				return nil, err
			}
			stored.Range, stored.Data = ports.Snapshot()
			return stored, nil
		}), nil)
	return storeerr.InterpretUpdateError(err, r.resource, "")
}

// ForEach calls f with the offset of each port given out.
func (r *portRegistry) ForEach(f func(int)) {
	if ports, err := r.read(); err == nil {
		ports.ForEach(f)
	}
}

// Has says whether the port at offset is given out. When that cannot be known it
// says no; allocation itself never relies on it.
func (r *portRegistry) Has(offset int) bool {
	ports, err := r.read()
	return err == nil && ports.Has(offset)
}

// Free returns how many ports are left, 0 when that cannot be known.
func (r *portRegistry) Free() int {
	ports, err := r.read()
	if err != nil {
		return 0
	}
	return ports.Free()
}

// Destroy implements allocator.Interface.
func (r *portRegistry) Destroy() { r.destroy() }

func (r *portRegistry) read() (*allocator.AllocationBitmap, error) {
	stored, err := r.Get()
	if err != nil {
		return nil, err
	}
	ports := r.empty()
	if stored.ResourceVersion == "" {
		return ports, nil
	}
	return ports, ports.Restore(stored.Range, stored.Data)
}

// Get implements rangeallocation.RangeRegistry. Before the first repair the
// answer has no resource version.
func (r *portRegistry) Get() (*core.RangeAllocation, error) {
	ctx, cancel := context.WithTimeout(context.Background(), nodePortTimeout)
	defer cancel()
	stored := &core.RangeAllocation{}
	err := r.storage.Get(ctx, nodePortKey, storage.GetOptions{IgnoreNotFound: true}, stored)
	return stored, storeerr.InterpretGetError(err, r.resource, "")
}

// CreateOrUpdate implements rangeallocation.RangeRegistry: it stores next unless
// what is stored is of another version than next is. Nothing is written when
// nothing changes.
func (r *portRegistry) CreateOrUpdate(next *core.RangeAllocation) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), nodePortTimeout)
	defer cancel()
	err := r.storage.GuaranteedUpdate(ctx, nodePortKey, &core.RangeAllocation{}, true, nil,
		storage.SimpleUpdate(func(current runtime.Object) (runtime.Object, error) {
			stored := current.(*core.RangeAllocation)
			if stored.ResourceVersion != next.ResourceVersion {
				return nil, apierrors.NewConflict(r.resource, "", errors.New("node ports were allocated meanwhile"))
			}
			if stored.Range == next.Range && bytes.Equal(stored.Data, next.Data) {
				return stored, nil
			}
			return next, nil
		}), nil)
	return storeerr.InterpretUpdateError(err, r.resource, "")
}

// waitReady returns when a leader has listed the ports in use.
func (r *portRegistry) waitReady(ctx context.Context) error {
	for {
		if stored, err := r.Get(); err == nil && stored.ResourceVersion != "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
