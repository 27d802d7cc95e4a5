package storage

import (
	"bytes"
	"io"
	"maps"
	"sync"
	"sync/atomic"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// sharedObject is an object that never changes, with the encodings that were
// asked for.
type sharedObject struct {
	object    runtime.Object
	mu        sync.Mutex // adds encodings
	encodings atomic.Pointer[map[runtime.Identifier]*encoding]
}

type encoding struct {
	once sync.Once
	raw  []byte
	err  error
}

func newSharedObject(obj runtime.Object) *sharedObject {
	s := &sharedObject{object: obj}
	s.encodings.Store(&map[runtime.Identifier]*encoding{})
	return s
}

func (s *sharedObject) encoding(id runtime.Identifier) *encoding {
	if e, ok := (*s.encodings.Load())[id]; ok {
		return e
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := (*s.encodings.Load())[id]; ok {
		return e
	}
	next := maps.Clone(*s.encodings.Load())
	e := &encoding{}
	next[id] = e
	s.encodings.Store(&next)
	return e
}

// forWatcher returns the object as one watcher may have it.
func (s *sharedObject) forWatcher(h *Holding) runtime.Object {
	if _, ok := s.object.(metav1.Object); ok {
		return &watchObject{shared: s, holder: h}
	}
	if _, ok := s.object.(metav1.ObjectMetaAccessor); ok {
		return &watchObject{shared: s, holder: h}
	}
	return s.object.DeepCopyObject()
}

// watchObject is a sharedObject in the hands of one watcher: it is encoded once
// for all of them, and becomes a copy of the watcher's own if it is changed.
type watchObject struct {
	shared *sharedObject
	holder *Holding // of the watch; nil for none
	mu     sync.Mutex
	own    runtime.Object // set once it was changed
}

var (
	_ runtime.CacheableObject = (*watchObject)(nil)
	_ metav1.Object           = (*watchObject)(nil)
)

// object is what to read.
func (o *watchObject) object() runtime.Object {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.own != nil {
		return o.own
	}
	return o.shared.object
}

// meta is the metadata to read.
func (o *watchObject) meta() metav1.Object { return metaOf(o.object()) }

// change is the metadata to write: from now on the object is the watcher's own.
func (o *watchObject) change() metav1.Object {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.own == nil {
		o.own = o.shared.object.DeepCopyObject()
	}
	return metaOf(o.own)
}

func metaOf(obj runtime.Object) metav1.Object {
	if m, ok := obj.(metav1.Object); ok {
		return m
	}
	return obj.(metav1.ObjectMetaAccessor).GetObjectMeta()
}

// CacheEncode writes the encoding named id, made by encode if there is none yet.
func (o *watchObject) CacheEncode(id runtime.Identifier, encode func(runtime.Object, io.Writer) error, w io.Writer) error {
	o.mu.Lock()
	own := o.own
	o.mu.Unlock()
	if own != nil {
		return encode(own, w)
	}
	e := o.shared.encoding(id)
	e.once.Do(func() {
		var b bytes.Buffer
		// Encoders may change what they encode for a moment: they get a copy.
		e.err = encode(o.shared.object.DeepCopyObject(), &b)
		e.raw = b.Bytes()
		o.holder.encoded(int64(len(e.raw)))
	})
	if e.err != nil {
		return e.err
	}
	if splice, ok := w.(runtime.Splice); ok {
		splice.Splice(e.raw)
		return nil
	}
	_, err := w.Write(e.raw)
	return err
}

// GetObject returns a copy that the caller owns.
func (o *watchObject) GetObject() runtime.Object { return o.object().DeepCopyObject() }

// DeepCopyObject returns a plain copy.
func (o *watchObject) DeepCopyObject() runtime.Object { return o.object().DeepCopyObject() }

// GetObjectKind returns the object's kind, not to be changed.
func (o *watchObject) GetObjectKind() schema.ObjectKind { return o.object().GetObjectKind() }

// The metadata: readers see the shared object, writers their own.

func (o *watchObject) GetNamespace() string                { return o.meta().GetNamespace() }
func (o *watchObject) SetNamespace(v string)               { o.change().SetNamespace(v) }
func (o *watchObject) GetName() string                     { return o.meta().GetName() }
func (o *watchObject) SetName(v string)                    { o.change().SetName(v) }
func (o *watchObject) GetGenerateName() string             { return o.meta().GetGenerateName() }
func (o *watchObject) SetGenerateName(v string)            { o.change().SetGenerateName(v) }
func (o *watchObject) GetUID() types.UID                   { return o.meta().GetUID() }
func (o *watchObject) SetUID(v types.UID)                  { o.change().SetUID(v) }
func (o *watchObject) GetResourceVersion() string          { return o.meta().GetResourceVersion() }
func (o *watchObject) SetResourceVersion(v string)         { o.change().SetResourceVersion(v) }
func (o *watchObject) GetGeneration() int64                { return o.meta().GetGeneration() }
func (o *watchObject) SetGeneration(v int64)               { o.change().SetGeneration(v) }
func (o *watchObject) GetSelfLink() string                 { return o.meta().GetSelfLink() }
func (o *watchObject) SetSelfLink(v string)                { o.change().SetSelfLink(v) }
func (o *watchObject) GetCreationTimestamp() metav1.Time   { return o.meta().GetCreationTimestamp() }
func (o *watchObject) SetCreationTimestamp(v metav1.Time)  { o.change().SetCreationTimestamp(v) }
func (o *watchObject) GetDeletionTimestamp() *metav1.Time  { return o.meta().GetDeletionTimestamp() }
func (o *watchObject) SetDeletionTimestamp(v *metav1.Time) { o.change().SetDeletionTimestamp(v) }
func (o *watchObject) GetDeletionGracePeriodSeconds() *int64 {
	return o.meta().GetDeletionGracePeriodSeconds()
}
func (o *watchObject) SetDeletionGracePeriodSeconds(v *int64) {
	o.change().SetDeletionGracePeriodSeconds(v)
}
func (o *watchObject) GetLabels() map[string]string       { return o.meta().GetLabels() }
func (o *watchObject) SetLabels(v map[string]string)      { o.change().SetLabels(v) }
func (o *watchObject) GetAnnotations() map[string]string  { return o.meta().GetAnnotations() }
func (o *watchObject) SetAnnotations(v map[string]string) { o.change().SetAnnotations(v) }
func (o *watchObject) GetFinalizers() []string            { return o.meta().GetFinalizers() }
func (o *watchObject) SetFinalizers(v []string)           { o.change().SetFinalizers(v) }
func (o *watchObject) GetOwnerReferences() []metav1.OwnerReference {
	return o.meta().GetOwnerReferences()
}
func (o *watchObject) SetOwnerReferences(v []metav1.OwnerReference) { o.change().SetOwnerReferences(v) }
func (o *watchObject) GetManagedFields() []metav1.ManagedFieldsEntry {
	return o.meta().GetManagedFields()
}
func (o *watchObject) SetManagedFields(v []metav1.ManagedFieldsEntry) { o.change().SetManagedFields(v) }
