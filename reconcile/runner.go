package reconcile

import (
	"context"
	"runtime"
	"sync"
	"time"

	"k8s.io/utils/clock"

	"timonel/internal/stall"
	"timonel/state/objects"
)

const (
	// beat is how often the clock is looked at, so that a longer gap between two looks
	// means that the process was held up, and how often the loop turns at least.
	beat = 500 * time.Millisecond
	// catchUp is how long to wait for the cache after a commit before going on without.
	catchUp = 5 * time.Second
)

// Runner drives reconcilers while this controller leads: it queues keys as
// objects change, evaluates them on the newest snapshot, and makes the changes
// through the API. A key never runs twice at a time, and runs again only once
// the cache shows what its last pass has changed.
type Runner struct {
	cfg    Config
	writer Writer
}

// NewRunner returns a runner. The error names what is wrong with the config.
func NewRunner(cfg Config) (*Runner, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	r := &Runner{cfg: cfg, writer: cfg.Writer}
	if r.writer == nil {
		w, err := newRESTWriter(cfg.Client, cfg.Direct)
		if err != nil {
			return nil, err
		}
		r.writer = w
	}
	if r.cfg.Kinds == nil {
		kinds, err := discoverer(cfg.Client)
		if err != nil {
			return nil, err
		}
		r.cfg.Kinds = kinds
	}
	return r, nil
}

// term is one Run of a Runner.
type term struct {
	*Runner
	number   uint64
	queue    *queue
	recorder *recorder
	wg       sync.WaitGroup

	// ordinary and urgent bound what the lanes of either sort do at a time.
	ordinary, urgent slots
	finished         chan *outcome

	// since is the start of every node's clock: the beginning of the term or the end of the last stall.
	since  time.Time
	pauses *stall.Watch
	health Health
	kinds  Kinds
	passes uint64
}

// slots bound what runs at a time: evaluations, and requests to the API.
type slots struct{ evaluate, requests chan struct{} }

func newSlots(requests int) slots {
	return slots{evaluate: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))), requests: make(chan struct{}, requests)}
}

// slots are those of a lane.
func (t *term) slots(l *lane) slots {
	if l.urgent {
		return t.urgent
	}
	return t.ordinary
}

// Run reconciles until ctx ends, and returns once everything it started has
// ended. It is to be called while this controller leads, with a context that
// carries the term.
func (r *Runner) Run(ctx context.Context, number uint64) error {
	now := r.cfg.Clock.Now()
	t := &term{
		Runner: r, number: number,
		queue:    newQueue(r.cfg.Reconcilers, r.cfg.Keys),
		recorder: newRecorder(r.writer, r.cfg.Host, r.cfg.Clock, r.cfg.Log),
		ordinary: newSlots(r.cfg.Workers),
		urgent:   newSlots(max(1, r.cfg.Workers/4)),
		finished: make(chan *outcome, r.cfg.Keys+len(r.cfg.Reconcilers)*max(1, r.cfg.Keys/laneShare)),
		since:    now, pauses: stall.New(r.cfg.Clock, beat, r.cfg.Stall),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer t.wg.Wait()
	defer cancel()
	return t.run(ctx)
}

// spawn runs f until the term ends.
func (t *term) spawn(f func()) {
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		f()
	}()
}

