//go:build chaos

package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/internal/machines"
	"timonel/pki"
	"timonel/test/harness"
	"timonel/test/history"
	"timonel/test/replica"
)

// TestState is TestMix on the log and the state by themselves: three replicas in
// machines of their own, without an API server, of which clients ask what an API
// server asks.
func TestState(t *testing.T) {
	seed, minutes := mixParameters(t, 2)
	random := rand.New(rand.NewPCG(seed, 0))
	c := startStores(t)
	keepHistory(t, &c.recorder)
	deadline := time.Now().Add(time.Duration(minutes * float64(time.Minute)))
	var work, watching sync.WaitGroup
	client := func(id int) *replica.Client {
		return &replica.Client{Cluster: c, Recorder: &c.recorder, ID: id, Random: rand.New(rand.NewPCG(seed, uint64(id)+1)),
			Timeout: perOperation, KeyLife: keyLife, Pause: 20 * time.Millisecond}
	}
	for id := range 9 {
		work.Go(func() { client(id).Use(deadline) })
	}
	ctx, stopWatching := context.WithCancel(t.Context())
	for id := range 3 {
		watching.Go(func() { client(10+id).Watch(ctx, 1) })
	}

	struck := map[string]int{}
	for time.Now().Before(deadline) {
		n := storeNemeses[random.IntN(len(storeNemeses))]
		struck[n.name]++
		n.strike(t, c, random)
		c.requireAll(t)
	}
	work.Wait()
	c.requireAll(t)
	revision := c.requireSame(t)
	harness.Eventually(t, time.Minute, "the watchers to see the last write", func() error {
		newest := map[string]int64{}
		for _, w := range c.recorder.History().Watches {
			who, _, _ := strings.Cut(w.Name, "/")
			for _, e := range w.Events {
				newest[who] = max(newest[who], e.Revision)
			}
		}
		for who, seen := range newest {
			if seen < revision {
				return fmt.Errorf("%s is at revision %d of %d", who, seen, revision)
			}
		}
		return nil
	})
	stopWatching()
	watching.Wait()
	require.Empty(t, c.problems)
	checkHistory(t, c.recorder.History(), fmt.Sprintf("seed %d: faults %v", seed, struck))
}

// stores is replicas of cmd store, each in a machine.
type stores struct {
	names    []string
	machines map[string]*machines.Machine
	remotes  map[string]*replica.Remote
	network  machines.Network
	argv     func(name string) []string
	recorder history.Recorder

	mu       sync.Mutex
	problems []string
}

func startStores(t *testing.T) *stores {
	dir := t.TempDir()
	program := filepath.Join(dir, "store")
	out, err := exec.Command("go", "build", "-o", program, "timonel/test/chaos/store").CombinedOutput()
	require.NoError(t, err, string(out))
	bundle := filepath.Join(dir, "bundle")
	_, err = pki.CreateBundle(bundle)
	require.NoError(t, err)

	c := &stores{names: []string{"c1", "c2", "c3"}, machines: map[string]*machines.Machine{}, remotes: map[string]*replica.Remote{},
		network: harness.Network(t, "stores")}
	var peers []string
	address := c.network.Host()
	for _, name := range c.names {
		address = address.Next()
		peers = append(peers, name+"="+address.String())
		m := c.network.Machine(name, address, filepath.Join(dir, name))
		c.machines[name] = m
		c.remotes[name] = &replica.Remote{Address: net.JoinHostPort(address.String(), "7000")}
		t.Cleanup(c.remotes[name].Close)
		t.Cleanup(func() {
			if t.Failed() {
				if log, err := os.ReadFile(filepath.Join(m.Dir, "log")); err == nil {
					lines := strings.Split(strings.TrimSpace(string(log)), "\n")
					t.Logf("the last lines of %s:\n%s", name, strings.Join(lines[max(0, len(lines)-40):], "\n"))
				}
			}
			require.NoError(t, m.PowerOff(context.Background()))
		})
	}
	c.argv = func(name string) []string {
		return []string{program, "--name", name, "--peers", strings.Join(peers, ","), "--bundle", bundle, "--data-dir", filepath.Join(dir, name, "data")}
	}
	for _, name := range c.names {
		c.start(t, name)
	}
	c.requireAll(t)
	return c
}

// start turns a replica on, its machine too if that is off.
func (c *stores) start(t *testing.T, name string) {
	t.Helper()
	m := c.machines[name]
	require.NoError(t, m.Boot(t.Context(), harness.Program(t, "machine")))
	require.NoError(t, m.Start(t.Context(), machines.Process{Argv: c.argv(name), Env: os.Environ(), Log: filepath.Join(m.Dir, "log")}))
}

