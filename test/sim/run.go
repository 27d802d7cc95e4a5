package sim

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"timonel/test/history"
	"timonel/test/replica"
)

// Result is what became of one run.
type Result struct {
	// Violations are sentences on what cannot be if the cluster kept its promises.
	Violations []string
	// Stuck says why replicas had to be restarted to become the same after
	// everything was mended; empty if they did so by themselves.
	Stuck string
	// Faults says what was done to the cluster, and when.
	Faults []string
	// History is what clients saw.
	History history.History
}

// inTouch is within what time a watch that gets no further ends, whatever the clock of
// its replica: see consensus.Config.TouchTimeout, and ProposeTimeout.
const inTouch = 4500 * time.Millisecond

// Run runs one cluster for some simulated seconds, in which the seed decides what
// breaks. Call it in the bubble of a [testing/synctest.Test].
func Run(seed uint64, log *slog.Logger) Result {
	random := rand.New(rand.NewPCG(seed, 0))
	w := weather{latency: 5 * time.Millisecond, delay: 600 * time.Millisecond}
	if random.IntN(2) == 0 {
		w.loss, w.slow = 0.08*random.Float64(), 0.1*random.Float64()
	}
	size := 3
	if random.IntN(8) == 0 {
		size = 5
	}
	c := newCluster(seed, size, w, log)
	for _, name := range c.names {
		c.nodes[name].start()
	}
	deadline := time.Now().Add(time.Duration(5000+random.IntN(5000)) * time.Millisecond)
	var clients, watchers sync.WaitGroup
	watching, stopWatching := context.WithCancel(context.Background())
	for i := range 4 {
		k := c.client(i, rand.New(rand.NewPCG(seed, 100+uint64(i))))
		clients.Go(func() { k.Use(deadline) })
	}
	if c.slow != "" {
		for i := range 2 {
			k := c.reader(20+i, c.slow, rand.New(rand.NewPCG(seed, 300+uint64(i))))
			clients.Go(func() { k.Use(deadline) })
		}
	}
	r := c.client(30, rand.New(rand.NewPCG(seed, 400)))
	clients.Go(func() { r.Return(deadline, c.promised) })
	stays := c.client(12, rand.New(rand.NewPCG(seed, 500)))
	stays.Stays = true
	watchers.Go(func() { stays.Watch(watching, 1) })
	for i := range 2 {
		k := c.client(10+i, rand.New(rand.NewPCG(seed, 200+uint64(i))))
		watchers.Go(func() { k.Watch(watching, 1) })
	}

	f := &faults{c: c, random: random, began: time.Now(), deadline: deadline}
	f.run()
	clients.Wait()
	c.settle()
	c.matching()
	c.last(watching)
	stopWatching()
	watchers.Wait()
	c.shutdown()

	h := c.recorder.History()
	report := history.Check(h, time.Hour) // of simulated time: porcupine comes to its end
	out := Result{Violations: slices.Concat(c.problems, report.Violations, history.Kept(h, inTouch)), Stuck: c.stuck, Faults: f.done, History: h}
	if report.Undecided {
		out.Violations = append(out.Violations, "porcupine did not come to an end")
	}
	return out
}

// client returns one of the run's clients.
func (c *cluster) client(id int, random *rand.Rand) *replica.Client {
	return &replica.Client{Cluster: c, Recorder: &c.recorder, ID: id, Random: random,
		Timeout: 2 * time.Second, KeyLife: 1500 * time.Millisecond, Pause: 60 * time.Millisecond}
}

// reader returns a client that reads on one replica, and is not long satisfied with no
// answer: when it gets one, it has not asked long before.
func (c *cluster) reader(id int, of string, random *rand.Rand) *replica.Client {
	k := c.client(id, random)
	k.Cluster, k.Reads, k.Timeout = only{c, of}, true, 150*time.Millisecond
	return k
}

// only is a cluster of which clients know one replica.
type only struct {
	*cluster
	name string
}

// Names implements [replica.Cluster].
func (o only) Names() []string { return []string{o.name} }

// last writes once more, and waits until all watchers have seen it.
func (c *cluster) last(ctx context.Context) {
	l := c.alive(c.names[0])
	if l == nil {
		return // settle has said why
	}
	before := l.store.View().Revision()
	c.client(99, rand.New(rand.NewPCG(0, 0))).Operate(replica.Local{Log: l.replica, Store: l.store}, l.ctx, "/kend-", "the end")
	limit := time.Now().Add(time.Minute)
	for time.Now().Before(limit) {
		behind := ""
		newest := map[string]history.Watch{} // each watcher's last record
		for _, w := range c.recorder.History().Watches {
			who, _, _ := strings.Cut(w.Name, "/")
			newest[who] = w
		}
		for who, w := range newest {
			if now := l.store.View().Revision(); now > before && w.After < now && (len(w.Events) == 0 || w.Events[len(w.Events)-1].Revision < now) {
				behind = who
			}
		}
		if behind == "" {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	c.Problem("a watcher did not see the last write within 1m")
}

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
	switch f.random.IntN(13) {
	case 12:
		if f.longer {
			return
		}
		f.longer = true
		f.say("%s is cut off for long", name)
		f.cut(name, true)
		f.later(inTouch+f.some(2*time.Second), func() { f.cut(name, false) })
	case 0:
		f.say("%s crashes", name)
		l.crash()
		restart(f.some(2 * time.Second))
	case 1, 2, 3:
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
