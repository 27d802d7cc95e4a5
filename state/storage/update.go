package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/storage"
	utilfeature "k8s.io/apiserver/pkg/util/feature"

	"timonel/state"
)

// base is what a write starts from: the object as it is, or as someone says.
type base struct {
	obj       runtime.Object // the caller's to change; nil if it is corrupt
	data      []byte         // the codec's bytes
	revision  int64          // 0 if there is no object
	stale     bool           // data should be written anew whatever it holds
	expiresAt int64
	confirmed bool // it was the newest at some time after the call began
}

// writer is one update or delete.
type writer struct {
	s              *Store
	ctx            context.Context
	key            string
	like           runtime.Object // an object of the type to read
	ignoreNotFound bool
	expectCorrupt  bool   // the object must not be readable
	release        func() // gives back what is reserved; nil if nothing is
}

// copiesOfWrite is how often what is written takes the memory of what is only read: as it
// was, as it is sent and as it becomes, each in two versions, and as its patch and its
// managed fields see it.
const copiesOfWrite = 4

// reserve reserves memory for the object as it is, once.
func (w *writer) reserve(kv *state.KV) error {
	if w.release != nil || len(kv.Value) <= uncounted {
		return nil
	}
	r := reserverOf(w.ctx)
	if r == nil {
		return nil
	}
	var err error
	w.release, err = r.Reserve(w.ctx, copiesOfWrite*w.s.cost(r, kv), true)
	return err
}

// done is when the write has ended.
func (w *writer) done() {
	if w.release != nil {
		w.release()
	}
}

// read returns the newest object that this replica has, or with confirm that
// there is anywhere.
func (w *writer) read(confirm bool) (*base, error) {
	if confirm {
		if err := w.s.barrier(w.ctx, w.key); err != nil {
			return nil, err
		}
	}
	kv, ok := w.s.backend.Store().View().Get(w.key)
	if !ok && !w.ignoreNotFound && !confirm {
		return w.read(true) // not found is said only of the newest
	}
	if !ok {
		return w.of(nil, confirm)
	}
	b, err := w.of(&kv, confirm)
	if err != nil && !confirm {
		return w.read(true)
	}
	return b, err
}

// of returns the base for a stored value, nil for none.
func (w *writer) of(kv *state.KV, confirmed bool) (*base, error) {
	b := &base{confirmed: confirmed}
	if kv == nil {
		if !w.ignoreNotFound {
			return nil, storage.NewKeyNotFoundError(w.key, 0)
		}
		b.obj = w.empty()
		return b, runtime.SetZeroValue(b.obj)
	}
	b.revision, b.expiresAt = kv.ModRevision, kv.ExpiresAt
	err := w.reserve(kv)
	if err != nil {
		return nil, err
	}
	if b.data, b.stale, err = w.s.transform(w.ctx, kv); err != nil {
		if w.expectCorrupt {
			b.stale = true
			return b, nil
		}
		return nil, readError(err)
	}
	if w.expectCorrupt {
		// Asked of the bytes themselves, whatever the cache has.
		if w.s.decodeInto(b.data, w.empty(), kv.ModRevision) == nil {
			return nil, storage.NewInvalidObjError(w.key, "unsafe deletion is not allowed because the object is decodable from storage")
		}
		return b, nil
	}
	shared, err := w.s.object(w.ctx, kv, true)
	if err != nil {
		return nil, readError(err)
	}
	b.obj = shared.DeepCopyObject()
	if reflect.TypeOf(b.obj) != reflect.TypeOf(w.like) {
		b.obj = w.empty()
		return b, w.s.decodeInto(b.data, b.obj, kv.ModRevision)
	}
	return b, nil
}

// empty returns a new object of the type to read.
func (w *writer) empty() runtime.Object {
	if u, ok := w.like.(runtime.Unstructured); ok {
		return u.NewEmptyInstance()
	}
	return reflect.New(reflect.TypeOf(w.like).Elem()).Interface().(runtime.Object)
}

// suggested returns the base for an object that the caller thinks is the newest.
func (w *writer) suggested(obj runtime.Object) (*base, error) {
	revision, err := w.s.versioner.ObjectResourceVersion(obj)
	if err != nil {
		return nil, fmt.Errorf("couldn't get resource version: %w", err)
	}
	if revision == 0 {
		return w.read(false)
	}
	// What this replica has at that revision is the same and better: it is as it
	// was stored.
	if kv, ok := w.s.backend.Store().View().Get(w.key); ok && kv.ModRevision == int64(revision) {
		return w.of(&kv, false)
	}
	b := &base{obj: obj, revision: int64(revision)}
	stored := obj.DeepCopyObject()
	if err := w.s.versioner.PrepareObjectForStorage(stored); err != nil {
		return nil, fmt.Errorf("prepare %s for storage: %w", w.key, err)
	}
	b.data, err = runtime.Encode(w.s.config.Codec, stored)
	return b, err
}

// failed decides what an error that came of b means: the error itself if b is
// the newest, else a new base to try again with.
func (w *writer) failed(b *base, cause error) (*base, error) {
	if b.confirmed {
		return nil, cause
	}
	next, err := w.read(true)
	if err != nil {
		return nil, err
	}
	if next.revision == b.revision {
		return nil, cause
	}
	return next, nil
}

