package gossip

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/stretchr/testify/require"
)

var testKey = bytes.Repeat([]byte{7}, 32)

// logs collects a pool's log lines.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// fastTimings find a dead member in a second or two, and are no shorter than machines
// need that are short of CPU.
func fastTimings() Timings {
	return Timings{
		ProbeInterval: 500 * time.Millisecond, ProbeTimeout: 400 * time.Millisecond, SuspicionMult: 2,
		GossipInterval: 50 * time.Millisecond, PushPull: time.Second, RejoinInterval: 250 * time.Millisecond,
		StreamTimeout: 2 * time.Second, KeepDead: time.Hour,
	}
}

func testConfig(name string, join ...*Pool) Config {
	c := Config{
		Name: name, Role: RoleController, ClusterID: "cluster-1", Keys: [][]byte{testKey}, BindAddr: "127.0.0.1",
		Timings: fastTimings(), Logger: slog.New(slog.DiscardHandler),
	}
	for _, p := range join {
		c.Join = append(c.Join, p.Addr())
	}
	return c
}

func open(t *testing.T, c Config) *Pool {
	t.Helper()
	p, err := Open(c)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

// await follows p's changes until member name is as wanted.
func await(t *testing.T, p *Pool, name string, want func(Member) bool) Member {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var last Member
	for e := range p.Subscribe(ctx) {
		if e.Member.Name != name {
			continue
		}
		if last = e.Member; want(last) {
			return last
		}
	}
	t.Fatalf("%s never saw %s as wanted, last: %+v", p.Name(), name, last)
	return last
}

func is(state State) func(Member) bool { return func(m Member) bool { return m.State == state } }

func TestJoinTagsAndDeath(t *testing.T) {
	t.Parallel()
	c1 := open(t, testConfig("c1"))
	config := testConfig("c2", c1)
	config.Tags = map[string]string{"grpc": "7443"}
	c2 := open(t, config)
	agent := testConfig("a1", c2)
	agent.Role = RoleAgent
	a1 := open(t, agent)

	for _, p := range []*Pool{c1, c2, a1} {
		for _, name := range []string{"c1", "c2", "a1"} {
			await(t, p, name, is(Alive))
		}
	}
	m, ok := c1.Member("c2")
	require.True(t, ok)
	require.Equal(t, map[string]string{"grpc": "7443"}, m.Tags)
	require.Equal(t, c2.Addr(), m.Addr)
	require.Equal(t, "127.0.0.1", m.Host())
	m, _ = c1.Member("a1")
	require.Equal(t, RoleAgent, m.Role)

	require.NoError(t, c2.SetTags(map[string]string{"grpc": "7443", "bootstrapped": "true"}))
	await(t, c1, "c2", func(m Member) bool { return m.Tags["bootstrapped"] == "true" })
	require.ErrorContains(t, c2.SetTags(map[string]string{"x": strings.Repeat("y", 500)}), "fit")

	require.Eventually(t, func() bool { // a machine short of CPU may not answer at once
		rtt, err := c1.Probe(t.Context(), "a1")
		return err == nil && rtt > 0
	}, 10*time.Second, time.Millisecond)
	_, err := c1.Probe(t.Context(), "a9")
	require.ErrorIs(t, err, ErrUnknownMember)

	require.NoError(t, a1.Close()) // as if killed: no goodbye
	await(t, c1, "a1", is(Suspect))
	_, err = c1.Probe(t.Context(), "a1")
	require.ErrorIs(t, err, ErrNoAnswer)
	dead := await(t, c2, "a1", is(Dead))
	await(t, c1, "a1", is(Dead))
	require.WithinDuration(t, time.Now(), dead.Since, 10*time.Second)

	// It comes back under its name at another port.
	agent.Join = []string{c1.Addr()}
	a1 = open(t, agent)
	back := await(t, c2, "a1", is(Alive))
	require.Equal(t, a1.Addr(), back.Addr)
	await(t, c1, "a1", is(Alive)) // whoever holds it for dead learns nothing from its goodbye

	require.NoError(t, a1.Leave(5*time.Second))
	require.NoError(t, a1.Close())
	await(t, c1, "a1", is(Left))
	await(t, c2, "a1", is(Left))
}

func TestWrongKey(t *testing.T) {
	t.Parallel()
	var atC1, atX logs
	config := testConfig("c1")
	config.Logger = slog.New(slog.NewTextHandler(&atC1, nil))
	c1 := open(t, config)

	config = testConfig("x1", c1)
	config.Keys = [][]byte{bytes.Repeat([]byte{8}, 32)}
	config.Logger = slog.New(slog.NewTextHandler(&atX, nil))
	x1 := open(t, config)
	require.Eventually(t, func() bool { return len(x1.Problems()) > 0 && len(c1.Problems()) > 0 }, 10*time.Second, 10*time.Millisecond)
	require.Contains(t, x1.Problems()[0], "its gossip key differs")
	require.Contains(t, x1.Problems()[0], c1.Addr())
	require.Contains(t, c1.Problems()[0], "its gossip key differs")
	require.Contains(t, atC1.String(), "gossip key differs")
	require.Contains(t, atX.String(), "gossip key differs")
	require.Len(t, c1.Members(), 1)
	require.Len(t, x1.Members(), 1)
}

func TestAnotherCluster(t *testing.T) {
	t.Parallel()
	var log logs
	config := testConfig("c1")
	config.Logger = slog.New(slog.NewTextHandler(&log, nil))
	c1 := open(t, config)
	config = testConfig("x1", c1)
	config.ClusterID = "cluster-2"
	x1 := open(t, config)
	require.Eventually(t, func() bool { return len(x1.Problems()) > 0 && len(c1.Problems()) > 0 }, 10*time.Second, 10*time.Millisecond)
	require.Contains(t, c1.Problems()[0], "a member of another cluster")
	require.Contains(t, log.String(), `it belongs to cluster \"cluster-2\"`)
	require.Len(t, c1.Members(), 1)
	require.Len(t, x1.Members(), 1)
}

func TestNameConflict(t *testing.T) {
	t.Parallel()
	c1 := open(t, testConfig("c1"))
	c2 := open(t, testConfig("c2", c1))
	await(t, c2, "c1", is(Alive))
	twin := open(t, testConfig("c1", c2))
	require.Eventually(t, func() bool { return len(twin.Problems()) > 0 }, 10*time.Second, 10*time.Millisecond)
	require.Contains(t, twin.Problems()[0], "two members call themselves c1")
	m, _ := c2.Member("c1")
	require.Equal(t, c1.Addr(), m.Addr, "the first one keeps its name")
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	c1 := open(t, testConfig("c1"))
	config := testConfig("c2")
	_, port, err := net.SplitHostPort(c1.Addr())
	require.NoError(t, err)
	_, err = fmt.Sscan(port, &config.Port)
	require.NoError(t, err)
	_, err = Open(config)
	require.ErrorContains(t, err, "in use by another program")
}

// wire is a transport that can be cut.
type wire struct {
	*memberlist.NetTransport
	mu  sync.Mutex
	cut map[string]bool // addresses that nothing goes to
}

func newWire(t *testing.T) (*wire, int) {
	t.Helper()
	inner, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{"127.0.0.1"}, Logger: newBridge(slog.New(slog.DiscardHandler), &Pool{problems: map[string]problem{}, log: slog.New(slog.DiscardHandler)}),
	})
	require.NoError(t, err)
	return &wire{NetTransport: inner, cut: make(map[string]bool)}, inner.GetAutoBindPort()
}

