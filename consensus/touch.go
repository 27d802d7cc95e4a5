package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// In touch: what this replica has is what the cluster has, but for a moment. A
// replica is in touch while both hold:
//
//   - contact: within Config.TouchTimeout it heard of a leader that it follows, or
//     leads itself and a majority of the voters answered heartbeats that it sent then;
//   - proof: a read barrier that began not long ago went through, so that all that was
//     committed by then is applied here. Contact alone would hold on a replica that
//     hears heartbeats and gets no entries, cannot write these, or applies none.
//
// Once it is out of touch, it takes a new proof to be in touch again: contact comes
// back sooner than what was missed. An election costs neither.
//
// Time says here when to stop serving, never what is true: a linearizable read needs
// ReadBarrier.
type touch struct {
	start   time.Time
	looked  atomic.Int64            // when watchTouch last looked, in nanoseconds since start
	contact atomic.Int64            // when the leader, or this one's majority, was last heard of
	proven  atomic.Int64            // when the last barrier that went through began; 0: none did
	now     atomic.Pointer[inTouch] // nil while out of touch
	proof   chan struct{}           // proven was set

	mu     sync.Mutex
	term   uint64
	voters map[raft.ServerID]int64 // when the heartbeat was sent that a voter last answered in the term
	why    error                   // why now is nil
}

// inTouch is one time of being in touch.
type inTouch struct{ lost chan struct{} } // closed at its end

func (t *touch) init() {
	t.start, t.proof, t.why = time.Now(), make(chan struct{}, 1), errors.New("it is starting")
}

// clock is the time since the start. It is never 0.
func (t *touch) clock() int64 { return int64(time.Since(t.start)) + 1 }

// ErrOutOfTouch is wrapped by the errors of InTouch.
var ErrOutOfTouch = errors.New("out of touch with the cluster")

// InTouch says whether this replica knows what the cluster knows: see touch. While it
// does, lost is closed as soon as it does not any more; whoever serves from the local
// state for longer than a moment has to stop then. The error, which wraps
// ErrOutOfTouch, says why it does not. It costs a few loads.
func (r *Replica) InTouch() (lost <-chan struct{}, err error) {
	t := &r.touch
	now, clock := t.now.Load(), t.clock()
	if now == nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		return nil, fmt.Errorf("controller %s is %w: %w", r.cfg.ID, ErrOutOfTouch, t.why)
	}
	// watchTouch may not run, as after a pause of the whole process.
	if err := r.heardOf(clock); err != nil {
		return nil, fmt.Errorf("controller %s is %w: %w", r.cfg.ID, ErrOutOfTouch, err)
	}
	return now.lost, nil
}

// heardOf is the part of touchErr that time alone may change.
func (r *Replica) heardOf(clock int64) error {
	t, limit := &r.touch, r.cfg.TouchTimeout
	if asleep := time.Duration(clock - t.looked.Load()); asleep > limit {
		return fmt.Errorf("it did not run for %v", asleep.Round(time.Millisecond))
	}
	if silence := time.Duration(clock - t.contact.Load()); silence > limit {
		return fmt.Errorf("no leader with a majority for %v: a majority of the controllers must be up and reach each other and this one", silence.Round(100*time.Millisecond))
	}
	return nil
}

// touchErr says why this replica is out of touch, or nil. since is when it was last
// known to be: a proof from before does not count.
func (r *Replica) touchErr(clock, since int64) error {
	t := &r.touch
	select {
	case <-r.failedCh:
		return fmt.Errorf("it stopped: %w", r.Err())
	case <-r.stop:
		return ErrClosed
	default:
	}
	if err := r.MemberErr(); err != nil {
		return err
	}
	if r.node.Load() == nil {
		return errors.New("it has no data yet: it waits to found or to join the cluster")
	}
	if err := r.heardOf(clock); err != nil {
		return err
	}
	proven, disk := t.proven.Load(), r.DiskErr()
	if proven <= since {
		if disk != nil {
			return disk // it would catch up for ever
		}
		return errors.New("it catches up with the others")
	}
	limit := max(r.cfg.ProposeTimeout, r.cfg.TouchTimeout)
	if disk != nil {
		limit = r.cfg.TouchTimeout
	}
	if age := time.Duration(clock - proven); age > limit {
		if disk != nil {
			return disk
		}
		return fmt.Errorf("it is %v behind the others", age.Round(100*time.Millisecond))
	}
	return nil
}

