package address

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/clock"

	"timonel/internal/stall"
	"timonel/network/feed"
	pb "timonel/proto/timonel/v1"
)

const (
	// beat is how often it is looked what is due while there is anything to announce.
	beat = 50 * time.Millisecond
	// longPause is after how long a pause of the process nothing that it knows is believed.
	longPause = time.Second
	// lookEvery is how often it is looked whether links are up, and on which one an
	// address is that has none.
	lookEvery = 200 * time.Millisecond
)

// Reasons of the events that an Announcer gives.
const (
	ReasonInUse = "AddressInUse"
	ReasonFails = "AddressNotAnnounced"
)

// Config describes one Announcer.
type Config struct {
	// Node is this node's name, NodeIPs its addresses.
	Node    string
	NodeIPs []netip.Addr
	// Skip are network devices on which nothing is announced: the pods' own.
	Skip []string
	// Store is where it is known from who announces what.
	Store *feed.Store
	// Alone says that no controller is to be reached. Nil: one always is.
	Alone func() bool
	// Event is called with what users should know of a Service; may be nil.
	Event func(service *corev1.Service, reason, message string)
	// Logger gets the rest.
	Logger *slog.Logger
}

func (c *Config) validate() error {
	switch {
	case c.Node == "":
		return errors.New("address config: Node is empty")
	case c.Store == nil:
		return errors.New("address config: Store is nil")
	case c.Logger == nil:
		return errors.New("address config: Logger is nil")
	}
	return nil
}

// Announcer announces the addresses that are this node's to announce.
type Announcer struct {
	cfg Config
	log *slog.Logger

	held, conflicts, taken atomic.Int64 // figures

	// All that follows is Run's alone.
	claims map[netip.Addr]*placed
	links  map[linkKey]*link
	looked time.Time
	pauses *stall.Watch
	frames chan frame
	ctx    context.Context
	wait   sync.WaitGroup
}

type linkKey struct {
	index int
	v4    bool
}

// placed is a claim, where it is announced, and what was told of it.
type placed struct {
	claim
	link *link // nil: nowhere yet
	said string
	was  state
}

// New returns an Announcer, which does nothing before it runs.
func New(cfg Config) (*Announcer, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Alone == nil {
		cfg.Alone = func() bool { return false }
	}
	return &Announcer{cfg: cfg, log: cfg.Logger.With("component", "addresses")}, nil
}

// Run announces until ctx ends. Then nobody answers for the addresses of this node.
func (a *Announcer) Run(ctx context.Context) error {
	a.claims, a.links, a.frames = map[netip.Addr]*placed{}, map[linkKey]*link{}, make(chan frame, 64)
	a.pauses = stall.New(clock.RealClock{}, beat, longPause)
	ctx, cancel := context.WithCancel(ctx)
	a.ctx = ctx
	defer func() {
		cancel()
		for _, l := range a.links {
			_ = l.close() // nothing of it stays
		}
		a.wait.Wait()
		a.held.Store(0)
	}()
	changed := make(chan struct{}, 1)
	a.wait.Go(func() { a.follow(changed) })
	ticker := time.NewTicker(beat)
	defer ticker.Stop()
	for {
		tick := ticker.C
		if len(a.claims) == 0 {
			tick = nil
		}
		var f frame
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick:
		case f = <-a.frames:
		}
		// Before anything is answered: what came while this process was paused may be about
		// what another node has by now.
		now := time.Now()
		if away := a.pauses.Away(); away > 0 && len(a.claims) > 0 {
			a.log.Warn("this agent was paused or stalled: it asks again who has the addresses of Services", "for", away.Round(time.Millisecond))
			a.doubt(nil, now)
		}
		a.hear(f, now)
		a.update(now)
		a.look(now)
		a.tick(now)
	}
}

