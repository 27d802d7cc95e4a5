package dns

import (
	"container/list"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxTTL is how long an answer of another server is kept as good, what it says of
	// itself notwithstanding: as CoreDNS does in clusters.
	maxTTL = 30 * time.Second
	// nothingTTL is how long an answer is kept that there is nothing, where it does
	// not say.
	nothingTTL = 5 * time.Second
	// maxStale is how long an answer may be used that is not good any more, while no
	// server gives another (RFC 8767). staleTTL is for how long clients may use it.
	maxStale = time.Hour
	staleTTL = 5 * time.Second
	// entryOverhead is what an answer takes besides its bytes.
	entryOverhead = 300
)

// entry is an answer of another server as it is sent on: its question is in lower
// case, and it has no id and no EDNS.
type entry struct {
	key  string
	wire []byte
	ttls []uint16 // where in wire the lifetimes of records are
	sets []set
	from time.Time
	life time.Duration
	uses int // while it is good, under the cache's lock
}

// set are records that differ by address alone; which is the first changes.
type set struct {
	at   []uint16 // where in wire the addresses are
	size int
}

// newEntry makes an entry of an answer to a question, whoever gave it.
func newEntry(key string, m *dns.Msg, now time.Time) (*entry, error) {
	out := &dns.Msg{MsgHdr: m.MsgHdr, Question: m.Question, Answer: m.Answer, Ns: m.Ns, Compress: true}
	out.Id, out.RecursionDesired, out.Authoritative, out.Truncated = 0, false, false, false
	if out.Rcode > 0xf {
		return nil, fmt.Errorf("answers %s", dns.RcodeToString[out.Rcode])
	}
	for _, rr := range m.Extra {
		if k := rr.Header().Rrtype; k != dns.TypeOPT && k != dns.TypeTSIG && k != dns.TypeSIG {
			out.Extra = append(out.Extra, rr)
		}
	}
	wire, err := out.Pack()
	if err != nil {
		return nil, fmt.Errorf("an answer that cannot be sent on: %w", err)
	}
	if len(wire) > maxTCP {
		return nil, errors.New("an answer that is too long")
	}
	e := &entry{key: key, wire: wire, from: now, life: lifetime(m)}
	// A record that says less than its kind does is read, and written as one that nobody
	// can read.
	if err := new(dns.Msg).Unpack(wire); err != nil {
		return nil, fmt.Errorf("an answer that cannot be sent on: %w", err)
	}
	at := skipName(wire, headerSize) + 4
	answers, records := int(binary.BigEndian.Uint16(wire[6:])), len(out.Answer)+len(out.Ns)+len(out.Extra)
	var last uint16
	for i := range records {
		owner := at
		if at = skipName(wire, at); at < 0 || at+10 > len(wire) {
			return nil, errors.New("an answer that cannot be read again")
		}
		kind, size := binary.BigEndian.Uint16(wire[at:]), int(binary.BigEndian.Uint16(wire[at+8:]))
		e.ttls = append(e.ttls, uint16(at+4))
		if i < answers && (kind == dns.TypeA || kind == dns.TypeAAAA) {
			// Names are compressed, so that equal owners are equal bytes but for the first.
			same := len(e.sets) > 0 && last == kind && out.Answer[i].Header().Name == out.Answer[i-1].Header().Name
			if !same {
				e.sets = append(e.sets, set{size: size})
			}
			s := &e.sets[len(e.sets)-1]
			s.at = append(s.at, uint16(at+10))
		}
		if last = 0; i < answers {
			last = kind
		}
		if at += 10 + size; at > len(wire) || at <= owner {
			return nil, errors.New("an answer that cannot be read again")
		}
	}
	return e, nil
}

// lifetime is how long an answer is good: as long as its shortest record, or as long
// as its SOA says that there is nothing.
func lifetime(m *dns.Msg) time.Duration {
	life := maxTTL
	least := func(seconds uint32) { life = min(life, time.Duration(seconds)*time.Second) }
	switch {
	case m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError:
		return 0
	case m.Rcode == dns.RcodeNameError || !answers(m):
		life = nothingTTL
		for _, rr := range m.Ns {
			if soa, ok := rr.(*dns.SOA); ok {
				life = maxTTL
				least(soa.Hdr.Ttl)
				least(soa.Minttl)
			}
		}
	}
	for _, rr := range m.Answer {
		least(rr.Header().Ttl)
	}
	return life
}

