package stall

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/utils/clock"
)

// jumpy is a clock that jumps, as it does to a process that was stopped.
type jumpy struct {
	clock.RealClock
	ahead *atomic.Int64
}

func (c jumpy) Now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

func TestWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := jumpy{ahead: &atomic.Int64{}}
		w := New(c, 500*time.Millisecond, 2*time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { w.Run(ctx); close(done) }()

		time.Sleep(time.Hour) // its user does something else
		if away := w.Away(); away != 0 {
			t.Errorf("an hour of work is a pause of %s", away)
		}
		c.ahead.Add(int64(time.Minute))
		if away := w.Away(); away < time.Minute {
			t.Errorf("who asks first after a minute's pause is told of %s", away)
		}
		if away := w.Away(); away != 0 {
			t.Errorf("one pause is told twice: %s", away)
		}
		c.ahead.Add(int64(3 * time.Second))
		time.Sleep(time.Minute)
		if away := w.Away(); away < 3*time.Second || away > 4*time.Second {
			t.Errorf("who asks a minute after a pause of 3 s is told of %s", away)
		}
		c.ahead.Add(int64(time.Second))
		time.Sleep(time.Second)
		if away := w.Away(); away != 0 {
			t.Errorf("a second is a pause of %s", away)
		}
		cancel()
		<-done
	})
}
