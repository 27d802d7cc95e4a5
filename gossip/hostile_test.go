package gossip

import (
	"bytes"
	"compress/lzw"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/test/intruder"
)

// stranger speaks to a pool with a key of it.
type stranger struct {
	*intruder.Intruder
	t    *testing.T
	addr string
}

func newIntruder(t *testing.T, p *Pool) *stranger {
	x, err := intruder.New(testKey, "cluster-1")
	require.NoError(t, err)
	t.Cleanup(func() { x.Close() })
	return &stranger{x, t, p.Addr()}
}

func (x *stranger) packet(message []byte) { require.NoError(x.t, x.Packet(x.addr, message)) }

// stream sends a message over a connection and returns when the other has closed it.
func (x *stranger) stream(message []byte) {
	require.NoError(x.t, x.Stream(x.addr, message, 20*time.Second))
}

// pack is a message of a kind.
func pack(kind byte, fields ...any) []byte {
	return append([]byte{kind}, intruder.Record(fields...)...)
}

// speaker makes messages, and sends none.
func speaker() *intruder.Intruder {
	x, err := intruder.New(testKey, "cluster-1")
	if err != nil {
		panic(err)
	}
	x.Close()
	return x
}

var said = speaker()

func aliveMessage(name, role string, ip net.IP, port, incarnation int) []byte {
	return said.Alive(intruder.Member{Name: name, Role: role, IP: ip, Port: port, Incarnation: incarnation,
		Tags: map[string]string{"raft": "1", "cluster": "1"}})
}

func ghost(name, role string, ip net.IP, port int) intruder.Member {
	return intruder.Member{Name: name, Role: role, IP: ip, Port: port, Incarnation: 7}
}

// watched is a pool that admits the names that it is given, at 127.0.0.1.
func watched(t *testing.T, names ...string) *Pool { return open(t, guarded(names...)) }

// guarded is the config of one.
func guarded(names ...string) Config {
	c := testConfig("c1")
	c.MaxMembers = 100
	c.Admit = func(name, role string, addr netip.AddrPort) error {
		for _, n := range names {
			if n == name && role == RoleAgent && addr.Addr() == netip.MustParseAddr("127.0.0.1") {
				return nil
			}
		}
		return fmt.Errorf("there is no Node %q at %s", name, addr)
	}
	return c
}

// TestGhosts is what took a leader to 1 GB and stranded an agent: names that there
// are not, by everybody who has the key.
func TestGhosts(t *testing.T) {
	c1 := watched(t, "a1")
	events := 0
	go func() {
		for range c1.Subscribe(t.Context()) {
			events++
		}
	}()
	x := newIntruder(t, c1)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range 2000 {
		role := []string{RoleAgent, RoleController}[i%2]
		x.packet(aliveMessage(fmt.Sprintf("ghost-%d", i), role, net.IPv4(10, 9, byte(i/250), byte(i%250)), 7946, 1))
	}
	x.packet(aliveMessage("c2", RoleController, net.IPv4(127, 0, 0, 1), 1, 1))
	x.packet(aliveMessage("a1", RoleController, net.IPv4(127, 0, 0, 1), 1, 1))
	x.packet(aliveMessage("a1", RoleAgent, net.IPv4(10, 9, 9, 9), 1, 1))
	var nodes []intruder.Member
	for i := range 90 {
		nodes = append(nodes, ghost(fmt.Sprintf("ghost-%d", i), RoleController, net.IPv4(10, 9, 0, byte(i)), 7946))
	}
	x.stream(x.State(nodes...))
	require.Eventually(t, func() bool { return c1.Refused()[refusedName] > 500 }, 10*time.Second, 10*time.Millisecond)
	runtime.GC()
	runtime.ReadMemStats(&after)
	require.Less(t, int64(after.HeapAlloc)-int64(before.HeapAlloc), int64(8<<20))
	require.Len(t, c1.Members(), 1, "%v", c1.Members())
	require.Equal(t, 1, c1.list.NumMembers(), "memberlist remembers none either")
	require.LessOrEqual(t, len(c1.Problems()), 2)

	// Whom the state has is let in, and gone when the state has it no more.
	a := testConfig("a1", c1)
	a.Role = RoleAgent
	open(t, a)
	await(t, c1, "a1", is(Alive))
}

