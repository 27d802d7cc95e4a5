package dns

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// clock is a time that a test sets.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// forwarding is a server that asks fakes, on a clock of the test's.
func forwarding(t *testing.T, list ...*fake) (*Server, string, *clock) {
	t.Helper()
	c := &clock{t: time.Now()}
	s, addr := server(t, cluster(), nil, func(s *Server) { s.forward.now = c.now })
	s.asks(list...)
	return s, addr, c
}

func TestAnswersOfOthersAreKept(t *testing.T) {
	t.Parallel()
	up := newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1", "@ 20 IN A 192.0.2.2"))
	_, addr, clock := forwarding(t, up)
	r := exchange(t, "udp", addr, ask("WWW.Example.com.", dns.TypeA))
	require.Equal(t, []string{"WWW.Example.com. 20 IN A 192.0.2.1", "WWW.Example.com. 20 IN A 192.0.2.2"}, sorted(r.Answer), "the client's letters")
	require.False(t, r.Authoritative)
	require.True(t, r.RecursionAvailable)
	clock.add(5 * time.Second)
	r = exchange(t, "tcp", addr, ask("www.example.com.", dns.TypeA))
	require.Equal(t, []string{"www.example.com. 15 IN A 192.0.2.1", "www.example.com. 15 IN A 192.0.2.2"}, sorted(r.Answer), "its time goes by")
	require.Equal(t, 1, up.asked("www.example.com."))
	firsts := map[string]bool{}
	for range 8 {
		firsts[exchange(t, "udp", addr, ask("www.example.com.", dns.TypeA)).Answer[0].String()] = true
	}
	require.Len(t, firsts, 2, "they take turns")
	clock.add(16 * time.Second)
	require.Equal(t, uint32(20), exchange(t, "udp", addr, ask("www.example.com.", dns.TypeA)).Answer[0].Header().Ttl)
	require.GreaterOrEqual(t, up.asked("www.example.com."), 2)

	m := ask("www.example.com.", dns.TypeA)
	m.RecursionDesired = false
	require.Equal(t, dns.RcodeRefused, exchange(t, "udp", addr, m).Rcode)
}

func sorted(list []dns.RR) []string {
	out := lines(list)
	for i := range out {
		for j := range i {
			if out[i] < out[j] {
				out[i], out[j] = out[j], out[i]
			}
		}
	}
	return out
}

func TestThatThereIsNothingIsKept(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		rcode   int
		records []string
		life    time.Duration
	}{
		{"no such name", dns.RcodeNameError, []string{"example. 300 IN SOA a. b. 1 2 3 4 10"}, 10 * time.Second},
		{"no such record", dns.RcodeSuccess, []string{"example. 7 IN SOA a. b. 1 2 3 4 300"}, 7 * time.Second},
		{"at most as long as an answer", dns.RcodeNameError, []string{"example. 300 IN SOA a. b. 1 2 3 4 300"}, maxTTL},
		{"it does not say how long", dns.RcodeNameError, nil, nothingTTL},
		{"an alias of nothing", dns.RcodeSuccess, []string{"@ 3 IN CNAME x.example.", "example. 300 IN SOA a. b. 1 2 3 4 10"}, 3 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			up := newFake(t, says(t, tc.rcode, tc.records...))
			_, addr, clock := forwarding(t, up)
			require.Equal(t, tc.rcode, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Rcode)
			clock.add(tc.life - time.Millisecond)
			require.Equal(t, tc.rcode, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Rcode)
			require.Equal(t, 1, up.asked("www.example."))
			clock.add(time.Millisecond)
			require.Equal(t, tc.rcode, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Rcode)
			require.Equal(t, 2, up.asked("www.example."))
		})
	}
}

