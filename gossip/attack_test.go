package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/stretchr/testify/require"

	"timonel/test/intruder"
)

// TestCloseUnderFlood: packets and connections that come while a pool closes do not
// keep it.
func TestCloseUnderFlood(t *testing.T) {
	for range 10 {
		p, err := Open(testConfig("c1"))
		require.NoError(t, err)
		udp, err := net.Dial("udp", p.Addr())
		require.NoError(t, err)
		stop := make(chan struct{})
		var flood sync.WaitGroup
		for range 4 {
			flood.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						_, _ = udp.Write([]byte("whatever there is to be said"))
					}
				}
			})
		}
		flood.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if conn, err := net.DialTimeout("tcp", p.Addr(), time.Second); err == nil {
						conn.Close()
					}
				}
			}
		})
		require.Eventually(t, func() bool { return p.Refused()[refusedMessage] > 0 }, 30*time.Second, time.Millisecond)
		closed := make(chan error, 1)
		go func() { closed <- p.Close() }()
		select {
		case err := <-closed:
			require.NoError(t, err)
		case <-time.After(time.Minute):
			t.Fatal("the pool does not close")
		}
		close(stop)
		flood.Wait()
		udp.Close()
	}
}

// TestFirstRumour: one of whom the first that is heard is that it lives has not
// answered, and is not alive.
func TestFirstRumour(t *testing.T) {
	t.Parallel()
	c1 := watched(t, "a1")
	events := c1.Subscribe(t.Context())
	x := newIntruder(t, c1)
	silent, err := net.ListenPacket("udp", "127.0.0.1:0") // nobody else gets the port
	require.NoError(t, err)
	defer silent.Close()
	port := silent.LocalAddr().(*net.UDPAddr).Port
	limit := time.After(time.Minute)
	for inc := 1; ; {
		x.packet(aliveMessage("a1", RoleAgent, net.IPv4(127, 0, 0, 1), port, inc))
		inc++
		select {
		case e := <-events:
			if e.Member.Name != "a1" {
				continue
			}
			require.NotEqual(t, Alive, e.Member.State)
			if e.Member.State == Dead {
				return
			}
		case <-time.After(100 * time.Millisecond):
			if inc > 10 { // enough of it: now it may be found dead
				x.packet(pack(kindDead, "Incarnation", 1<<20, "Node", "a1", "From", "a1"))
			}
		case <-limit:
			t.Fatal("a1 is not found dead")
		}
	}
}

// TestLogIsBounded: memberlist warns of each message that contradicts what it knows.
func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	var log logs
	config := testConfig("c1")
	config.Logger = slog.New(slog.NewTextHandler(&log, nil))
	c1 := open(t, config)
	c2 := open(t, testConfig("c2", c1))
	await(t, c1, "c2", is(Alive))
	x := newIntruder(t, c1)
	for i := range 3000 {
		x.packet(aliveMessage("c2", RoleController, net.IPv4(127, 0, 0, 1), 1+i%100, i))
		x.packet(pack(kindDead, "Incarnation", 100+i, "Node", "c1", "From", "a2"))
		x.packet(pack(kindSuspect, "Incarnation", 100+i, "Node", "c1", "From", "a2"))
		if i%100 == 0 {
			_, _ = c1.Probe(t.Context(), "c2") // lets what was sent be read
		}
	}
	require.Eventually(t, func() bool { return strings.Count(log.String(), "level=WARN") >= maxWarnings }, 20*time.Second, 10*time.Millisecond)
	require.Less(t, strings.Count(log.String(), "\n"), 300)
	await(t, c1, "c2", is(Alive))
	m, _ := c1.Member("c2")
	require.Equal(t, c2.Addr(), m.Addr)
}

// largest is as much of a member as fits.
func largest(i int) intruder.Member {
	m := ghost(fmt.Sprintf("%0*d", maxName, i), RoleController, net.IPv4(10, byte(i>>16), byte(i>>8), byte(i)), 7946)
	left, _ := json.Marshal(meta{Role: m.Role, Cluster: "cluster-1", Tags: map[string]string{"x": ""}})
	m.Tags = map[string]string{"x": strings.Repeat("y", memberlist.MetaMaxSize-len(left))}
	return m
}

