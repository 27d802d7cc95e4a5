package feed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"k8s.io/client-go/tools/cache"

	"timonel/state/objects"
)

// errReadOnly is what a controller gets that wants to change its informer's store.
var errReadOnly = errors.New("the store of this informer is the cache of all controllers and cannot be changed")

// indexer is a cache.Indexer over the newest snapshot. Its indexes, but for that by
// namespace, which the cache's order is, are folds over the cache's changes.
type indexer struct {
	informer *informer

	mu    sync.Mutex
	funcs cache.Indexers
	at    *objects.Snapshot // what the indexes show, nil while there are none
	// indexes are by name of the index and value the keys of objects, as the cache has them.
	indexes map[string]map[string]map[string]struct{}
}

func newIndexer(i *informer) *indexer {
	return &indexer{informer: i, funcs: cache.Indexers{}, indexes: map[string]map[string]map[string]struct{}{}}
}

// newest is the snapshot that answers come from.
func (x *indexer) newest() *objects.Snapshot { return x.informer.factory.feed.cache.Snapshot() }

// advance moves the indexes to a newer snapshot.
func (x *indexer) advance(from, to *objects.Snapshot, concerns bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.at == nil:
	case !concerns && x.at == from:
		x.at = to
	default:
		x.catchUp()
	}
}

// catchUp makes the indexes those of the newest snapshot. x.mu is held.
func (x *indexer) catchUp() {
	changes := x.informer.factory.feed.cache.ChangesNow(x.at.Revision())
	if changes.Snapshot == x.at {
		return
	}
	x.informer.changed(x.at, changes, func(before, after any, _ bool, key string) {
		for name, values := range x.funcs {
			x.remove(name, values, before, key)
			x.insert(name, values, after, key)
		}
	})
	x.at = changes.Snapshot
}

func (x *indexer) insert(name string, values cache.IndexFunc, object any, key string) {
	if object == nil {
		return
	}
	for _, v := range valuesOf(name, values, object) {
		if x.indexes[name][v] == nil {
			x.indexes[name][v] = map[string]struct{}{}
		}
		x.indexes[name][v][key] = struct{}{}
	}
}

func (x *indexer) remove(name string, values cache.IndexFunc, object any, key string) {
	if object == nil {
		return
	}
	for _, v := range valuesOf(name, values, object) {
		delete(x.indexes[name][v], key)
		if len(x.indexes[name][v]) == 0 {
			delete(x.indexes[name], v)
		}
	}
}

// valuesOf panics as client-go's indexers do when the controller's function fails.
func valuesOf(name string, values cache.IndexFunc, object any) []string {
	out, err := values(object)
	if err != nil {
		panic(fmt.Errorf("calculate an index entry of %T for the index %q: %w", object, name, err))
	}
	return out
}

// AddIndexers implements cache.Indexer.
func (x *indexer) AddIndexers(indexers cache.Indexers) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for name := range indexers {
		if name == cache.NamespaceIndex || x.funcs[name] != nil {
			return fmt.Errorf("there is an index %q already", name)
		}
	}
	if x.at == nil {
		x.at = x.newest()
	} else {
		x.catchUp()
	}
	for name, values := range indexers {
		x.funcs[name], x.indexes[name] = values, map[string]map[string]struct{}{}
		prefix := x.informer.prefix(x.at)
		for m := range x.at.Metas().WithPrefix(prefix) {
			x.insert(name, values, x.informer.object(m), strings.TrimPrefix(m.Key, prefix))
		}
	}
	return nil
}

// GetIndexers implements cache.Indexer.
func (x *indexer) GetIndexers() cache.Indexers {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := maps.Clone(x.funcs)
	out[cache.NamespaceIndex] = cache.MetaNamespaceIndexFunc
	return out
}

// Index implements cache.Indexer.
func (x *indexer) Index(name string, object any) ([]any, error) {
	values, ok := x.GetIndexers()[name]
	if !ok {
		return nil, fmt.Errorf("there is no index %q", name)
	}
	wanted, err := values(object)
	if err != nil {
		return nil, err
	}
	if len(wanted) == 1 {
		return x.ByIndex(name, wanted[0])
	}
	seen := map[string]bool{}
	var out []any
	for _, v := range wanted {
		keys, s, err := x.keys(name, v)
		if err != nil {
			return nil, err
		}
		keys = slices.DeleteFunc(keys, func(key string) bool { return seen[key] })
		for _, key := range keys {
			seen[key] = true
		}
		out = append(out, x.objects(s, keys)...)
	}
	return out, nil
}

// IndexKeys implements cache.Indexer.
func (x *indexer) IndexKeys(name, value string) ([]string, error) {
	keys, _, err := x.keys(name, value)
	return keys, err
}

