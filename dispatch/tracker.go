package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/utils/clock"

	"timonel/gossip"
	"timonel/internal/stall"
	pb "timonel/proto/timonel/v1"
)

// NodeHealth is what the controllers know of one node.
type NodeHealth struct {
	Stream       bool      // some controller has its stream
	StreamSince  time.Time // when Stream became what it is
	Goodbye      bool      // its agent announced the end of its last stream
	Holders      []string  // the controllers that have its stream
	Gossip       gossip.State
	GossipSince  time.Time
	ProbesFailed int       // controllers whose direct probes failed since the stream went, and have not succeeded again
	ProbesSince  time.Time // when the last of them failed
}

// Health is what the controllers know of all nodes. It is not changed once given
// out.
type Health struct {
	// Since is when the tracker began to look, or began anew after a pause.
	Since time.Time
	Nodes map[string]NodeHealth
}

// Times of the tracker.
const (
	trackInterval  = 200 * time.Millisecond
	pauseLimit     = 1500 * time.Millisecond // looks at the clock that are further apart than this mean that we were away
	probeInterval  = 300 * time.Millisecond  // between the probes of a node without a stream
	probeSlow      = 2 * time.Second         // the same once it has been gone for long
	probeSlowAfter = 30 * time.Second
	probeTimeout   = time.Second
	probeFailures  = 2  // probes in a row that must fail before a controller counts as a witness
	probePeers     = 4  // other controllers asked
	probesAtOnce   = 64 // nodes
	followPause    = 200 * time.Millisecond
)

// Tracker puts together what all controllers know of each node's liveness. It
// runs on the leader, and forgets everything when it stops.
type Tracker struct {
	d       *Dispatcher
	log     *slog.Logger
	changed chan struct{}
	now     func() time.Time

	mu     sync.Mutex
	since  time.Time
	nodes  map[string]*track
	health Health // the last published
	dirty  bool
}

// track is what is known of one node.
type track struct {
	holders     map[string]bool // controllers that have its stream
	streamSince time.Time
	goodbye     bool
	gossip      gossip.State
	gossipSince time.Time
	failures    map[string]int       // by prober: probes in a row that failed
	failedSince map[string]time.Time // by prober that counts as a witness
	stopProbes  context.CancelFunc
}

// NewTracker returns the tracker of this controller.
func (d *Dispatcher) NewTracker() *Tracker {
	return &Tracker{
		d: d, log: d.log.With("part", "tracker"), changed: make(chan struct{}, 1), now: time.Now,
		nodes: make(map[string]*track),
	}
}

// Changed is signalled when Health has changed. It is for one reader.
func (t *Tracker) Changed() <-chan struct{} { return t.changed }

// Health returns what is known now. While the tracker does not run, Since is
// zero and it knows nothing.
func (t *Tracker) Health() Health {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dirty {
		t.dirty = false
		t.health = t.freeze()
	}
	return t.health
}

// Reset starts the clock of every node again, as after a pause.
func (t *Tracker) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reset()
}

func (t *Tracker) reset() {
	now := t.now()
	t.since = now
	for _, n := range t.nodes {
		n.streamSince = now
		clear(n.failures)
		clear(n.failedSince)
	}
	t.touch()
}

// touch makes the next Health new. The caller holds t.mu.
func (t *Tracker) touch() {
	t.dirty = true
	notify(t.changed)
}

func (t *Tracker) freeze() Health {
	h := Health{Since: t.since, Nodes: make(map[string]NodeHealth, len(t.nodes))}
	for name, n := range t.nodes {
		facts := NodeHealth{
			Stream: len(n.holders) > 0, StreamSince: n.streamSince, Goodbye: n.goodbye,
			Holders: slices.Sorted(maps.Keys(n.holders)),
			Gossip:  n.gossip, GossipSince: n.gossipSince, ProbesFailed: len(n.failedSince),
		}
		for _, at := range n.failedSince {
			if at.After(facts.ProbesSince) {
				facts.ProbesSince = at
			}
		}
		h.Nodes[name] = facts
	}
	return h
}

