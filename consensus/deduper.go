package consensus

import (
	"errors"
	"sync"
	"time"
)

// mostRemembered is how many answered requests a generation of a deduper has at most: of
// some 40 bytes each.
const mostRemembered = 1 << 17

// errForgotten says that a repeated request may be one that is remembered no more.
var errForgotten = errors.New("outcome unknown: an earlier copy may have been forgotten")

// deduper recognises a request that is forwarded again because its first answer
// was lost. A leader that died leads another term when it is back, and entries
// are fenced to theirs, so memory of this process is enough.
//
// It remembers in two generations, for some time and of some number: beyond these, a
// request that says itself that it is a repeated one is refused rather than proposed twice.
type deduper struct {
	keep time.Duration // for at least how long a request is known, if there are not too many
	most int           // in a generation

	mu       sync.Mutex
	term     uint64                  // of all that is remembered
	open     map[requestID]*proposal // that Raft has not answered
	new, old map[requestID]uint64    // where they are in the log; 0: the outcome is unknown
	turned   time.Time
	forgot   bool // something of the term
}

// do proposes a request in a term, or returns what was proposed for it before.
func (d *deduper) do(id requestID, term uint64, again bool, propose func() *proposal) (*proposal, error) {
	d.mu.Lock()
	switch {
	case term < d.term:
		d.mu.Unlock()
		return nil, ErrNotLeader
	case term > d.term || d.open == nil:
		d.term, d.forgot, d.turned = term, false, time.Now()
		d.open, d.new, d.old = map[requestID]*proposal{}, map[requestID]uint64{}, nil
	default:
		d.turn()
	}
	if p := d.known(id); p != nil {
		d.mu.Unlock()
		return p, nil
	}
	if again && d.forgot {
		d.mu.Unlock()
		return nil, errForgotten
	}
	p := propose()
	d.open[id] = p
	d.mu.Unlock()
	p.then(func() { d.answered(id, term, p) })
	return p, nil
}

// known returns what was proposed for a request, nil if nothing is remembered. d.mu is held.
func (d *deduper) known(id requestID) *proposal {
	if p := d.open[id]; p != nil {
		return p
	}
	index, ok := d.new[id]
	if !ok {
		index, ok = d.old[id]
	}
	if !ok {
		return nil
	}
	p := &proposal{settled: true, index: index}
	if index == 0 {
		p.err = errors.New("it was lost with leadership")
	}
	return p
}

// answered keeps of a request only what an answer needs. What was not appended may be
// proposed again.
func (d *deduper) answered(id requestID, term uint64, p *proposal) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.term != term {
		return
	}
	delete(d.open, id)
	switch {
	case p.err == nil:
		d.new[id] = p.index
	case !certainlyNotAppended(p.err):
		d.new[id] = 0
	}
}

// turn forgets the old generation when it is time, or there are too many. d.mu is held.
func (d *deduper) turn() {
	if now := time.Now(); len(d.new) >= d.most || now.Sub(d.turned) > d.keep {
		d.forgot = d.forgot || len(d.old) > 0
		d.old, d.new, d.turned = d.new, map[requestID]uint64{}, now
	}
}

// tidy forgets what is old without being asked for more.
func (d *deduper) tidy() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.new)+len(d.old) > 0 {
		d.turn()
	}
}

// held is about how many bytes are taken.
func (d *deduper) held() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.new)+len(d.old)) * 40
}