func (w *wire) set(addrs []string, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range addrs {
		w.cut[a] = cut
	}
}

func (w *wire) isCut(addr string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut[addr]
}

func (w *wire) WriteToAddress(b []byte, addr memberlist.Address) (time.Time, error) {
	if w.isCut(addr.Addr) {
		return time.Now(), nil
	}
	return w.NetTransport.WriteToAddress(b, addr)
}

func (w *wire) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if w.isCut(addr.Addr) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: context.DeadlineExceeded}
	}
	return w.NetTransport.DialAddressTimeout(addr, timeout)
}

func TestPartitionHeals(t *testing.T) {
	t.Parallel()
	pools := make([]*Pool, 4)
	wires := make([]*wire, 4)
	for i := range pools {
		config := testConfig(fmt.Sprintf("c%d", i+1))
		wires[i], config.Port = newWire(t)
		config.transport = wires[i]
		if i > 0 {
			config.Join = []string{pools[0].Addr()}
		}
		pools[i] = open(t, config)
	}
	everybody := func(state State, from, to []*Pool) {
		for _, p := range from {
			for _, q := range to {
				if p != q {
					await(t, p, q.Name(), is(state))
				}
			}
		}
	}
	everybody(Alive, pools, pools)

	left, right := pools[:2], pools[2:]
	addrs := func(ps []*Pool) (out []string) {
		for _, p := range ps {
			out = append(out, p.Addr())
		}
		return out
	}
	setCut := func(cut bool) {
		for i := range left {
			wires[i].set(addrs(right), cut)
			wires[2+i].set(addrs(left), cut)
		}
	}
	setCut(true)
	everybody(Dead, left, right)
	everybody(Dead, right, left)
	everybody(Alive, left, left)
	setCut(false)
	everybody(Alive, pools, pools)
}