// TestAnswersInReserve: while no server answers, what they said before is used, for an
// hour.
func TestAnswersInReserve(t *testing.T) {
	t.Parallel()
	up := newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1"))
	s, addr, clock := forwarding(t, up)
	require.Len(t, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Answer, 1)
	up.set(says(t, dns.RcodeServerFailure))
	clock.add(time.Minute)
	r := exchange(t, "udp", addr, ask("www.example.", dns.TypeA))
	require.Equal(t, []string{"www.example. 5 IN A 192.0.2.1"}, lines(r.Answer))
	require.Equal(t, dns.RcodeServerFailure, exchange(t, "udp", addr, ask("new.example.", dns.TypeA)).Rcode)

	up.set(func(string, *dns.Msg) []byte { return nil })
	r = exchange(t, "udp", addr, ask("www.example.", dns.TypeA))
	require.Equal(t, []string{"www.example. 5 IN A 192.0.2.1"}, lines(r.Answer), "after a while, when they say nothing")
	u := s.forward.servers(nil)[0]
	for range failures {
		u.result(net.ErrClosed)
	}
	began := time.Now()
	require.Len(t, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Answer, 1)
	require.Less(t, time.Since(began), patience, "at once, when they are known to be dead")
	clock.add(maxStale)
	require.Equal(t, dns.RcodeServerFailure, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Rcode)
}

// TestWhatIsUsedIsRenewed: an answer that is asked for again and again does not end.
func TestWhatIsUsedIsRenewed(t *testing.T) {
	t.Parallel()
	up := newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1"))
	_, addr, clock := forwarding(t, up)
	for range 4 {
		exchange(t, "udp", addr, ask("www.example.", dns.TypeA))
	}
	require.Equal(t, 1, up.asked("www.example."))
	clock.add(19 * time.Second)
	require.Equal(t, uint32(1), exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Answer[0].Header().Ttl, "nobody waits for it")
	require.Eventually(t, func() bool { return up.asked("www.example.") == 2 }, 30*time.Second, time.Millisecond)
}

// TestEqualQuestionsAreAskedOnce: hundreds who ask the same wait for one answer.
func TestEqualQuestionsAreAskedOnce(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	answer := says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1")
	up := newFake(t, func(network string, q *dns.Msg) []byte { <-release; return answer(network, q) })
	s, addr, _ := forwarding(t, up)
	var wait sync.WaitGroup
	for range 50 {
		wait.Go(func() { exchange(t, "udp", addr, ask("www.example.", dns.TypeA)) })
	}
	require.Eventually(t, func() bool {
		s.sources.mu.Lock()
		defer s.sources.mu.Unlock()
		return s.sources.holds[holdsQuery] == 50
	}, 30*time.Second, time.Millisecond)
	s.forward.mu.Lock()
	flights := len(s.forward.flights)
	s.forward.mu.Unlock()
	require.LessOrEqual(t, flights, 1)
	close(release)
	wait.Wait()
	require.LessOrEqual(t, up.asked("www.example."), 2, "the server may have been asked twice, as if its answer was lost")
}

// TestOthersAreAskedWhenOneFails has servers that are dead, deaf or of no use before
// one that is not.
func TestOthersAreAskedWhenOneFails(t *testing.T) {
	t.Parallel()
	good := says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1")
	for name, bad := range map[string]func(string, *dns.Msg) []byte{
		"says nothing": func(string, *dns.Msg) []byte { return nil },
		"refuses":      says(t, dns.RcodeRefused),
		"fails":        says(t, dns.RcodeServerFailure),
		"says garbage": func(_ string, q *dns.Msg) []byte { return []byte("garbage, and more of it") },
		"has another id": func(n string, q *dns.Msg) []byte {
			q.Id++
			return good(n, q)
		},
		"answers another question": func(n string, q *dns.Msg) []byte {
			q.Question[0].Name = "evil.example."
			return good(n, q)
		},
		"asks back": func(_ string, q *dns.Msg) []byte { raw, _ := q.Pack(); return raw },
		"is cut, and not there by TCP": func(n string, q *dns.Msg) []byte {
			if n == "tcp" {
				return nil
			}
			q.Response, q.Truncated = true, true
			raw, _ := q.Pack()
			return raw
		},
		"points to itself": func(_ string, q *dns.Msg) []byte { // a name that never ends
			q.Response = true
			raw, _ := q.Pack()
			raw[7] = 1
			return append(raw, 0xc0, byte(len(raw)), 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 1, 2, 3, 4)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second := newFake(t, bad), newFake(t, good)
			s, addr, _ := forwarding(t, first, second)
			r := exchange(t, "udp", addr, ask("www.example.", dns.TypeA))
			require.Equal(t, []string{"www.example. 20 IN A 192.0.2.1"}, lines(r.Answer))
			require.GreaterOrEqual(t, first.asked("www.example."), 1, "in their order")
			s.asks(first)
			require.Equal(t, dns.RcodeServerFailure, exchange(t, "udp", addr, ask("other.example.", dns.TypeA)).Rcode)
		})
	}
}

