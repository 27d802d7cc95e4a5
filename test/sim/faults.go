package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// faults breaks a cluster.
type faults struct {
	c        *cluster
	random   *rand.Rand
	began    time.Time
	deadline time.Time
	done     []string
	mending  sync.WaitGroup
	wiping   bool
	longer   bool // one was cut off for as long as it takes to lose touch
}

func (f *faults) say(format string, args ...any) {
	f.done = append(f.done, fmt.Sprintf("%5dms ", time.Since(f.began).Milliseconds())+fmt.Sprintf(format, args...))
}

func (f *faults) some(most time.Duration) time.Duration {
	return time.Duration(f.random.Int64N(int64(most)))
}

// later mends something after a while.
func (f *faults) later(d time.Duration, mend func()) {
	f.mending.Go(func() {
		time.Sleep(d)
		mend()
	})
}

// run breaks things until the deadline, and returns when what was to be mended
// is.
func (f *faults) run() {
	time.Sleep(f.some(2 * time.Second)) // some break the founding
	for time.Now().Before(f.deadline) {
		f.strike()
		time.Sleep(50*time.Millisecond + f.some(1200*time.Millisecond))
	}
	f.mending.Wait()
}

func (f *faults) strike() {
	c := f.c
	if leader := c.leader(); c.slow != "" && leader != nil && f.random.IntN(2) == 0 {
		if leader.node.name != c.slow { // whom the others are ahead of in elections
			f.say("%s hands leadership over to %s, whose clock is slow", leader.node.name, c.slow)
			f.mending.Go(func() { _ = leader.replica.TransferLeadership(c.slow) })
			return
		}
		if f.random.IntN(3) > 0 {
			f.tellLate(c.slow)
			return
		}
		f.say("%s, whose clock is slow, is cut off", c.slow)
		f.cut(c.slow, true)
		f.later(500*time.Millisecond+f.some(1500*time.Millisecond), func() { f.cut(c.slow, false) })
		return
	}
	name := c.names[f.random.IntN(len(c.names))]
	l := c.alive(name)
	if leader := c.leader(); leader != nil && f.random.IntN(2) == 0 {
		l, name = leader, leader.node.name
	}
	if l == nil {
		return
	}
	others := slices.DeleteFunc(slices.Clone(c.names), func(n string) bool { return n == name })
	restart := func(after time.Duration) {
		f.later(after, func() {
			l.node.start()
		})
	}
	switch f.random.IntN(17) {
	case 15:
		f.fill(l)
	case 13, 14:
		f.failOnce(l)
	case 12:
		if f.longer {
			return
		}
		f.longer = true
		f.say("%s is cut off for long", name)
		f.cut(name, true)
		f.later(inTouch+f.some(2*time.Second), func() { f.cut(name, false) })
	case 0:
		if f.random.IntN(2) == 0 {
			f.say("%s is killed", name)
			l.die(false)
		} else {
			f.say("%s crashes", name)
			l.crash()
		}
		restart(f.some(2 * time.Second))
	case 1, 2, 3, 16:
		n := 1 + f.random.IntN(30)
		f.say("%s crashes at its write number %d from now", name, n)
		l.node.disk.medium.CutIn(n)
		f.later(f.some(2*time.Second), func() {
			<-l.gone(3 * time.Second)
			l.node.start()
		})
		if other := others[f.random.IntN(len(others))]; f.random.IntN(3) == 0 {
			// What that one alone has of the writes of the first must not be acknowledged.
			rest := time.Second + f.some(2*time.Second)
			f.say("and then %s is cut off", other)
			f.mending.Go(func() {
				<-l.gone(3 * time.Second)
				f.cut(other, true)
				time.Sleep(rest)
				f.cut(other, false)
			})
		}
	case 4:
		f.say("all crash")
		for _, name := range c.names {
			if l := c.alive(name); l != nil {
				l.crash()
				f.later(f.some(time.Second), func() {
					l.node.start()
				})
			}
		}
	case 5, 6:
		way := f.random.IntN(3)
		f.say("%s is cut off from %v (%s)", name, others, []string{"both ways", "it does not hear", "it is not heard"}[way])
		for _, other := range others {
			c.network.block(name, other, way != 1)
			c.network.block(other, name, way != 2)
		}
		f.later(200*time.Millisecond+f.some(2*time.Second), func() {
			for _, other := range others {
				c.network.block(name, other, false)
				c.network.block(other, name, false)
			}
		})
	case 7:
		f.say("the disk of %s is slow", name)
		l.node.disk.setSlow(50*time.Millisecond + f.some(1500*time.Millisecond))
		f.later(f.some(2*time.Second), func() { l.node.disk.setSlow(0) })
	case 8:
		f.say("writes and syncs of the disk of %s fail now and then", name)
		l.node.disk.medium.Fail(true)
		rest := f.some(3 * time.Second)
		f.later(f.some(2*time.Second), func() {
			l.node.disk.medium.Fail(false)
			if c.alive(name) != l {
				return
			}
			time.Sleep(rest) // it goes on, and then its power is cut
			if c.alive(name) == l {
				l.crash()
			}
			l.node.start()
		})
	case 9:
		f.say("%s hands leadership over, if it leads", name)
		f.mending.Go(func() { _ = l.replica.TransferLeadership("") })
	case 10:
		f.say("%s stops in order", name)
		l.stop()
		restart(f.some(time.Second))
	case 11:
		if f.wiping || !f.well() || c.alive(name) != l { // asking took time
			f.say("%s takes a snapshot", name)
			f.mending.Go(func() { _ = l.replica.Snapshot() })
			return
		}
		// One that all the others can do without: its disk is lost, and it joins anew.
		f.say("%s crashes and loses its disk", name)
		f.wiping = true
		l.crash()
		l.node.disk.wipe()
		restart(f.some(time.Second))
	}
}

