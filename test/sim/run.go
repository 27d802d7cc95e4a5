package sim

import (
	"context"
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
