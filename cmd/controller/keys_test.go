package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"timonel/consensus"
	"timonel/dispatch"
	"timonel/gossip"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/state"
	"timonel/state/objects"
	"timonel/test/intruder"
	"timonel/trust"
)

// oneReplica is a state that applies at once what is committed to it, and may be told
// to be out of touch.
type oneReplica struct {
	store *state.Store
	mu    sync.Mutex
	index uint64
	out   bool
}

func (r *oneReplica) Store() *state.Store { return r.store }

func (r *oneReplica) Commit(_ context.Context, txn *state.Txn) (state.Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index++
	return r.store.ApplyBatch([]state.Entry{{Index: r.index, Term: 1, Command: txn.Marshal()}})[0], nil
}

func (r *oneReplica) setOut(out bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.out = out
}

func (r *oneReplica) InTouch() (<-chan struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out {
		return nil, errors.New("out of touch")
	}
	return make(chan struct{}), nil
}

func (r *oneReplica) ReadBarrier(context.Context) error {
	_, err := r.InTouch()
	return err
}

// keysCluster is a bundle and a state in which keys can be rotated.
type keysCluster struct {
	t        *testing.T
	bundle   *pki.Bundle
	replica  *oneReplica
	registry *trust.Registry
}

func newKeysCluster(t *testing.T) *keysCluster {
	t.Helper()
	bundle, err := pki.CreateBundle(filepath.Join(t.TempDir(), "bundle"))
	require.NoError(t, err)
	return restoredKeysCluster(t, bundle)
}

// restoredKeysCluster is one whose state is empty again.
func restoredKeysCluster(t *testing.T, bundle *pki.Bundle) *keysCluster {
	c := &keysCluster{t: t, bundle: bundle, replica: &oneReplica{store: state.New(state.Options{})}}
	_, err := c.replica.Commit(t.Context(), &state.Txn{Changes: []state.Change{{Key: state.VersionKey, Value: []byte(strconv.Itoa(trust.GossipVersion))}}})
	require.NoError(t, err)
	c.registry = trust.New(trust.Config{State: c.replica, Vault: bundle})
	return c
}

// rotate takes both keys so many steps further; three are a rotation.
func (c *keysCluster) rotate(steps int) {
	c.t.Helper()
	for range steps {
		if ring := c.ring(pki.PoolNodes); ring.Step == trust.GossipRest {
			require.NoError(c.t, c.registry.RotateGossip(c.t.Context(), trust.GossipPools, time.Minute, "test"))
			continue
		}
		for _, pool := range trust.GossipPools {
			require.NoError(c.t, c.registry.AdvanceGossip(c.t.Context(), pool, c.ring(pool).Generation))
		}
	}
}

func (c *keysCluster) ring(pool string) trust.GossipRing {
	c.t.Helper()
	ring, err := c.registry.GossipRing(pool)
	require.NoError(c.t, err)
	return ring
}

// keyrings are those of a controller with its data in dir.
func (c *keysCluster) keyrings(dir string) *keyrings {
	c.t.Helper()
	r, _, err := newKeyrings(c.bundle, dir, slog.New(slog.DiscardHandler))
	require.NoError(c.t, err)
	r.registry, r.replica = c.registry, c.replica
	return r
}