// TestADeadServerIsAskedLastAndComesBack: it is tried until it answers.
func TestADeadServerIsAskedLastAndComesBack(t *testing.T) {
	t.Parallel()
	first, second := newFake(t, func(string, *dns.Msg) []byte { return nil }), newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1"))
	s, addr, _ := forwarding(t, first, second)
	u := s.forward.servers(nil)[0]
	require.Equal(t, first.addr, u.addr)
	for range failures - 1 {
		require.False(t, u.result(net.ErrClosed))
	}
	require.True(t, u.result(net.ErrClosed))
	s.forward.lost(u)
	require.Equal(t, second.addr, s.forward.servers(nil)[0].addr)
	exchange(t, "udp", addr, ask("www.example.", dns.TypeA))
	require.Zero(t, first.asked("www.example."))
	first.set(says(t, dns.RcodeRefused))
	require.Eventually(t, func() bool { return s.forward.servers(nil)[0].addr == first.addr }, 30*time.Second, 10*time.Millisecond, "an answer is an answer")
}

func TestLongAnswers(t *testing.T) {
	t.Parallel()
	var records []string
	for i := range 200 {
		records = append(records, fmt.Sprintf("@ 20 IN A 192.0.2.%d", i))
	}
	whole := says(t, dns.RcodeSuccess, records...)
	up := newFake(t, func(network string, q *dns.Msg) []byte {
		raw := whole(network, q)
		if network == "udp" { // cut in the middle of a record
			raw = raw[:1000]
			raw[2] |= flagTC >> 8
		}
		return raw
	})
	_, addr, _ := forwarding(t, up)
	require.Len(t, exchange(t, "tcp", addr, ask("www.example.", dns.TypeA)).Answer, 200)
	m := ask("www.example.", dns.TypeA)
	r := exchange(t, "udp", addr, m)
	require.True(t, r.Truncated)
	require.Len(t, r.Answer, (512-headerSize-17)/16)
	m.SetEdns0(2000, false)
	r = exchange(t, "udp", addr, m)
	require.True(t, r.Truncated)
	require.NotNil(t, r.IsEdns0())
	require.Len(t, r.Answer, (2000-headerSize-17-optSize)/16)
	m.SetEdns0(65000, false)
	require.False(t, exchange(t, "udp", addr, m).Truncated)
}

// TestExternalNames: an alias of the cluster is followed to what others say.
func TestExternalNames(t *testing.T) {
	t.Parallel()
	good := says(t, dns.RcodeSuccess, "@ 20 IN CNAME edge.example.net.", "edge.example.net. 9 IN A 192.0.2.1")
	up := newFake(t, func(n string, q *dns.Msg) []byte {
		if q.Question[0].Name == "gone.example.net." {
			return says(t, dns.RcodeNameError, "example.net. 300 IN SOA a. b. 1 2 3 4 10")(n, q)
		}
		return good(n, q)
	})
	_, addr, _ := forwarding(t, up)
	for _, network := range []string{"udp", "tcp"} {
		r := exchange(t, network, addr, ask("ext-CHAIN.testns.svc.cluster.local.", dns.TypeA))
		require.Equal(t, []string{
			"ext-CHAIN.testns.svc.cluster.local. 5 IN CNAME ext.testns.svc.cluster.local.",
			"ext.testns.svc.cluster.local. 5 IN CNAME www.example.net.",
			"www.example.net. 9 IN CNAME edge.example.net.", "edge.example.net. 9 IN A 192.0.2.1", // good for as long as the shortest
		}, lines(r.Answer))
		r = exchange(t, network, addr, ask("ext-gone.testns.svc.cluster.local.", dns.TypeA))
		require.Equal(t, dns.RcodeNameError, r.Rcode, "RFC 6604: of the last name")
		require.Len(t, r.Answer, 1)
		require.Len(t, r.Ns, 1)
	}
	require.Equal(t, 1, up.asked("www.example.net."))
	up.set(says(t, dns.RcodeServerFailure))
	require.Equal(t, dns.RcodeServerFailure, exchange(t, "udp", addr, ask("ext.testns.svc.cluster.local.", dns.TypeAAAA)).Rcode)
}

