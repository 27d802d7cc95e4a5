package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/apitesting"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apiserver/pkg/apis/example"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/storage"
	storagetesting "k8s.io/apiserver/pkg/storage/testing"
	"k8s.io/apiserver/pkg/storage/value"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	featuregatetesting "k8s.io/component-base/featuregate/testing"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// The upstream suite, k8s.io/apiserver/pkg/storage/testing, called as upstream's
// etcd3 store calls it. Of its RunTest functions none is left out. What etcd3's
// own tests have beside them is left out because it tests etcd's client rather
// than the interface: counts of reads sent to etcd (the CallsValidation and
// KubernetesRecorder arguments, nil here), leases, RangeStream, the etcd
// compactor, client configuration, and metrics of etcd requests. In exchange the
// two tests of bookmarks that upstream runs on its watch cache alone run here.

const valuePrefix = "test!"

func exampleScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	utilruntime.Must(example.AddToScheme(scheme))
	utilruntime.Must(examplev1.AddToScheme(scheme))
	return scheme
}

func exampleCodec() runtime.Codec {
	return apitesting.TestCodec(serializer.NewCodecFactory(exampleScheme()), examplev1.SchemeGroupVersion)
}

// setup returns a storage of example pods over a state of its own.
func setup(t testing.TB, change ...func(*Config)) (context.Context, *Store, *storagetest.LocalBackend) {
	t.Helper()
	b := storagetest.NewLocalBackend(state.Options{})
	c := Config{
		Codec:          exampleCodec(),
		NewFunc:        func() runtime.Object { return &example.Pod{} },
		NewListFunc:    func() runtime.Object { return &example.PodList{} },
		GroupResource:  schema.GroupResource{Resource: "pods"},
		ResourcePrefix: "/pods/",
		Transformer:    storagetesting.NewPrefixTransformer([]byte(valuePrefix), false),
		BookmarkPeriod: time.Second,
		FreshTimeout:   20 * time.Millisecond,
	}
	for _, f := range change {
		f(&c)
	}
	s, err := New(b, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Destroy)
	return context.Background(), s, b
}

// expiring runs the leader's deletes of expired keys.
func expiring(t *testing.T, b Backend) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Expire(ctx, b, slog.Default()) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Expire: %v", err)
		}
	})
}

func checkStored(b *storagetest.LocalBackend, codec runtime.Codec) storagetesting.KeyValidation {
	return func(_ context.Context, t *testing.T, key string) {
		kv, ok := b.Store().View().Get(key)
		if !ok {
			t.Fatalf("nothing is stored at %s", key)
		}
		obj, err := runtime.Decode(codec, kv.Value[len(valuePrefix):])
		if err != nil {
			t.Fatalf("stored object %q: %v", kv.Value, err)
		}
		if pod := obj.(*example.Pod); pod.ResourceVersion != "" || pod.SelfLink != "" {
			t.Errorf("stored object has resourceVersion %q, selfLink %q, want none", pod.ResourceVersion, pod.SelfLink)
		}
	}
}

