package logs

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

// How often a log is looked at.
const (
	// idleInterval is for a log that nothing is written to; the first write is
	// told besides. It is upstream's for all.
	idleInterval = 10 * time.Second
	// busyInterval is at most between two looks at a log that is written to.
	busyInterval = 200 * time.Millisecond
	// leastInterval is at least between two looks: what can be written in that
	// time is how much longer than its size a file gets.
	leastInterval = 20 * time.Millisecond
)

// calm is how long after a rotation older files are compressed. What is rotated
// more often is removed too soon to be worth it.
const calm = 2 * time.Second

// lingering is for how long containerd may take to write the last bytes to a
// file that it has left.
const lingering = 10 * time.Second

// container is one container whose log is rotated.
type container struct {
	s     *Logs
	id    string
	over  bool          // s.mu guards it
	ended chan struct{} // closed when the container has ended
	wake  chan struct{}

	log       *log
	size      int64 // when last looked at
	at        time.Time
	armed     bool // the next write is told
	failures  int
	rotatedAt time.Time
	untidy    bool // there may be something to compress or to cut
	tidying   chan struct{}
}

// run looks at the log until the container has ended, and once then.
func (c *container) run(ctx context.Context) {
	rel, ok := c.find(ctx)
	if !ok || rel == "" {
		return
	}
	c.log = c.s.hold(rel)
	defer c.s.release(c.log)
	c.log.mu.Lock()
	c.log.ended = c.ended
	c.log.mu.Unlock()
	if c.s.notify != nil {
		defer c.s.notify.forget(c.wake)
	}
	defer func() {
		if c.tidying != nil {
			<-c.tidying
		}
	}()
	c.untidy = true // an agent before this one may have been interrupted
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.ended:
			c.bury(ctx)
			return
		case <-c.wake:
			c.armed = false
		case <-timer.C:
		}
		timer.Reset(c.look(ctx))
	}
}

// find asks where the log is until there is an answer.
func (c *container) find(ctx context.Context) (rel string, ok bool) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, idleInterval) {
		rel, err := c.s.rel(ctx, c.id)
		if err == nil {
			return rel, true
		}
		if ctx.Err() == nil {
			c.s.log.Warn("ask where a container's log is; trying again", "id", c.id, "error", err)
		}
		select {
		case <-ctx.Done():
			return "", false
		case <-time.After(wait):
		}
	}
}

// look looks at the log, rotates it when it is large, and says when to look
// again.
func (c *container) look(ctx context.Context) time.Duration {
	wait, err := c.step(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return idleInterval
		}
		c.failures++
		c.s.warn(c.log.rel, "rotate a log; trying again", err)
		return min(busyInterval<<min(c.failures, 10), idleInterval)
	}
	c.failures = 0
	if c.untidy {
		if time.Since(c.rotatedAt) < calm || !c.tidy(ctx) {
			return min(wait, calm)
		}
		c.untidy = false
	}
	return wait
}

func (c *container) step(ctx context.Context) (time.Duration, error) {
	l := c.log
	l.step.Lock()
	defer l.step.Unlock()
	dir, err := l.open()
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return idleInterval, nil // it went with its pod
		}
		return 0, err
	}
	defer dir.Close()
	st, err := c.ensure(ctx, dir)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	if st.Size >= c.s.cfg.MaxSize {
		if err := l.rotate(ctx, dir, c.id, st.Size); err != nil {
			return 0, err
		}
		c.size, c.at, c.rotatedAt, c.untidy = 0, now, now, true
		if st, err := dir.Lstat(l.base()); err == nil {
			l.seen = fileOf(&st)
		}
		return leastInterval, nil
	}
	grown, since := st.Size-c.size, now.Sub(c.at)
	first := c.at.IsZero()
	c.size, c.at = st.Size, now
	switch {
	case grown <= 0 && !first:
		switch {
		case c.armed:
			return idleInterval, nil
		case c.arm(dir):
			return leastInterval, nil // to see what came before it was armed
		}
		return busyInterval, nil
	case first || since > 2*busyInterval:
		return leastInterval, nil // how fast is not known yet
	}
	// Half of the time that it will take at this speed.
	left := float64(c.s.cfg.MaxSize-st.Size) / float64(grown) * float64(since) / 2
	return max(leastInterval, time.Duration(min(left, float64(busyInterval)))), nil
}

// ensure sees to it that there is a log and that containerd writes to it: it may
// have been removed, or replaced, or moved by an agent that then ended.
func (c *container) ensure(ctx context.Context, dir *hostile.Root) (unix.Stat_t, error) {
	l := c.log
	st, err := dir.Lstat(l.base())
	good := err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
	if good && fileOf(&st) == l.seen {
		return st, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return st, err
	}
	if good {
		if good, err = written(dir, l.base()); err != nil {
			return st, err
		}
	} else if err == nil {
		if err := dir.RemoveAll(ctx, l.base()); err != nil {
			return st, err
		}
	}
	if !good {
		if err := l.reopen(ctx, c.id); err != nil {
			return st, err
		}
		c.armed, c.at = false, time.Time{}
		if st, err = dir.Lstat(l.base()); err != nil {
			return st, err
		}
	}
	l.seen = fileOf(&st)
	return st, nil
}

// written says whether somebody writes to a file, and true if that is not known.
func written(dir *hostile.Root, name string) (bool, error) {
	f, err := dir.Open(name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	busy, err := hostile.HasWriter(f)
	return busy || err != nil, nil
}

// arm has the next write told. It is false when nobody will tell it.
func (c *container) arm(dir *hostile.Root) bool {
	if c.s.notify == nil {
		return false
	}
	f, err := dir.Open(c.log.base())
	if err != nil {
		return false
	}
	defer f.Close()
	select {
	case <-c.wake: // of before
	default:
	}
	if err := c.s.notify.arm(f, c.wake); err != nil {
		return false
	}
	c.armed = true
	return true
}

// tidy compresses and cuts what was rotated, in the background. It is false
// while that is being done already.
func (c *container) tidy(ctx context.Context) bool {
	if c.tidying != nil {
		select {
		case <-c.tidying:
		default:
			return false
		}
	}
	done := make(chan struct{})
	c.tidying = done
	go func() { // run waits for it
		defer close(done)
		c.clean(ctx)
	}()
	return true
}

func (c *container) clean(ctx context.Context) {
	err := c.log.shorten(ctx)
	if err == nil {
		err = c.log.compress(ctx)
	}
	if err != nil && ctx.Err() == nil {
		c.s.warn(c.log.rel, "compress a rotated log; it stays as it is", err)
	}
}

// bury waits for containerd's last bytes and brings the log to what it may be.
func (c *container) bury(ctx context.Context) {
	if c.tidying != nil {
		<-c.tidying
	}
	c.log.waitLeft(ctx, c.log.base())
	if err := c.log.bury(ctx); err != nil && ctx.Err() == nil {
		c.s.warn(c.log.rel, "cut the log of a container that has ended", err)
	}
	c.clean(ctx)
}
