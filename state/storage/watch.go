package storage

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/storage"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"

	"timonel/state"
)

const (
	// watchBuffer is how many events wait for a client before the watch stops
	// pulling them from the history.
	watchBuffer = 16
	// bookmarkBeforeEnd is how long before its deadline a watch gets a last
	// bookmark, so that the next one starts from there.
	bookmarkBeforeEnd = 2 * time.Second
)

// watch is one client's watch. A goroutine of its own pulls events from the
// state's history and pushes them to the client.
type watch struct {
	s         *Store
	ctx       context.Context
	cancel    context.CancelFunc
	key       string
	recursive bool
	selection selection
	bookmarks bool
	results   chan apiwatch.Event
	progress  chan struct{}   // asks for a bookmark now
	last      int64           // revision of the last bookmark
	lost      <-chan struct{} // closed when this replica is out of touch
	holding   holdings
	holder    *Holding // who is told of it; nil for nobody
}

// Watch implements storage.Interface.
func (s *Store) Watch(ctx context.Context, key string, opts storage.ListOptions) (apiwatch.Interface, error) {
	var lost <-chan struct{}
	if !IsOwn(ctx) {
		var err error
		if lost, err = s.backend.InTouch(); err != nil {
			return nil, OutOfTouch(err, true)
		}
	}
	fullKey, err := s.key(key, opts.Recursive)
	if err != nil {
		return nil, err
	}
	parsed, err := s.versioner.ParseResourceVersion(opts.ResourceVersion)
	if err != nil {
		return nil, err
	}
	if opts.ProgressNotify && s.config.NewFunc == nil {
		return nil, apierrors.NewInternalError(errors.New("progressNotify for watch is unsupported because no newFunc was provided"))
	}
	revision := int64(parsed)
	watchList := utilfeature.DefaultFeatureGate.Enabled(features.WatchList)
	asked := watchList && opts.SendInitialEvents != nil && *opts.SendInitialEvents
	initial := asked || (opts.SendInitialEvents == nil && revision == 0)
	if opts.ResourceVersion == "" {
		// The newest state anywhere, whether it is sent or only started from.
		if err := s.barrier(ctx, fullKey); err != nil {
			return nil, err
		}
	}
	if revision == 0 && !initial {
		revision = s.backend.Store().View().Revision()
	}
	w := &watch{
		s: s, key: fullKey, recursive: opts.Recursive, selection: newSelection(opts.Predicate),
		bookmarks: (opts.Predicate.AllowWatchBookmarks || opts.ProgressNotify) && s.config.NewFunc != nil,
		results:   make(chan apiwatch.Event, watchBuffer), progress: make(chan struct{}, 1),
		lost: lost,
	}
	w.ctx, w.cancel = context.WithCancel(ctx)
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		w.cancel()
		return nil, apierrors.NewServiceUnavailable("storage is shut down")
	}
	s.watches[w] = struct{}{}
	s.mu.Unlock()
	w.tell(ctx)
	// The goroutine ends with the watch's context, which the caller owns.
	go w.run(revision, initial, asked && opts.Predicate.AllowWatchBookmarks)
	return w, nil
}

// RequestWatchProgress implements storage.Interface: every watch that gets
// bookmarks gets one soon.
func (s *Store) RequestWatchProgress(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		select {
		case w.progress <- struct{}{}:
		default:
		}
	}
	return nil
}

// Stop ends the watch.
func (w *watch) Stop() { w.cancel() }

// ResultChan is closed when the watch has ended.
func (w *watch) ResultChan() <-chan apiwatch.Event { return w.results }

func (w *watch) run(revision int64, initial, endBookmark bool) {
	defer close(w.results)
	defer func() {
		w.cancel()
		w.s.mu.Lock()
		delete(w.s.watches, w)
		w.s.mu.Unlock()
	}()
	if err := w.follow(revision, initial, endBookmark); err != nil && w.ctx.Err() == nil && !errors.Is(err, errLost) {
		w.fail(err)
	}
}

// errLost ends a watch of a replica that is out of touch, without a word: so clients go
// on from the last event that they have, on the next replica that takes the watch. An
// error would make many of them list all again.
var errLost = errors.New("this replica is out of touch")

func (w *watch) follow(revision int64, initial, endBookmark bool) error {
	store := w.s.backend.Store()
	var view state.View
	if initial {
		if err := w.s.wait(w.ctx, revision); err != nil {
			return err
		}
		view = store.View()
		revision = view.Revision()
	}
	events, err := store.Watch(w.key, revision)
	if err != nil {
		return err
	}
	defer events.Close()
	if initial {
		if err := w.sendAll(view); err != nil {
			return err
		}
		if endBookmark {
			if err := w.bookmark(revision, true); err != nil {
				return err
			}
		}
	}
	utilflowcontrol.WatchInitialized(w.ctx)
	w.last = revision

	timer := time.NewTimer(w.untilBookmark())
	defer timer.Stop()
	for {
		batch, err := events.Poll()
		if err != nil {
			return err
		}
		held := int64(0)
		for _, e := range batch {
			held += e.Size()
		}
		for i, e := range batch {
			w.holding.batch.Store(held)
			if err := w.sendEvent(e); err != nil {
				return err
			}
			held -= e.Size()
			batch[i] = nil
		}
		w.holding.batch.Store(0)
		if len(batch) > 0 {
			continue
		}
		select {
		case <-w.ctx.Done():
			return nil
		case <-w.lost:
			return errLost
		case <-events.Ready():
			continue
		case <-timer.C:
			timer.Reset(w.untilBookmark())
		case <-w.progress:
		}
		if w.bookmarks {
			if p := events.Progress(); p >= w.last {
				w.last = p
				if err := w.bookmark(p, false); err != nil {
					return err
				}
			}
		}
	}
}

