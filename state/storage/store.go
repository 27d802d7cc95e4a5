package storage

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"timonel/state"
)

// Config is what a storage of one resource needs.
type Config struct {
	// Codec encodes objects to bytes and back. Required.
	Codec runtime.Codec
	// NewFunc returns an empty object. Bookmarks need it.
	NewFunc func() runtime.Object
	// NewListFunc returns an empty list.
	NewListFunc func() runtime.Object
	// GetAttrs returns what selectors select by. If it is nil, each watcher asks
	// its own predicate.
	GetAttrs storage.AttrFunc
	// GroupResource is the resource's name, for errors.
	GroupResource schema.GroupResource
	// ResourcePrefix begins all keys that callers pass, such as "/pods". Required.
	ResourcePrefix string
	// PathPrefix is put before them in the state, such as "/registry". Default
	// none.
	PathPrefix string
	// Transformer encrypts values. Default none.
	Transformer value.Transformer
	// BookmarkPeriod is how often a watch that allows them gets a bookmark.
	// Default 1 minute. A watch with a deadline also gets one 2 s before it.
	BookmarkPeriod time.Duration
	// FreshTimeout is how long a read waits for this replica to reach the
	// resourceVersion it asks for. Default 3 s.
	FreshTimeout time.Duration
	// Now is the clock for times to live. Default time.Now.
	Now func() time.Time

	caches *Caches // shared by the storages of a backend
}

// Store keeps the objects of one resource. It implements storage.Interface.
type Store struct {
	backend   Backend
	config    Config
	versioner storage.APIObjectVersioner
	path      string // before all keys, with slashes round it
	caches    *Caches
	now       func() time.Time

	transformerMu sync.RWMutex

	mu      sync.Mutex
	sizes   bool // sizes are estimated
	stopped bool
	watches map[*watch]struct{}
	pages   struct { // the newest revision at which a list in pages began
		revision int64
		began    time.Time
	}
}

var _ storage.Interface = (*Store)(nil)

