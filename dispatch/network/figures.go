package network

import (
	"sync"
	"sync/atomic"
	"time"
)

// Figures are what a feed has done and holds.
type Figures struct {
	// Streams is how many agents are told of changes here.
	Streams int
	// Items and Bytes are what every node is told of, Withheld what is left out, or of
	// policies told without what they allow, because it is too much.
	Items, Withheld int
	Bytes           int64
	// Policies and PolicyBytes are the network policies and the parts of the groups of pods
	// that they name, of which each node is told what concerns its own pods.
	Policies    int
	PolicyBytes int64
	// Batches and SentItems were sent to all agents, and Lists of those were compared
	// and told anew.
	Batches, SentItems, Lists uint64
	// Taken are the changes of which agents said that they have them; Lag is the sum of
	// the times from their publication, and LongestLag the longest of the last minute
	// or two.
	Taken      uint64
	Lag        time.Duration
	LongestLag time.Duration
}

type figures struct {
	batches, items, lists, withheld atomic.Uint64
	lag                             lag
}

// lag is how long changes take.
type lag struct {
	mu      sync.Mutex
	count   uint64
	sum     time.Duration
	longest [2]time.Duration // of the minute that began at since, and of the one before
	since   time.Time
}

func (l *lag) observe(d time.Duration, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turn(now)
	l.count++
	l.sum += d
	l.longest[0] = max(l.longest[0], d)
}

// turn begins a new minute when the last is over.
func (l *lag) turn(now time.Time) {
	if age := now.Sub(l.since); age >= time.Minute {
		l.longest[1], l.longest[0], l.since = l.longest[0], 0, now
		if age >= 2*time.Minute {
			l.longest[1] = 0
		}
	}
}

// Figures are those of now.
func (f *Feed) Figures() Figures {
	out := Figures{
		Withheld: int(f.figures.withheld.Load()), Batches: f.figures.batches.Load(), SentItems: f.figures.items.Load(), Lists: f.figures.lists.Load(),
	}
	out.Bytes, out.Items = f.log.Held()
	var closed int
	out.PolicyBytes, out.Policies, closed = f.policies.Held()
	out.Withheld += closed
	f.mu.Lock()
	out.Streams = len(f.streams)
	f.mu.Unlock()
	l := &f.figures.lag
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turn(time.Now())
	out.Taken, out.Lag, out.LongestLag = l.count, l.sum, max(l.longest[0], l.longest[1])
	return out
}
