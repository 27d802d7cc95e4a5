package image

import (
	"context"
	"slices"
	"sync"
)

const (
	// MaxPulls is how many images are pulled at a time, and maxNamespacePulls how many of
	// them for one namespace's pods: a registry may take as long as it likes for each, and
	// each takes connections, memory and disk of the node.
	MaxPulls          = 10
	maxNamespacePulls = MaxPulls / 2
)

// slots are the places of pulls. Next is the namespace that has least, and of its pods who
// came first.
type slots struct {
	mu      sync.Mutex
	running map[string]int
	total   int
	waiting []*waiter
}

type waiter struct {
	namespace string
	turn      chan struct{} // closed when it has a slot
}

func newSlots() *slots { return &slots{running: map[string]int{}} }

// take waits for a slot until ctx ends.
func (s *slots) take(ctx context.Context, namespace string) (give func(), err error) {
	w := &waiter{namespace: namespace, turn: make(chan struct{})}
	give = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.total--
		if s.running[namespace]--; s.running[namespace] == 0 {
			delete(s.running, namespace)
		}
		s.next()
	}
	s.mu.Lock()
	s.waiting = append(s.waiting, w)
	s.next()
	s.mu.Unlock()
	select {
	case <-w.turn:
		return give, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	i := slices.Index(s.waiting, w)
	if i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
	}
	s.mu.Unlock()
	if i < 0 { // its turn came meanwhile
		give()
	}
	return nil, ctx.Err()
}

// next gives what slots there are.
func (s *slots) next() {
	for s.total < MaxPulls {
		first := -1
		for i, w := range s.waiting {
			n := s.running[w.namespace]
			if n < maxNamespacePulls && (first < 0 || n < s.running[s.waiting[first].namespace]) {
				first = i
			}
		}
		if first < 0 {
			return
		}
		w := s.waiting[first]
		s.waiting = slices.Delete(s.waiting, first, first+1)
		s.running[w.namespace]++
		s.total++
		close(w.turn)
	}
}