// failOnce has one sync of a file of a log fail, or one write or sync of any. The replica
// goes on, and soon its power is cut, or it is killed and the power is cut when it is back.
func (f *faults) failOnce(l *life) {
	file := []string{journalFile, journalFile, boltFile, ""}[f.random.IntN(4)]
	first, next := 1+f.random.IntN(6), 1+f.random.IntN(10)
	rest := time.Duration(0)
	then := fmt.Sprintf("and %d writes or syncs later it crashes", next)
	if f.random.IntN(4) == 0 {
		rest = f.some(time.Second)
		then = fmt.Sprintf("it is killed in %v, and crashes soon after that", rest.Round(time.Millisecond))
	}
	cut := next
	if rest != 0 {
		cut = 0
	}
	disk := l.node.disk.medium
	if file != "" {
		f.say("sync %d of %s of %s fails; %s", first, file, l.node.name, then)
		disk.FailSync(file, first, cut)
	} else {
		f.say("write or sync %d of %s fails; %s", first, l.node.name, then)
		disk.FailAt(first)
		if cut != 0 {
			disk.CutIn(first + cut)
		}
	}
	f.mending.Go(func() {
		if rest != 0 {
			time.Sleep(rest)
			if f.c.alive(l.node.name) != l {
				return
			}
			l.die(false)
			l.node.start()
			if l = f.c.alive(l.node.name); l == nil {
				return
			}
			disk.CutIn(next)
		}
		<-l.gone(3 * time.Second)
		l.node.start()
	})
}

// fill fills a disk for some time, in which the replica may end: it comes back when it can.
func (f *faults) fill(l *life) {
	ends := f.random.IntN(3)
	f.say("the disk of %s is full%s", l.node.name, []string{"", ", and it is killed", ", and it crashes"}[ends])
	l.node.disk.medium.Fill(true)
	before, after := f.some(1500*time.Millisecond), f.some(1500*time.Millisecond)
	f.mending.Go(func() {
		time.Sleep(before)
		if ends > 0 && f.c.alive(l.node.name) == l {
			l.die(ends == 2)
			l.node.start()
		}
		time.Sleep(after)
		l.node.disk.medium.Fill(false)
		l.node.start()
	})
}

// tellLate lets a leader with a slow clock hear late what the others answer, and then
// not be heard by them: while they elect another, it gets answers that they gave before.
func (f *faults) tellLate(name string) {
	var by []string
	var longest time.Duration
	for _, other := range f.c.names {
		if other != name {
			late := 600*time.Millisecond + f.some(1000*time.Millisecond)
			longest = max(longest, late)
			by = append(by, fmt.Sprintf("%s by %v", other, late.Round(time.Millisecond)))
			f.c.network.delay(other, name, late)
		}
	}
	f.say("%s, whose clock is slow, hears late: %s; and then is not heard", name, strings.Join(by, ", "))
	before, after := 150*time.Millisecond+f.some(200*time.Millisecond), longest+f.some(time.Second)
	over := make(chan struct{})
	if f.random.IntN(3) > 0 {
		defer func() { <-over }() // nothing else happens meanwhile
	}
	f.mending.Go(func() {
		defer close(over)
		time.Sleep(before)
		for _, other := range f.c.names {
			f.c.network.block(name, other, other != name)
		}
		time.Sleep(after)
		for _, other := range f.c.names {
			f.c.network.block(name, other, false)
			f.c.network.delay(other, name, 0)
		}
	})
}

// cut cuts a replica off from all others, or mends that.
func (f *faults) cut(name string, on bool) {
	for _, other := range f.c.names {
		if other != name {
			f.c.network.block(name, other, on)
			f.c.network.block(other, name, on)
		}
	}
}

// well reports that all replicas are up, vote and have applied the same.
func (f *faults) well() bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return f.c.same(ctx) == nil
}

// gone returns a channel that is closed when the life is over, or after a while.
func (l *life) gone(within time.Duration) <-chan struct{} {
	ctx, cancel := context.WithTimeout(l.ctx, within)
	context.AfterFunc(ctx, cancel)
	return ctx.Done()
}