// Names implements [replica.Cluster].
func (c *stores) Names() []string { return c.names }

// Replica implements [replica.Cluster]. Who asks one that is down finds out.
func (c *stores) Replica(name string) (replica.Replica, context.Context, bool) {
	return c.remotes[name], context.Background(), true
}

// Problem implements [replica.Cluster].
func (c *stores) Problem(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

// requireAll waits until all replicas answer reads.
func (c *stores) requireAll(t *testing.T) {
	t.Helper()
	for _, name := range c.names {
		harness.Eventually(t, time.Minute, name+" to answer", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, _, err := c.remotes[name].Get(ctx, "/any")
			return err
		})
	}
}

// requireSame waits until all have applied the same, and returns the revision.
func (c *stores) requireSame(t *testing.T) (revision int64) {
	t.Helper()
	harness.Eventually(t, time.Minute, "the replicas to be the same", func() error {
		var states []string
		for _, name := range c.names {
			at, hash, _, err := c.remotes[name].Status(t.Context())
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			revision = at
			states = append(states, fmt.Sprintf("revision %d with hash %x", at, hash))
		}
		if len(slices.Compact(slices.Clone(states))) > 1 {
			return fmt.Errorf("they have %v", states)
		}
		return nil
	})
	return revision
}

// leader waits for one.
func (c *stores) leader(t *testing.T) (leader string) {
	t.Helper()
	harness.Eventually(t, time.Minute, "a leader", func() error {
		for _, name := range c.names {
			_, _, said, err := c.remotes[name].Status(t.Context())
			if err == nil && said == name {
				leader = name
				return nil
			}
		}
		return fmt.Errorf("none of %v leads", c.names)
	})
	return leader
}

// storeNemesis breaks something of stores and mends it.
type storeNemesis struct {
	name   string
	strike func(t *testing.T, c *stores, random *rand.Rand)
}

var storeNemeses = []storeNemesis{
	{"leader killed", func(t *testing.T, c *stores, random *rand.Rand) { c.kill(t, random, c.leader(t)) }},
	{"one killed", func(t *testing.T, c *stores, random *rand.Rand) { c.kill(t, random, c.someone(random)) }},
	{"all killed", func(t *testing.T, c *stores, random *rand.Rand) { c.kill(t, random, c.names...) }},
	{"leader paused", func(t *testing.T, c *stores, random *rand.Rand) { c.pause(t, random, c.leader(t)) }},
	{"one paused", func(t *testing.T, c *stores, random *rand.Rand) { c.pause(t, random, c.someone(random)) }},
	{"leader cut off", func(t *testing.T, c *stores, random *rand.Rand) { c.cut(t, random, c.leader(t)) }},
	{"one cut off", func(t *testing.T, c *stores, random *rand.Rand) { c.cut(t, random, c.someone(random)) }},
	{"leader stopped", func(t *testing.T, c *stores, _ *rand.Rand) {
		name := c.leader(t)
		require.NoError(t, c.machines[name].Stop(t.Context()))
		c.start(t, name)
	}},
	{"leadership handed over", func(t *testing.T, c *stores, _ *rand.Rand) {
		require.NoError(t, c.remotes[c.leader(t)].Transfer(t.Context(), ""))
	}},
	{"snapshot taken", func(t *testing.T, c *stores, random *rand.Rand) {
		_ = c.remotes[c.someone(random)].Snapshot(t.Context()) // there may be nothing new
	}},
}

func (c *stores) someone(random *rand.Rand) string { return c.names[random.IntN(len(c.names))] }

// kill kills replicas with signal 9, or turns their machines off.
func (c *stores) kill(t *testing.T, random *rand.Rand, names ...string) {
	for _, name := range names {
		require.NoError(t, c.machines[name].Signal(t.Context(), unix.SIGKILL, random.IntN(2) == 0))
	}
	hold(t, random)
	for _, name := range names {
		c.start(t, name)
	}
}

func (c *stores) pause(t *testing.T, random *rand.Rand, name string) {
	require.NoError(t, c.machines[name].Signal(t.Context(), unix.SIGSTOP, false))
	hold(t, random)
	require.NoError(t, c.machines[name].Signal(t.Context(), unix.SIGCONT, false))
}

// cut cuts a replica off from the others, in one direction or both.
func (c *stores) cut(t *testing.T, random *rand.Rand, name string) {
	others := slices.DeleteFunc(slices.Clone(c.names), func(n string) bool { return n == name })
	direction := []machines.Direction{machines.In, machines.Out, machines.Both}[random.IntN(3)]
	require.NoError(t, c.network.Cut(name, others, direction))
	hold(t, random)
	require.NoError(t, c.network.Heal(name))
}
