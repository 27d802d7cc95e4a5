package storage

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"

	"timonel/state"
)

const (
	// defaultCacheBytes bounds the decoded objects kept, by the size of their
	// encodings; they are some four times as large in memory.
	defaultCacheBytes = 16 << 20
	// sharedEvents is how many recent events are kept for their watchers.
	sharedEvents = 1024
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
	d := s.caches.objects.entry(objectKey{s, kv.Key, kv.ModRevision}, len(kv.Value), keep)
	if !d.done.Load() {
		s.fill(ctx, d, *kv, nil)
	}
	return d.obj, d.err
}

// written is object for a value that was just stored; data is its encoding.
func (s *Store) written(kv *state.KV, data []byte) (runtime.Object, error) {
	d := s.caches.objects.entry(objectKey{s, kv.Key, kv.ModRevision}, len(kv.Value), true)
	if !d.done.Load() {
		s.fill(context.Background(), d, *kv, data)
	}
	return d.obj, d.err
}

// fill decodes into an entry, once. data is the codec's bytes if they are known.
func (s *Store) fill(ctx context.Context, d *decoded, kv state.KV, data []byte) {
	d.once.Do(func() {
		defer d.done.Store(true)
		if data == nil {
			// Others wait for this, so the caller's giving up is not to end it.
			data, _, d.err = s.transform(context.WithoutCancel(ctx), &kv)
		}
		if d.err == nil {
			d.obj, d.err = s.decodeNew(data, kv.ModRevision)
		}
		if d.err != nil {
			// What makes an object unreadable may pass, such as a key service
			// that is away.
			s.caches.objects.forget(objectKey{s, kv.Key, kv.ModRevision}, d)
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

// caches are what all storages of a backend share.
type caches struct {
	objects *objectCache
	events  *eventCache
}

func newCaches(bytes int64) *caches {
	if bytes <= 0 {
		bytes = defaultCacheBytes
	}
	return &caches{
		objects: &objectCache{limit: bytes, young: map[objectKey]*decoded{}},
		events:  &eventCache{byEvent: map[eventKey]*sharedEvent{}},
	}
}

type objectKey struct {
	store    *Store
	key      string
	revision int64
}

type decoded struct {
	once sync.Once
	done atomic.Bool // obj or err is set
	obj  runtime.Object
	err  error
	size int
}

// objectCache keeps decoded objects in two generations: what is used moves to
// the young one; when that is half of the limit, the old one is dropped.
type objectCache struct {
	limit int64

	mu         sync.Mutex
	young, old map[objectKey]*decoded
	bytes      int64 // of young
}

// entry finds an object, or makes an empty entry which it keeps if asked to.
func (c *objectCache) entry(key objectKey, size int, keep bool) *decoded {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d, ok := c.young[key]; ok {
		return d
	}
	d, ok := c.old[key]
	if ok {
		delete(c.old, key)
	} else {
		d = &decoded{size: size}
		if !keep {
			return d
		}
	}
	c.young[key] = d
	if c.bytes += int64(d.size); c.bytes > c.limit/2 {
		c.old, c.young, c.bytes = c.young, map[objectKey]*decoded{}, 0
	}
	return d
}

func (c *objectCache) forget(key objectKey, d *decoded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.young[key] == d {
		delete(c.young, key)
		c.bytes -= int64(d.size)
	}
	if c.old[key] == d {
		delete(c.old, key)
	}
}

// forgetStore drops all objects of a storage.
func (c *objectCache) forgetStore(s *Store) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, d := range c.young {
		if k.store == s {
			delete(c.young, k)
			c.bytes -= int64(d.size)
		}
	}
	for k := range c.old {
		if k.store == s {
			delete(c.old, k)
		}
	}
}

// sharedEvent is an event decoded for all its watchers.
type sharedEvent struct {
	key          eventKey
	now, before  sharedSide
	nowMu, oldMu sync.Mutex
}

// sharedSide is the object before or after an event.
type sharedSide struct {
	object   *sharedObject
	labels   labels.Set
	fields   fields.Set
	hasAttrs bool
}

type eventKey struct {
	store *Store
	event *state.Event
}

// eventCache keeps the last events used.
type eventCache struct {
	mu      sync.Mutex
	byEvent map[eventKey]*sharedEvent
	ring    [sharedEvents]*sharedEvent
	next    int
}

func (c *eventCache) get(key eventKey) *sharedEvent {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.byEvent[key]; ok {
		return e
	}
	e := &sharedEvent{key: key}
	if out := c.ring[c.next]; out != nil {
		delete(c.byEvent, out.key)
	}
	c.ring[c.next] = e
	c.next = (c.next + 1) % sharedEvents
	c.byEvent[key] = e
	return e
}

func (c *eventCache) forgetStore(s *Store) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range c.ring {
		if e != nil && e.key.store == s {
			delete(c.byEvent, e.key)
			c.ring[i] = nil
		}
	}
}

// current returns the object after a put.
func (e *sharedEvent) current(ctx context.Context) (*sharedSide, error) {
	e.nowMu.Lock()
	defer e.nowMu.Unlock()
	if e.now.object == nil {
		s := e.key.store
		obj, err := s.object(ctx, &e.key.event.KV, true)
		if err != nil {
			return nil, err
		}
		e.now.set(s, obj)
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
		obj, err := s.object(ctx, &e.key.event.Prev, false)
		if err != nil {
			return nil, err
		}
		obj = obj.DeepCopyObject()
		if err := s.versioner.UpdateObject(obj, uint64(e.key.event.Revision)); err != nil {
			return nil, err
		}
		e.before.set(s, obj)
	}
	return &e.before, nil
}

func (d *sharedSide) set(s *Store, obj runtime.Object) {
	if s.config.GetAttrs != nil {
		if l, f, err := s.config.GetAttrs(obj); err == nil {
			d.labels, d.fields, d.hasAttrs = l, f, true
		}
	}
	d.object = newSharedObject(obj)
}
