package storage

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/conversion"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/storage"
	utilfeature "k8s.io/apiserver/pkg/util/feature"

	"timonel/state"
)

const (
	listExpired = "The resourceVersion for the provided list is too old."

	continueTooOld = "The provided continue parameter is too old to display a consistent list result. " +
		"You can start a new list without the continue parameter"
	continueExpired      = continueTooOld + "."
	continueInconsistent = continueTooOld + ", or use the continue token in this response to retrieve the remainder of the results. " +
		"Continuing with the provided token results in an inconsistent list - objects that were created, " +
		"modified, or deleted between the time the first chunk was returned and now may show up in the list."
)

// GetList implements storage.Interface.
func (s *Store) GetList(ctx context.Context, key string, opts storage.ListOptions, listObj runtime.Object) error {
	fullKey, err := s.key(key, opts.Recursive)
	if err != nil {
		return err
	}
	itemsPtr, err := meta.GetItemsPtr(listObj)
	if err != nil {
		return err
	}
	items, err := conversion.EnforcePtr(itemsPtr)
	if err != nil || items.Kind() != reflect.Slice {
		return fmt.Errorf("need ptr to slice: %v", err)
	}
	revision, start, err := storage.ValidateListOptions(fullKey, s.versioner, opts)
	if err != nil {
		return err
	}
	view, err := s.listView(ctx, fullKey, start, revision, opts)
	if err != nil {
		return err
	}
	l := &lister{s: s, ctx: ctx, selection: newSelection(opts.Predicate), items: items,
		itemPtr: reflect.PointerTo(items.Type().Elem()), newItem: newItem(listObj, items)}
	more := false
	if opts.Recursive {
		more, err = l.all(view, fullKey, start)
	} else if kv, ok := view.Get(fullKey); ok {
		if err = s.reserveOne(ctx, &kv); err == nil {
			err = l.add(&kv)
		}
	}
	if err != nil {
		return err
	}
	if err := l.errs.result(s.config.GroupResource); err != nil {
		return err
	}
	var token string
	var remaining *int64
	if more {
		// The next page reads this very view.
		s.backend.Store().Keep(view)
		if opts.Predicate.Continue == "" {
			s.firstPage(view.Revision())
		}
		count := int64(view.CountFrom(fullKey, start))
		if token, remaining, err = storage.PrepareContinueToken(l.last, fullKey, view.Revision(), count, true, opts); err != nil {
			return err
		}
	}
	if items.IsNil() {
		items.Set(reflect.MakeSlice(items.Type(), 0, 0))
	}
	if err := s.versioner.UpdateList(listObj, uint64(view.Revision()), token, remaining); err != nil {
		return err
	}
	opts.Predicate.SetShardInfoOnList(listObj)
	return nil
}

// listView returns the state that a list is read from: at revision, or if that
// is 0, one that is as new as the options ask for.
func (s *Store) listView(ctx context.Context, key, start string, revision int64, opts storage.ListOptions) (state.View, error) {
	if revision == 0 {
		return s.view(ctx, key, opts.ResourceVersion)
	}
	if _, err := s.inTouch(ctx); err != nil {
		return state.View{}, err
	}
	if err := s.wait(ctx, revision); err != nil {
		return state.View{}, err
	}
	view, err := s.backend.Store().AtPrefix(key, revision)
	switch {
	case err == nil && (opts.Predicate.Continue == "" || !s.overdue(ctx, revision)):
		return view, nil
	case err != nil && !errors.Is(err, state.ErrCompacted):
		return state.View{}, storage.NewInternalError(err)
	case opts.Predicate.Continue == "":
		return state.View{}, apierrors.NewResourceExpired(listExpired)
	}
	// Revision -1 in a token says to go on with the newest state.
	token, err := storage.EncodeContinue(start, key, -1)
	if err != nil {
		return state.View{}, apierrors.NewResourceExpired(continueExpired)
	}
	expired := apierrors.NewResourceExpired(continueInconsistent)
	expired.ErrStatus.ListMeta.Continue = token
	return state.View{}, expired
}

// compactionKey is written where a revision is to become an old one.
const compactionKey = "/timonel/compaction"

// firstPage notes that a list at a revision has begun.
func (s *Store) firstPage(revision int64) {
	s.mu.Lock()
	s.pages.revision, s.pages.began = revision, s.now()
	s.mu.Unlock()
}

// overdue says whether the last list at a revision that is still the newest began
// longer ago than the history's age. In etcd, the compaction would be writing by the
// clock and the revision be gone; here nothing is written while nothing happens, but
// when somebody goes on with such a list: he is told that it is too old, and that
// there is a newer state, as he would be there.
func (s *Store) overdue(ctx context.Context, revision int64) bool {
	store := s.backend.Store()
	if store.View().Revision() != revision {
		return false
	}
	s.mu.Lock()
	if s.pages.revision != revision { // it began on another replica, or before a restart
		s.pages.revision, s.pages.began = revision, s.now()
	}
	began := s.pages.began
	s.mu.Unlock()
	if s.now().Sub(began) <= store.HistoryAge() {
		return false
	}
	result, err := s.backend.Commit(ctx, &state.Txn{Changes: []state.Change{{Key: compactionKey, Value: strconv.AppendInt(nil, revision, 10)}}})
	return err == nil && result.Err == nil
}

