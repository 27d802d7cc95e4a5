package feed

import (
	"context"
	"sync"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"

	"timonel/state/objects"
)

// Feed follows a cache and wakes the handlers of the kinds that changed.
type Feed struct {
	cache *objects.Cache
	from  *objects.Snapshot // what was there when it was made: handlers hear of what is newer

	mu        sync.Mutex
	informers map[*informer]bool // those that were started
}

// New returns a feed from a cache. It does nothing until it runs.
func New(cache *objects.Cache) *Feed {
	return &Feed{cache: cache, from: cache.Snapshot(), informers: map[*informer]bool{}}
}

// Run feeds the informers of all factories until ctx ends, whose error it returns. It
// is called once. A handler that was told of everything before it runs misses nothing.
func (f *Feed) Run(ctx context.Context) error {
	at := f.from
	f.from = nil // it is not kept
	for {
		changes, err := f.cache.Changes(ctx, at.Revision())
		if err != nil {
			return err
		}
		var directories map[string]bool // nil: any may have changed
		if !changes.Reset {
			directories = map[string]bool{}
			for i := range changes.Changed {
				directories[directoryOf(changes.Snapshot.Prefix(), changes.Changed[i].Meta())] = true
			}
		}
		for _, i := range f.started() {
			func() {
				defer utilruntime.HandleCrashWithContext(ctx) // of a controller's index
				i.advance(at, changes.Snapshot, directories == nil || directories[i.directory])
			}()
		}
		at = changes.Snapshot
	}
}

// directoryOf is the part of an object's key between the prefix and its namespace or
// name, slash included.
func directoryOf(prefix string, m *objects.Meta) string {
	end := len(m.Key) - len(m.Name)
	if m.Namespace != "" {
		end -= len(m.Namespace) + 1
	}
	if end < len(prefix) {
		return "" // a key that is not of its object
	}
	return m.Key[len(prefix):end]
}

func (f *Feed) started() []*informer {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*informer, 0, len(f.informers))
	for i := range f.informers {
		out = append(out, i)
	}
	return out
}

func (f *Feed) start(i *informer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.informers[i] = true
}

func (f *Feed) stop(i *informer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.informers, i)
}
