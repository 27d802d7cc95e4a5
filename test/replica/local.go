package replica

import (
	"context"
	"errors"
	"fmt"

	"timonel/consensus"
	"timonel/state"
)

// Replica is one replica, wherever it runs. Errors that wrap
// [consensus.ErrUnknownOutcome] leave open whether a write was done; all others
// say that nothing was.
type Replica interface {
	Commit(ctx context.Context, txn *state.Txn) (state.Result, error)
	// Get and List are linearizable. List returns up to limit keys with a prefix (0:
	// all), and the revision they are of.
	Get(ctx context.Context, key string) (kv state.KV, found bool, err error)
	List(ctx context.Context, prefix string, limit int) (kvs []state.KV, revision int64, err error)
	// Page lists the keys with a prefix that come after one, as of a revision. Errors:
	// *TooOld.
	Page(ctx context.Context, prefix, after string, revision int64) ([]state.KV, error)
	// Follow calls saw for each change after a revision, in order, until ctx or the
	// stream ends. Errors: *TooOld.
	Follow(ctx context.Context, prefix string, after int64, saw func(state.Event)) error
	// Revision is the newest that the replica has, which may be behind others.
	Revision(ctx context.Context) (int64, error)
}

// TooOld says that a revision has left the history window.
type TooOld struct {
	Asked, Oldest int64 // Oldest is where the window begins
}

func (e *TooOld) Error() string {
	return fmt.Sprintf("revision %d is too old: the window begins at %d", e.Asked, e.Oldest)
}

// Local is a replica of this process.
type Local struct {
	Log   *consensus.Replica
	Store *state.Store
}

// Commit implements [Replica].
func (l Local) Commit(ctx context.Context, txn *state.Txn) (state.Result, error) {
	v, err := l.Log.Apply(ctx, txn.Marshal())
	if err != nil {
		return state.Result{}, err
	}
	return v.(state.Result), nil
}

// Get implements [Replica].
func (l Local) Get(ctx context.Context, key string) (kv state.KV, found bool, err error) {
	if err := l.Log.ReadBarrier(ctx); err != nil {
		return state.KV{}, false, err
	}
	kv, found = l.Store.View().Get(key)
	return kv, found, nil
}

// List implements [Replica].
func (l Local) List(ctx context.Context, prefix string, limit int) (kvs []state.KV, revision int64, err error) {
	if err := l.Log.ReadBarrier(ctx); err != nil {
		return nil, 0, err
	}
	view := l.Store.View()
	for kv := range view.Range(prefix, "") {
		if kvs = append(kvs, kv); len(kvs) == limit {
			break
		}
	}
	return kvs, view.Revision(), nil
}

// Page implements [Replica]. A replica that is behind the revision comes to it first.
func (l Local) Page(ctx context.Context, prefix, after string, revision int64) (kvs []state.KV, err error) {
	if err := l.Store.WaitRevision(ctx, revision); err != nil {
		return nil, err
	}
	past, err := l.Store.AtPrefix(prefix, revision)
	if err != nil {
		return nil, l.window(revision, err)
	}
	for kv := range past.Range(prefix, after+"\x00") {
		kvs = append(kvs, kv)
	}
	return kvs, nil
}

// Follow implements [Replica]. A replica that is behind the revision comes to it
// first. It ends when the replica is out of touch, as the API server's watches do.
func (l Local) Follow(ctx context.Context, prefix string, after int64, saw func(state.Event)) error {
	lost, err := l.Log.InTouch()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx
		select {
		case <-lost:
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := l.Store.WaitRevision(ctx, after); err != nil {
		return err
	}
	w, err := l.Store.Watch(prefix, after)
	if err != nil {
		return l.window(after, err)
	}
	defer w.Close()
	for {
		events, err := w.Next(ctx)
		if ctx.Err() != nil || err != nil {
			return l.window(after, err)
		}
		for _, e := range events {
			saw(*e)
			after = e.KV.ModRevision
		}
	}
}

func (l Local) window(asked int64, err error) error {
	if errors.Is(err, state.ErrCompacted) {
		return &TooOld{Asked: asked, Oldest: l.Store.CompactRevision()}
	}
	return err
}

// Revision implements [Replica].
func (l Local) Revision(context.Context) (int64, error) { return l.Store.View().Revision(), nil }