func (t *term) run(ctx context.Context) error {
	log := t.cfg.Log.With("term", t.number)
	changes := make(chan objects.Changes)
	kinds := make(chan Kinds)
	askKinds := make(chan struct{}, 1)
	t.spawn(func() { t.pauses.Run(ctx) })
	t.spawn(func() { t.recorder.run(ctx) })
	t.spawn(func() { t.followKinds(ctx, askKinds, kinds) })
	if t.cfg.Expire != nil {
		t.spawn(func() { t.expire(ctx) })
	}
	// Whoever leads has a state, so the cache has a snapshot soon if it has none yet.
	if err := t.cfg.Cache.WaitRevision(ctx, t.cfg.Revision()); err != nil {
		return ctx.Err()
	}
	snapshot := t.cfg.Cache.Snapshot()
	t.spawn(func() { t.follow(ctx, snapshot.Revision(), changes) })
	t.health = t.currentHealth()
	askKinds <- struct{}{}
	t.addAll(snapshot)
	log.Info("reconcilers started", "revision", snapshot.Revision())
	defer log.Info("reconcilers stopped")

	ticker := t.cfg.Clock.NewTicker(beat)
	defer ticker.Stop()
	var timer clock.Timer
	var timerAt time.Time
	var timerC <-chan time.Time
	for {
		t.checkStall()
		now := t.cfg.Clock.Now()
		if next := t.queue.ring(now); !next.Equal(timerAt) {
			if timer != nil {
				timer.Stop()
				timer, timerC = nil, nil
			}
			if timerAt = next; !next.IsZero() {
				timer = t.cfg.Clock.NewTimer(next.Sub(now))
				timerC = timer.C()
			}
		}
		t.start(ctx, now)

		select {
		case <-ctx.Done():
			if timer != nil {
				timer.Stop()
			}
			return ctx.Err()
		case <-ticker.C():
		case <-timerC:
			timer, timerC, timerAt = nil, nil, time.Time{}
		case c := <-changes:
			t.changed(c, askKinds)
		case o := <-t.finished:
			t.finish(o)
		case <-t.cfg.HealthChanged:
			t.healthChanged()
		case k := <-kinds:
			t.kinds = k
			t.addFor(t.cfg.Cache.Snapshot(), func(r Reconciler) bool { return traitsOf(r).Kinds })
		}
	}
}

// currentHealth asks for the nodes' health and starts their clocks no earlier than this term.
func (t *term) currentHealth() Health {
	if t.cfg.Health == nil {
		return Health{Since: t.since}
	}
	h := t.cfg.Health()
	if h.Since.Before(t.since) {
		h.Since = t.since
	}
	return h
}

// checkStall starts every node's clock again when the process was stopped, or held
// up, since the loop turned last. Work that keeps the loop long is no pause.
func (t *term) checkStall() {
	away := t.pauses.Away()
	if away == 0 {
		return
	}
	t.cfg.Log.Warn("this controller was paused or stalled: the clock of every node starts again", "for", away.Round(time.Millisecond))
	t.since = t.cfg.Clock.Now()
	if t.cfg.ResetHealth != nil {
		t.cfg.ResetHealth()
	}
	t.healthChanged()
}

// healthChanged queues what the new health concerns.
func (t *term) healthChanged() {
	before := t.health
	t.health = t.currentHealth()
	now, s := t.cfg.Clock.Now(), t.cfg.Cache.Snapshot()
	for _, l := range t.queue.lanes {
		if r, ok := l.reconciler.(HealthReconciler); ok {
			for _, key := range r.HealthKeys(before, t.health, s) {
				t.queue.add(l, key, now)
			}
		}
	}
}

// addAll queues every key there is.
func (t *term) addAll(s *objects.Snapshot) {
	t.addFor(s, func(Reconciler) bool { return true })
}

func (t *term) addFor(s *objects.Snapshot, want func(Reconciler) bool) {
	now := t.cfg.Clock.Now()
	for _, l := range t.queue.lanes {
		if !want(l.reconciler) {
			continue
		}
		for _, key := range l.reconciler.All(s) {
			t.queue.add(l, key, now)
		}
	}
}

// follow passes on the cache's changes.
func (t *term) follow(ctx context.Context, after int64, out chan<- objects.Changes) {
	for {
		c, err := t.cfg.Cache.Changes(ctx, after)
		if err != nil {
			return // ctx has ended
		}
		after = c.Snapshot.Revision()
		select {
		case out <- c:
		case <-ctx.Done():
			return
		}
	}
}