// watchTouch keeps touch.now up to date.
func (r *Replica) watchTouch() {
	t := &r.touch
	tick := time.NewTicker(max(5*time.Millisecond, min(100*time.Millisecond, r.cfg.TouchTimeout/20)))
	defer tick.Stop()
	since := int64(0) // a proof has to be later
	for {
		changed := r.changed.wait()
		r.hearSelf()
		clock := t.clock()
		err := r.touchErr(clock, since)
		t.looked.Store(clock)
		switch now := t.now.Load(); {
		case err != nil && now != nil:
			since = clock
			t.lose(err)
			r.log.Warn("out of touch with the cluster: this replica serves nothing from its state", "why", err)
		case err != nil:
			t.setWhy(err)
		case now == nil:
			t.now.Store(&inTouch{lost: make(chan struct{})})
			r.log.Info("in touch with the cluster")
		}
		select {
		case <-tick.C:
		case <-changed:
		case <-t.proof:
		case <-r.failedCh:
			t.lose(r.touchErr(t.clock(), since))
			return
		case <-r.stop:
			t.lose(ErrClosed)
			return
		}
	}
}

func (t *touch) setWhy(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.why = err
}

// lose ends the time of being in touch, if it is one.
func (t *touch) lose(why error) {
	t.setWhy(why)
	if now := t.now.Swap(nil); now != nil {
		close(now.lost)
	}
}

// prove takes a read barrier each third of TouchTimeout, and one after the other while
// this replica is out of touch and hears of a leader.
func (r *Replica) prove() {
	t := &r.touch
	for {
		wait := r.cfg.TouchTimeout / 3
		if r.node.Load() != nil && !r.removed.Load() {
			began := t.clock()
			ctx, cancel := context.WithTimeout(r.ctx, max(r.cfg.ProposeTimeout, r.cfg.TouchTimeout))
			err := r.ReadBarrier(ctx)
			cancel()
			if err == nil {
				t.proven.Store(began)
				poke(t.proof)
			}
		}
		if t.now.Load() == nil {
			wait = min(wait, 50*time.Millisecond)
		}
		if !r.sleep(wait) {
			return
		}
	}
}

// hear notes that the leader of this replica was heard of.
func (r *Replica) hear() { r.touch.contact.Store(r.touch.clock()) }

// confirmed notes that a member answered a heartbeat of this replica's that was sent
// at some time (touch.clock) in a term it leads: when a majority of the voters has,
// that is contact.
func (r *Replica) confirmed(id raft.ServerID, term uint64, sent int64) {
	t := &r.touch
	t.mu.Lock()
	defer t.mu.Unlock()
	if term < t.term {
		return
	}
	if term > t.term || t.voters == nil {
		t.term, t.voters = term, map[raft.ServerID]int64{}
	}
	t.voters[id] = max(t.voters[id], sent)
	t.voters[raft.ServerID(r.cfg.ID)] = sent
	if at := majorityHeard(r.configuration(), t.voters); at > t.contact.Load() {
		t.contact.Store(at)
	}
}

// majorityHeard is the latest time since which more than half of the voters were heard
// of; 0 for those that were not.
func majorityHeard(members []raft.Server, at map[raft.ServerID]int64) int64 {
	var heard []int64
	for _, s := range members {
		if s.Suffrage == raft.Voter {
			heard = append(heard, at[s.ID])
		}
	}
	if len(heard) == 0 {
		return 0
	}
	slices.Sort(heard)
	return heard[(len(heard)-1)/2]
}

// hearSelf is contact for a leader that is the only voter.
func (r *Replica) hearSelf() {
	node := r.node.Load()
	if node == nil || node.State() != raft.Leader {
		return
	}
	voters := 0
	for _, s := range r.configuration() {
		if s.Suffrage == raft.Voter {
			voters++
			if string(s.ID) != r.cfg.ID {
				return
			}
		}
	}
	if voters == 1 {
		r.hear()
	}
}
