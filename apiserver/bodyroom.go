package apiserver

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// errNoRoom says that too many wait for room already.
var errNoRoom = errors.New("no room")

// mostWaiters is how many wait for room at most, of one source a quarter of it. What waits
// has up to unreadBody in HTTP/2's buffers.
const mostWaiters = 128

// bodyRoom is a number of bytes that requests share. Whoever has the least of it is next.
type bodyRoom struct {
	limit int64

	mu      sync.Mutex
	held    int64
	sources map[string]*bodyShare
	waiters []*bodyWaiter // in the order in which they came
	refused uint64
}

// bodyShare is what one source has of a room.
type bodyShare struct {
	held    int64
	uses    int // takes that are not given back, and waiters
	waiting int
}

type bodyWaiter struct {
	of   *bodyShare
	n    int64
	turn chan struct{} // closed when it has what it waits for
}

func newBodyRoom(limit int64) *bodyRoom {
	return &bodyRoom{limit: limit, sources: map[string]*bodyShare{}}
}

// take waits until ctx ends for n bytes; more than there are count as all. What give gives
// back was taken.
func (r *bodyRoom) take(ctx context.Context, who string, n int64) (give func(), err error) {
	n = min(n, r.limit)
	r.mu.Lock()
	share := r.sources[who]
	if share == nil {
		share = &bodyShare{}
		r.sources[who] = share
	}
	share.uses++
	give = func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.held -= n
		share.held -= n
		r.drop(who, share)
		r.next()
	}
	if r.fits(share, n) && len(r.waiters) == 0 {
		r.grant(share, n)
		r.mu.Unlock()
		return give, nil
	}
	w := &bodyWaiter{of: share, n: n, turn: make(chan struct{})}
	if len(r.waiters) >= mostWaiters || share.waiting >= mostWaiters/4 {
		r.refused++
		r.drop(who, share)
		r.mu.Unlock()
		return nil, errNoRoom
	}
	share.waiting++
	r.waiters = append(r.waiters, w)
	r.next()
	r.mu.Unlock()
	select {
	case <-w.turn:
		return give, nil
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.waiters, w); i >= 0 {
		r.waiters = slices.Delete(r.waiters, i, i+1)
		share.waiting--
		r.refused++
		r.drop(who, share)
		r.next() // it may have been in the way of others
		return nil, ctx.Err()
	}
	return give, nil // its turn came meanwhile
}

// fits says whether a source may have n more: not more than half, but for one that has
// nothing yet, which may have all.
func (r *bodyRoom) fits(share *bodyShare, n int64) bool {
	return r.held+n <= r.limit && r.mayHave(share, n)
}

func (r *bodyRoom) mayHave(share *bodyShare, n int64) bool {
	return share.held == 0 || share.held+n <= r.limit/2
}

func (r *bodyRoom) grant(share *bodyShare, n int64) {
	r.held += n
	share.held += n
}

// next lets those go on whose turn it is: those of the source that has least, of these the
// first. One for whom there is not enough yet keeps others from taking what gets free.
func (r *bodyRoom) next() {
	for {
		var first *bodyWaiter
		for _, w := range r.waiters {
			if r.mayHave(w.of, w.n) && (first == nil || w.of.held < first.of.held) {
				first = w
			}
		}
		if first == nil || r.held+first.n > r.limit {
			return
		}
		r.grant(first.of, first.n)
		first.of.waiting--
		r.waiters = slices.DeleteFunc(r.waiters, func(w *bodyWaiter) bool { return w == first })
		close(first.turn)
	}
}

// drop forgets a source that has nothing and waits for nothing.
func (r *bodyRoom) drop(who string, share *bodyShare) {
	if share.uses--; share.uses == 0 {
		delete(r.sources, who)
	}
}

// count is how much is held, and how many found no room.
func (r *bodyRoom) count() (held int64, refused uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held, r.refused
}
