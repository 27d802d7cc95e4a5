package dns

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// TestAClientTakesNoMoreThanItsShare: who asks too much is not answered, and others are.
func TestAClientTakesNoMoreThanItsShare(t *testing.T) {
	t.Parallel()
	now := time.Now()
	s := newSources()
	s.now = func() time.Time { return now }
	greedy, other := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for range burst {
		require.True(t, s.allow(greedy))
	}
	require.False(t, s.allow(greedy))
	require.True(t, s.allow(other))
	now = now.Add(time.Second / rate * 2)
	require.True(t, s.allow(greedy))
	s.charge(greedy, costs) // no more than it may
	require.True(t, s.allow(greedy))
	require.False(t, s.allow(greedy))
	s.charge(other, 2*burst*costs)
	require.False(t, s.allow(other), "what takes long counts as many")

	var drops []func()
	for range waiting {
		drop, ok := s.hold(greedy, holdsQuery)
		require.True(t, ok)
		drops = append(drops, drop)
	}
	_, ok := s.hold(greedy, holdsQuery)
	require.False(t, ok)
	_, ok = s.hold(greedy, holdsConnection)
	require.True(t, ok, "connections are counted apart")
	_, ok = s.hold(other, holdsQuery)
	require.True(t, ok)
	drops[0]()
	_, ok = s.hold(greedy, holdsQuery)
	require.True(t, ok)
}

// TestSourcesAreBounded: addresses that are made up do not fill memory.
func TestSourcesAreBounded(t *testing.T) {
	t.Parallel()
	now := time.Now()
	s := newSources()
	s.now = func() time.Time { return now }
	for i := range 2 * maxSources {
		s.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	require.Len(t, s.known, maxSources)
	holder := netip.MustParseAddr("10.0.0.1")
	drop, ok := s.hold(holder, holdsQuery)
	require.True(t, ok)
	now = now.Add(time.Minute)
	require.True(t, s.allow(netip.MustParseAddr("10.9.9.9")))
	require.Len(t, s.known, 2, "those that are as if they had never asked are forgotten; who holds something is not")
	drop()
}

// TestManyGreedyOnesLeaveRoom: as many clients as could hold everything do not keep out one
// that asks for little.
func TestManyGreedyOnesLeaveRoom(t *testing.T) {
	t.Parallel()
	for u, all := range map[use]int{holdsQuery: waitingAll, holdsConnection: connectionsAll} {
		s := newSources()
		held := 0
		for i := range 20 {
			for {
				if _, ok := s.hold(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), u); !ok {
					break
				}
				held++
			}
		}
		require.Greater(t, held, all/4*3)
		for range few {
			_, ok := s.hold(netip.MustParseAddr("10.0.1.1"), u)
			require.True(t, ok)
		}
		_, ok := s.hold(netip.MustParseAddr("10.0.1.1"), u)
		require.False(t, ok)
	}
}

// TestAPodThatWaitsTakesNothingFromOthers: one pod has as many questions under way as
// it may, at a server that does not answer; another is answered.
func TestAPodThatWaitsTakesNothingFromOthers(t *testing.T) {
	t.Parallel()
	up := newFake(t, func(n string, q *dns.Msg) []byte {
		if q.Question[0].Name == "good.example." {
			return says(t, dns.RcodeSuccess, "@ 20 IN A 192.0.2.1")(n, q)
		}
		return nil
	})
	_, addr, _ := forwarding(t, up)
	conn, err := net.Dial("udp", addr)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	for i := range waiting + 1 {
		m := ask("x"+string(rune('a'+i%26))+string(rune('a'+i/26))+".example.", dns.TypeA)
		raw, err := m.Pack()
		require.NoError(t, err)
		_, err = conn.Write(raw)
		require.NoError(t, err)
	}
	buf := make([]byte, maxUDP)
	n, err := conn.Read(buf)
	require.NoError(t, err)
	r := new(dns.Msg)
	require.NoError(t, r.Unpack(buf[:n]))
	require.Equal(t, dns.RcodeServerFailure, r.Rcode, "one too many")
	require.Len(t, exchange(t, "udp", addr, ask("svc1.testns.svc.cluster.local.", dns.TypeA)).Answer, 1, "what is known is answered")
	c := dns.Client{Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}}, Timeout: 10 * time.Second}
	got, _, err := c.Exchange(ask("good.example.", dns.TypeA), addr)
	require.NoError(t, err)
	require.Len(t, got.Answer, 1)
}

func TestWhatIsNoQuestion(t *testing.T) {
	t.Parallel()
	_, addr := server(t, cluster(), nil)
	m := ask("svc1.testns.svc.cluster.local.", dns.TypeA)
	m.SetEdns0(4096, false)
	m.IsEdns0().SetVersion(1)
	r := exchange(t, "udp", addr, m)
	require.Equal(t, dns.RcodeBadVers, r.Rcode)
	for rcode, change := range map[int]func(*dns.Msg){
		dns.RcodeNotImplemented: func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate },
		dns.RcodeFormatError:    func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		dns.RcodeRefused:        func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR },
	} {
		m := ask("svc1.testns.svc.cluster.local.", dns.TypeA)
		change(m)
		require.Equal(t, rcode, exchange(t, "tcp", addr, m).Rcode)
	}
	m = ask("svc1.testns.svc.cluster.local.", dns.TypeA)
	m.Question[0].Qclass = dns.ClassCHAOS
	require.Equal(t, dns.RcodeRefused, exchange(t, "udp", addr, m).Rcode)

	conn, err := net.Dial("udp", addr)
	require.NoError(t, err)
	defer conn.Close()
	m = ask("svc1.testns.svc.cluster.local.", dns.TypeA)
	m.Response = true
	raw, err := m.Pack()
	require.NoError(t, err)
	for _, b := range [][]byte{raw, raw[:5], {}} { // not answered: the next is
		_, err = conn.Write(b)
		require.NoError(t, err)
	}
	m.Response, m.Id = false, 99
	raw, err = m.Pack()
	require.NoError(t, err)
	_, err = conn.Write(raw)
	require.NoError(t, err)
	require.NoError(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	buf := make([]byte, 512)
	_, err = conn.Read(buf)
	require.NoError(t, err)
	require.Equal(t, byte(99), buf[1])
}