// newItem returns what makes an empty item of a list.
func newItem(list runtime.Object, items reflect.Value) func() runtime.Object {
	if u, ok := list.(*unstructured.UnstructuredList); ok {
		if version := u.GetAPIVersion(); version != "" {
			return func() runtime.Object {
				return &unstructured.Unstructured{Object: map[string]any{"apiVersion": version}}
			}
		}
	}
	elem := items.Type().Elem()
	return func() runtime.Object { return reflect.New(elem).Interface().(runtime.Object) }
}

// lister fills a list.
type lister struct {
	s         *Store
	ctx       context.Context
	selection selection
	items     reflect.Value
	itemPtr   reflect.Type // pointer to an item
	newItem   func() runtime.Object
	errs      listErrors
	total     int    // objects that there are to look at
	looked    int    // of those, so far
	last      string // key of the last one
	bytes     int64  // of those kept in the cache

	reserver      Reserver // nil if all is reserved, or need not be
	due, reserved int64    // bytes that those in the list take, and that it may take
	releases      []func()
}

// all lists what is under the prefix from start on, up to the predicate's limit.
// It says whether there is more.
func (l *lister) all(view state.View, prefix, start string) (more bool, err error) {
	l.total = view.CountFrom(prefix, start)
	if err := l.reserve(view, prefix, start); err != nil {
		return false, err
	}
	for {
		if more, err = l.fill(view, prefix, start); !errors.Is(err, ErrFull) {
			return more, err
		}
		if err := l.again(); err != nil {
			return false, err
		}
	}
}

func (l *lister) fill(view state.View, prefix, start string) (more bool, err error) {
	for kv := range view.Range(prefix, start) {
		if l.selection.Limit > 0 && int64(l.items.Len()) >= l.selection.Limit {
			return true, nil
		}
		if l.looked%64 == 63 && l.ctx.Err() != nil {
			return false, storage.NewTimeoutError(kv.Key, "request did not complete within requested timeout")
		}
		l.last = kv.Key
		if err := l.add(&kv); err != nil {
			return false, err
		}
		l.looked++
	}
	return false, nil
}

// grow makes room for what is likely to come: for all that is left, or for as large
// a share of it as was selected so far, within bounds as the first say little of
// the rest.
func (l *lister) grow() {
	n, more := l.items.Len(), max(l.total-l.looked, 1)
	if !l.selection.everything {
		share := more * n / max(l.looked, 1)
		more = min(more, 16+max(n/4, min(share, 3*n)))
	}
	if limit := l.selection.Limit; limit > int64(n) {
		more = int(min(int64(more), limit-int64(n)))
	}
	grown := reflect.MakeSlice(l.items.Type(), n, n+more)
	reflect.Copy(grown, l.items)
	l.items.Set(grown)
}

// add puts an object into the list if it matches. Its error ends the list.
func (l *lister) add(kv *state.KV) error {
	obj, matched, err := l.object(kv)
	if err != nil {
		if t, ok := err.(*transformError); ok {
			err = storage.NewInternalError(fmt.Errorf("unable to transform key %q: %w", kv.Key, t.err))
		}
		if l.errs.add(kv.Key, err) {
			return l.errs.result(l.s.config.GroupResource)
		}
		return nil
	}
	if matched {
		if err := l.found(kv); err != nil {
			return err
		}
		n := l.items.Len()
		if n == l.items.Cap() {
			l.grow()
		}
		l.items.SetLen(n + 1)
		l.items.Index(n).Set(reflect.ValueOf(obj).Elem())
	}
	return nil
}

// object returns the decoded object, of the list's type, and whether it matches.
func (l *lister) object(kv *state.KV) (runtime.Object, bool, error) {
	// A list bigger than the cache would only empty it.
	keep := l.bytes+int64(len(kv.Value)) <= l.s.caches.objects.limit/2
	if keep {
		l.bytes += int64(len(kv.Value))
	}
	d := l.s.decoded(l.ctx, kv, nil, keep)
	if d.err != nil {
		return nil, false, d.err
	}
	if reflect.TypeOf(d.obj) == l.itemPtr {
		return d.obj, l.selection.selects(d.obj, d), nil
	}
	data, _, err := l.s.transform(l.ctx, kv)
	if err != nil {
		return nil, false, err
	}
	into := l.newItem()
	if err := l.s.decodeInto(data, into, kv.ModRevision); err != nil {
		return nil, false, err
	}
	matched, err := l.selection.Matches(into)
	return into, matched && err == nil, nil
}

// listErrors gathers what could not be read in a list.
type listErrors struct {
	corrupt []error
	abort   error
}

// maxCorrupt is how many corrupt objects a list names before it gives up.
const maxCorrupt = 100

var errTooManyCorrupt = errors.New("too many errors, the list is truncated")

// add notes an error and says whether the list ends with it: it does unless
// corrupt objects are to be found so that they can be deleted.
func (e *listErrors) add(key string, err error) bool {
	var corrupt *corruptError
	if !errors.As(err, &corrupt) || !utilfeature.DefaultFeatureGate.Enabled(features.AllowUnsafeMalformedObjectDeletion) {
		e.abort = err
		return true
	}
	e.corrupt = append(e.corrupt, storage.NewCorruptObjError(key, corrupt))
	if len(e.corrupt) == maxCorrupt {
		e.abort = errTooManyCorrupt
		return true
	}
	return false
}
