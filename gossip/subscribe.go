package gossip

import "context"

// Event says that a member is new or has changed, and how it is now.
type Event struct{ Member Member }

// subscriber holds what it has not been sent yet, one entry per member at most,
// so that a slow one costs no memory and nobody waits for it.
type subscriber struct {
	pending map[string]Member
	order   []string
	wake    chan struct{}
	cancel  context.CancelFunc
}

// Subscribe returns a channel of changes, the present members first. When a
// member changes faster than the channel is read, only its newest state comes.
// The channel is closed when ctx ends or the pool is closed.
func (p *Pool) Subscribe(ctx context.Context) <-chan Event {
	ctx, cancel := context.WithCancel(ctx)
	s := &subscriber{pending: make(map[string]Member), wake: make(chan struct{}, 1), cancel: cancel}
	for _, m := range p.Members() {
		s.add(m)
	}
	p.mu.Lock()
	for _, m := range p.members { // whoever changed in between
		s.add(m.Member)
	}
	p.subscribers[s] = struct{}{}
	p.mu.Unlock()

	out := make(chan Event)
	go func() {
		defer close(out)
		defer cancel()
		defer func() {
			p.mu.Lock()
			delete(p.subscribers, s)
			p.mu.Unlock()
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case <-s.wake:
			}
			for {
				p.mu.Lock()
				m, ok := s.next()
				p.mu.Unlock()
				if !ok {
					break
				}
				select {
				case out <- Event{Member: m}:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

// publish hands a change to every subscriber. The caller holds p.mu.
func (p *Pool) publish(m Member) {
	for s := range p.subscribers {
		s.add(m)
	}
}

func (s *subscriber) add(m Member) {
	if _, ok := s.pending[m.Name]; !ok {
		s.order = append(s.order, m.Name)
	}
	s.pending[m.Name] = m
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscriber) next() (Member, bool) {
	if len(s.order) == 0 {
		return Member{}, false
	}
	name := s.order[0]
	s.order = s.order[1:]
	m := s.pending[name]
	delete(s.pending, name)
	return m, true
}
