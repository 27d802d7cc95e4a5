package feed

import (
	"context"
	"strings"
	"sync"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/tools/cache"

	"timonel/state/objects"
)

// listener tells one handler what changes, in a goroutine of its own.
type listener struct {
	informer *informer
	handler  cache.ResourceEventHandler
	ctx      context.Context
	end      context.CancelFunc
	wake     chan struct{} // holds one
	synced   chan struct{} // closed when the handler knows the first snapshot

	mu   sync.Mutex
	told *objects.Snapshot // what the handler knows, nil for nothing
	busy bool              // it is being told; told is not to be moved
}

func newListener(i *informer, handler cache.ResourceEventHandler) *listener {
	l := &listener{informer: i, handler: handler, wake: make(chan struct{}, 1), synced: make(chan struct{}), busy: true}
	l.ctx, l.end = context.WithCancel(i.factory.ctx)
	return l
}

// start begins to tell the handler. It is called once.
func (l *listener) start() { l.informer.factory.wg.Go(l.run) }

func (l *listener) run() {
	defer l.end()
	cache := l.informer.factory.feed.cache
	if cache.WaitRevision(l.ctx, 1) != nil {
		return
	}
	first := cache.Snapshot()
	for m := range first.Metas().WithPrefix(l.informer.prefix(first)) {
		if l.ctx.Err() != nil {
			return
		}
		if o := l.informer.object(m); o != nil {
			l.call(func() { l.handler.OnAdd(o, true) })
		}
	}
	l.know(first)
	close(l.synced)
	for {
		for l.catchUp() {
		}
		select {
		case <-l.wake:
		case <-l.ctx.Done():
			return
		}
	}
}

// know says what the handler was told, and that it is being told more.
func (l *listener) know(s *objects.Snapshot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told, l.busy = s, true
}

// catchUp tells the handler what is new and says whether there was anything.
func (l *listener) catchUp() bool {
	l.mu.Lock()
	changes := l.informer.factory.feed.cache.ChangesNow(l.told.Revision())
	told := l.told
	l.busy = changes.Snapshot != told
	more := l.busy
	l.mu.Unlock()
	if !more || l.ctx.Err() != nil {
		return false
	}
	l.informer.changed(told, changes, l.tell)
	l.know(changes.Snapshot)
	return true
}

// tell tells the handler of one change, in which a nil is an object that is not there.
func (l *listener) tell(before, after any, unseen bool, key string) {
	switch {
	case l.ctx.Err() != nil || before == nil && after == nil:
	case before == nil:
		l.call(func() { l.handler.OnAdd(after, false) })
	case after != nil:
		l.call(func() { l.handler.OnUpdate(before, after) })
	case unseen:
		l.call(func() { l.handler.OnDelete(cache.DeletedFinalStateUnknown{Key: key, Obj: before}) })
	default:
		l.call(func() { l.handler.OnDelete(before) })
	}
}

// call calls the handler. One that panics is told of the next change all the same.
func (l *listener) call(handler func()) {
	defer utilruntime.HandleCrashWithContext(l.ctx)
	handler()
}

// advance moves what the handler knows on when there is nothing to tell it, so that
// it does not keep an old snapshot, and wakes it otherwise.
func (l *listener) advance(from, to *objects.Snapshot, concerns bool) {
	l.mu.Lock()
	moved := !concerns && !l.busy && l.told == from
	if moved {
		l.told = to
	}
	l.mu.Unlock()
	if !moved {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// HasSynced implements cache.ResourceEventHandlerRegistration.
func (l *listener) HasSynced() bool {
	select {
	case <-l.synced:
		return true
	default:
		return false
	}
}

// HasSyncedChecker implements cache.ResourceEventHandlerRegistration.
func (l *listener) HasSyncedChecker() cache.DoneChecker {
	return done{"handler of " + l.informer.directory, l.synced}
}

// changed calls tell with what changed of the informer's kind between a snapshot and
// that of changes: in order when that is known, else by the difference of the two.
// unseen says that a deletion was not seen, so that the object may have changed before.
func (i *informer) changed(told *objects.Snapshot, changes objects.Changes, tell func(before, after any, unseen bool, key string)) {
	prefix := i.prefix(changes.Snapshot)
	of := func(m *objects.Meta) any {
		if m == nil {
			return nil
		}
		return i.object(m)
	}
	if !changes.Reset {
		for _, c := range changes.Changed {
			if key, ok := strings.CutPrefix(c.Meta().Key, prefix); ok {
				tell(of(c.Old), of(c.New), false, key)
			}
		}
		return
	}
	for before, after := range difference(told, changes.Snapshot, prefix) {
		switch {
		case before != nil && after != nil && before.UID != after.UID:
			key := strings.TrimPrefix(before.Key, prefix)
			tell(of(before), nil, true, key)
			tell(nil, of(after), false, key)
		case before != nil:
			tell(of(before), of(after), true, strings.TrimPrefix(before.Key, prefix))
		default:
			tell(nil, of(after), false, strings.TrimPrefix(after.Key, prefix))
		}
	}
}