// Run tracks until ctx ends, whose error it returns.
func (t *Tracker) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer func() {
		cancel()
		work.Wait()
		t.mu.Lock()
		t.since, t.nodes, t.health, t.dirty = time.Time{}, make(map[string]*track), Health{}, false
		t.mu.Unlock()
	}()
	t.Reset()

	local, feed := t.d.hub.subscribe()
	defer t.d.hub.unsubscribe(feed)
	t.setHolder(t.d.config.Name, local)
	events := t.d.config.Gossip.Subscribe(ctx)
	probes := make(chan struct{}, probesAtOnce)
	followed := make(map[string]context.CancelFunc)

	tick := time.NewTicker(trackInterval)
	defer tick.Stop()
	pauses := stall.New(trackerClock{now: t.now}, trackInterval, pauseLimit)
	work.Go(func() { pauses.Run(ctx) })
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-feed.wake:
			for node, p := range feed.take() {
				t.setStream(t.d.config.Name, node, p)
			}
		case e, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			t.setGossip(e.Member)
		case <-tick.C:
		}
		// After each of them, so that a pause is noticed before what comes after it
		// is believed.
		if away := pauses.Away(); away > 0 {
			t.log.Warn("this controller was away; every node's clock starts again", "for", away.Round(time.Millisecond))
			t.Reset()
		}
		t.followPeers(ctx, &work, followed)
		t.probeMissing(ctx, &work, probes)
	}
}

// trackerClock is the clock of a tracker for its watch over pauses.
type trackerClock struct {
	clock.RealClock
	now func() time.Time
}

// Now implements clock.PassiveClock.
func (c trackerClock) Now() time.Time { return c.now() }

// node returns what is known of a node, made if need be. The caller holds t.mu.
func (t *Tracker) node(name string) *track {
	n := t.nodes[name]
	if n == nil {
		n = &track{
			holders: make(map[string]bool), streamSince: t.since,
			failures: make(map[string]int), failedSince: make(map[string]time.Time),
		}
		t.nodes[name] = n
	}
	return n
}

// setStream records that a controller got or lost a node's stream.
func (t *Tracker) setStream(controller, node string, p presence) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.node(node)
	had := len(n.holders) > 0
	if p == up {
		n.holders[controller] = true
		n.goodbye = false
	} else {
		delete(n.holders, controller)
		if p == left {
			n.goodbye = true
		}
	}
	if has := len(n.holders) > 0; has != had {
		n.streamSince = t.now()
		clear(n.failures)
		clear(n.failedSince)
	}
	t.touch()
}

// setHolder makes nodes those whose streams a controller has.
func (t *Tracker) setHolder(controller string, nodes []string) {
	t.mu.Lock()
	var lost []string
	for name, n := range t.nodes {
		if n.holders[controller] && !slices.Contains(nodes, name) {
			lost = append(lost, name)
		}
	}
	t.mu.Unlock()
	for _, name := range nodes {
		t.setStream(controller, name, up)
	}
	for _, name := range lost {
		t.setStream(controller, name, down)
	}
}

func (t *Tracker) setGossip(m gossip.Member) {
	if m.Role != gossip.RoleAgent {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.node(m.Name)
	n.gossip, n.gossipSince = m.State, m.Since
	t.touch()
}

// followPeers keeps a follower of every other controller's sessions.
func (t *Tracker) followPeers(ctx context.Context, work *sync.WaitGroup, followed map[string]context.CancelFunc) {
	peers := t.d.peers()
	for name, stop := range followed {
		if !slices.Contains(peers, name) {
			stop()
			delete(followed, name)
		}
	}
	for _, name := range peers {
		if followed[name] != nil {
			continue
		}
		follow, stop := context.WithCancel(ctx)
		followed[name] = stop
		work.Go(func() {
			for follow.Err() == nil {
				err := t.follow(follow, name)
				// Its agents have to find another controller now: each one's clock
				// starts when it is missed.
				t.setHolder(name, nil)
				if follow.Err() == nil {
					t.log.Debug("cannot follow another controller's sessions", "controller", name, "err", err)
				}
				timer := time.NewTimer(followPause)
				select {
				case <-follow.Done():
				case <-timer.C:
				}
				timer.Stop()
			}
		})
	}
}

// follow takes what one controller says of its sessions until it says nothing
// for long.
func (t *Tracker) follow(ctx context.Context, name string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(peerSilence, cancel)
	defer silence.Stop()
	cc, err := t.d.config.PeerConn(ctx, name)
	if err != nil {
		return err
	}
	stream, err := pb.NewPeersClient(cc).Sessions(ctx, &pb.SessionsRequest{})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		silence.Reset(peerSilence)
		if m.GetFull() {
			t.setHolder(name, m.GetNodes())
			continue
		}
		for p, nodes := range map[presence][]string{up: m.GetNodes(), down: m.GetGone(), left: m.GetGoodbye()} {
			for _, node := range nodes {
				t.setStream(name, node, p)
			}
		}
	}
}