// follow says when the store has news of addresses.
func (a *Announcer) follow(changed chan<- struct{}) {
	for after := uint64(0); ; {
		c, err := a.cfg.Store.Changes(a.ctx, after)
		if err != nil {
			return // ctx
		}
		after = c.View.Revision()
		if c.Addresses {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}
}

// doubt has the claims on a link, or all, ask anew before they answer.
func (a *Announcer) doubt(l *link, now time.Time) {
	for _, c := range a.claims {
		if l == nil || c.link == l {
			c.begin(now)
		}
	}
}

// update makes the claims what the newest View says.
func (a *Announcer) update(now time.Time) {
	mine := map[netip.Addr]*pb.AddressHolder{}
	for h := range a.cfg.Store.View().Addresses() {
		if ip, err := netip.ParseAddr(h.GetAddress()); err == nil && h.GetNodeName() == a.cfg.Node {
			mine[ip] = h
		}
	}
	for ip, c := range a.claims {
		if mine[ip] == nil {
			a.log.Info("no longer announcing an address of Services", "address", ip)
			a.leave(c)
			delete(a.claims, ip)
		}
	}
	for ip, h := range mine {
		if c := a.claims[ip]; c != nil {
			c.renumber(h.GetNumber(), now)
			continue
		}
		c := &placed{claim: claim{ip: ip, number: h.GetNumber()}}
		c.begin(now)
		a.claims[ip] = c
		a.place(c)
	}
	a.tidy()
}

// place finds the link for a claim.
func (a *Announcer) place(c *placed) {
	device, err := deviceFor(c.ip, a.cfg.NodeIPs, a.cfg.Skip)
	if err != nil {
		a.say(c, ReasonFails, err.Error())
		return
	}
	key := linkKey{device.Index, c.ip.Is4()}
	l := a.links[key]
	if l == nil {
		if l, err = openLink(device, c.ip.Is4()); err != nil {
			a.say(c, ReasonFails, err.Error())
			return
		}
		a.links[key] = l
		l.read(a.ctx, a.frames, &a.wait)
	}
	if err := l.join(c.ip); err != nil {
		l.leave(c.ip)
		a.say(c, ReasonFails, err.Error())
		return
	}
	c.link = l
}

func (a *Announcer) leave(c *placed) {
	if c.link != nil {
		c.link.leave(c.ip)
		c.link = nil
	}
}

// tidy closes the links that nothing is announced on.
func (a *Announcer) tidy() {
	used := map[*link]bool{}
	for _, c := range a.claims {
		used[c.link] = true
	}
	for key, l := range a.links {
		if !used[l] {
			_ = l.close()
			delete(a.links, key)
		}
	}
}

// drop gives up a link that is broken: what was on it is placed anew.
func (a *Announcer) drop(l *link, err error, now time.Time) {
	for key, have := range a.links {
		if have != l {
			continue
		}
		a.log.Warn("a network device fails; its addresses of Services are placed anew", "device", l.device.Name, "error", err)
		for _, c := range a.claims {
			if c.link == l {
				c.link = nil
				c.begin(now)
			}
		}
		_ = l.close()
		delete(a.links, key)
	}
}

// look looks after the links, now and then.
func (a *Announcer) look(now time.Time) {
	if now.Sub(a.looked) < lookEvery {
		return
	}
	a.looked = now
	for _, l := range slices.Collect(maps.Values(a.links)) {
		changed, err := l.look()
		switch {
		case err != nil:
			a.drop(l, err, now)
		case changed:
			a.doubt(l, now) // an address may be elsewhere before the link is back
		}
	}
	for _, c := range a.claims {
		if c.link == nil {
			a.place(c)
		}
	}
}

// hear takes a frame.
func (a *Announcer) hear(f frame, now time.Time) {
	if f.link == nil {
		return
	}
	if f.err != nil {
		a.drop(f.link, f.err, now) // nothing, if it was closed on purpose
		return
	}
	for _, m := range parse(f.raw) {
		c := a.claims[m.ip]
		if c == nil || c.link != f.link || m.from == f.link.mac {
			continue
		}
		a.send(c, c.hear(m, now))
		a.note(c)
	}
}

func (a *Announcer) tick(now time.Time) {
	alone := a.cfg.Alone()
	held := 0
	for _, c := range a.claims {
		if c.link != nil && c.link.up {
			a.send(c, c.tick(now, alone))
			a.note(c)
		}
		if c.state == holding {
			held++
		}
	}
	a.held.Store(int64(held))
}

func (a *Announcer) send(c *placed, list []out) {
	for _, o := range list {
		if err := c.link.send(o); err != nil {
			a.log.Debug("send on a segment", "address", c.ip, "device", c.link.device.Name, "error", err)
		}
	}
}

// note tells people what became of a claim.
func (a *Announcer) note(c *placed) {
	was := c.was
	c.was = c.state
	switch {
	case c.state == holding && was != holding:
		a.taken.Add(1)
		a.log.Info("announcing an address of Services", "address", c.ip, "device", c.link.device.Name, "number", c.number)
	case c.state == outdone && was != outdone:
		a.log.Warn("another node has an address of Services by a later word than this one knows", "address", c.ip, "hardware", c.conflict, "number", c.number)
	}
	switch {
	case c.state == holding && c.conflict == (mac{}):
		c.said = ""
	case c.conflict != (mac{}) && (c.state == foreign || c.state == holding):
		text := fmt.Sprintf("node %s: the machine with the hardware address %s has %s as well", a.cfg.Node, c.conflict, c.ip)
		if c.state == foreign {
			text += ", which is not announced while that is so"
		}
		if a.say(c, ReasonInUse, text+"; take it from that machine, or out of the pool") {
			a.conflicts.Add(1)
		}
	}
}

// say tells users, once for as long as it is so.
func (a *Announcer) say(c *placed, reason, text string) bool {
	if c.said == text {
		return false
	}
	c.said = text
	a.log.Warn("address of Services", "address", c.ip, "reason", reason, "message", text)
	if a.cfg.Event == nil {
		return true
	}
	for _, svc := range a.cfg.Store.View().Services() {
		for i := range svc.Status.LoadBalancer.Ingress {
			if ip, err := netip.ParseAddr(svc.Status.LoadBalancer.Ingress[i].IP); err == nil && ip == c.ip {
				a.cfg.Event(svc, reason, text)
			}
		}
	}
	return true
}

// WriteMetrics writes the figures as Prometheus reads them.
func (a *Announcer) WriteMetrics(w io.Writer) {
	for _, m := range []struct {
		name, kind, help string
		value            int64
	}{
		{"addresses_held", "gauge", "Addresses of Services that this node answers for", a.held.Load()},
		{"addresses_taken_total", "counter", "How often this node began to answer for an address of Services", a.taken.Load()},
		{"address_conflicts_total", "counter", "How often another machine was found to have an address of Services", a.conflicts.Load()},
	} {
		fmt.Fprintf(w, "# HELP timonel_agent_%s %s\n# TYPE timonel_agent_%s %s\ntimonel_agent_%s %d\n", m.name, m.help, m.name, m.kind, m.name, m.value)
	}
}
