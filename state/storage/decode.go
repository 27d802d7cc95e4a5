package storage

import (
	"context"
	"fmt"
	"reflect"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"

	"timonel/state"
)

const (
	// leastCacheBytes is the least bound of the decoded objects kept, by the size of
	// their encodings; they are some four times as large in memory.
	leastCacheBytes = 16 << 20
	// sharedEvents is how many recent events are kept for their watchers, and
	// sharedEventBytes how much of values they may be of, before and after each: decoded
	// and encoded for watchers they take several times that.
	sharedEvents     = 1024
	sharedEventBytes = 8 << 20
)

// transformError is from the transformer, as opposed to the codec.
type transformError struct{ err error }

func (e *transformError) Error() string { return e.err.Error() }
func (e *transformError) Unwrap() error { return e.err }

// transform returns the codec's bytes of a stored value and whether they were
// written in a way that is out of date.
func (s *Store) transform(ctx context.Context, kv *state.KV) ([]byte, bool, error) {
	t := s.transformer()
	if t == nil {
		return kv.Value, false, nil
	}
	data, stale, err := t.TransformFromStorage(ctx, kv.Value, value.DefaultContext(kv.Key))
	if err != nil {
		return nil, false, &transformError{err}
	}
	return data, stale, nil
}

// decodeNew decodes codec bytes into a new object with the revision.
func (s *Store) decodeNew(data []byte, revision int64) (runtime.Object, error) {
	var into runtime.Object
	if s.config.NewFunc != nil {
		into = s.config.NewFunc()
	}
	obj, _, err := s.config.Codec.Decode(data, nil, into)
	if err != nil {
		return nil, err
	}
	if err := s.versioner.UpdateObject(obj, uint64(revision)); err != nil {
		return nil, fmt.Errorf("set resourceVersion of %T: %w", obj, err)
	}
	return obj, nil
}

// object returns the decoded object of a stored value. It is shared: it must not
// be changed. keep says whether to remember it.
func (s *Store) object(ctx context.Context, kv *state.KV, keep bool) (runtime.Object, error) {
	d := s.decoded(ctx, kv, nil, keep)
	return d.obj, d.err
}

// decoded is object with what is known of it beside. data is the codec's bytes if
// they are known.
func (s *Store) decoded(ctx context.Context, kv *state.KV, data []byte, keep bool) *decoded {
	d := s.caches.objects.entry(s, kv, keep)
	if !d.done.Load() {
		s.fill(ctx, d, kv, data)
	}
	return d
}

// fill decodes into an entry, once. data is the codec's bytes if they are known.
func (s *Store) fill(ctx context.Context, d *decoded, kv *state.KV, data []byte) {
	d.once.Do(func() {
		defer d.done.Store(true)
		if data == nil {
			// Others wait for this, so the caller's giving up is not to end it.
			data, _, d.err = s.transform(context.WithoutCancel(ctx), kv)
		}
		if d.err == nil {
			d.obj, d.err = s.decodeNew(data, kv.ModRevision)
		}
		if d.err != nil {
			// What makes an object unreadable may pass, such as a key service
			// that is away.
			s.caches.objects.forget(d)
		}
	})
}

// readError is the error that a read of one object answers for a failure of
// object or transform.
func readError(err error) error {
	if t, ok := err.(*transformError); ok {
		return storage.NewInternalError(t.err)
	}
	return err
}

// copyInto sets out, a pointer, to a copy of obj.
func (s *Store) copyInto(obj, out runtime.Object, kv *state.KV) error {
	ov, cv := reflect.ValueOf(out), reflect.ValueOf(obj)
	if ov.Kind() != reflect.Pointer || ov.IsNil() {
		return fmt.Errorf("unable to convert output object to pointer: got %T", out)
	}
	if ov.Type() == cv.Type() {
		ov.Elem().Set(reflect.ValueOf(obj.DeepCopyObject()).Elem())
		return nil
	}
	// A caller that wants another type than the storage's.
	data, _, err := s.transform(context.Background(), kv)
	if err != nil {
		return readError(err)
	}
	return s.decodeInto(data, out, kv.ModRevision)
}

