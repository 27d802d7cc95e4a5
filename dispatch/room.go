package dispatch

import "sync"

const (
	// sessionReports is how many bytes of one agent's reports may wait to be written.
	sessionReports = 4 << 20
	// leastReports is what each agent may have waiting, however much all have.
	leastReports = 16 << 10
	// defaultReports is the default of Config.ReportBytes.
	defaultReports = 64 << 20
)

// room bounds what agents said and is not written yet, by its encoded size. Who has
// no room is not read from: the agent waits, by its stream's flow control.
type room struct {
	limit int64

	mu      sync.Mutex
	held    int64
	changed chan struct{} // closed and renewed when somebody gives room back
}

// share is what one agent holds of a room; the room's lock guards it.
type share struct {
	held  int64
	ended bool
}

func newRoom(limit int64) *room { return &room{limit: limit, changed: make(chan struct{})} }

// take waits for n bytes of room. It returns false when done is closed before.
func (r *room) take(done <-chan struct{}, s *share, n int64) bool {
	for {
		r.mu.Lock()
		if s.ended {
			r.mu.Unlock()
			return false
		}
		if r.fits(s.held, n) {
			s.held += n
			r.held += n
			r.mu.Unlock()
			return true
		}
		changed := r.changed
		r.mu.Unlock()
		select {
		case <-changed:
		case <-done:
			return false
		}
	}
}

// fits reports whether one that holds so much may have n more. One message always
// fits where nothing waits.
func (r *room) fits(held, n int64) bool {
	if held+n <= leastReports {
		return true
	}
	return (held == 0 || held+n <= sessionReports) && (r.held == 0 || r.held+n <= r.limit)
}

// give gives n bytes back.
func (r *room) give(s *share, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.giveLocked(s, n)
}

func (r *room) giveLocked(s *share, n int64) {
	if n == 0 || s.ended {
		return
	}
	s.held -= n
	r.held -= n
	close(r.changed)
	r.changed = make(chan struct{})
}

// end gives back all that an agent holds, when its session ends.
func (r *room) end(s *share) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.giveLocked(s, s.held)
	s.ended = true
}

// bytes is how much is held.
func (r *room) bytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}
