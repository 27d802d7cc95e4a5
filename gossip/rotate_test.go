package gossip

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestRotationUnderAttack: members take a new key one after the other, in the steps of
// a rotation, while somebody with the old one says what he likes; nobody is lost. Who
// was away comes back when he is told the new key, and the old one opens nothing.
func TestRotationUnderAttack(t *testing.T) {
	t.Parallel()
	old, next := testKey, bytes.Repeat([]byte{9}, KeySize)
	names := []string{"c1", "c2", "c3", "a1"}
	pools := map[string]*Pool{}
	admit := func(name, _ string, addr netip.AddrPort) error { // as the state would say
		if addr.Addr() != netip.MustParseAddr("127.0.0.1") || !slices.Contains(append(names, "c4"), name) {
			return errors.New("it is not a member")
		}
		return nil
	}
	for _, name := range names {
		c := testConfig(name)
		c.Admit = admit
		if len(pools) > 0 {
			c.Join = []string{pools["c1"].Addr()}
		}
		if name == "a1" {
			c.Role = RoleAgent
		}
		pools[name] = open(t, c)
	}
	for _, p := range pools {
		for _, name := range names {
			await(t, p, name, is(Alive))
		}
	}
	away := testConfig("c4", pools["c1"])
	c4, err := Open(away)
	require.NoError(t, err)
	await(t, pools["c1"], "c4", is(Alive))
	_, port, err := net.SplitHostPort(c4.Addr())
	require.NoError(t, err)
	require.NoError(t, c4.Close())
	away.Port, err = net.LookupPort("tcp", port)
	require.NoError(t, err)

	stop := make(chan struct{})
	var attack sync.WaitGroup
	for _, p := range pools {
		x := newIntruder(t, p)
		attack.Go(func() {
			for inc := 1; ; inc++ {
				for _, name := range append([]string{"ghost"}, names...) {
					_ = x.Packet(x.addr, aliveMessage(name, RoleController, net.IPv4(10, 9, 9, 9), 7946, inc))
				}
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond): // more, and what members say waits behind it on a busy machine
				}
			}
		})
	}
	for step, keys := range [][][]byte{{old, next}, {next, old}, {next}} {
		if step == 2 {
			close(stop)
			attack.Wait()
			for name, p := range pools {
				require.Zero(t, p.Refused()[refusedKey], "%s could not read something", name)
			}
		}
		for _, name := range names {
			require.NoError(t, pools[name].SetKeys(keys))
			for _, other := range names {
				require.Eventually(t, func() bool {
					_, err := pools[name].ProbeAddr(t.Context(), other, pools[other].Addr())
					return err == nil
				}, 20*time.Second, time.Millisecond, "%s does not reach %s", name, other)
			}
		}
	}
	for _, p := range pools {
		for _, name := range names { // whom a machine short of CPU had not let answer is back
			await(t, p, name, is(Alive))
		}
	}

	// The old key is worth nothing.
	before := map[string]uint64{}
	for name, p := range pools {
		before[name] = p.Refused()[refusedKey]
		members := len(p.Members())
		x := newIntruder(t, p)
		x.packet(aliveMessage("late", RoleController, net.IPv4(127, 0, 0, 1), 1, 1))
		x.stream(x.State(ghost("late", RoleController, net.IPv4(127, 0, 0, 1), 1)))
		require.Eventually(t, func() bool { return p.Refused()[refusedKey] >= before[name]+2 }, 20*time.Second, time.Millisecond)
		require.Len(t, p.Members(), members)
		_, there := p.Member("late")
		require.False(t, there)
		var stolen ring
		require.NoError(t, stolen.set([][]byte{old}))
		_, err := stolen.open(p.ring.seal(nil, []byte("what members say"), nil), nil)
		require.ErrorIs(t, err, errKey)
	}

	// c4 comes back with the key of before, and finds nobody until it is told.
	var c4back *Pool
	require.Eventually(t, func() bool { // its port may be somebody else's for a moment
		c4back, err = Open(away)
		return err == nil
	}, 20*time.Second, 10*time.Millisecond)
	t.Cleanup(func() { require.NoError(t, c4back.Close()) })
	require.Eventually(t, func() bool { return len(c4back.Problems()) > 0 }, 20*time.Second, time.Millisecond)
	require.Contains(t, c4back.Problems()[0], "gossip key differs")
	require.Len(t, c4back.Members(), 1)
	require.NoError(t, c4back.SetKeys([][]byte{next}))
	for _, name := range names {
		await(t, c4back, name, is(Alive))
		await(t, pools[name], "c4", is(Alive))
	}
}
