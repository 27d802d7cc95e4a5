package storage

import (
	"context"
	"errors"

	"timonel/internal/weigh"
	"timonel/state"
)

// Reserver gives memory to reads: for the objects that they decode, and the answers that
// are made of them.
type Reserver interface {
	// Cost is how much memory an object takes until it is answered. value is its encoding,
	// and decoded what it takes as an object.
	Cost(value []byte, decoded int64) int64
	// Reserve reserves n bytes, for as long as the request lasts or until release is
	// called. If there is no room for them it fails with ErrFull, or with wait waits for
	// some; the error is then one to answer.
	Reserve(ctx context.Context, n int64, wait bool) (release func(), err error)
}

// ErrFull says that there is no room without waiting.
var ErrFull = errors.New("no room without waiting")

type reserverKey struct{}

// WithReserver returns a context whose reads reserve memory with r.
func WithReserver(ctx context.Context, r Reserver) context.Context {
	return context.WithValue(ctx, reserverKey{}, r)
}

// reserverOf is nil for reads that need reserve nothing.
func reserverOf(ctx context.Context) Reserver {
	r, _ := ctx.Value(reserverKey{}).(Reserver)
	return r
}

const (
	// uncounted is how large a stored object may be that is read alone without being
	// counted: as many as there are requests at once take little.
	uncounted = 4 << 10
	// leastReserved is what a list that selects reserves at least, so that it has not to
	// ask for each object.
	leastReserved = 256 << 10
)

// reserveOne reserves memory for an object that is read alone.
func (s *Store) reserveOne(ctx context.Context, kv *state.KV) error {
	if len(kv.Value) <= uncounted {
		return nil
	}
	r := reserverOf(ctx)
	if r == nil {
		return nil
	}
	_, err := r.Reserve(ctx, s.cost(r, kv), true)
	return err
}

// cost is what an object takes until it is answered.
func (s *Store) cost(r Reserver, kv *state.KV) int64 {
	return r.Cost(kv.Value, s.weight(kv))
}

// weight is what a stored object takes when it is decoded. It is remembered with objects
// that are kept.
func (s *Store) weight(kv *state.KV) int64 {
	var kept *decoded
	if memo := kv.Memo(); memo != nil {
		if kept = inMemo(memo); kept != nil && kept.store == s {
			if w := kept.weight.Load(); w != 0 {
				return w
			}
		} else {
			kept = nil
		}
	}
	var w int64
	if s.transformer() == nil {
		w = weigh.Decoded(kv.Value)
	} else {
		w = weigh.Hidden(kv.Value)
	}
	if kept != nil {
		kept.weight.Store(w)
	}
	return w
}

// reserve reserves memory for what is selected from the objects under the prefix from
// start on. A list of everything reserves all that it will take before it begins; one that
// selects reserves as it finds, twice as much each time.
func (l *lister) reserve(view state.View, prefix, start string) error {
	if l.reserver = reserverOf(l.ctx); l.reserver == nil || !l.selection.everything {
		return nil
	}
	limit := l.selection.Limit
	if limit <= 0 {
		limit = int64(l.total)
	}
	cost, n := int64(0), int64(0)
	for kv := range view.Range(prefix, start) {
		if n == limit {
			break
		}
		n++
		cost += l.s.cost(l.reserver, &kv)
		if n%1024 == 0 && l.ctx.Err() != nil {
			return l.ctx.Err()
		}
	}
	_, err := l.reserver.Reserve(l.ctx, cost, true)
	l.reserver = nil
	return err
}

// found reserves memory for one more object that was selected. It fails with ErrFull if
// there is none now.
func (l *lister) found(kv *state.KV) error {
	if l.reserver == nil {
		return nil
	}
	if l.due += l.s.cost(l.reserver, kv); l.due <= l.reserved {
		return nil
	}
	more := max(l.due-l.reserved, l.reserved, leastReserved)
	release, err := l.reserver.Reserve(l.ctx, more, false)
	if err != nil {
		return err
	}
	l.reserved += more
	l.releases = append(l.releases, release)
	return nil
}

// again lets go of what was found and reserved, and returns when twice as much is reserved.
// Who waits has nothing that others wait for.
func (l *lister) again() error {
	l.items.SetZero()
	l.looked, l.bytes, l.errs = 0, 0, listErrors{}
	for _, release := range l.releases {
		release()
	}
	more := 2 * l.due
	l.due, l.reserved, l.releases = 0, 0, nil
	release, err := l.reserver.Reserve(l.ctx, more, true)
	if err != nil {
		return err
	}
	l.reserved, l.releases = more, append(l.releases, release)
	return nil
}