// New returns a storage. The error names the field of c that is wrong.
func New(b Backend, c Config) (*Store, error) {
	switch {
	case b == nil || b.Store() == nil:
		return nil, errors.New("backend is missing")
	case c.Codec == nil:
		return nil, errors.New("Codec is missing")
	case c.ResourcePrefix == "" || c.ResourcePrefix == "/":
		return nil, fmt.Errorf("ResourcePrefix cannot be %q", c.ResourcePrefix)
	case !strings.HasPrefix(c.ResourcePrefix, "/"):
		return nil, fmt.Errorf("ResourcePrefix %q needs to start with /", c.ResourcePrefix)
	}
	if c.BookmarkPeriod <= 0 {
		c.BookmarkPeriod = time.Minute
	}
	if c.FreshTimeout <= 0 {
		c.FreshTimeout = 3 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.caches == nil {
		c.caches = NewCaches(0)
	}
	s := &Store{backend: b, config: c, caches: c.caches, now: c.Now, watches: map[*watch]struct{}{}}
	s.path = path.Join("/", c.PathPrefix)
	if !strings.HasSuffix(s.path, "/") {
		s.path += "/"
	}
	return s, nil
}

// Destroy ends all watches.
func (s *Store) Destroy() {
	s.mu.Lock()
	s.stopped = true
	watches := make([]*watch, 0, len(s.watches))
	for w := range s.watches {
		watches = append(watches, w)
	}
	s.mu.Unlock()
	for _, w := range watches {
		w.Stop()
	}
	s.caches.objects.forgetStore(s)
	s.caches.events.forgetStore(s)
}

func (s *Store) transformer() value.Transformer {
	s.transformerMu.RLock()
	defer s.transformerMu.RUnlock()
	return s.config.Transformer
}

// setTransformer changes how values are read and written, and returns how they
// were.
func (s *Store) setTransformer(t value.Transformer) value.Transformer {
	s.transformerMu.Lock()
	old := s.config.Transformer
	s.config.Transformer = t
	s.transformerMu.Unlock()
	s.caches.objects.forgetStore(s)
	s.caches.events.forgetStore(s)
	return old
}

// key returns the state's key for a caller's.
func (s *Store) key(key string, recursive bool) (string, error) {
	key, err := storage.PrepareKey(s.config.ResourcePrefix, key, recursive)
	if err != nil {
		return "", err
	}
	return s.path + strings.TrimPrefix(key, "/"), nil
}

// Versioner implements storage.Interface.
func (s *Store) Versioner() storage.Versioner { return s.versioner }

// Create implements storage.Interface.
func (s *Store) Create(ctx context.Context, key string, obj, out runtime.Object, ttl uint64) error {
	fullKey, err := s.key(key, false)
	if err != nil {
		return err
	}
	if version, err := s.versioner.ObjectResourceVersion(obj); err == nil && version != 0 {
		return storage.ErrResourceVersionSetOnCreate
	}
	if err := s.versioner.PrepareObjectForStorage(obj); err != nil {
		return fmt.Errorf("prepare %s for storage: %w", fullKey, err)
	}
	data, err := runtime.Encode(s.config.Codec, obj)
	if err != nil {
		return err
	}
	change, err := s.put(ctx, fullKey, data, s.expiry(ttl))
	if err != nil {
		return err
	}
	result, err := s.commit(ctx, "create", state.Condition{Key: fullKey}, change)
	if err != nil {
		return err
	}
	if !result.Succeeded {
		return storage.NewKeyExistsError(fullKey, 0)
	}
	if out == nil {
		return nil
	}
	return s.answer(change, data, result.Revision, out)
}

// put returns the change that stores encoded data.
func (s *Store) put(ctx context.Context, key string, data []byte, expiresAt int64) (state.Change, error) {
	if t := s.transformer(); t != nil {
		var err error
		if data, err = t.TransformToStorage(ctx, data, value.DefaultContext(key)); err != nil {
			return state.Change{}, storage.NewInternalError(err)
		}
	}
	return state.Change{Key: key, Value: data, ExpiresAt: expiresAt}, nil
}

// expiry returns when a time to live that starts now ends, 0 for never.
func (s *Store) expiry(ttl uint64) int64 {
	if ttl == 0 {
		return 0
	}
	return s.now().Unix() + int64(ttl)
}

// answer sets out to the object that a committed change stored; data is its
// encoding.
func (s *Store) answer(change state.Change, data []byte, revision int64, out runtime.Object) error {
	kv, ok := s.backend.Store().View().Get(change.Key)
	if !ok || kv.ModRevision != revision { // it has changed again
		kv = state.KV{Key: change.Key, Value: change.Value, ModRevision: revision, ExpiresAt: change.ExpiresAt}
	}
	d := s.decoded(context.Background(), &kv, data, true)
	if d.err != nil {
		return readError(d.err)
	}
	return s.copyInto(d.obj, out, &kv)
}

// Get implements storage.Interface.
func (s *Store) Get(ctx context.Context, key string, opts storage.GetOptions, out runtime.Object) error {
	fullKey, err := s.key(key, false)
	if err != nil {
		return err
	}
	view, err := s.view(ctx, fullKey, opts.ResourceVersion)
	if err != nil {
		return err
	}
	kv, ok := view.Get(fullKey)
	if !ok {
		if opts.IgnoreNotFound {
			return runtime.SetZeroValue(out)
		}
		return storage.NewKeyNotFoundError(fullKey, 0)
	}
	if err := s.reserveOne(ctx, &kv); err != nil {
		return err
	}
	obj, err := s.object(ctx, &kv, true)
	if err != nil {
		return corruptGet(key, readError(err))
	}
	return s.copyInto(obj, out, &kv)
}

// view returns the state for a read that is to be not older than a
// resourceVersion: "" is linearizable, "0" is whatever is here.
func (s *Store) view(ctx context.Context, key, resourceVersion string) (state.View, error) {
	store := s.backend.Store()
	if _, err := s.inTouch(ctx); err != nil {
		return state.View{}, err
	}
	switch resourceVersion {
	case "":
		if err := s.barrier(ctx, key); err != nil {
			return state.View{}, err
		}
	case "0":
	default:
		revision, err := s.versioner.ParseResourceVersion(resourceVersion)
		if err != nil {
			return state.View{}, apierrors.NewBadRequest(fmt.Sprintf("invalid resource version: %v", err))
		}
		if err := s.wait(ctx, int64(revision)); err != nil {
			return state.View{}, err
		}
	}
	return store.View(), nil
}

// wait waits until this replica has reached a revision, but not for long.
func (s *Store) wait(ctx context.Context, revision int64) error {
	store := s.backend.Store()
	if store.View().Revision() >= revision {
		return nil
	}
	waitCtx, cancel := context.WithTimeout(ctx, s.config.FreshTimeout)
	defer cancel()
	if err := store.WaitRevision(waitCtx, revision); err != nil {
		if ctx.Err() != nil {
			return storage.NewTimeoutError(s.config.ResourcePrefix, "request did not complete within requested timeout")
		}
		return storage.NewTooLargeResourceVersionError(uint64(revision), uint64(store.View().Revision()), 1)
	}
	return nil
}

// GetCurrentResourceVersion implements storage.Interface.
func (s *Store) GetCurrentResourceVersion(ctx context.Context) (uint64, error) {
	if err := s.barrier(ctx, s.config.ResourcePrefix); err != nil {
		return 0, err
	}
	return uint64(s.backend.Store().View().Revision()), nil
}

// CompactRevision implements storage.Interface: 0 if nothing was dropped yet.
func (s *Store) CompactRevision() int64 {
	if r := s.backend.Store().CompactRevision(); r > firstRevision {
		return r
	}
	return 0
}

// firstRevision is that of an empty state.
const firstRevision = 1

// ReadinessCheck implements storage.Interface. A replica always reads its own
// memory; whether the cluster has a leader is for the server's checks to say.
func (s *Store) ReadinessCheck() error { return nil }

// Stats implements storage.Interface.
func (s *Store) Stats(context.Context) (storage.Stats, error) {
	prefix, err := s.key(s.config.ResourcePrefix, true)
	if err != nil {
		return storage.Stats{}, err
	}
	view := s.backend.Store().View()
	stats := storage.Stats{ObjectCount: int64(view.Count(prefix))}
	s.mu.Lock()
	sizes := s.sizes
	s.mu.Unlock()
	if sizes && stats.ObjectCount > 0 {
		var bytes int64
		for kv := range view.Range(prefix, "") {
			bytes += int64(len(kv.Value))
		}
		stats.EstimatedAverageObjectSizeBytes = bytes / stats.ObjectCount
	}
	return stats, nil
}

// EnableResourceSizeEstimation implements storage.Interface. The sizes are exact
// and need no keys from the caller.
func (s *Store) EnableResourceSizeEstimation(keys storage.KeysFunc) error {
	if keys == nil {
		return errors.New("KeysFunc cannot be nil")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sizes {
		return errors.New("resource size estimation is already enabled")
	}
	s.sizes = true
	return nil
}