func increaseRV(b *storagetest.LocalBackend) storagetesting.IncreaseRVFunc {
	return func(ctx context.Context, t *testing.T) int64 {
		r, err := b.Commit(ctx, &state.Txn{Changes: []state.Change{{Key: "increaseRV", Value: []byte("ok")}}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Revision
	}
}

func compact(b *storagetest.LocalBackend) storagetesting.Compaction {
	return func(ctx context.Context, t *testing.T, resourceVersion string) {
		rv, err := storage.APIObjectVersioner{}.ParseResourceVersion(resourceVersion)
		if err != nil {
			t.Fatal(err)
		}
		// As etcd's compactor does, this takes a revision.
		txn := &state.Txn{Compact: int64(rv), Changes: []state.Change{{Key: "compact", Value: []byte(resourceVersion)}}}
		if _, err := b.Commit(ctx, txn); err != nil {
			t.Fatal(err)
		}
	}
}

// withTransformer lets the suite change how values are read.
type withTransformer struct{ *Store }

func (s withTransformer) UpdatePrefixTransformer(modify storagetesting.PrefixTransformerModifier) func() {
	old := s.transformer().(*storagetesting.PrefixTransformer)
	changed := *old
	s.setTransformer(modify(&changed))
	return func() { s.setTransformer(old) }
}

func (s withTransformer) UpdateTransformer(modify storagetesting.TransformerModifier) func() {
	old := s.setTransformer(modify(s.transformer()))
	return func() { s.setTransformer(old) }
}

// failing fails to read while it is told to.
type failing struct{ atomic.Bool }

var errSynthetic = errors.New("synthetic error")

type failingCodec struct {
	runtime.Codec
	fail *failing
}

func (c failingCodec) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	if c.fail.Load() {
		return nil, nil, errSynthetic
	}
	return c.Codec.Decode(data, defaults, into)
}

type failingTransformer struct {
	value.Transformer
	fail *failing
}

func (t failingTransformer) TransformFromStorage(ctx context.Context, data []byte, dataCtx value.Context) ([]byte, bool, error) {
	if t.fail.Load() {
		return nil, false, errSynthetic
	}
	return t.Transformer.TransformFromStorage(ctx, data, dataCtx)
}

func unsafeDeletion(t *testing.T, on bool) {
	featuregatetesting.SetFeatureGateDuringTest(t, utilfeature.DefaultFeatureGate, features.AllowUnsafeMalformedObjectDeletion, on)
}

var errCorrupt = &corruptError{"data from the storage is not transformable", errors.New("bits flipped")}

func TestUpstreamStore(t *testing.T) {
	// The tests that need no more than a storage.
	plain := map[string]func(context.Context, *testing.T, storage.Interface){
		"CreateWithKeyExist":                    storagetesting.RunTestCreateWithKeyExist,
		"Get":                                   storagetesting.RunTestGet,
		"UnconditionalDelete":                   storagetesting.RunTestUnconditionalDelete,
		"ConditionalDelete":                     storagetesting.RunTestConditionalDelete,
		"DeleteWithSuggestion":                  storagetesting.RunTestDeleteWithSuggestion,
		"DeleteWithSuggestionAndConflict":       storagetesting.RunTestDeleteWithSuggestionAndConflict,
		"DeleteWithSuggestionOfDeletedObject":   storagetesting.RunTestDeleteWithSuggestionOfDeletedObject,
		"ValidateDeletionWithSuggestion":        storagetesting.RunTestValidateDeletionWithSuggestion,
		"ValidateDeletionWithOnlySuggestion":    storagetesting.RunTestValidateDeletionWithOnlySuggestionValid,
		"DeleteWithConflict":                    storagetesting.RunTestDeleteWithConflict,
		"PreconditionalDeleteWithSuggestion":    storagetesting.RunTestPreconditionalDeleteWithSuggestion,
		"PreconditionalDeleteOnlySuggestion":    storagetesting.RunTestPreconditionalDeleteWithOnlySuggestionPass,
		"ListPaging":                            storagetesting.RunTestListPaging,
		"GetListRecursivePrefix":                storagetesting.RunTestGetListRecursivePrefix,
		"KeySchema":                             storagetesting.RunTestKeySchema,
		"GuaranteedUpdateWithConflict":          storagetesting.RunTestGuaranteedUpdateWithConflict,
		"GuaranteedUpdateSuggestionAndConflict": storagetesting.RunTestGuaranteedUpdateWithSuggestionAndConflict,
		"NamespaceScopedList":                   storagetesting.RunTestNamespaceScopedList,
	}
	for name, run := range plain {
		t.Run(name, func(t *testing.T) {
			ctx, s, _ := setup(t)
			run(ctx, t, s)
		})
	}
	t.Run("Create", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestCreate(ctx, t, s, checkStored(b, s.config.Codec))
	})
	t.Run("CreateWithTTL", func(t *testing.T) {
		ctx, s, b := setup(t)
		expiring(t, b)
		storagetesting.RunTestCreateWithTTL(ctx, t, s)
	})
	t.Run("GuaranteedUpdate", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestGuaranteedUpdate(ctx, t, withTransformer{s}, checkStored(b, s.config.Codec))
	})
	t.Run("GuaranteedUpdateWithTTL", func(t *testing.T) {
		ctx, s, b := setup(t)
		expiring(t, b)
		storagetesting.RunTestGuaranteedUpdateWithTTL(ctx, t, s)
	})
	t.Run("GuaranteedUpdateChecksStoredData", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestGuaranteedUpdateChecksStoredData(ctx, t, withTransformer{s})
	})
	t.Run("TransformationFailure", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestTransformationFailure(ctx, t, withTransformer{s})
	})
	for _, sizes := range []bool{true, false} {
		t.Run(fmt.Sprintf("Stats/sizes=%v", sizes), func(t *testing.T) {
			ctx, s, _ := setup(t)
			if sizes {
				if err := s.EnableResourceSizeEstimation(func(context.Context) ([]string, error) { return nil, nil }); err != nil {
					t.Fatal(err)
				}
			}
			storagetesting.RunTestStats(ctx, t, s, s.config.Codec, s.transformer(), sizes)
		})
	}
}

func TestUpstreamList(t *testing.T) {
	t.Run("List", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestList(ctx, t, s, compact(b), false, nil)
	})
	t.Run("GetListNonRecursive", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestGetListNonRecursive(ctx, t, increaseRV(b), s)
	})
	t.Run("ConsistentList", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestConsistentList(ctx, t, s, increaseRV(b), false, true, false)
	})
	t.Run("CompactRevision", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestCompactRevision(ctx, t, s, increaseRV(b), compact(b))
	})
	t.Run("ListContinuation", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestListContinuation(ctx, t, s, nil)
	})
	t.Run("ListPaginationRareObject", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestListPaginationRareObject(ctx, t, s, nil)
	})
	t.Run("ListContinuationWithFilter", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestListContinuationWithFilter(ctx, t, s, nil)
	})
	t.Run("ListInconsistentContinuation", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestListInconsistentContinuation(ctx, t, s, compact(b))
	})
	t.Run("ListResourceVersionMatch", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestListResourceVersionMatch(ctx, t, withTransformer{s})
	})
}