// conflict returns the base that a refused commit answered.
func (w *writer) conflict(result state.Result) (*base, error) {
	kv := result.Failed[0]
	if kv.ModRevision == 0 {
		return w.of(nil, true)
	}
	return w.of(&kv, true)
}

// Delete implements storage.Interface.
func (s *Store) Delete(
	ctx context.Context, key string, out runtime.Object, preconditions *storage.Preconditions,
	validateDeletion storage.ValidateObjectFunc, cachedExistingObject runtime.Object, opts storage.DeleteOptions,
) error {
	fullKey, err := s.key(key, false)
	if err != nil {
		return err
	}
	if v := reflect.ValueOf(out); v.Kind() != reflect.Pointer || v.IsNil() {
		return fmt.Errorf("unable to convert output object to pointer: got %T", out)
	}
	w := &writer{s: s, ctx: ctx, key: fullKey, like: out}
	defer w.done()
	w.expectCorrupt = opts.ExpectTransformOrDecodeError && utilfeature.DefaultFeatureGate.Enabled(features.AllowUnsafeMalformedObjectDeletion)

	var b *base
	if cachedExistingObject != nil && !w.expectCorrupt {
		b, err = w.suggested(cachedExistingObject)
	} else {
		b, err = w.read(false)
	}
	for {
		if err != nil {
			return err
		}
		err = nil
		if preconditions != nil {
			err = preconditions.Check(fullKey, b.obj)
		}
		if err == nil {
			err = validateDeletion(ctx, b.obj)
		}
		if err != nil {
			b, err = w.failed(b, err)
			continue
		}
		result, err2 := s.commit(ctx, "delete", state.Condition{Key: fullKey, ModRevision: b.revision}, state.Change{Key: fullKey, Delete: true})
		if err2 != nil {
			return err2
		}
		if result.Succeeded {
			if w.expectCorrupt {
				return nil
			}
			return s.decodeInto(b.data, out, result.Revision)
		}
		b, err = w.conflict(result)
	}
}

// GuaranteedUpdate implements storage.Interface. An update that leaves the time
// to live nil keeps the object's.
func (s *Store) GuaranteedUpdate(
	ctx context.Context, key string, destination runtime.Object, ignoreNotFound bool,
	preconditions *storage.Preconditions, tryUpdate storage.UpdateFunc, cachedExistingObject runtime.Object,
) error {
	fullKey, err := s.key(key, false)
	if err != nil {
		return err
	}
	if v := reflect.ValueOf(destination); v.Kind() != reflect.Pointer || v.IsNil() {
		return fmt.Errorf("unable to convert output object to pointer: got %T", destination)
	}
	w := &writer{s: s, ctx: ctx, key: fullKey, like: destination, ignoreNotFound: ignoreNotFound}
	defer w.done()

	var b *base
	if cachedExistingObject != nil {
		b, err = w.suggested(cachedExistingObject)
	} else {
		b, err = w.read(false)
	}
	for {
		if err != nil {
			return err
		}
		var next *base
		next, err = w.update(b, preconditions, tryUpdate, destination)
		if next == nil {
			return err
		}
		b = next
	}
}

// update tries to update from b. It returns another base to try from, or nil and
// the outcome.
func (w *writer) update(b *base, preconditions *storage.Preconditions, tryUpdate storage.UpdateFunc, out runtime.Object) (*base, error) {
	s := w.s
	if err := preconditions.Check(w.key, b.obj); err != nil {
		return w.failed(b, err)
	}
	updated, expiresAt, err := w.apply(b, tryUpdate)
	if err != nil {
		return w.failed(b, err)
	}
	data, err := runtime.Encode(s.config.Codec, updated)
	if err != nil {
		return nil, err
	}
	if !b.stale && expiresAt == b.expiresAt && b.revision != 0 && bytes.Equal(data, b.data) {
		// Nothing to write, if this is the newest.
		if !b.confirmed {
			if b, err = w.read(true); err != nil {
				return nil, err
			}
		}
		if !b.stale && expiresAt == b.expiresAt && bytes.Equal(data, b.data) {
			return nil, s.decodeInto(b.data, out, b.revision)
		}
		return b, nil
	}
	change, err := s.put(w.ctx, w.key, data, expiresAt)
	if err != nil {
		return nil, err
	}
	result, err := s.commit(w.ctx, "update", state.Condition{Key: w.key, ModRevision: b.revision}, change)
	if err != nil {
		return nil, err
	}
	if !result.Succeeded {
		return w.conflict(result)
	}
	return nil, s.answer(change, data, result.Revision, out)
}

// apply calls tryUpdate and returns what to store, and until when.
func (w *writer) apply(b *base, tryUpdate storage.UpdateFunc) (runtime.Object, int64, error) {
	meta := storage.ResponseMeta{ResourceVersion: uint64(b.revision)}
	if b.expiresAt != 0 {
		meta.TTL = b.expiresAt - w.s.now().Unix()
	}
	updated, ttl, err := tryUpdate(b.obj, meta)
	if err != nil {
		return nil, 0, err
	}
	if updated == nil {
		return nil, 0, storage.NewInternalError(errors.New("update of " + w.key + " returned no object"))
	}
	if err := w.s.versioner.PrepareObjectForStorage(updated); err != nil {
		return nil, 0, fmt.Errorf("prepare %s for storage: %w", w.key, err)
	}
	if ttl == nil {
		return updated, b.expiresAt, nil
	}
	return updated, w.s.expiry(*ttl), nil
}
