package gossip

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// callsPerRound bounds how many lost members are called in one round.
const callsPerRound = 3

// rejoin calls seeds and lost members for as long as there are any. memberlist
// forgets a dead member after a while; without this the halves of a partition
// would stay apart.
func (p *Pool) rejoin(ctx context.Context) {
	ticker := time.NewTicker(p.config.Timings.RejoinInterval)
	defer ticker.Stop()
	for {
		var calls sync.WaitGroup
		for _, addr := range p.callable() {
			calls.Go(func() { p.call(addr) })
		}
		calls.Wait()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			p.forget()
		}
	}
}

// call joins the pool that the member at addr is in.
func (p *Pool) call(addr string) {
	_, err := p.list.Join([]string{addr})
	switch {
	case err == nil:
		p.clear("join " + addr)
		p.log.Info("reached a member of the gossip pool", "addr", addr)
	case keyDiffers(err.Error()):
		p.report("join "+addr, "the member at "+addr+" cannot read this member's gossip, nor the reverse: its gossip key differs"+
			" (another cluster, or a gossip.key that was not copied from this one)", err)
	default: // a foreign cluster was reported by the merge delegate
		p.log.Debug("a member does not answer yet", "addr", addr, "err", err)
	}
}

// callable lists the addresses of seeds that are not alive members, and of dead
// members, a few of them.
func (p *Pool) callable() []string {
	var seeds []string
	if p.config.Seeds != nil {
		seeds = p.config.Seeds()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	alive := map[string]bool{p.addr: true}
	lost := make(map[string]bool)
	for _, m := range p.members {
		switch {
		case m.gone == Alive && (m.State == Alive || m.State == Suspect):
			alive[m.Addr] = true
		case m.State != Left: // a live one of which it is said that it is gone hears it so, and denies it
			lost[m.Addr] = true
		}
	}
	for _, seed := range p.config.Join {
		lost[seed] = true
	}
	for _, seed := range seeds {
		lost[seed] = true
	}
	var out []string
	for addr := range lost {
		if !alive[addr] {
			out = append(out, addr)
		}
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out[:min(len(out), callsPerRound)]
}

// forget drops members that have been gone for long, and whom the pool is not to
// have any more; these are published as Unknown.
func (p *Pool) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, m := range p.members {
		switch {
		case (m.State == Dead || m.State == Left) && time.Since(m.Since) > p.config.Timings.KeepDead:
			delete(p.members, name)
		case p.admit(name, m.Role, m.Addr) != nil:
			p.drop(name)
		}
	}
}

// drop forgets whom the pool is not to have. The caller holds p.mu.
func (p *Pool) drop(name string) {
	m := p.members[name]
	if m == nil {
		return
	}
	delete(p.members, name)
	gone := m.Member
	gone.State, gone.Since = Unknown, time.Now()
	p.publish(gone)
}

// watched are those to ping: who lives, and who is said to live again and has not
// answered yet.
func (p *Pool) watched() (out []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, m := range p.members {
		if name != p.config.Name && (m.State == Alive || m.State == Suspect || m.gone == Alive) {
			out = append(out, name)
		}
	}
	return out
}

// watchBatch bounds how many members are pinged at once.
const watchBatch = 16

// watch pings the others in turn, all of them each ProbeInterval in a small
// cluster, and finds suspect who does not answer twice.
func (p *Pool) watch(ctx context.Context) {
	ticker := time.NewTicker(p.config.Timings.ProbeInterval)
	defer ticker.Stop()
	var round []string
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if len(round) == 0 {
			round = p.watched()
		}
		var pings sync.WaitGroup
		n := min(len(round), watchBatch)
		for _, name := range round[:n] {
			pings.Go(func() {
				answered := p.ask(ctx, name)
				if ctx.Err() == nil {
					p.setSuspect(name, !answered)
				}
			})
		}
		pings.Wait()
		round = round[n:]
	}
}
