package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// ErrUnknownMember means that the pool knows nobody of that name.
var ErrUnknownMember = errors.New("not a member of the gossip pool")

// ErrNoAnswer means that a probe was not answered in time.
var ErrNoAnswer = errors.New("no answer to a gossip probe")

// Pool is this process' membership in a pool. Its methods may be called from
// many goroutines.
type Pool struct {
	config Config
	log    *slog.Logger
	list   *memberlist.Memberlist // set when opened is closed: it calls us before
	opened chan struct{}
	ring   ring

	transport *sealed // what comes passes through it

	ctx  context.Context
	stop context.CancelFunc
	done sync.WaitGroup

	mu          sync.Mutex // never held while calling memberlist, which calls us with its own lock held
	addr        string
	meta        meta
	members     map[string]*entry
	subscribers map[*subscriber]struct{}
	problems    map[string]problem
	refused     map[string]uint64 // by reason
	verifying   chan struct{}     // holds one for each member that is being verified

	closing sync.Mutex // one Leave or Close at a time
	closed  bool
}

// Open starts to listen, and calls the members in c.Join until they are there.
// It does not wait for them.
func Open(c Config) (*Pool, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	p := &Pool{
		config:      c,
		opened:      make(chan struct{}),
		log:         c.Logger.With("room", "gossip"),
		meta:        meta{Role: c.Role, Cluster: c.ClusterID, Tags: c.Tags},
		members:     make(map[string]*entry),
		subscribers: make(map[*subscriber]struct{}),
		problems:    make(map[string]problem),
		refused:     make(map[string]uint64),
		verifying:   make(chan struct{}, verifiedAtOnce),
	}
	p.ctx, p.stop = context.WithCancel(context.Background())
	if err := p.ring.set(c.Keys); err != nil {
		return nil, err
	}
	inner := c.transport
	port, err := c.Port, error(nil)
	if inner == nil {
		inner, port, err = listen(&c, p)
	}
	var list *memberlist.Memberlist
	if err == nil {
		p.transport = newSealed(p, inner)
		if list, err = memberlist.Create(c.memberlist(p, p.transport, port)); err != nil {
			err = errors.Join(err, p.transport.Shutdown())
		}
	}
	if err != nil {
		p.stop()
		where := net.JoinHostPort(c.BindAddr, fmt.Sprint(c.Port))
		if strings.Contains(err.Error(), "address already in use") {
			return nil, fmt.Errorf("gossip: %s is in use by another program: stop it, or choose another port or address", where)
		}
		return nil, fmt.Errorf("gossip: listen on %s: %w", where, err)
	}
	p.list = list
	close(p.opened)
	p.done.Go(func() { p.rejoin(p.ctx) })
	if *c.Watch {
		p.done.Go(func() { p.watch(p.ctx) })
	}
	return p, nil
}

// Name is this member's own.
func (p *Pool) Name() string { return p.config.Name }

// Addr is the host:port that others reach this member at.
func (p *Pool) Addr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addr
}

// Members returns everybody that is known, this member included, by name. The
// dead are among them for as long as Timings.KeepDead.
func (p *Pool) Members() []Member {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Member, 0, len(p.members))
	for _, name := range slices.Sorted(maps.Keys(p.members)) {
		out = append(out, p.members[name].Member)
	}
	return out
}

// Member returns one member by name.
func (p *Pool) Member(name string) (Member, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.members[name]
	if m == nil {
		return Member{}, false
	}
	return m.Member, true
}

// SetKeys replaces the keys: the first seals from now on, any opens.
func (p *Pool) SetKeys(keys [][]byte) error {
	if err := checkKeys(keys); err != nil {
		return fmt.Errorf("gossip: set keys: %w", err)
	}
	if p.ring.has(keys) {
		return nil
	}
	return p.ring.set(keys)
}

// SetTags replaces this member's tags and tells the others. Tags that do not fit
// are refused and change nothing.
func (p *Pool) SetTags(tags map[string]string) error {
	next := meta{Role: p.config.Role, Cluster: p.config.ClusterID, Tags: maps.Clone(tags)}
	if _, err := next.encode(); err != nil {
		return err
	}
	p.mu.Lock()
	same := maps.Equal(p.meta.Tags, next.Tags)
	p.meta.Tags = next.Tags
	p.mu.Unlock()
	if same {
		return nil
	}
	p.closing.Lock()
	defer p.closing.Unlock()
	if p.closed {
		return errors.New("gossip: set tags: the pool is closed")
	}
	// Waiting for the broadcast is of no use: whoever misses it learns the tags
	// when the two compare all they know.
	if err := p.list.UpdateNode(p.config.Timings.GossipInterval * 5); err != nil {
		p.log.Debug("new tags are not broadcast yet", "err", err)
	}
	return nil
}

// Probe pings a member directly, past all gossip, and returns how long the
// answer took. It fails with [ErrUnknownMember] or [ErrNoAnswer], the latter
// after Timings.ProbeTimeout at most.
func (p *Pool) Probe(ctx context.Context, name string) (time.Duration, error) {
	m, ok := p.Member(name)
	if !ok {
		return 0, fmt.Errorf("probe %s: %w", name, ErrUnknownMember)
	}
	return p.ProbeAddr(ctx, name, m.Addr)
}

// ProbeAddr pings the member called name at a given host:port, known or not.
func (p *Pool) ProbeAddr(ctx context.Context, name, addr string) (time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("probe %s at %s: %w", name, addr, err)
	}
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return 0, fmt.Errorf("probe %s at %s: %w", name, addr, err)
	}
	rtt, err := p.list.Ping(name, to)
	var silent memberlist.NoPingResponseError
	if errors.As(err, &silent) {
		return 0, fmt.Errorf("probe %s at %s: %w in %s", name, addr, ErrNoAnswer, p.config.Timings.ProbeTimeout)
	}
	if err != nil {
		return 0, fmt.Errorf("probe %s at %s: %w: %w", name, addr, ErrNoAnswer, err)
	}
	return rtt, nil
}

// Leave tells the others that this member goes on purpose, and waits until one
// of them has heard it, timeout at most. The pool must be closed afterwards.
func (p *Pool) Leave(timeout time.Duration) error {
	p.closing.Lock()
	defer p.closing.Unlock()
	if p.closed {
		return nil
	}
	p.mu.Lock()
	p.meta.Left = true
	p.mu.Unlock()
	start := time.Now()
	if err := p.list.UpdateNode(max(timeout/2, time.Millisecond)); err != nil {
		p.log.Debug("leaving is not broadcast yet", "err", err)
	}
	if err := p.list.Leave(max(timeout-time.Since(start), time.Millisecond)); err != nil {
		return fmt.Errorf("gossip: leave: %w", err)
	}
	return nil
}

// Close stops to listen and to ask. Without [Pool.Leave] before, the others will
// find this member dead.
func (p *Pool) Close() error {
	p.closing.Lock()
	defer p.closing.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	p.mu.Lock()
	p.stop() // from here on put starts nobody that would be waited for
	p.mu.Unlock()
	p.done.Wait()
	err := p.list.Shutdown()
	p.mu.Lock()
	for s := range p.subscribers {
		s.cancel()
	}
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("gossip: close: %w", err)
	}
	return nil
}