// untilBookmark is how long to wait for the next bookmark: some four fifths to
// all of the period, so that many watches do not get theirs at once, or until
// shortly before the watch's deadline.
func (w *watch) untilBookmark() time.Duration {
	if !w.bookmarks {
		return time.Hour
	}
	period := w.s.config.BookmarkPeriod
	d := period - time.Duration(rand.Int64N(int64(period)/5+1))
	if deadline, ok := w.ctx.Deadline(); ok {
		if left := time.Until(deadline) - bookmarkBeforeEnd; left > 0 && left < d {
			d = left
		}
	}
	return d
}

// sendAll sends what there is as if it were created now.
func (w *watch) sendAll(view state.View) error {
	send := func(kv *state.KV) error {
		d := w.s.decoded(w.ctx, kv, nil, true)
		if d.err != nil {
			return readError(d.err)
		}
		if !w.selection.selects(d.obj, d) {
			return nil
		}
		return w.send(apiwatch.Event{Type: apiwatch.Added, Object: newSharedObject(d.obj).forWatcher(w.holder)}, len(kv.Value))
	}
	if !w.recursive {
		if kv, ok := view.Get(w.key); ok {
			return send(&kv)
		}
		return nil
	}
	held := int64(0) // by a client that does not read, whatever becomes of these objects
	for kv := range view.Range(w.key, "") {
		held += int64(len(kv.Value))
	}
	for kv := range view.Range(w.key, "") {
		w.holding.batch.Store(held)
		held -= int64(len(kv.Value))
		if err := send(&kv); err != nil {
			return err
		}
	}
	return nil
}

// sendEvent sends an event as the predicate sees it.
func (w *watch) sendEvent(e *state.Event) error {
	if !w.recursive && e.KV.Key != w.key {
		return nil
	}
	shared := w.s.caches.events.get(eventKey{w.s, e})
	var now, before *sharedSide
	var isNow, wasBefore bool
	var err error
	if e.Type == state.Put {
		if now, err = shared.current(w.ctx); err != nil {
			return readError(err)
		}
		isNow = w.matches(now)
	}
	// What the object was matters if it is gone, or perhaps is for this watcher.
	if e.Prev.ModRevision != 0 {
		if wasBefore = w.selection.everything; !wasBefore || e.Type == state.Delete {
			if before, err = shared.previous(w.ctx); err != nil {
				return deletedCorrupt(e, readError(err))
			}
			wasBefore = w.matches(before)
		}
	}
	switch {
	case isNow && wasBefore:
		return w.send(apiwatch.Event{Type: apiwatch.Modified, Object: now.object.forWatcher(w.holder)}, len(e.KV.Value))
	case isNow:
		return w.send(apiwatch.Event{Type: apiwatch.Added, Object: now.object.forWatcher(w.holder)}, len(e.KV.Value))
	case wasBefore:
		return w.send(apiwatch.Event{Type: apiwatch.Deleted, Object: before.object.forWatcher(w.holder)}, len(e.Prev.Value))
	}
	return nil
}

func (w *watch) matches(side *sharedSide) bool {
	return w.selection.selects(side.object.object, side.from)
}

// bookmark tells the client how far the watch is. end marks the end of the
// initial events.
func (w *watch) bookmark(revision int64, end bool) error {
	if w.s.config.NewFunc == nil {
		return nil
	}
	obj := w.s.config.NewFunc()
	if err := w.s.versioner.UpdateObject(obj, uint64(revision)); err != nil {
		return err
	}
	if end {
		if err := storage.AnnotateInitialEventsEndBookmark(obj); err != nil {
			return err
		}
	}
	return w.send(apiwatch.Event{Type: apiwatch.Bookmark, Object: obj}, 0)
}

// send returns an error if the watch has ended: nothing may be sent after what
// was not. size is that of the value that the event is of.
func (w *watch) send(e apiwatch.Event, size int) error {
	select {
	case w.results <- e:
		w.holding.add(int64(size))
		return nil
	case <-w.ctx.Done():
		return w.ctx.Err()
	case <-w.lost:
		return errLost
	}
}

// fail sends the error as the last event.
func (w *watch) fail(err error) {
	if errors.Is(err, state.ErrCompacted) {
		err = apierrors.NewResourceExpired("The resourceVersion for the provided watch is too old.")
	}
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		status = apierrors.NewInternalError(err)
	}
	object := status.Status()
	_ = w.send(apiwatch.Event{Type: apiwatch.Error, Object: &object}, 0) // nobody is left to tell
}

// deletedCorrupt says that an object that could not be read is gone.
func deletedCorrupt(e *state.Event, err error) error {
	var corrupt *corruptError
	if e.Type != state.Delete || !errors.As(err, &corrupt) {
		return err
	}
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusInternalServerError,
		Reason:  metav1.StatusReasonStoreReadError,
		Message: fmt.Sprintf("saw a DELETED event, but object data is corrupt - %v", strings.TrimSpace(corrupt.Error())),
	}}
}