// TestKeysFollowTheState: what the state says is used, and kept for the next start; an
// old state that is not known to be the newest changes nothing.
func TestKeysFollowTheState(t *testing.T) {
	t.Parallel()
	c, dir := newKeysCluster(t), t.TempDir()
	used := make(chan string, 100)
	r := c.keyrings(dir)
	require.False(t, r.Uses(pki.PoolNodes, c.ring(pki.PoolNodes).IDs()), "before there are pools nothing is")
	require.NoError(t, r.start(func(pool string, keys [][]byte) error { used <- pool; return pki.CheckGossipKeys(keys) }))
	require.Len(t, used, 2)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.follow(ctx) }()
	usesAll := func(r *keyrings) bool {
		return r.Uses(pki.PoolNodes, c.ring(pki.PoolNodes).IDs()) && r.Uses(pki.PoolControllers, c.ring(pki.PoolControllers).IDs())
	}
	for range 3 {
		c.rotate(1)
		require.Eventually(t, func() bool { return usesAll(r) }, 20*time.Second, time.Millisecond)
	}
	require.Empty(t, r.sentences())
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)

	info, err := os.Stat(r.file)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), info.Mode().Perm())
	raw, err := os.ReadFile(r.file)
	require.NoError(t, err)
	for _, pool := range trust.GossipPools {
		require.NotContains(t, string(raw), string(c.ring(pool).Secrets[0]))
	}

	// All controllers start again at once, and have no leader yet: they have the keys.
	c.replica.setOut(true)
	r = c.keyrings(dir)
	require.NoError(t, r.start(func(string, [][]byte) error { return nil }))
	require.True(t, usesAll(r))
	rotated := c.ring(pki.PoolNodes)

	// A state of before, as when the log is not applied yet.
	before := restoredKeysCluster(t, c.bundle)
	before.replica.setOut(true)
	r.registry, r.replica = before.registry, before.replica
	require.False(t, r.take(t.Context()))
	require.True(t, r.Uses(pki.PoolNodes, rotated.IDs()))
	// It is what the cluster has: it was restored.
	before.replica.setOut(false)
	require.True(t, r.take(t.Context()))
	require.True(t, r.Uses(pki.PoolNodes, before.ring(pki.PoolNodes).IDs()))
	require.Equal(t, [][]byte{c.bundle.GossipKey()}, c.keyrings(dir).secrets(pki.PoolNodes))

	// What is newer is used even then.
	before.rotate(1)
	before.replica.setOut(true)
	require.False(t, r.take(t.Context()))
	require.True(t, r.Uses(pki.PoolNodes, before.ring(pki.PoolNodes).IDs()))
	require.Len(t, r.sentences(), 2, "a rotation is on")

	// A record that cannot be read changes nothing, and is said.
	kv, _ := before.replica.store.View().Get("/timonel/trust/gossip/nodes")
	_, err = before.replica.Commit(t.Context(), &state.Txn{Changes: []state.Change{{Key: kv.Key, Value: []byte("9")}}})
	require.NoError(t, err)
	uses := r.secrets(pki.PoolNodes)
	require.False(t, r.take(t.Context()))
	require.Equal(t, uses, r.secrets(pki.PoolNodes))
	require.Contains(t, r.sentences()[0], "run a newer version")
}

func TestKeysFile(t *testing.T) {
	t.Parallel()
	c := newKeysCluster(t)
	c.rotate(3)
	dir := t.TempDir()
	r := c.keyrings(dir)
	require.True(t, r.take(t.Context()))
	good, err := os.ReadFile(r.file)
	require.NoError(t, err)
	for name, content := range map[string]string{
		"empty": "", "cut off": string(good[:len(good)/2]), "other": `{"records":["OXt9"]}`, "large": string(make([]byte, maxKeysFile+1)),
	} {
		require.NoError(t, os.WriteFile(r.file, []byte(content), 0o600))
		require.Equal(t, [][]byte{c.bundle.GossipKey()}, c.keyrings(dir).secrets(pki.PoolNodes), name)
	}
	require.NoError(t, os.WriteFile(r.file, good, 0o600))
	require.Equal(t, c.ring(pki.PoolNodes).Secrets, c.keyrings(dir).secrets(pki.PoolNodes))
	other := newKeysCluster(t)
	require.Equal(t, [][]byte{other.bundle.GossipKey()}, other.keyrings(dir).secrets(pki.PoolNodes), "another cluster's")
}

// peersOf serves what a controller tells others of its keys.
type peersOf struct {
	pb.UnimplementedPeersServer
	keys dispatch.Keys
}

func (p peersOf) GossipKeys(ctx context.Context, _ *pb.GossipKeysRequest) (*pb.GossipKeysResponse, error) {
	records, newest := p.keys.Newest(ctx)
	return &pb.GossipKeysResponse{Records: records, Newest: newest}, nil
}