// answers says whether an answer has a record of the kind that was asked for.
func answers(m *dns.Msg) bool {
	for _, rr := range m.Answer {
		if k := rr.Header().Rrtype; k == m.Question[0].Qtype || m.Question[0].Qtype == dns.TypeANY {
			return true
		}
	}
	return false
}

func (e *entry) size() int { return len(e.wire) + len(e.key) + 2*len(e.ttls) + entryOverhead }

func (e *entry) fresh(now time.Time) bool { return now.Sub(e.from) < e.life }

// usable says whether an answer may be used when there is no other.
func (e *entry) usable(now time.Time) bool {
	return e.life > 0 && now.Sub(e.from) < e.life+maxStale
}

// write is the answer to one client: with its id and its letters, lifetimes as they
// are by now, the addresses in another order each time, and cut to what it takes.
func (e *entry) write(buf []byte, q *query, now time.Time, limit int, turn uint32) []byte {
	b := append(buf[:0], e.wire...)
	binary.BigEndian.PutUint16(b, q.id)
	flags := binary.BigEndian.Uint16(b[2:])&(flagAD|0xf) | flagQR | flagRA
	if !q.ad && !q.do {
		flags &^= flagAD
	}
	if q.rd {
		flags |= flagRD
	}
	if q.cd {
		flags |= flagCD
	}
	binary.BigEndian.PutUint16(b[2:], flags)
	copy(b[headerSize:], q.question)
	age := now.Sub(e.from)
	for _, at := range e.ttls {
		left := time.Duration(binary.BigEndian.Uint32(b[at:]))*time.Second - age
		switch {
		case age >= e.life && e.life > 0:
			left = staleTTL
		case left > e.life-age:
			left = e.life - age
		}
		binary.BigEndian.PutUint32(b[at:], uint32(max((left+time.Second-1)/time.Second, 0)))
	}
	for _, s := range e.sets {
		if n := len(s.at); n > 1 {
			for i, at := range s.at {
				from := s.at[(i+int(turn%uint32(n)))%n]
				copy(b[at:int(at)+s.size], e.wire[from:int(from)+s.size])
			}
		}
	}
	if q.edns {
		limit -= optSize
	}
	if len(b) > limit {
		b = e.cut(b, limit)
	}
	if q.edns {
		b = appendOPT(b, q, 0)
	}
	return b
}

// cut leaves the answers that fit.
func (e *entry) cut(b []byte, limit int) []byte {
	have := int(binary.BigEndian.Uint16(b[6:]))
	end, kept := skipName(b, headerSize)+4, 0
	for _, at := range e.ttls[:have] {
		next := int(at) + 6 + int(binary.BigEndian.Uint16(b[at+4:]))
		if next > limit {
			b[2] |= flagTC >> 8
			break
		}
		end, kept = next, kept+1
	}
	binary.BigEndian.PutUint16(b[6:], uint16(kept))
	binary.BigEndian.PutUint32(b[8:], 0)
	return b[:end]
}

// cache keeps answers, those used last, up to a number of bytes.
type cache struct {
	limit int

	mu    sync.Mutex
	bytes int
	byKey map[string]*list.Element // of *entry
	order list.List                // used last first
}

func newCache(limit int) *cache {
	c := &cache{limit: limit, byKey: make(map[string]*list.Element)}
	c.order.Init()
	return c
}

// get returns an answer that is good or may be used, and whether it is worth to be
// asked for again before it ends.
func (c *cache) get(key []byte, now time.Time) (e *entry, renew bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	item := c.byKey[string(key)]
	if item == nil {
		return nil, false
	}
	e = item.Value.(*entry)
	if !e.usable(now) {
		c.remove(item)
		return nil, false
	}
	c.order.MoveToFront(item)
	e.uses++
	left := e.life - now.Sub(e.from)
	return e, left > 0 && left < e.life/10 && e.uses > 2
}

// put keeps an answer if it may be used again.
func (c *cache) put(e *entry) {
	if e.life <= 0 || e.size() > c.limit/16 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.byKey[e.key]; old != nil {
		c.remove(old)
	}
	c.byKey[e.key] = c.order.PushFront(e)
	for c.bytes += e.size(); c.bytes > c.limit; {
		c.remove(c.order.Back())
	}
}

func (c *cache) remove(item *list.Element) {
	e := c.order.Remove(item).(*entry)
	delete(c.byKey, e.key)
	c.bytes -= e.size()
}