func TestSlowSubscriber(t *testing.T) {
	t.Parallel()
	c1 := open(t, testConfig("c1"))
	ctx, cancel := context.WithCancel(t.Context())
	events := c1.Subscribe(ctx)
	for i := range 50 {
		require.NoError(t, c1.SetTags(map[string]string{"n": fmt.Sprint(i)}))
	}
	got := 0
	for e := range events {
		if got++; e.Member.Tags["n"] == "49" {
			break
		}
	}
	require.Less(t, got, 10, "what was not read is merged")
	cancel()
	for range events {
	}
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"good", func(*Config) {}, ""},
		{"defaults", func(c *Config) { c.Timings = Timings{} }, ""},
		{"name", func(c *Config) { c.Name = "" }, "Name is empty"},
		{"role", func(c *Config) { c.Role = "boss" }, `Role is "boss"`},
		{"cluster", func(c *Config) { c.ClusterID = "" }, "ClusterID is empty"},
		{"key", func(c *Config) { c.Keys = [][]byte{testKey, testKey[:16]} }, "Keys: key 2 has 16 bytes instead of 32"},
		{"no key", func(c *Config) { c.Keys = nil }, "Keys: 0 keys"},
		{"bind", func(c *Config) { c.BindAddr = "localhost" }, `BindAddr "localhost" is not an IP`},
		{"advertise", func(c *Config) { c.AdvertiseAddr = "x" }, `AdvertiseAddr "x" is not an IP`},
		{"port", func(c *Config) { c.Port = 70000 }, "Port 70000"},
		{"join", func(c *Config) { c.Join = []string{"10.0.0.1:7946", "10.0.0.2"} }, `Join[1] "10.0.0.2" is not host:port`},
		{"join port", func(c *Config) { c.Join = []string{"10.0.0.1:0"} }, `Join[0]`},
		{"tags", func(c *Config) { c.Tags = map[string]string{"x": strings.Repeat("y", 500)} }, "Tags"},
		{"probe timeout", func(c *Config) { c.Timings.ProbeTimeout = time.Second }, "Timings.ProbeTimeout"},
		{"keep dead", func(c *Config) { c.Timings.KeepDead = 0 }, "Timings.KeepDead"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := testConfig("c1")
			test.change(&c)
			err := c.Validate()
			if test.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, test.want)
		})
	}
}
