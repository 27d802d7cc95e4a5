// Package stall notices that this process was stopped or held up: by SIGSTOP, by a
// machine that was suspended, by a processor that others took.
//
// A [Watch] looks at the clock from a goroutine that does nothing else, so that the
// work of those who ask, however long, is no pause, and asks itself again when it is
// asked, so that whoever runs first after a pause hears of it.
package stall

import (
	"context"
	"sync"
	"time"

	"k8s.io/utils/clock"
)

// Watch notices pauses. It has one user, who calls [Watch.Away] before believing
// anything that time has to do with.
type Watch struct {
	clock       clock.WithTicker
	beat, limit time.Duration

	mu   sync.Mutex
	last time.Time
	away time.Duration // the longest pause that was not told yet
}

// New returns a Watch that looks at the clock every beat, and takes a gap of limit or
// more between two looks for a pause.
func New(clock clock.WithTicker, beat, limit time.Duration) *Watch {
	return &Watch{clock: clock, beat: beat, limit: limit, last: clock.Now()}
}

// Run looks at the clock until ctx ends.
func (w *Watch) Run(ctx context.Context) {
	tick := w.clock.NewTicker(w.beat)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C():
			w.look()
		}
	}
}

// look notes how long it is since the last look. Both clocks are looked at: the
// monotonic one stands still while a machine is suspended.
func (w *Watch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.clock.Now()
	gap := max(now.Sub(w.last), now.Round(0).Sub(w.last.Round(0)))
	w.last = now
	if gap >= w.limit {
		w.away = max(w.away, gap)
	}
}

// Away returns how long the process was away since Away was called last, 0 if it was not.
func (w *Watch) Away() time.Duration {
	w.look()
	w.mu.Lock()
	defer w.mu.Unlock()
	away := w.away
	w.away = 0
	return away
}
