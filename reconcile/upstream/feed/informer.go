package feed

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"

	"timonel/state/objects"
)

// informer is a cache.SharedIndexInformer of one kind.
type informer struct {
	factory   *Factory
	directory string
	gvk       schema.GroupVersionKind // of a typed one
	// object is what clients get of a Meta; nil: nothing, it is none of theirs.
	object  func(*objects.Meta) any
	indexer *indexer
	synced  chan struct{} // closed once it is started and the cache has a snapshot

	mu        sync.Mutex
	started   bool
	listeners []*listener
}

func (f *Factory) newInformer(directory string, object func(*objects.Meta) any) *informer {
	i := &informer{factory: f, directory: directory, object: object, synced: make(chan struct{})}
	i.indexer = newIndexer(i)
	return i
}

// prefix is of the keys of its objects.
func (i *informer) prefix(s *objects.Snapshot) string { return s.Prefix() + i.directory }

// start begins to tell the handlers. An informer that nobody gave a handler has
// nothing to do: its store is the cache.
func (i *informer) start() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.started || i.factory.ctx.Err() != nil {
		return
	}
	i.started = true
	if i.factory.feed.cache.Snapshot().Revision() > 0 {
		close(i.synced)
	} else {
		i.factory.wg.Go(func() {
			if i.factory.feed.cache.WaitRevision(i.factory.ctx, 1) == nil {
				close(i.synced)
			}
		})
	}
	i.factory.feed.start(i)
	for _, l := range i.listeners {
		l.start()
	}
}

func (i *informer) isStarted() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.started
}

// advance is told by the feed that there is a newer snapshot, and whether anything of
// the informer's kind may differ in it.
func (i *informer) advance(from, to *objects.Snapshot, concerns bool) {
	i.indexer.advance(from, to, concerns)
	i.mu.Lock()
	listeners := slices.Clone(i.listeners)
	i.mu.Unlock()
	for _, l := range listeners {
		l.advance(from, to, concerns)
	}
}

// AddEventHandler implements cache.SharedInformer.
func (i *informer) AddEventHandler(handler cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	return i.AddEventHandlerWithOptions(handler, cache.HandlerOptions{})
}

// AddEventHandlerWithResyncPeriod implements cache.SharedInformer. There is no resync.
func (i *informer) AddEventHandlerWithResyncPeriod(handler cache.ResourceEventHandler, _ time.Duration) (cache.ResourceEventHandlerRegistration, error) {
	return i.AddEventHandlerWithOptions(handler, cache.HandlerOptions{})
}

// AddEventHandlerWithOptions implements cache.SharedInformer. There is no resync.
func (i *informer) AddEventHandlerWithOptions(handler cache.ResourceEventHandler, _ cache.HandlerOptions) (cache.ResourceEventHandlerRegistration, error) {
	if i.IsStopped() {
		return nil, errors.New("the informer has stopped")
	}
	l := newListener(i, handler)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.listeners = append(i.listeners, l)
	if i.started {
		l.start()
	}
	return l, nil
}

// RemoveEventHandler implements cache.SharedInformer.
func (i *informer) RemoveEventHandler(handle cache.ResourceEventHandlerRegistration) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := slices.IndexFunc(i.listeners, func(l *listener) bool { return cache.ResourceEventHandlerRegistration(l) == handle })
	if n >= 0 {
		i.listeners[n].end()
		i.listeners = slices.Delete(i.listeners, n, n+1)
	}
	return nil
}

// GetStore implements cache.SharedInformer.
func (i *informer) GetStore() cache.Store { return i.indexer }

// GetIndexer implements cache.SharedIndexInformer.
func (i *informer) GetIndexer() cache.Indexer { return i.indexer }

// AddIndexers implements cache.SharedIndexInformer.
func (i *informer) AddIndexers(indexers cache.Indexers) error { return i.indexer.AddIndexers(indexers) }

// GetController implements cache.SharedInformer. The informer is its own.
func (i *informer) GetController() cache.Controller { return controller{i} }

// controller is what an informer shows of its insides: nothing runs in it.
type controller struct{ *informer }

// Run implements cache.Controller.
func (controller) Run(<-chan struct{}) {}

// RunWithContext implements cache.Controller.
func (controller) RunWithContext(context.Context) {}

// Run implements cache.SharedInformer. It returns when stop is closed or the
// factory's context ends; only the latter ends the informer.
func (i *informer) Run(stop <-chan struct{}) {
	i.start()
	select {
	case <-stop:
	case <-i.factory.ctx.Done():
	}
}

// RunWithContext implements cache.SharedInformer, as Run does. A context that has
// ended starts nothing.
func (i *informer) RunWithContext(ctx context.Context) {
	if ctx.Err() == nil {
		i.Run(ctx.Done())
	}
}

// HasSynced implements cache.SharedInformer.
func (i *informer) HasSynced() bool {
	select {
	case <-i.synced:
		return true
	default:
		return false
	}
}

// HasSyncedChecker implements cache.SharedInformer.
func (i *informer) HasSyncedChecker() cache.DoneChecker {
	return done{"objects of " + i.directory, i.synced}
}

// done implements cache.DoneChecker.
type done struct {
	name string
	done <-chan struct{}
}

// Name implements cache.DoneChecker.
func (d done) Name() string { return d.name }

// Done implements cache.DoneChecker.
func (d done) Done() <-chan struct{} { return d.done }

// LastSyncResourceVersion implements cache.SharedInformer.
func (i *informer) LastSyncResourceVersion() string {
	return strconv.FormatInt(i.factory.feed.cache.Snapshot().Revision(), 10)
}

// SetWatchErrorHandler implements cache.SharedInformer. There is no watch to fail.
func (i *informer) SetWatchErrorHandler(cache.WatchErrorHandler) error { return nil }

// SetWatchErrorHandlerWithContext implements cache.SharedInformer. There is no watch to fail.
func (i *informer) SetWatchErrorHandlerWithContext(cache.WatchErrorHandlerWithContext) error {
	return nil
}

// SetTransform implements cache.SharedInformer. The objects are the cache's, so
// nobody may have others.
func (i *informer) SetTransform(cache.TransformFunc) error {
	return errors.New("the objects of this informer are shared with all controllers and cannot be transformed")
}

// IsStopped implements cache.SharedInformer.
func (i *informer) IsStopped() bool { return i.factory.ctx.Err() != nil }