func TestStubDomains(t *testing.T) {
	t.Parallel()
	usual, stub, inner := newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1")), newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.2")), newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.3"))
	s, addr := server(t, cluster(), func(c *Config) {
		c.Stubs = map[string][]netip.AddrPort{"Acme.local": {stub.addr}, "eu.acme.local.": {inner.addr}}
	})
	s.asks(usual)
	for name, want := range map[string]string{
		"www.example.": "192.0.2.1", "acme.local.": "192.0.2.2", "a.b.ACME.local.": "192.0.2.2", "xacme.local.": "192.0.2.1", "a.eu.acme.local.": "192.0.2.3",
	} {
		require.Equal(t, want, exchange(t, "udp", addr, ask(name, dns.TypeA)).Answer[0].(*dns.A).A.String(), name)
	}
}

// TestALoopIsFound: a name server of the node that asks us is not asked.
func TestALoopIsFound(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, addr := server(t, cluster(), func(c *Config) { c.ResolvConf = filepath.Join(dir, "none") })
	loop := newFake(t, nil)
	loop.set(func(_ string, q *dns.Msg) []byte {
		c := dns.Client{Timeout: 10 * time.Second}
		r, _, err := c.Exchange(q, addr)
		if err != nil {
			return nil
		}
		raw, _ := r.Pack()
		return raw
	})
	good := newFake(t, says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1"))
	s.asks(loop, good)
	s.forward.findLoops(t.Context())
	require.True(t, s.forward.all[0].looping())
	require.False(t, s.forward.all[1].looping())
	require.Len(t, exchange(t, "udp", addr, ask("www.example.", dns.TypeA)).Answer, 1)
	require.Zero(t, loop.asked("www.example."))
	own := netip.MustParseAddrPort(addr)
	s.forward.set([]netip.AddrPort{own})
	require.Empty(t, s.forward.servers(nil), "the server itself is no server to ask")
	require.Equal(t, dns.RcodeServerFailure, exchange(t, "udp", addr, ask("other.example.", dns.TypeA)).Rcode)
}

// TestTheNodesServersAreFollowed: resolv.conf may be replaced at any time.
func TestTheNodesServersAreFollowed(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	s, _ := server(t, cluster(), func(c *Config) { c.ResolvConf = path })
	require.Empty(t, s.forward.servers(nil))
	require.NoError(t, os.WriteFile(path, []byte("nameserver 127.0.0.99\nnameserver none\nnameserver 127.0.0.98\n"), 0o600))
	require.Eventually(t, func() bool {
		list := s.forward.servers(nil)
		return len(list) == 2 && list[0].addr == netip.MustParseAddrPort("127.0.0.99:53") && list[1].addr == netip.MustParseAddrPort("127.0.0.98:53")
	}, 30*time.Second, 10*time.Millisecond)
}

func TestTheCacheIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	c := newCache(64 << 10)
	now := time.Now()
	for i := range 2000 {
		m := ask(fmt.Sprintf("%d.example.", i), dns.TypeTXT)
		rr, err := dns.NewRR(fmt.Sprintf("%d.example. 20 IN TXT %q", i, strings.Repeat("x", i%250)))
		require.NoError(t, err)
		m.Answer = append(m.Answer, rr)
		e, err := newEntry(fmt.Sprint(i), m, now)
		require.NoError(t, err)
		c.put(e)
		c.put(e) // again, as after a renewal
		sum := 0
		for item := c.order.Front(); item != nil; item = item.Next() {
			sum += item.Value.(*entry).size()
		}
		require.Equal(t, sum, c.bytes)
		require.LessOrEqual(t, c.bytes, c.limit)
		if i > 0 {
			kept, _ := c.get([]byte("0"), now)
			require.NotNil(t, kept, "what is used stays")
		}
	}
	require.Greater(t, len(c.byKey), 50)
	require.Len(t, c.byKey, c.order.Len())
}
