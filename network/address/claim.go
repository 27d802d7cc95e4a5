package address

import (
	"net/netip"
	"time"
)

const (
	// How often, and with which pause, it is asked whether somebody has an address before
	// it is taken.
	probeCount = 3
	probeEvery = 100 * time.Millisecond
	// How often it is said that an address is here now; the pause doubles each time. Some
	// machines listen no more than once a second.
	announceCount = 6
	announceEvery = 100 * time.Millisecond
	// How often it is said again later, for whoever missed all of it.
	announceAgain = 15 * time.Second
	// How often it is asked, while no controller is to be reached, whether somebody has by
	// right what this node has.
	doubtEvery = time.Second
	// How long until an address that somebody else has is tried again.
	againForeign = 5 * time.Second
	againOutdone = 2 * time.Second
	// How often an address is defended at most.
	defendEvery = 100 * time.Millisecond
)

// state is how far this node is with an address.
type state int

const (
	probing state = iota // it asks whether somebody has it
	holding              // it answers
	outdone              // another node has it by a higher number
	foreign              // another machine has it
)

// claim is one address that this node is to announce. It knows no sockets and no clock.
type claim struct {
	ip       netip.Addr
	number   uint64
	state    state
	sent     int // in this state
	due      time.Time
	doubted  time.Time
	defended time.Time
	// conflict is who else has the address; zero: nobody.
	conflict mac
}

// out is a message to send, and for whom.
type out struct {
	message
	to mac
}

func (c *claim) say(v verb) out { return out{message: message{verb: v, ip: c.ip, number: c.number}} }

// begin asks anew before it answers.
func (c *claim) begin(now time.Time) {
	c.state, c.sent, c.due = probing, 0, now
}

// renumber says that the state names this node again.
func (c *claim) renumber(number uint64, now time.Time) {
	if number == c.number {
		return
	}
	c.number = number
	if c.state != holding {
		c.begin(now)
	}
}

// tick does what is due. alone says that no controller is to be reached.
func (c *claim) tick(now time.Time, alone bool) (list []out) {
	if c.state == holding && alone && now.Sub(c.doubted) >= doubtEvery {
		c.doubted = now
		list = append(list, c.say(probes))
	}
	if now.Before(c.due) {
		return list
	}
	switch c.state {
	case outdone, foreign:
		c.begin(now)
		fallthrough
	case probing:
		if c.sent < probeCount {
			c.sent++
			c.due = now.Add(probeEvery)
			return append(list, c.say(probes))
		}
		c.state, c.sent, c.conflict = holding, 0, mac{}
		fallthrough
	case holding:
		c.due = now.Add(announceAgain)
		if c.sent < announceCount {
			c.due = now.Add(announceEvery << c.sent)
			c.sent++
		}
		return append(list, c.say(claims))
	}
	return list
}

// hear takes what another machine says of the address.
func (c *claim) hear(m message, now time.Time) []out {
	switch {
	case m.verb != asks && m.number > c.number:
		c.state, c.due, c.conflict = outdone, now.Add(againOutdone), m.from
	case m.verb == claims && (m.number == 0 || m.number == c.number):
		c.conflict = m.from
		if c.state == holding {
			return c.defend(now, doubtEvery)
		}
		c.state, c.due = foreign, now.Add(againForeign)
	case m.verb == claims:
		// Of an earlier holder, that has not heard of it.
		if c.state == holding {
			return c.defend(now, defendEvery)
		}
		c.begin(now.Add(probeEvery))
	case m.verb == probes && m.number > 0 && c.state == holding:
		return c.defend(now, defendEvery) // who was told a lie by it learns better, too
	case c.state == holding:
		answer := c.say(claims)
		answer.asker, answer.to = m.asker, m.from // of a probe by NDP nobody: all are told
		if m.verb == probes && c.ip.Is4() {
			answer.asker = netip.IPv4Unspecified()
		}
		return []out{answer}
	}
	return nil
}

// defend tells everybody who has the address.
func (c *claim) defend(now time.Time, every time.Duration) []out {
	if now.Sub(c.defended) < every {
		return nil
	}
	c.defended = now
	return []out{c.say(claims)}
}