// changed queues the keys that changes concern.
func (t *term) changed(c objects.Changes, askKinds chan<- struct{}) {
	if c.Reset {
		t.addAll(c.Snapshot)
	}
	now := t.cfg.Clock.Now()
	for _, ch := range c.Changed {
		for _, l := range t.queue.lanes {
			for _, key := range l.reconciler.Keys(ch, c.Snapshot) {
				if edits(ch, key) {
					t.queue.edited(l, key)
				}
				t.queue.add(l, key, now)
			}
		}
		if c.Reset || servesKinds(ch) {
			select {
			case askKinds <- struct{}{}:
			default:
			}
		}
	}
}

// start gives turns to as many keys as may run at a time.
func (t *term) start(ctx context.Context, now time.Time) {
	for {
		l, it := t.queue.take()
		if it == nil {
			return
		}
		t.passes++
		it.started = now
		in := Input{
			Now: now, Seed: t.cfg.Seed + t.number<<32 + t.passes,
			Snapshot: t.cfg.Cache.Snapshot(), Changes: t.cfg.Cache.ChangesNow,
			Health: t.health, Kinds: t.kinds, Failed: it.failed, Since: it.since,
		}
		t.spawn(func() { t.finished <- t.pass(ctx, l, it, in) })
	}
}

// outcome is what became of a pass.
type outcome struct {
	lane *lane
	item *item
	next time.Time
	// mu guards what follows while requests are made.
	mu sync.Mutex
	// failed are the refused changes, stale says that one found another state than
	// it expected, later that the API could not be asked.
	failed       []Failure
	stale, later bool
	err          error
}

// finish ends the turn of a key and decides when it has another.
func (t *term) finish(o *outcome) {
	now := t.cfg.Clock.Now()
	it := o.item
	it.failed = o.failed
	again := true
	steady := traitsOf(o.lane.reconciler).Steady
	switch {
	case steady && len(o.failed) > 0 && !o.later && o.err == nil:
		it.tries = 0
	case len(o.failed) > 0 || o.later || o.err != nil || o.stale && it.tries >= staleTries:
		it.tries++
		it.notBefore = now.Add(backoff(it.tries, t.cfg.Seed+Hash(it.key.String())))
		t.cfg.Log.Debug("reconcile again", "reconciler", o.lane.reconciler.Name(), "key", it.key.String(), "tries", it.tries, "err", o.err)
	case o.stale:
		it.tries++
	default:
		it.tries, again, it.notBefore = 0, false, time.Time{}
	}
	if it.edited { // while the pass ran, which knew nothing of it
		it.tries, it.notBefore = min(it.tries, 1), time.Time{}
	}
	if o.err != nil {
		t.cfg.Log.Warn("reconcile failed", "reconciler", o.lane.reconciler.Name(), "key", it.key.String(), "err", o.err)
	}
	t.queue.done(o.lane, it, o.next, again, now)
}

// staleTries is after how many passes in a row on an outdated snapshot the next ones are put off.
const staleTries = 3

// backoff is the time before the next try: doubled with each, with some jitter.
func backoff(tries int, seed uint64) time.Duration {
	const first, longest = 50 * time.Millisecond, time.Minute
	d := longest
	if tries < 11 {
		d = min(longest, first<<(tries-1))
	}
	jitter := time.Duration((seed*0x9e3779b97f4a7c15 + uint64(tries)*0xbf58476d1ce4e5b9) % 1000)
	return d*4/5 + d*2/5*jitter/1000
}

// expire calls Config.Expire when it is time.
func (t *term) expire(ctx context.Context) {
	for {
		now := t.cfg.Clock.Now()
		next, err := t.cfg.Expire(ctx, now)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			t.cfg.Log.Warn("delete expired objects", "err", err)
		}
		wait := t.cfg.ExpirePoll
		if !next.IsZero() && err == nil {
			wait = min(wait, max(next.Sub(now), 100*time.Millisecond))
		}
		timer := t.cfg.Clock.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C():
		}
	}
}