// TestAgentsPoolIsBounded: an agent has no state to know members by. What ghosts cost
// it is bounded, by number and bytes.
func TestAgentsPoolIsBounded(t *testing.T) {
	config := testConfig("a1")
	config.Role = RoleAgent
	config.MaxMembers = 1000
	a1 := open(t, config)
	x := newIntruder(t, a1)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const batch = 500
	for round := range 10 {
		var nodes []intruder.Member
		for i := range batch {
			nodes = append(nodes, largest(round*batch+i))
		}
		x.stream(x.State(nodes...))
	}
	for i := range 10_000 {
		x.packet(aliveMessage(fmt.Sprintf("ghost-%d", i), RoleAgent, net.IPv4(10, 9, byte(i/250), byte(i%250)), 7946, 1))
	}
	require.Eventually(t, func() bool { return a1.Refused()[refusedFull] > 0 }, 30*time.Second, 10*time.Millisecond)
	runtime.GC()
	runtime.ReadMemStats(&after)
	require.LessOrEqual(t, len(a1.Members()), config.MaxMembers)
	held := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("%d members, %d KiB", len(a1.Members()), held>>10)
	require.Less(t, held, int64(32<<20))

	// The cluster that it belongs to still reaches it.
	c1 := watched(t, "a1")
	require.Eventually(t, func() bool {
		_, err := c1.ProbeAddr(t.Context(), "a1", a1.Addr())
		return err == nil
	}, 20*time.Second, 10*time.Millisecond)
}

// TestSlowStreams: connections that say much, slowly, or announce all that there may
// be, take what they may together, and end.
func TestSlowStreams(t *testing.T) {
	c := guarded("a1")
	var seed atomic.Pointer[string]
	c.Seeds = func() []string {
		if s := seed.Load(); s != nil {
			return []string{*s}
		}
		return nil
	}
	c1 := open(t, c)
	most := c1.config.maxState()
	stop := make(chan struct{})
	var all sync.WaitGroup
	defer all.Wait()
	defer close(stop)
	x := newIntruder(t, c1)
	for range 3 * maxConns {
		all.Go(func() {
			for {
				conn, err := net.Dial("tcp", c1.Addr())
				if err != nil {
					return
				}
				head := binary.BigEndian.AppendUint32([]byte{kindEncrypted}, uint32(most))
				_, err = conn.Write(append(head, bytes.Repeat([]byte{1}, most-1)...))
				for err == nil {
					select {
					case <-stop:
						conn.Close()
						return
					case <-time.After(50 * time.Millisecond):
						_, err = conn.Write(nil)
						_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
						if _, end := conn.Read(make([]byte, 1)); end != nil && !isTimeout(end) {
							err = end
						}
					}
				}
				conn.Close()
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
	}
	require.Eventually(t, func() bool { return c1.Refused()[refusedConnection] > 100 }, 30*time.Second, 10*time.Millisecond)
	s := c1.transport
	require.LessOrEqual(t, s.budget.held.Load(), s.budget.most)
	s.conns.mu.Lock()
	open1 := s.conns.all
	s.conns.mu.Unlock()
	require.LessOrEqual(t, open1, maxConns)

	// Whom the state has comes in all the same: c1 calls it.
	a := testConfig("a1")
	a.Role = RoleAgent
	a1 := open(t, a)
	addr := a1.Addr()
	seed.Store(&addr)
	await(t, c1, "a1", is(Alive))
	x.packet(aliveMessage("ghost", RoleAgent, net.IPv4(127, 0, 0, 1), 1, 1))
	require.Len(t, c1.Members(), 2)
}

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}

// TestToldWhileOpening: memberlist tells of members before it has been handed out, and
// they are asked once it has.
func TestToldWhileOpening(t *testing.T) {
	t.Parallel()
	c1, c2 := open(t, testConfig("c1")), open(t, testConfig("c2"))
	p := &Pool{config: c1.config, log: c1.log, opened: make(chan struct{}), members: map[string]*entry{}, verifying: make(chan struct{}, 1)}
	p.ctx, p.stop = context.WithCancel(t.Context())
	defer p.stop()
	addr := netip.MustParseAddrPort(c2.Addr())
	c2.mu.Lock()
	raw, err := c2.meta.encode()
	c2.mu.Unlock()
	require.NoError(t, err)
	p.put(&memberlist.Node{Name: "c2", Addr: addr.Addr().AsSlice(), Port: addr.Port(), Meta: raw}, Alive)
	time.Sleep(20 * time.Millisecond) // who did not wait has asked by now
	p.list = c1.list
	close(p.opened)
	p.done.Wait()
	m, ok := p.Member("c2")
	require.True(t, ok)
	require.Equal(t, Alive, m.State)
}