// probeMissing keeps probing every node that has no stream, and no other.
func (t *Tracker) probeMissing(ctx context.Context, work *sync.WaitGroup, probes chan struct{}) {
	nodes := make(map[string]string) // name to where its gossip is, if known
	for node := range t.d.config.Objects.Snapshot().Nodes().All() {
		nodes[node.Name] = GossipAddress(node)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, n := range t.nodes {
		if _, exists := nodes[name]; n.stopProbes != nil && (!exists || len(n.holders) > 0) {
			n.stopProbes()
			n.stopProbes = nil
		}
		if _, exists := nodes[name]; !exists && len(n.holders) == 0 && n.gossip == gossip.Unknown {
			delete(t.nodes, name)
			t.touch()
		}
	}
	for name, addr := range nodes {
		n := t.nodes[name]
		if n == nil {
			n = t.node(name) // nobody has its stream: say so
			t.touch()
		}
		if len(n.holders) > 0 || n.stopProbes != nil {
			continue
		}
		probe, stop := context.WithCancel(ctx)
		n.stopProbes = stop
		work.Go(func() { t.probeLoop(probe, name, addr, probes) })
	}
}

// probeLoop probes one node from here and from other controllers until ctx ends.
func (t *Tracker) probeLoop(ctx context.Context, node, addr string, probes chan struct{}) {
	start := t.now()
	for {
		select {
		case probes <- struct{}{}:
		case <-ctx.Done():
			return
		}
		t.probeOnce(ctx, node, addr)
		<-probes
		pause := probeInterval
		if t.now().Sub(start) > probeSlowAfter {
			pause = probeSlow
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (t *Tracker) probeOnce(ctx context.Context, node, addr string) {
	limited, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var asked sync.WaitGroup
	asked.Go(func() {
		_, err := t.d.probe(limited, node, addr)
		if err == nil || errors.Is(err, gossip.ErrNoAnswer) {
			t.setProbe(ctx, t.d.config.Name, node, err == nil)
		}
	})
	peers := t.d.peers()
	for _, peer := range peers[:min(len(peers), probePeers)] {
		asked.Go(func() {
			cc, err := t.d.config.PeerConn(limited, peer)
			if err != nil {
				return
			}
			answer, err := pb.NewPeersClient(cc).Probe(limited, &pb.ProbeRequest{NodeName: node, Address: addr})
			if err != nil { // it says nothing of the node
				if status.Code(err) != codes.Unavailable && limited.Err() == nil {
					t.log.Debug("another controller cannot probe", "controller", peer, "node", node, "err", err)
				}
				return
			}
			t.setProbe(ctx, peer, node, answer.GetAlive())
		})
	}
	asked.Wait()
}

func (t *Tracker) setProbe(ctx context.Context, prober, node string, alive bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[node]
	if n == nil || ctx.Err() != nil || len(n.holders) > 0 {
		return
	}
	if alive {
		delete(n.failures, prober)
		if _, counted := n.failedSince[prober]; counted {
			delete(n.failedSince, prober)
			t.touch()
		}
		return
	}
	n.failures[prober]++
	if _, counted := n.failedSince[prober]; !counted && n.failures[prober] >= probeFailures {
		n.failedSince[prober] = t.now()
		t.touch()
	}
}