// ByIndex implements cache.Indexer.
func (x *indexer) ByIndex(name, value string) ([]any, error) {
	if name == cache.NamespaceIndex {
		return x.inNamespace(value), nil
	}
	keys, s, err := x.keys(name, value)
	if err != nil {
		return nil, err
	}
	return x.objects(s, keys), nil
}

// ListIndexFuncValues implements cache.Indexer.
func (x *indexer) ListIndexFuncValues(name string) []string {
	if name == cache.NamespaceIndex {
		var out []string
		s := x.newest()
		for m := range s.Metas().WithPrefix(x.informer.prefix(s)) {
			if (len(out) == 0 || out[len(out)-1] != m.Namespace) && x.informer.object(m) != nil {
				out = append(out, m.Namespace)
			}
		}
		return out
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.at != nil {
		x.catchUp()
	}
	return slices.Collect(maps.Keys(x.indexes[name]))
}

// keys are those of the objects with a value, and the snapshot that has these.
func (x *indexer) keys(name, value string) ([]string, *objects.Snapshot, error) {
	if name == cache.NamespaceIndex {
		s := x.newest()
		prefix := x.informer.prefix(s)
		var out []string
		for m := range s.Metas().WithPrefix(prefix + namespacePrefix(value)) {
			if m.Namespace == value && x.informer.object(m) != nil {
				out = append(out, strings.TrimPrefix(m.Key, prefix))
			}
		}
		return out, s, nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.funcs[name] == nil {
		return nil, nil, fmt.Errorf("there is no index %q", name)
	}
	x.catchUp()
	return slices.Collect(maps.Keys(x.indexes[name][value])), x.at, nil
}

// namespacePrefix is what the keys of a namespace's objects begin with, below their
// directory.
func namespacePrefix(namespace string) string {
	if namespace == "" {
		return ""
	}
	return namespace + "/"
}

func (x *indexer) inNamespace(namespace string) []any {
	s := x.newest()
	return x.collect(s, x.informer.prefix(s)+namespacePrefix(namespace), func(m *objects.Meta) bool { return m.Namespace == namespace })
}

// collect returns the objects under a prefix that want is true for.
func (x *indexer) collect(s *objects.Snapshot, prefix string, want func(*objects.Meta) bool) []any {
	var out []any
	for m := range s.Metas().WithPrefix(prefix) {
		if want(m) {
			if o := x.informer.object(m); o != nil {
				out = append(out, o)
			}
		}
	}
	return out
}

func (x *indexer) objects(s *objects.Snapshot, keys []string) []any {
	out := make([]any, 0, len(keys))
	for _, key := range keys {
		if m, ok := s.Metas().Get(x.informer.prefix(s) + key); ok {
			if o := x.informer.object(m); o != nil {
				out = append(out, o)
			}
		}
	}
	return out
}

// List implements cache.Store.
func (x *indexer) List() []any {
	s := x.newest()
	return x.collect(s, x.informer.prefix(s), func(*objects.Meta) bool { return true })
}

// ListKeys implements cache.Store.
func (x *indexer) ListKeys() []string {
	s := x.newest()
	prefix := x.informer.prefix(s)
	var out []string
	for m := range s.Metas().WithPrefix(prefix) {
		if x.informer.object(m) != nil {
			out = append(out, strings.TrimPrefix(m.Key, prefix))
		}
	}
	return out
}

// Get implements cache.Store.
func (x *indexer) Get(object any) (any, bool, error) {
	key, err := cache.MetaNamespaceKeyFunc(object)
	if err != nil {
		return nil, false, err
	}
	return x.GetByKey(key)
}

// GetByKey implements cache.Store.
func (x *indexer) GetByKey(key string) (any, bool, error) {
	s := x.newest()
	if m, ok := s.Metas().Get(x.informer.prefix(s) + key); ok {
		if o := x.informer.object(m); o != nil {
			return o, true, nil
		}
	}
	return nil, false, nil
}

// LastStoreSyncResourceVersion implements cache.Store.
func (x *indexer) LastStoreSyncResourceVersion() string {
	return strconv.FormatInt(x.newest().Revision(), 10)
}

// Bookmark implements cache.Store. The cache knows its revision by itself.
func (x *indexer) Bookmark(string) {}

// Resync implements cache.Store. There is none.
func (x *indexer) Resync() error { return nil }

// Add implements cache.Store, and refuses.
func (x *indexer) Add(any) error { return errReadOnly }

// Update implements cache.Store, and refuses.
func (x *indexer) Update(any) error { return errReadOnly }

// Delete implements cache.Store, and refuses.
func (x *indexer) Delete(any) error { return errReadOnly }

// Replace implements cache.Store, and refuses.
func (x *indexer) Replace([]any, string) error { return errReadOnly }
