package storage

import (
	"context"
	"errors"
	"fmt"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/tools/cache"

	"timonel/state"
)

// Backend is a replica of the state.
type Backend interface {
	// Commit commits a transaction and returns its result when this replica has
	// applied it. An error that is no [CommitError] leaves open whether it was
	// committed, or will be.
	Commit(ctx context.Context, txn *state.Txn) (state.Result, error)
	// ReadBarrier returns when this replica has applied everything that was
	// committed anywhere before the call.
	ReadBarrier(ctx context.Context) error
	// InTouch says whether Store is what the cluster has, but for a moment. lost is
	// closed when it is not any more; the error says why it is not.
	InTouch() (lost <-chan struct{}, err error)
	// Store is this replica's state.
	Store() *state.Store
}

// Decorator returns the function that makes the storage of each resource. All
// storages it makes share the caches.
func Decorator(b Backend, shared *Caches) generic.StorageDecorator {
	return func(
		config *storagebackend.ConfigForResource,
		resourcePrefix string,
		_ func(obj runtime.Object) (string, error),
		newFunc func() runtime.Object,
		newListFunc func() runtime.Object,
		getAttrs storage.AttrFunc,
		_ storage.IndexerFuncs,
		_ *cache.Indexers,
	) (storage.Interface, factory.DestroyFunc, error) {
		c := Config{
			Codec:          config.Codec,
			NewFunc:        newFunc,
			NewListFunc:    newListFunc,
			GetAttrs:       getAttrs,
			GroupResource:  config.GroupResource,
			ResourcePrefix: resourcePrefix,
			PathPrefix:     config.Prefix,
			Transformer:    config.Transformer,
			caches:         shared,
		}
		if utilfeature.DefaultFeatureGate.Enabled(features.AllowUnsafeMalformedObjectDeletion) {
			c.Codec = corruptionMarkingCodec{c.Codec}
			if c.Transformer != nil {
				c.Transformer = corruptionMarkingTransformer{c.Transformer}
			}
		}
		s, err := New(b, c)
		if err != nil {
			return nil, nil, fmt.Errorf("storage of %s: %w", config.GroupResource, err)
		}
		var once sync.Once
		return s, func() { once.Do(s.Destroy) }, nil
	}
}

// commit commits changes to one key and maps errors to what clients understand.
func (s *Store) commit(ctx context.Context, verb string, condition state.Condition, change state.Change) (state.Result, error) {
	txn := &state.Txn{
		Conditions: []state.Condition{condition},
		Changes:    []state.Change{change},
		Time:       s.now().Unix(),
	}
	if _, err := s.inTouch(ctx); err != nil {
		return state.Result{}, err // it would wait for a leader first
	}
	result, err := s.backend.Commit(ctx, txn)
	if err == nil {
		err = result.Err
	}
	if err != nil {
		return state.Result{}, s.unavailable(verb, change.Key, err)
	}
	if !result.Succeeded && len(result.Failed) != 1 {
		return state.Result{}, storage.NewInternalError(fmt.Errorf("%s %s: transaction refused without saying which condition failed", verb, change.Key))
	}
	return result, nil
}

// barrier waits until what is read next is linearizable.
func (s *Store) barrier(ctx context.Context, key string) error {
	if err := s.backend.ReadBarrier(ctx); err != nil {
		return s.unavailable("get", key, notRead(ctx, err))
	}
	return nil
}

// unavailable maps an error of the backend to what clients understand: see answers.
func (s *Store) unavailable(verb, key string, err error) error {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return err
	}
	answer := Answer(err, verb, key)
	answer.ErrStatus.Details.Group, answer.ErrStatus.Details.Kind = s.config.GroupResource.Group, s.config.GroupResource.Resource
	return answer
}