// gossiper is a controller as far as gossip is concerned.
type gossiper struct {
	k        *controller
	identity *pki.Controller
}

// start opens a controller's pools on data in dir, as run does. Its cluster port serves
// its keys. join are others' gossip addresses.
func (c *keysCluster) start(name, dir string, join ...string) *gossiper {
	c.t.Helper()
	identity, err := c.bundle.Controller(name, nil, nil)
	require.NoError(c.t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(c.t, err)
	// The others find the cluster port from that of gossip: they are as far apart
	// everywhere.
	k := &controller{config: config{
		name: name, dataDir: dir, bindIP: "127.0.0.1", advertiseIP: "127.0.0.1", join: join,
		clusterPort: listener.Addr().(*net.TCPAddr).Port, raftPort: freePort(c.t), apiPort: 6443,
	}, log: slog.New(slog.DiscardHandler), bundle: c.bundle, store: c.replica.store}
	k.gossipPort, k.controllersGossipPort = k.clusterPort+gossipFromCluster, k.clusterPort+2*gossipFromCluster
	if k.controllersGossipPort > 65535 {
		k.gossipPort, k.controllersGossipPort = k.clusterPort-gossipFromCluster, k.clusterPort-2*gossipFromCluster
	}
	k.cache = objects.NewCache(c.replica.store)
	require.NoError(c.t, k.openGossip(c.t.Context(), identity))
	k.keys.registry, k.keys.replica = c.registry, c.replica
	server := grpc.NewServer(append(pb.ServerOptions(), grpc.Creds(credentials.NewTLS(identity.ClusterServerTLS())))...)
	pb.RegisterPeersServer(server, peersOf{keys: k.keys})
	go func() { _ = server.Serve(listener) }()
	c.t.Cleanup(func() {
		server.Stop()
		k.peers.close()
		require.NoError(c.t, k.directory.close())
	})
	return &gossiper{k, identity}
}

// gossipFromCluster is how far a test's gossip port is from its cluster port.
const gossipFromCluster = 1

func (g *gossiper) awaitAlive(t *testing.T, name string) {
	t.Helper()
	require.Eventually(t, func() bool {
		own, ok := g.k.directory.controllers.Member(name)
		nodes, there := g.k.directory.nodes.Member(name)
		return ok && there && own.State == gossip.Alive && nodes.State == gossip.Alive
	}, time.Minute, 10*time.Millisecond, "%s does not see %s", g.k.name, name)
}

// TestControllersFindTheRotatedCluster: after a rotation, one with an empty folder and
// one with the keys of before find the others, where --join or the log says; the old
// keys are worth nothing.
func TestControllersFindTheRotatedCluster(t *testing.T) {
	t.Parallel()
	c := newKeysCluster(t)
	old := map[string][]byte{pki.PoolNodes: c.ring(pki.PoolNodes).Secrets[0], pki.PoolControllers: c.ring(pki.PoolControllers).Secrets[0]}
	c1 := c.start("c1", t.TempDir())
	require.True(t, c1.k.keys.take(t.Context()))
	c.rotate(3)
	require.True(t, c1.k.keys.take(t.Context()))
	at := c1.k.advertised(c1.k.gossipPort)

	// It asks when it starts, once; a machine that is short of CPU may not answer in time.
	var fresh *gossiper
	for i := range 5 {
		fresh = c.start(fmt.Sprintf("c2%d", i), t.TempDir(), at)
		if fresh.k.keys.Uses(pki.PoolNodes, c.ring(pki.PoolNodes).IDs()) {
			break
		}
	}
	fresh.awaitAlive(t, "c1")
	c1.awaitAlive(t, fresh.k.name)

	// It has been here before, so it does not wait for others when it starts.
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "raft"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "gossip-keys.json"), []byte(`{"records":[]}`), 0o600))
	c3 := c.start("c3", dir)
	members := func() []consensus.Member {
		return []consensus.Member{{Server: consensus.Server{ID: "c1", Addr: net.JoinHostPort("127.0.0.1", "1")}}}
	}
	c3.k.directory.log.Store(&members)
	require.True(t, c3.k.keys.Uses(pki.PoolNodes, pki.GossipKeyIDs([][]byte{old[pki.PoolNodes]})))
	lone := c3.k.keySources(c3.identity)
	require.Len(t, lone, 1)
	// In the log it is at another port than c1's here: it is where --join says.
	require.False(t, c3.k.keys.ask(t.Context(), lone))
	c3.k.join = []string{at}
	require.Eventually(t, func() bool { return c3.k.keys.ask(t.Context(), c3.k.keySources(c3.identity)) }, time.Minute, time.Millisecond)
	require.True(t, c3.k.keys.Uses(pki.PoolNodes, c.ring(pki.PoolNodes).IDs()))

	for _, d := range []*directory{c1.k.directory, fresh.k.directory} {
		for pool, p := range map[string]*gossip.Pool{pki.PoolNodes: d.nodes, pki.PoolControllers: d.controllers} {
			x, err := intruder.New(old[pool], c.bundle.ClusterID())
			require.NoError(t, err)
			defer x.Close()
			before := p.Refused()["wrong-key"]
			for _, name := range []string{"c1", "c2", "ghost"} {
				require.NoError(t, x.Packet(p.Addr(), x.Alive(intruder.Member{Name: name, Role: gossip.RoleController, IP: net.IPv4(10, 9, 9, 9), Port: 7946, Incarnation: 1 << 20})))
			}
			require.Eventually(t, func() bool { return p.Refused()["wrong-key"] >= before+3 }, time.Minute, time.Millisecond)
			_, there := p.Member("ghost")
			require.False(t, there)
		}
	}

	// A controller that is out of touch tells what it last knew, and that it is not sure:
	// nobody goes back by it.
	c.replica.setOut(true)
	r := c.keyrings(t.TempDir())
	require.Eventually(t, func() bool {
		require.False(t, r.ask(t.Context(), c3.k.keySources(c3.identity)))
		return slices.EqualFunc(c.ring(pki.PoolNodes).Secrets, r.secrets(pki.PoolNodes), slices.Equal)
	}, time.Minute, time.Millisecond, "what c1 last knew is newer than the bundle's")
}

