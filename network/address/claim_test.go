package address

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// TestFrames: what is rendered is what is parsed.
func TestFrames(t *testing.T) {
	t.Parallel()
	me, other := mac{2, 0, 0, 0, 0, 1}, mac{2, 0, 0, 0, 0, 2}
	for _, text := range []string{"192.0.2.10", "2001:db8::10"} {
		ip := netip.MustParseAddr(text)
		for _, m := range []message{{verb: probes, ip: ip, from: me, number: 7}, {verb: claims, ip: ip, from: me, number: 1 << 60}} {
			for _, raw := range render(m, mac{}) {
				require.Equal(t, []message{m}, parse(raw), text)
				require.Equal(t, me, mac(raw[6:12]))
				require.NotZero(t, raw[0]&1, "it goes to everybody")
				for i := range raw {
					parse(raw[:i])
				}
			}
		}
		asker := netip.MustParseAddr("192.0.2.77")
		if ip.Is6() {
			asker = netip.MustParseAddr("2001:db8::77")
		}
		answer := render(message{verb: claims, ip: ip, from: me, asker: asker, number: 3}, other)
		require.Len(t, answer, 1)
		require.Equal(t, other, mac(answer[0][:6]))
		require.Equal(t, []message{{verb: claims, ip: ip, from: me, number: 3}}, parse(answer[0]))
	}
	// Another machine's question after an address, which also says its own.
	raw := renderARP(message{verb: probes, ip: netip.MustParseAddr("192.0.2.10"), from: other}, mac{})[0][:headerBytes+arpBytes]
	copy(raw[headerBytes+14:], []byte{192, 0, 2, 77})
	require.Equal(t, []message{
		{verb: claims, ip: netip.MustParseAddr("192.0.2.77"), from: other},
		{verb: asks, ip: netip.MustParseAddr("192.0.2.10"), from: other, asker: netip.MustParseAddr("192.0.2.77")},
	}, parse(raw))
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{"192.0.2.10", "2001:db8::10"} {
		for _, v := range []verb{probes, claims} {
			for _, raw := range render(message{verb: v, ip: netip.MustParseAddr(text), number: 9}, mac{}) {
				f.Add(raw)
			}
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, m := range parse(raw) {
			if !m.ip.IsValid() {
				t.Fatalf("%+v", m)
			}
		}
	})
}

// segment is nodes and other machines that hear one another at once, unless a node is
// paused or cut off.
type segment struct {
	now   time.Time
	nodes []*simulated
}

type simulated struct {
	claim
	mac    mac
	mine   bool // as far as it knows
	paused bool
	half   int // of the segment
	queue  []message
}

// deliver passes on what a node says, and what others answer.
func (s *segment) deliver(from *simulated, list []out) {
	for _, o := range list {
		o.from = from.mac
		for _, n := range s.nodes {
			switch {
			case n == from || n.half != from.half:
			case n.paused:
				n.queue = append(n.queue, o.message)
			default:
				s.hear(n, o.message)
			}
		}
	}
}

func (s *segment) hear(n *simulated, m message) {
	if n.mine {
		s.deliver(n, n.hear(m, s.now))
	}
}

func (s *segment) step() {
	s.now = s.now.Add(50 * time.Millisecond)
	for _, n := range s.nodes {
		if n.mine && !n.paused {
			s.deliver(n, n.tick(s.now, true))
		}
	}
}

// TestAnAddressIsNeverOnTwo: whatever nodes are told when, however they are paused, two
// never hold an address that can hear each other; and the one that is to have it gets it.
func TestAnAddressIsNeverOnTwo(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 2))
		s := &segment{now: start}
		for i := range 4 {
			s.nodes = append(s.nodes, &simulated{mac: mac{2, 0, 0, 0, 0, byte(i)}})
		}
		ip := netip.MustParseAddr("192.0.2.10")
		number, holder, healed := uint64(0), (*simulated)(nil), start
		tell := func(n *simulated) { // as the feed does
			if n != holder {
				n.mine = false
			} else if n.mine {
				n.renumber(number, s.now)
			} else {
				n.mine, n.claim = true, claim{ip: ip, number: number}
				n.begin(s.now)
			}
		}
		for range 400 {
			n := s.nodes[r.IntN(len(s.nodes))]
			switch r.IntN(12) {
			case 0:
				number++
				holder = n
				if !n.paused {
					tell(n)
				}
			case 1:
				if holder != nil && !n.paused {
					tell(n)
				}
			case 2:
				n.paused = true
			case 3:
				if n.paused { // it asks again before it believes what it knew
					n.paused = false
					n.begin(s.now)
					for _, m := range n.queue {
						s.hear(n, m)
					}
					n.queue = nil
				}
			case 4:
				if r.IntN(3) == 0 {
					n.half = 1 - n.half
					healed = s.now
				}
			default:
				s.step()
			}
			for half := range 2 {
				var holders []string
				for _, n := range s.nodes {
					if n.mine && !n.paused && n.half == half && n.state == holding {
						holders = append(holders, fmt.Sprintf("%s by %d", n.mac, n.number))
					}
				}
				// Halves that were joined may need until the next question of one of them.
				if len(holders) > 1 && s.now.Sub(healed) > doubtEvery+100*time.Millisecond {
					t.Fatalf("seed %d: %v", seed, holders)
				}
			}
		}
		if holder == nil {
			continue
		}
		for _, n := range s.nodes {
			if n.paused {
				n.paused, n.queue = false, nil
				n.begin(s.now)
			}
			n.half = 0
			tell(n)
		}
		for range 100 {
			s.step()
		}
		require.Equal(t, holding, holder.state, "seed %d", seed)
	}
}

// TestAnotherMachineHasIt: it is not taken from it, and taken once it is free.
func TestAnotherMachineHasIt(t *testing.T) {
	t.Parallel()
	c := &claim{ip: netip.MustParseAddr("192.0.2.10"), number: 4}
	c.begin(start)
	require.Equal(t, probes, c.tick(start, false)[0].verb)
	them := message{verb: claims, ip: c.ip, from: mac{6}}
	require.Empty(t, c.hear(them, start))
	require.Equal(t, foreign, c.state)
	require.Empty(t, c.hear(message{verb: asks, ip: c.ip, asker: netip.MustParseAddr("192.0.2.1")}, start), "it answers")
	require.Empty(t, c.tick(start.Add(againForeign-1), false))
	now := start.Add(againForeign)
	for c.state != holding {
		for _, o := range c.tick(now, false) {
			if c.state != holding {
				require.Equal(t, probes, o.verb)
			}
		}
		now = now.Add(probeEvery)
	}
	require.Zero(t, c.conflict)
	// One that comes later is told, and not for ever.
	require.Len(t, c.hear(them, now), 1)
	require.Empty(t, c.hear(them, now))
	require.Equal(t, holding, c.state)
}
