package dns

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// forwardTimeout is for how long servers are asked. Clients ask again after 5 s.
	forwardTimeout = 4500 * time.Millisecond
	// patience is how long a client waits for servers when there is an answer of
	// before (RFC 8767 says 1.8 s).
	patience = 1800 * time.Millisecond
	// reviveEvery is how often a server that did not answer is tried.
	reviveEvery = 500 * time.Millisecond
	// loopName is where names lie that tell whether a server asks us.
	loopName = "timonel-loop."
)

var errNoServers = errors.New("there is no server to ask")

// forwarder answers names that are not the cluster's, by asking other servers.
type forwarder struct {
	cache *cache
	log   *slog.Logger
	now   func() time.Time
	limit int // flights
	fell  chan struct{}
	loop  string // the name that tells of a loop

	mu      sync.Mutex
	own     []netip.AddrPort
	all     []*upstream
	stubs   map[string][]*upstream // by domain in lower case, with a dot at its end
	flights map[string]*flight
	wait    sync.WaitGroup // of flights; to be waited for when nobody starts any more
}

// flight is one question on its way, for all that ask it.
type flight struct {
	done  chan struct{}
	entry *entry
	err   error
}

func newForwarder(own []netip.AddrPort, stubs map[string][]netip.AddrPort, cacheBytes, limit int, log *slog.Logger) *forwarder {
	token := make([]byte, 16)
	_, _ = rand.Read(token) // never fails
	f := &forwarder{
		cache: newCache(cacheBytes), log: log, now: time.Now, limit: limit, fell: make(chan struct{}, 1), own: own,
		loop: hex.EncodeToString(token) + "." + loopName, stubs: make(map[string][]*upstream), flights: make(map[string]*flight),
	}
	for domain, addrs := range stubs {
		for _, a := range addrs {
			if !slices.Contains(own, a) {
				f.stubs[dns.CanonicalName(domain)] = append(f.stubs[dns.CanonicalName(domain)], &upstream{addr: a})
			}
		}
	}
	return f
}

// set gives the servers of all names without servers of their own, in the order of
// preference. What is known of those that stay is kept.
func (f *forwarder) set(addrs []netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var next []*upstream
	for _, a := range addrs {
		if slices.Contains(f.own, a) {
			f.log.Warn("the node's name server is this server itself: it is not asked", "server", a)
			continue
		}
		if i := slices.IndexFunc(f.all, func(u *upstream) bool { return u.addr == a }); i >= 0 {
			next = append(next, f.all[i])
		} else if !slices.ContainsFunc(next, func(u *upstream) bool { return u.addr == a }) {
			next = append(next, &upstream{addr: a})
		}
	}
	if len(next) == 0 {
		f.log.Warn("there is no name server for names outside the cluster: they cannot be looked up; give one in the node's resolv.conf")
	}
	f.all = next
}

// servers are those of a name, those that answer first.
func (f *forwarder) servers(labels []string) []*upstream {
	f.mu.Lock()
	list := f.all
	for i := range labels {
		if s, ok := f.stubs[strings.Join(labels[i:], ".")+"."]; ok {
			list = s
			break
		}
	}
	f.mu.Unlock()
	var up, down []*upstream
	for _, u := range list {
		switch {
		case u.looping():
		case u.down():
			down = append(down, u)
		default:
			up = append(up, u)
		}
	}
	return append(up, down...)
}

// key is what makes questions equal.
func key(buf []byte, q *query) []byte {
	b := buf[:0]
	for _, l := range q.labels {
		b = append(append(b, byte(len(l))), l...)
	}
	b = append(b, 0)
	b = append(b, q.question[len(q.question)-4:]...)
	flags := byte(0)
	if q.do {
		flags |= 1
	}
	if q.cd {
		flags |= 2
	}
	return append(b, flags)
}

// kept is the answer that is there without asking anybody, nil if there is none that
// is good.
func (f *forwarder) kept(q *query) *entry {
	var buf [maxName + 8]byte
	k := key(buf[:], q)
	now := f.now()
	e, renew := f.cache.get(k, now)
	if e == nil || !e.fresh(now) {
		return nil
	}
	if renew {
		f.start(string(k), q, f.limit/2)
	}
	return e
}

// resolve is the answer to a query. It asks others unless there is one that is good,
// and uses one that is not good any more when they do not answer in time.
func (f *forwarder) resolve(ctx context.Context, q *query) (*entry, error) {
	var buf [maxName + 8]byte
	k := key(buf[:], q)
	old, _ := f.cache.get(k, f.now())
	if old != nil && old.fresh(f.now()) {
		return old, nil
	}
	fl := f.start(string(k), q, f.limit)
	if fl == nil {
		if old != nil {
			return old, nil
		}
		return nil, errors.New("too many questions wait for answers")
	}
	var late <-chan time.Time
	if old != nil {
		wait := patience
		if servers := f.servers(q.labels); len(servers) == 0 || servers[0].down() {
			wait = 0
		}
		timer := time.NewTimer(wait)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-late:
		return old, nil
	case <-fl.done:
	}
	if fl.err != nil && old != nil {
		return old, nil
	}
	return fl.entry, fl.err
}