// TestTally: who has the keys of a ring, who is waited for, and who is away.
func TestTally(t *testing.T) {
	t.Parallel()
	set := func(names ...string) map[string]bool {
		out := map[string]bool{}
		for _, n := range names {
			out[n] = true
		}
		return out
	}
	many := map[string]bool{}
	for i := range 5000 {
		many["n"+strconv.Itoa(i)] = true
	}
	for name, test := range map[string]struct {
		names, lives, have  map[string]bool
		had, waiting, away  int
		waitingFor, awayFor []string
	}{
		"all":         {set("c1", "c2"), set("c1", "c2"), set("c1", "c2"), 2, 0, 0, nil, nil},
		"one lacks":   {set("c1", "c2", "c3"), set("c1", "c2"), set("c1"), 1, 1, 1, []string{"c2"}, []string{"c3"}},
		"a stranger":  {set("c1"), set("c1", "ghost"), set("c1", "ghost"), 1, 0, 0, nil, nil},
		"nobody":      {set("c1", "c2"), set(), set(), 0, 0, 2, nil, []string{"c1", "c2"}},
		"many at all": {many, many, set(), 0, 5000, 0, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := tally(trust.GossipRing{Pool: "nodes"}, test.names, test.lives, test.have, map[string]string{"c2": "why"})
			require.Equal(t, []int{test.had, test.waiting, test.away}, []int{got.Have, got.WaitingCount, got.AwayCount})
			require.LessOrEqual(t, len(got.Waiting), maxNamed)
			for _, list := range []struct {
				want []string
				got  []member
			}{{test.waitingFor, got.Waiting}, {test.awayFor, got.Away}} {
				for i, want := range list.want {
					require.Equal(t, want, list.got[i].Name)
				}
			}
		})
	}
}