// decodeInto decodes codec bytes into out.
func (s *Store) decodeInto(data []byte, out runtime.Object, revision int64) error {
	if v := reflect.ValueOf(out); v.Kind() != reflect.Pointer || v.IsNil() {
		return fmt.Errorf("unable to convert output object to pointer: got %T", out)
	}
	if _, _, err := s.config.Codec.Decode(data, nil, out); err != nil {
		return err
	}
	return s.versioner.UpdateObject(out, uint64(revision))
}

// Caches are the decoded objects and events that all storages of a backend share.
type Caches struct {
	objects *objectCache
	events  *eventCache
}

// NewCaches makes empty caches. bytes bounds the decoded objects that are kept, by the
// size of their encodings; it is 16 MiB at least.
func NewCaches(bytes int64) *Caches {
	return &Caches{
		objects: newObjectCache(max(bytes, leastCacheBytes)),
		events:  &eventCache{byEvent: map[eventKey]*sharedEvent{}},
	}
}

// Bytes is how much the caches hold, by the size of the encodings.
func (c *Caches) Bytes() int64 { return c.objects.held() + c.events.held() }

// Age lets go of the objects that were not used since the last call but one, and of all
// events: what a time of much work has left behind.
func (c *Caches) Age() {
	c.objects.age()
	c.events.clear()
}

// sharedEvent is an event decoded for all its watchers.
type sharedEvent struct {
	key          eventKey
	now, before  sharedSide
	nowMu, oldMu sync.Mutex
}

// sharedSide is the object before or after an event.
type sharedSide struct {
	object *sharedObject
	from   *decoded // has its labels and fields
}

type eventKey struct {
	store *Store
	event *state.Event
}

// size is that of the values that the event's objects are made of.
func (k eventKey) size() int64 { return k.event.Size() }

// eventCache keeps the last events used, as many as its bounds allow, but always the
// last one.
type eventCache struct {
	mu      sync.Mutex
	byEvent map[eventKey]*sharedEvent
	ring    [sharedEvents]*sharedEvent
	first   int // the oldest
	n       int // from first on; those of a storage that was forgotten are nil
	bytes   int64
}

func (c *eventCache) get(key eventKey) *sharedEvent {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.byEvent[key]; ok {
		return e
	}
	e := &sharedEvent{key: key}
	for c.n == sharedEvents || c.n > 0 && c.bytes+key.size() > sharedEventBytes {
		c.drop(c.first)
		c.first = (c.first + 1) % sharedEvents
		c.n--
	}
	c.ring[(c.first+c.n)%sharedEvents] = e
	c.n++
	c.bytes += key.size()
	c.byEvent[key] = e
	return e
}

// drop empties a place. c.mu is held.
func (c *eventCache) drop(place int) {
	if e := c.ring[place]; e != nil {
		delete(c.byEvent, e.key)
		c.bytes -= e.key.size()
		c.ring[place] = nil
	}
}

// clear forgets all events.
func (c *eventCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.ring {
		c.drop(i)
	}
	c.first, c.n = 0, 0
}

// held is the size of the values that the events kept are made of.
func (c *eventCache) held() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

func (c *eventCache) forgetStore(s *Store) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range c.ring {
		if e != nil && e.key.store == s {
			c.drop(i)
		}
	}
}

// current returns the object after a put.
func (e *sharedEvent) current(ctx context.Context) (*sharedSide, error) {
	e.nowMu.Lock()
	defer e.nowMu.Unlock()
	if e.now.object == nil {
		s := e.key.store
		d := s.decoded(ctx, &e.key.event.KV, nil, true)
		if d.err != nil {
			return nil, d.err
		}
		e.now = sharedSide{newSharedObject(d.obj), d}
	}
	return &e.now, nil
}

// previous returns the object before the event, with the event's revision, which
// is what a watcher is told of an object that is gone for it.
func (e *sharedEvent) previous(ctx context.Context) (*sharedSide, error) {
	e.oldMu.Lock()
	defer e.oldMu.Unlock()
	if e.before.object == nil {
		s := e.key.store
		d := s.decoded(ctx, &e.key.event.Prev, nil, false)
		if d.err != nil {
			return nil, d.err
		}
		obj := d.obj.DeepCopyObject()
		if err := s.versioner.UpdateObject(obj, uint64(e.key.event.Revision)); err != nil {
			return nil, err
		}
		e.before = sharedSide{newSharedObject(obj), d}
	}
	return &e.before, nil
}
