package gossip

import (
	"context"
	"maps"
	"time"

	"github.com/hashicorp/memberlist"
)

// entry is what is known of a member.
//
// A pool that watches (controllers' do) publishes of a member's life only what it saw
// itself: whoever has a key can say that another is dead, that it has left, or that it
// lives again. So what memberlist says is a reason to ask, and the answer counts.
type entry struct {
	Member
	// gone is what memberlist says of one that is gone: Dead or Left; else Alive.
	gone      State
	verifying bool // somebody asks it
}

const (
	// verifiedAtOnce bounds how many members are asked at once whether what is said of
	// them is so.
	verifiedAtOnce = 128
	// verifiedAgain is how often a member that is said to be gone and answers is asked
	// again, soon; later it is one of those that are watched.
	verifiedAgain = 5
)

// put takes what memberlist said of a member, and tells the subscribers.
func (p *Pool) put(n *memberlist.Node, state State) {
	m, err := decodeMeta(n.Meta)
	if err != nil {
		return // refused in NotifyAlive already
	}
	if state == Dead && m.Left {
		state = Left
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	self := n.Name == p.config.Name
	if self {
		p.addr = address(n)
	}
	old := p.members[n.Name]
	if !self && p.admit(n.Name, m.Role, address(n)) != nil {
		// It was let in when less was known, or is not of the pool any more. memberlist
		// still has it, and tells of its end.
		p.drop(n.Name)
		return
	}
	e := &entry{Member: Member{Name: n.Name, Addr: address(n), Role: m.Role, Tags: m.Tags, State: state, Since: time.Now()}, gone: state}
	if old == nil {
		if *p.config.Watch && !self && state == Alive {
			e.State = Suspect // until it has answered
			p.startVerify(e)
		}
		p.members[n.Name] = e
		p.publish(e.Member)
		return
	}
	e.verifying = old.verifying
	if *p.config.Watch && !self && old.State != state {
		if state != Alive && old.State == Suspect {
			// Both agree.
		} else if e.State = old.State; state == Alive || old.State == Alive {
			p.startVerify(e)
		}
	}
	if old.State == e.State {
		e.Since = old.Since
	}
	p.members[n.Name] = e
	if old.State != e.State || old.Addr != e.Addr || old.Role != e.Role || !maps.Equal(old.Tags, e.Tags) {
		p.publish(e.Member)
	}
}

// startVerify has one who is not asked already be asked. The caller holds p.mu.
func (p *Pool) startVerify(e *entry) {
	if e.verifying || p.ctx.Err() != nil {
		return
	}
	e.verifying = true
	p.done.Go(func() { p.verify(e.Name) })
}

// verify asks a member itself whether what is said of it is so.
func (p *Pool) verify(name string) {
	select {
	case <-p.opened:
	case <-p.ctx.Done():
		return
	}
	for try := 0; ; try++ {
		select {
		case p.verifying <- struct{}{}:
		case <-p.ctx.Done():
			return
		}
		answered := p.ask(p.ctx, name)
		<-p.verifying
		if p.ctx.Err() != nil {
			return
		}
		if !p.answered(name, answered, try+1 < verifiedAgain) {
			return
		}
		select {
		case <-time.After(2 * p.config.Timings.ProbeInterval):
		case <-p.ctx.Done():
			return
		}
	}
}

// ask pings a member, twice if need be.
func (p *Pool) ask(ctx context.Context, name string) bool {
	_, err := p.Probe(ctx, name)
	if err != nil && ctx.Err() == nil {
		_, err = p.Probe(ctx, name)
	}
	return err == nil
}

// answered records the outcome of verify, and reports whether to ask again: what
// memberlist says is not so, or not yet.
func (p *Pool) answered(name string, answered, more bool) (again bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.members[name]
	if e == nil {
		return false
	}
	again = more && (answered && e.gone != Alive || !answered && e.gone == Alive)
	if !again {
		next := *e
		next.verifying = false
		p.members[name] = &next
	}
	p.setAnswered(name, answered)
	return again
}

// setSuspect records the outcome of this member's own pings.
func (p *Pool) setSuspect(name string, suspect bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.members[name]; e != nil && (e.State == Alive || e.State == Suspect || e.gone == Alive) {
		p.setAnswered(name, !suspect)
	}
}

// setAnswered records that a member answered this one, or did not. The caller holds
// p.mu.
func (p *Pool) setAnswered(name string, answered bool) {
	old := p.members[name]
	state := Alive
	switch {
	case answered:
	case old.gone != Alive:
		state = old.gone
	case old.State == Dead || old.State == Left:
		return // it is said to live again, and does not
	default:
		state = Suspect
	}
	if old.State == state {
		return
	}
	next := *old
	next.State, next.Since = state, time.Now()
	p.members[name] = &next
	p.publish(next.Member)
}
