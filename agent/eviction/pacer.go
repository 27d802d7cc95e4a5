package eviction

import (
	"context"
	"time"
)

// pacer keeps all measuring of a node together to half of one CPU and to one
// disk access at a time, in turns: a pod with millions of files keeps neither
// the machine nor the measuring of others.
type pacer struct{ turn chan struct{} }

func newPacer() *pacer { return &pacer{turn: make(chan struct{}, 1)} }

// work calls f when it is its turn. f calls pause now and then.
func (p *pacer) work(ctx context.Context, f func(pause func() error)) error {
	if err := p.take(ctx); err != nil {
		return err
	}
	defer func() { <-p.turn }()
	began := time.Now()
	f(func() error {
		// It rests as long as it worked before others have their turn.
		if err := sleep(ctx, time.Since(began)); err != nil {
			return err
		}
		<-p.turn
		err := p.take(context.WithoutCancel(ctx)) // the others give it back soon
		began = time.Now()
		if err == nil {
			err = ctx.Err()
		}
		return err
	})
	return nil
}

func (p *pacer) take(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case p.turn <- struct{}{}:
		return nil
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