func TestUpstreamCorruptObjects(t *testing.T) {
	t.Run("GetListWithErrorAggregation", func(t *testing.T) {
		unsafeDeletion(t, true)
		ctx, s, _ := setup(t)
		storagetesting.RunTestGetListWithErrorAggregation(ctx, t, withTransformer{s}, errCorrupt)
	})
	t.Run("GetListWithoutErrorAggregation", func(t *testing.T) {
		unsafeDeletion(t, false)
		ctx, s, _ := setup(t)
		storagetesting.RunTestGetListWithoutErrorAggregation(ctx, t, withTransformer{s}, errCorrupt)
	})
	t.Run("DeleteWithConflictAndMissingExpectedTransformOrDecodeError", func(t *testing.T) {
		unsafeDeletion(t, true)
		var fail failing
		ctx, s, _ := setup(t, func(c *Config) { c.Codec = failingCodec{c.Codec, &fail} })
		storagetesting.RunTestDeleteWithConflictAndMissingExpectedTransformOrDecodeError(ctx, t, s, fail.Store)
	})
	t.Run("DeleteExpectedTransformError", func(t *testing.T) {
		unsafeDeletion(t, true)
		var fail failing
		ctx, s, _ := setup(t, func(c *Config) { c.Transformer = failingTransformer{c.Transformer, &fail} })
		storagetesting.RunTestDeleteExpectedTransformOrDecodeError(ctx, t, s, fail.Store)
	})
	t.Run("DeleteExpectedDecodeError", func(t *testing.T) {
		unsafeDeletion(t, true)
		var fail failing
		ctx, s, _ := setup(t, func(c *Config) { c.Codec = failingCodec{c.Codec, &fail} })
		storagetesting.RunTestDeleteExpectedTransformOrDecodeError(ctx, t, s, fail.Store)
	})
	t.Run("DeleteWithSuggestionAndMissingExpectedTransformOrDecodeError", func(t *testing.T) {
		unsafeDeletion(t, true)
		ctx, s, _ := setup(t)
		storagetesting.RunTestDeleteWithSuggestionAndMissingExpectedTransformOrDecodeError(ctx, t, s)
	})
	t.Run("WatchWithUnsafeDelete", func(t *testing.T) {
		unsafeDeletion(t, true)
		ctx, s, _ := setup(t)
		storagetesting.RunTestWatchWithUnsafeDelete(ctx, t, withTransformer{s}, errCorrupt)
	})
}

func TestUpstreamWatch(t *testing.T) {
	plain := map[string]func(context.Context, *testing.T, storage.Interface){
		"Watch":                               storagetesting.RunTestWatch,
		"ClusterScopedWatch":                  storagetesting.RunTestClusterScopedWatch,
		"NamespaceScopedWatch":                storagetesting.RunTestNamespaceScopedWatch,
		"DeleteTriggerWatch":                  storagetesting.RunTestDeleteTriggerWatch,
		"WatchFromNonZero":                    storagetesting.RunTestWatchFromNonZero,
		"DelayedWatchDelivery":                storagetesting.RunTestDelayedWatchDelivery,
		"WatchContextCancel":                  storagetesting.RunTestWatchContextCancel,
		"WatcherTimeout":                      storagetesting.RunTestWatcherTimeout,
		"WatchDeleteEventObjectHaveLatestRV":  storagetesting.RunTestWatchDeleteEventObjectHaveLatestRV,
		"WatchInitializationSignal":           storagetesting.RunTestWatchInitializationSignal,
		"WatchBookmarksWithCorrectRV":         storagetesting.RunTestOptionalWatchBookmarksWithCorrectResourceVersion,
		"SendInitialEventsBackwardCompatible": storagetesting.RunSendInitialEventsBackwardCompatibility,
		"WatchSemantics":                      storagetesting.RunWatchSemantics,
		"WatchSemanticInitialEventsExtended":  storagetesting.RunWatchSemanticInitialEventsExtended,
		"WatchListMatchSingle":                storagetesting.RunWatchListMatchSingle,
	}
	for name, run := range plain {
		t.Run(name, func(t *testing.T) {
			ctx, s, _ := setup(t)
			run(ctx, t, s)
		})
	}
	t.Run("WatchFromZero", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunTestWatchFromZero(ctx, t, s, compact(b))
	})
	t.Run("WatchError", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestWatchError(ctx, t, withTransformer{s})
	})
	t.Run("ProgressNotify", func(t *testing.T) {
		ctx, s, b := setup(t)
		storagetesting.RunOptionalTestProgressNotify(ctx, t, s, increaseRV(b))
	})
	t.Run("WatchDispatchBookmarkEvents", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunTestWatchDispatchBookmarkEvents(ctx, t, s, true)
	})
	t.Run("WatchErrorIsBlockingFurtherEvents", func(t *testing.T) {
		ctx, s, _ := setup(t)
		storagetesting.RunWatchErrorIsBlockingFurtherEvents(ctx, t, withTransformer{s})
	})
}