// start returns the flight of a question, a new one when there is none and there are
// not limit of them.
func (f *forwarder) start(k string, q *query, limit int) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.flights[k]; fl != nil {
		return fl
	}
	if len(f.flights) >= limit {
		return nil
	}
	fl := &flight{done: make(chan struct{})}
	f.flights[k] = fl
	question, do, cd, labels := questionOf(q), q.do, q.cd, q.labels
	f.wait.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), forwardTimeout)
		defer cancel()
		fl.entry, fl.err = f.fetch(ctx, k, question, labels, do, cd)
		f.mu.Lock()
		delete(f.flights, k)
		f.mu.Unlock()
		close(fl.done)
	})
	return fl
}

func (f *forwarder) fetch(ctx context.Context, k string, question dns.Question, labels []string, do, cd bool) (*entry, error) {
	servers := f.servers(labels)
	if len(servers) == 0 {
		return nil, errNoServers
	}
	m, err := askAll(ctx, servers, question, do, cd, f.lost)
	if err != nil {
		return nil, err
	}
	e, err := newEntry(k, m, f.now())
	if err != nil {
		return nil, err
	}
	f.cache.put(e)
	return e, nil
}

// questionOf is a query's question, in lower case.
func questionOf(q *query) dns.Question {
	wire := append(appendLabels(nil, q.labels...), 0)
	text, _, _ := dns.UnpackDomainName(wire, 0) // it was read before
	return dns.Question{Name: text, Qtype: q.kind, Qclass: q.class}
}

// lost is told of a server that does not answer any more.
func (f *forwarder) lost(u *upstream) {
	f.log.Warn("a name server does not answer: others are asked first", "server", u.addr)
	select {
	case f.fell <- struct{}{}:
	default:
	}
}

// run tries servers that did not answer until they do.
func (f *forwarder) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.fell:
		}
		for f.revive(ctx) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(reviveEvery):
			}
		}
	}
}

// revive asks those that did not answer, and says whether some still do not.
func (f *forwarder) revive(ctx context.Context) (more bool) {
	f.mu.Lock()
	list := slices.Clone(f.all)
	for _, s := range f.stubs {
		list = append(list, s...)
	}
	f.mu.Unlock()
	var wait sync.WaitGroup
	var mu sync.Mutex
	for _, u := range list {
		if !u.down() {
			continue
		}
		wait.Go(func() {
			_, err := u.ask(ctx, dns.Question{Name: ".", Qtype: dns.TypeNS, Qclass: dns.ClassINET}, false, false)
			if err != nil && !errors.As(err, new(*answerError)) {
				mu.Lock()
				more = true
				mu.Unlock()
				return
			}
			u.result(nil)
			f.log.Info("a name server answers again", "server", u.addr)
		})
	}
	wait.Wait()
	return more
}

// findLoops asks each server for a name that nobody has: who asks us for it would ask
// us for everything, and we him.
func (f *forwarder) findLoops(ctx context.Context) {
	f.mu.Lock()
	list := slices.Clone(f.all)
	f.mu.Unlock()
	var wait sync.WaitGroup
	for i, u := range list {
		wait.Go(func() {
			name := fmt.Sprintf("%d.%s", i, f.loop)
			_, _ = u.ask(ctx, dns.Question{Name: name, Qtype: dns.TypeHINFO, Qclass: dns.ClassINET}, false, false)
		})
	}
	wait.Wait()
}

// looped is told of each name that is to be forwarded, and says whether it is one of
// findLoops'.
func (f *forwarder) looped(q *query) bool {
	if len(q.labels) != 3 || q.labels[1]+"."+q.labels[2]+"." != f.loop {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, u := range f.all {
		if fmt.Sprint(i) == q.labels[0] && !u.looping() {
			u.mu.Lock()
			u.loops = true
			u.mu.Unlock()
			f.log.Error("a name server of the node asks this server: it is not asked any more; give the node one that does not (agent --resolv-conf)", "server", u.addr)
		}
	}
	return true
}

// addrPorts are name servers' addresses at port 53.
func addrPorts(servers []string) (out []netip.AddrPort) {
	for _, s := range servers {
		if ip, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
			out = append(out, netip.AddrPortFrom(ip.Unmap(), 53))
		} else if host, port, err := net.SplitHostPort(s); err == nil {
			if ap, err := netip.ParseAddrPort(net.JoinHostPort(host, port)); err == nil {
				out = append(out, ap)
			}
		}
	}
	return out
}
