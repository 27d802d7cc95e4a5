// Package fair shares a number of something, bytes or places, among sources that nobody
// trusts to ask for little: whoever has the least is next, and who has some already gets
// no more than half.
//
//	r := fair.New(64<<20, 128)
//	give, err := r.Take(ctx, "namespace", n) // waits for its turn
//	defer give()
package fair

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// ErrNoRoom says that too many wait for room already.
var ErrNoRoom = errors.New("no room")

// Room is a number of something that sources share. Its methods are safe for concurrent use.
type Room struct {
	limit       int64
	mostWaiters int // 0: any number

	mu      sync.Mutex
	held    int64
	sources map[string]*share
	waiters []*waiter // in the order in which they came
	refused uint64
}

// share is what one source has of a room.
type share struct {
	held    int64
	uses    int // takes that are not given back, and waiters
	waiting int
}

type waiter struct {
	of   *share
	n    int64
	turn chan struct{} // closed when it has what it waits for
}

// New returns a Room of limit, for which mostWaiters wait at most, of one source a quarter of
// them; 0 for any number.
func New(limit int64, mostWaiters int) *Room {
	return &Room{limit: limit, mostWaiters: mostWaiters, sources: map[string]*share{}}
}

// Limit is all that there is.
func (r *Room) Limit() int64 { return r.limit }

// Take waits until ctx ends for n; more than there is counts as all. It fails with
// ErrNoRoom when too many wait, and with ctx's error. give gives back what was taken; it
// is called once.
func (r *Room) Take(ctx context.Context, who string, n int64) (give func(), err error) {
	n = min(n, r.limit)
	r.mu.Lock()
	of, give, ok := r.enter(who, n)
	if ok {
		r.mu.Unlock()
		return give, nil
	}
	w := &waiter{of: of, n: n, turn: make(chan struct{})}
	if most := r.mostWaiters; most > 0 && (len(r.waiters) >= most || of.waiting >= most/4) {
		r.refused++
		r.drop(who, of)
		r.mu.Unlock()
		return nil, ErrNoRoom
	}
	of.waiting++
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
		of.waiting--
		r.refused++
		r.drop(who, of)
		r.next() // it may have been in the way of others
		return nil, ctx.Err()
	}
	return give, nil // its turn came meanwhile
}

// TryTake is Take if that needs not wait.
func (r *Room) TryTake(who string, n int64) (give func(), ok bool) {
	n = min(n, r.limit)
	r.mu.Lock()
	defer r.mu.Unlock()
	of, give, ok := r.enter(who, n)
	if !ok {
		r.drop(who, of)
		return nil, false
	}
	return give, true
}

// enter notes a use of a source, and grants it if it needs not wait. r.mu is held.
func (r *Room) enter(who string, n int64) (of *share, give func(), granted bool) {
	of = r.sources[who]
	if of == nil {
		of = &share{}
		r.sources[who] = of
	}
	of.uses++
	give = func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.held -= n
		of.held -= n
		r.drop(who, of)
		r.next()
	}
	if granted = r.fits(of, n) && len(r.waiters) == 0; granted {
		r.grant(of, n)
	}
	return of, give, granted
}

// fits says whether a source may have n more: not more than half, but for one that has
// nothing yet, which may have all.
func (r *Room) fits(of *share, n int64) bool {
	return r.held+n <= r.limit && r.mayHave(of, n)
}

func (r *Room) mayHave(of *share, n int64) bool {
	return of.held == 0 || of.held+n <= r.limit/2
}

func (r *Room) grant(of *share, n int64) {
	r.held += n
	of.held += n
}

// next lets those go on whose turn it is: those of the source that has least, of these the
// first. One for whom there is not enough yet keeps others from taking what gets free.
func (r *Room) next() {
	for {
		var first *waiter
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
		r.waiters = slices.DeleteFunc(r.waiters, func(w *waiter) bool { return w == first })
		close(first.turn)
	}
}

// drop forgets a source that has nothing and waits for nothing.
func (r *Room) drop(who string, of *share) {
	if of.uses--; of.uses == 0 {
		delete(r.sources, who)
	}
}

// Stats are what a Room has to say of itself.
type Stats struct {
	Held    int64
	Sources int    // that hold something or wait
	Waiting int    // takes
	Refused uint64 // takes that found no room, or gave up
}

// Stats says how things are.
func (r *Room) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Stats{Held: r.held, Sources: len(r.sources), Waiting: len(r.waiters), Refused: r.refused}
}
