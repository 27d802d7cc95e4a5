package consensus

import (
	"container/list"
	"context"
	"sync"
	"sync/atomic"
)

const (
	// smallCommand is up to where a command is small: it never waits behind large ones.
	smallCommand = 16 << 10
	// besideProposal is about what a command on its way takes beside itself.
	besideProposal = 2 << 10
	// sharers is how many replicas share Config.ProposalBytes on a leader.
	sharers = 5
)

// room bounds what the callers of this replica have on its way to the log, in bytes. Half
// of it is for small commands and half for large ones: so neither waits for the other,
// however many there are, and in each half who came first is first. One always fits where
// nothing else is.
type room struct {
	mu           sync.Mutex
	small, large lane
}

// lane is one half of a room.
type lane struct {
	limit, held int64
	waiting     list.List // of *stay
}

// stay is a place in a room. It is given back when nobody has the command any more: not
// its caller, not who sends it, not Raft.
type stay struct {
	room    *room
	lane    *lane
	bytes   int64
	granted chan struct{} // nil if it had not to wait
	holders atomic.Int32
}

func newRoom(bytes int64) *room {
	r := new(room)
	r.small.limit, r.large.limit = bytes/2, bytes/2
	return r
}

// enter waits for a place for a command of that many bytes, no longer than ctx and done.
// The caller must leave it.
func (r *room) enter(ctx context.Context, done <-chan struct{}, command int) (*stay, error) {
	s := &stay{room: r, lane: &r.small, bytes: int64(command) + besideProposal}
	if command > smallCommand {
		s.lane = &r.large
	}
	s.holders.Store(1)
	r.mu.Lock()
	if s.lane.waiting.Len() == 0 && s.lane.fits(s.bytes) {
		s.lane.held += s.bytes
		r.mu.Unlock()
		return s, nil
	}
	s.granted = make(chan struct{})
	place := s.lane.waiting.PushBack(s)
	r.mu.Unlock()
	var err error
	select {
	case <-s.granted:
		return s, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-done:
		err = ErrClosed
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-s.granted: // in the meantime
		s.lane.give(s.bytes)
	default:
		s.lane.waiting.Remove(place)
		s.lane.give(0) // those behind it may fit
	}
	return nil, err
}

func (l *lane) fits(bytes int64) bool { return l.held == 0 || l.held+bytes <= l.limit }

// give gives bytes back, to who waits. The room's lock is held.
func (l *lane) give(bytes int64) {
	l.held -= bytes
	for e := l.waiting.Front(); e != nil; e = l.waiting.Front() {
		s := e.Value.(*stay)
		if !l.fits(s.bytes) {
			return
		}
		l.waiting.Remove(e)
		l.held += s.bytes
		close(s.granted)
	}
}

// keep makes one more have the command. Who keeps it leaves it.
func (s *stay) keep() { s.holders.Add(1) }

// leave says that one has the command no more.
func (s *stay) leave() {
	if s.holders.Add(-1) > 0 {
		return
	}
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.lane.give(s.bytes)
}

// held is how many bytes are on their way.
func (r *room) held() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.small.held + r.large.held
}

// intake bounds what one stream has brought and Raft has not answered: no more is read
// from it until there is less. A replica that has a room of the same size never gets there.
type intake struct {
	limit int64
	all   *atomic.Int64 // of all streams

	held  atomic.Int64
	freed chan struct{}
}

func newIntake(limit int64, all *atomic.Int64) *intake {
	return &intake{limit: limit, all: all, freed: make(chan struct{}, 1)}
}

// await waits until more may be read; false when the stream or the replica ends before.
func (i *intake) await(ended, done <-chan struct{}) bool {
	for i.held.Load() > i.limit {
		select {
		case <-i.freed:
		case <-ended:
			return false
		case <-done:
			return false
		}
	}
	return true
}

func (i *intake) take(n int64) {
	i.held.Add(n)
	i.all.Add(n)
}

func (i *intake) give(n int64) {
	i.all.Add(-n)
	i.held.Add(-n)
	poke(i.freed)
}
