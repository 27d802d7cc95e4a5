package consensus

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// voterRounds has the voters confirm that this replica leads, in the term of one
// leadership. A round is confirmed when a majority of the voters, each of them asked
// after the round began, has answered in that term: none of these had then voted for a
// leader of a later term, so when the round began no such leader had a majority, and
// nothing was committed that this replica does not know of.
//
// The voters are those of the latest configuration, committed or not. A leader of a
// later term was elected by that one or one next to it, and any two majorities of
// neighbours have a member in common (Ongaro, Consensus: Bridging Theory and Practice,
// 4.1).
//
// Raft's own VerifyLeader will not do: it counts any answer that comes after the call,
// also to a heartbeat that was sent before it, and those of non-voters.
//
// Rounds follow one another; questions outlive them. A voter that answers at once is
// asked once in a round. One that does not is asked again, and never has more than
// maxQuestions to answer: no read adds a connection or a goroutine for a voter that is
// gone.
type voterRounds struct {
	ctx  context.Context // ends with the leadership
	self raft.ServerID
	// ask sends a voter a heartbeat of the leadership's term and reports whether it
	// follows in that term.
	ask func(raft.Server) (follows bool, err error)
	// configuration is the latest one.
	configuration func() []raft.Server
	// patience is how long a round waits for a majority.
	patience time.Duration

	mu       sync.Mutex
	begun    uint64 // number of the newest round
	voters   map[raft.ServerID]*voter
	answered chan struct{} // an answer came
}

// voter is what rounds know of a voter. Rounds have numbers; 0 is none.
type voter struct {
	server    raft.Server
	confirmed uint64    // the newest round that it has confirmed
	refused   uint64    // the newest that it has not: it follows another term
	questions int       // without an answer yet
	asked     time.Time // when the last was sent
	failures  int       // since the last answer
}

const (
	maxQuestions = 2
	// askAgain is how long a voter has for an answer before it is asked once more, over
	// another connection; and how often one that cannot be reached is tried, after as
	// many failures at once as Raft's transport keeps connections, which a restart of the
	// voter breaks all.
	askAgain     = 30 * time.Millisecond
	manyFailures = 4
)

func (r *Replica) newVoterRounds(l *leadership) *voterRounds {
	return &voterRounds{
		ctx: l.ctx, self: raft.ServerID(r.cfg.ID), configuration: r.configuration, patience: r.cfg.ElectionTimeout,
		ask: func(s raft.Server) (bool, error) {
			return r.trans.heartbeat(s, r.cfg.ID, r.advertise, l.term)
		},
		voters: map[raft.ServerID]*voter{}, answered: make(chan struct{}, 1),
	}
}

// confirm does a round. One is done at a time. It fails when so many voters follow
// another term that no majority is left, when none has answered in time, and when the
// leadership ends.
func (v *voterRounds) confirm() error {
	v.mu.Lock()
	v.begun++
	v.mu.Unlock()
	servers := v.configuration() // of the time after the round began, or later
	timeout := time.NewTimer(v.patience)
	defer timeout.Stop()
	again := time.NewTicker(askAgain)
	defer again.Stop()
	for {
		voters, votes, refused := v.count(servers)
		switch {
		case votes > voters/2:
			return nil
		case voters-refused <= voters/2:
			return fmt.Errorf("%d of %d voters follow another term", refused, voters)
		}
		select {
		case <-v.answered:
		case <-again.C:
		case <-timeout.C:
			return fmt.Errorf("%d of %d voters confirmed it within %v", votes, voters, v.patience)
		case <-v.ctx.Done():
			return context.Cause(v.ctx)
		}
	}
}

// count counts the answers to the newest round, and asks whoever has none to give yet.
func (v *voterRounds) count(servers []raft.Server) (voters, votes, refused int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if s.ID == v.self {
			votes++ // its own term is looked at when the round is over
			continue
		}
		x := v.voters[s.ID]
		if x == nil {
			x = &voter{}
			v.voters[s.ID] = x
		}
		x.server = s
		switch {
		case x.confirmed >= v.begun:
			votes++
		case x.refused >= v.begun:
			refused++
		case x.questions == 0 && x.failures < manyFailures, x.questions < maxQuestions && time.Since(x.asked) >= askAgain:
			v.question(x)
		}
	}
	return voters, votes, refused
}

// question asks a voter. v.mu is held.
func (v *voterRounds) question(x *voter) {
	// The answer says nothing of rounds that begin after this.
	round, server := v.begun, x.server
	x.questions++
	x.asked = time.Now()
	go func() { // ends with the transport
		follows, err := v.ask(server)
		v.mu.Lock()
		defer v.mu.Unlock()
		x.questions--
		switch {
		case err != nil:
			x.failures++
		case follows:
			x.failures, x.confirmed = 0, max(x.confirmed, round)
		default:
			x.failures, x.refused = 0, max(x.refused, round)
		}
		poke(v.answered)
	}()
}