// TestRumours: nobody is dead or alive because somebody says so.
func TestRumours(t *testing.T) {
	c1 := watched(t, "a1", "a2")
	a := testConfig("a1", c1)
	a.Role = RoleAgent
	a1 := open(t, a)
	await(t, c1, "a1", is(Alive))
	x := newIntruder(t, c1)
	for inc := range 20 {
		x.packet(pack(kindDead, "Incarnation", 100+inc, "Node", "a1", "From", "a2"))
		x.packet(pack(kindSuspect, "Incarnation", 200+inc, "Node", "a1", "From", "a2"))
		x.packet(pack(kindDead, "Incarnation", 100+inc, "Node", "c1", "From", "a2"))
	}
	// As high as it goes: a1 cannot deny it any more.
	x.packet(pack(kindDead, "Incarnation", 1<<32-1, "Node", "a1", "From", "a2"))
	deadline := time.Now().Add(3 * time.Second)
	for time.Now().Before(deadline) {
		m, ok := c1.Member("a1")
		require.True(t, ok)
		require.NotContains(t, []State{Dead, Left}, m.State)
		time.Sleep(20 * time.Millisecond) // it must stay so for a while
	}
	await(t, c1, "a1", is(Alive))
	require.NoError(t, a1.Close())
	await(t, c1, "a1", func(m Member) bool { return m.State == Dead || m.State == Suspect })
	addr, err := netip.ParseAddrPort(a1.Addr())
	require.NoError(t, err)
	ctx := t.Context()
	events := c1.Subscribe(ctx)
	for inc := range 50 {
		x.packet(aliveMessage("a1", RoleAgent, net.IPv4(127, 0, 0, 1), int(addr.Port()), 1<<32-100+inc))
	}
	deadline = time.Now().Add(2 * time.Second)
	for time.Now().Before(deadline) {
		select {
		case e := <-events:
			if e.Member.Name == "a1" {
				require.NotEqual(t, Alive, e.Member.State, "nobody but a1 can say that it lives")
			}
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// bomb is n bytes of little when compressed.
func bomb(n int) []byte {
	var b bytes.Buffer
	w := lzw.NewWriter(&b, lzw.LSB, 8)
	_, _ = w.Write(make([]byte, n))
	_ = w.Close()
	out := []byte{kindCompressed, 0x82, 0xa4, 'A', 'l', 'g', 'o', 0, 0xa3, 'B', 'u', 'f', 0xdb}
	out = binary.BigEndian.AppendUint32(out, uint32(b.Len()))
	return append(out, b.Bytes()...)
}

// TestMalformed: what is announced, nested or packed to be huge is refused before
// anything is made of it, and the pool goes on.
func TestMalformed(t *testing.T) {
	c1 := watched(t)
	x := newIntruder(t, c1)
	huge := pack(kindPushPull, "Nodes", 1<<40, "UserStateLen", 0)
	user := pack(kindPushPull, "Nodes", 0, "UserStateLen", 1<<30)
	long := append(pack(kindAlive)[:1], 0x81, 0xa4, 'N', 'o', 'd', 'e', 0xdb, 0x7f, 0xff, 0xff, 0xff)
	nested := append([]byte{kindAlive, 0x81, 0xa1, 'x'}, bytes.Repeat([]byte{0x91}, 2000)...)
	for range 20 {
		for _, message := range [][]byte{
			huge, user, long, nested, bomb(1 << 30 / 64), {}, {kindCompound}, {kindCompound, 255}, {kindCompound, 1, 0, 5, kindCompressed, 0, 0, 0, 0},
			{8, 1, 2, 3}, {kindPushPull}, {200}, pack(kindAlive, "Node", string(bytes.Repeat([]byte{'x'}, 2000))), pack(kindAlive, "Node", "a\nb"),
		} {
			if len(message) < 60000 {
				x.packet(message)
			}
			x.stream(message)
		}
	}
	// Connections that say nothing, and announce much.
	for range 2 * maxConns {
		conn, err := net.Dial("tcp", c1.Addr())
		require.NoError(t, err)
		defer conn.Close()
		_, _ = conn.Write([]byte{kindEncrypted, 0, 0, 0xff, 0})
	}
	require.Eventually(t, func() bool { return c1.Refused()[refusedConnection] > 0 }, 10*time.Second, 10*time.Millisecond)
	require.Positive(t, c1.Refused()[refusedMessage])
	require.Eventually(t, func() bool {
		_, err := c1.Probe(t.Context(), "c1")
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
}

// TestKeysChange: a new key is added everywhere, then sealed with, then alone; nobody
// misses anybody meanwhile.
func TestKeysChange(t *testing.T) {
	t.Parallel()
	c1 := open(t, testConfig("c1"))
	c2 := open(t, testConfig("c2", c1))
	await(t, c1, "c2", is(Alive))
	await(t, c2, "c1", is(Alive))
	next := bytes.Repeat([]byte{9}, KeySize)
	for _, keys := range [][][]byte{{testKey, next}, {next, testKey}, {next}} {
		for _, p := range []*Pool{c1, c2} {
			require.NoError(t, p.SetKeys(keys))
			require.True(t, p.ring.has(keys))
			for _, q := range []*Pool{c1, c2} {
				m, ok := q.Member(map[*Pool]string{c1: "c2", c2: "c1"}[q])
				require.True(t, ok)
				require.NotEqual(t, Dead, m.State)
			}
		}
		require.Eventually(t, func() bool {
			_, err := c1.Probe(t.Context(), "c2")
			return err == nil
		}, 10*time.Second, time.Millisecond)
	}
	require.Error(t, c1.SetKeys(nil))
	x := newIntruder(t, c1) // with the old key
	x.packet(aliveMessage("x", RoleController, net.IPv4(127, 0, 0, 1), 1, 1))
	require.Eventually(t, func() bool { return c1.Refused()[refusedKey] > 0 }, 10*time.Second, time.Millisecond)
}

func FuzzMessages(f *testing.F) {
	f.Add(aliveMessage("a1", RoleAgent, net.IPv4(127, 0, 0, 1), 1, 1))
	f.Add(said.State(ghost("a1", RoleAgent, net.IPv4(127, 0, 0, 1), 1)))
	f.Add(bomb(1000))
	f.Add([]byte{kindCompound, 1, 0, 2, kindAck, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		if out, err := openPacket(b); err == nil {
			require.LessOrEqual(t, len(out), maxPacket)
		}
		if out, err := openStream(b, 1<<16, 10); err == nil {
			require.LessOrEqual(t, len(out), 1<<16)
		}
	})
}

// TestNotOfThePoolAnyMore: whom the pool took when it knew less, and forgot, does not
// come back when memberlist tells of its end.
func TestNotOfThePoolAnyMore(t *testing.T) {
	t.Parallel()
	c := testConfig("c1")
	var known atomic.Bool
	c.Admit = func(string, string, netip.AddrPort) error {
		if known.Load() {
			return errors.New("it is not a member")
		}
		return nil
	}
	c1 := open(t, c)
	x := newIntruder(t, c1)
	silent, err := net.ListenPacket("udp", "127.0.0.1:0") // nobody else gets the port
	require.NoError(t, err)
	defer silent.Close()
	x.packet(aliveMessage("ghost", RoleController, net.IPv4(127, 0, 0, 1), silent.LocalAddr().(*net.UDPAddr).Port, 1))
	await(t, c1, "ghost", func(Member) bool { return true })
	known.Store(true)
	require.Eventually(t, func() bool { _, there := c1.Member("ghost"); return !there }, 20*time.Second, time.Millisecond)
	deadline := time.Now().Add(time.Minute)
	for c1.list.NumMembers() > 1 { // memberlist counts who lives
		require.True(t, time.Now().Before(deadline), "memberlist does not find it dead")
		_, there := c1.Member("ghost")
		require.False(t, there)
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond) // what it told is taken by now
	_, there := c1.Member("ghost")
	require.False(t, there)
}
