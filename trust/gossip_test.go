package trust

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/pki"
	"timonel/state"
)

func newBundle(t *testing.T) *pki.Bundle {
	t.Helper()
	b, err := pki.CreateBundle(filepath.Join(t.TempDir(), "bundle"))
	require.NoError(t, err)
	return b
}

// newGossip is a registry of a cluster of a version.
func newGossip(t *testing.T, b *pki.Bundle, version int) (*Registry, *replica, *clock) {
	t.Helper()
	s, c := newReplica(), newClock()
	_, err := s.Commit(context.Background(), &state.Txn{Changes: []state.Change{{Key: state.VersionKey, Value: []byte(strconv.Itoa(version))}}})
	require.NoError(t, err)
	return New(Config{State: s, Now: c.now, Vault: b}), s, c
}

func gossipRing(t *testing.T, r *Registry, pool string) GossipRing {
	t.Helper()
	ring, err := r.GossipRing(pool)
	require.NoError(t, err)
	require.Equal(t, pki.GossipKeyIDs(ring.Secrets), ring.IDs())
	return ring
}

// TestGossipSteps: what becomes of the keys o (old) and n (new), step by step, and when.
func TestGossipSteps(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	first, err := FirstGossipRing(b, pki.PoolNodes)
	require.NoError(t, err)
	n := bytes.Repeat([]byte{9}, pki.GossipKeySize)
	names := map[string]string{first.Keys[0].ID: "o", pki.GossipKeyID(n): "n"}
	show := func(g GossipRing) string {
		out := fmt.Sprintf("%d %q", g.Generation, g.Step)
		for i, k := range g.Keys {
			require.Equal(t, k.ID, pki.GossipKeyID(g.Secrets[i]))
			out += " " + names[k.ID]
		}
		return out
	}
	rings := map[string]GossipRing{"rest": first}
	rings["install"], err = first.begin(n, began, time.Minute, "admin")
	require.NoError(t, err)
	rings["use"] = rings["install"].next(began)
	rings["done"] = rings["use"].next(began)
	for _, test := range []struct {
		ring    string
		after   time.Duration
		waiting int
		ready   bool
		is      string // the ring
		next    string // and the one after
	}{
		{"rest", time.Hour, 0, false, `0 "" o`, `0 "" o`},
		{"install", 0, 0, true, `1 "install" o n`, `2 "use" n o`},
		{"install", time.Minute - 1, 1, false, `1 "install" o n`, `2 "use" n o`},
		{"install", time.Minute, 5000, true, `1 "install" o n`, `2 "use" n o`},
		{"use", 0, 0, true, `2 "use" n o`, `3 "" n`},
		{"use", time.Second, 1, false, `2 "use" n o`, `3 "" n`},
		{"use", time.Hour, 1, true, `2 "use" n o`, `3 "" n`},
		{"done", time.Hour, 0, false, `3 "" n`, `3 "" n`},
	} {
		t.Run(fmt.Sprintf("%s after %s, %d waited for", test.ring, test.after, test.waiting), func(t *testing.T) {
			ring := rings[test.ring]
			require.Equal(t, test.ready, ring.Ready(began.Add(test.after), test.waiting))
			require.Equal(t, test.is, show(ring))
			require.Equal(t, test.next, show(ring.next(began.Add(time.Hour))))
			require.Equal(t, test.is, show(ring), "it is not changed in place")
			if ring.Step != GossipRest {
				_, err := ring.begin(n, began, time.Minute, "admin")
				refused(t, err, "the key of pool nodes is being rotated already, since 2026-01-02T03:04:05Z")
			}
		})
	}
	// Whatever two members are one step apart, they understand one another.
	order := []string{"rest", "install", "use", "done"}
	for i := range order[1:] {
		for _, pair := range [][2]string{{order[i], order[i+1]}, {order[i+1], order[i]}} {
			sender, receiver := rings[pair[0]], rings[pair[1]]
			require.Contains(t, receiver.IDs(), sender.IDs()[0], "%v", pair)
		}
	}
}

func TestRotateGossip(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	b := newBundle(t)
	r, s, c := newGossip(t, b, GossipVersion)
	ring := gossipRing(t, r, pki.PoolNodes)
	require.Equal(t, [][]byte{b.GossipKey()}, ring.Secrets, "the bundle's, until it is rotated")
	both := []string{pki.PoolControllers, pki.PoolNodes}

	index := s.index
	for _, test := range []struct {
		pools []string
		wait  time.Duration
		want  string
	}{
		{nil, time.Minute, "none is named"},
		{[]string{"agents"}, time.Minute, `"agents" is not controllers or nodes`},
		{[]string{"nodes", "nodes"}, time.Minute, "once each"},
		{[]string{""}, time.Minute, `"" is not`},
		{[]string{"nodes/../x"}, time.Minute, "is not controllers or nodes"},
		{both, 0, "wait: 0s is not between"},
		{both, time.Hour * 24 * 30, "is not between"},
	} {
		refused(t, r.RotateGossip(ctx, test.pools, test.wait, "admin"), test.want)
	}
	old, _, _ := newGossip(t, b, GossipVersion-1)
	refused(t, old.RotateGossip(ctx, both, time.Minute, "admin"), "from cluster version 3 on, and this cluster writes the formats of version 2")
	require.Equal(t, index, s.index, "what is refused writes nothing")

	require.NoError(t, r.RotateGossip(ctx, []string{pki.PoolNodes}, time.Minute, "admin"))
	refused(t, r.RotateGossip(ctx, both, time.Minute, "admin"), "pool nodes is being rotated already")
	require.Equal(t, GossipRest, gossipRing(t, r, pki.PoolControllers).Step, "all of them or none")

	for step := range 3 {
		ring = gossipRing(t, r, pki.PoolNodes)
		require.EqualValues(t, step+1, ring.Generation)
		kv, ok := s.store.View().Get(gossipPrefix + pki.PoolNodes)
		require.True(t, ok)
		for _, key := range ring.Secrets {
			require.NotContains(t, string(kv.Value), string(key), "in clear")
		}
		c.mu.Lock()
		c.t = c.t.Add(time.Second)
		c.mu.Unlock()
		require.NoError(t, r.AdvanceGossip(ctx, pki.PoolNodes, ring.Generation))
		require.NoError(t, r.AdvanceGossip(ctx, pki.PoolNodes, ring.Generation), "twice is once")
	}
	ring = gossipRing(t, r, pki.PoolNodes)
	require.EqualValues(t, 3, ring.Generation)
	require.Len(t, ring.Secrets, 1)
	require.NotEqual(t, b.GossipKey(), ring.Secrets[0])
	require.Equal(t, c.now().Add(-2*time.Second), ring.Keys[0].Seals, "since the second step")
	index = s.index
	require.NoError(t, r.AdvanceGossip(ctx, pki.PoolNodes, ring.Generation))
	require.Equal(t, index, s.index, "a cluster at rest appends nothing")

	// Who cannot read it must not go on as if it were not there.
	for name, damage := range map[string]func([]byte) []byte{
		"another format": func(v []byte) []byte { return append([]byte{'9'}, v[1:]...) },
		"not JSON":       func(v []byte) []byte { return []byte("1{") },
		"empty":          func([]byte) []byte { return nil },
		"another pool's": func(v []byte) []byte {
			return bytes.Replace(v, []byte(`"pool":"nodes"`), []byte(`"pool":"controllers"`), 1)
		},
		"other keys": func(v []byte) []byte {
			return bytes.Replace(v, []byte(ring.Keys[0].ID), []byte("000000000000"), 1)
		},
		"cut off": func(v []byte) []byte { return bytes.Replace(v, []byte(`"sealed":"`), []byte(`"sealed":"AAAA`), 1) },
	} {
		_, found, err := OpenGossipRing(b, damage(bytes.Clone(ring.Record)))
		require.Error(t, err, name)
		require.False(t, found, name)
	}
	other := newBundle(t)
	_, found, err := OpenGossipRing(other, ring.Record)
	require.NoError(t, err, "restored with another bundle, the state has no ring")
	require.False(t, found)
	restored := New(Config{State: s, Now: c.now, Vault: other})
	require.Equal(t, [][]byte{other.GossipKey()}, gossipRing(t, restored, pki.PoolNodes).Secrets)
	require.NoError(t, restored.RotateGossip(ctx, both, time.Minute, "admin"))
	require.Len(t, gossipRing(t, restored, pki.PoolNodes).Secrets, 2)
}

// TestFollowGossip: whoever follows hears that the keys changed, and that alone.
func TestFollowGossip(t *testing.T) {
	t.Parallel()
	r, _, _ := newGossip(t, newBundle(t), GossipVersion)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	said := make(chan Changes, 16)
	ended := make(chan error, 1)
	go func() { ended <- r.Follow(ctx, func(c Changes) { said <- c }) }()
	require.True(t, (<-said).Reset)
	_, _, err := r.CreateToken(ctx, TokenSpec{})
	require.NoError(t, err)
	require.False(t, (<-said).Gossip)
	require.NoError(t, r.RotateGossip(ctx, []string{pki.PoolNodes}, time.Minute, "admin"))
	require.True(t, (<-said).Gossip)
	cancel()
	require.True(t, errors.Is(<-ended, context.Canceled))
}

// FuzzGossipRecord: what a controller is told by others, or reads from a file.
func FuzzGossipRecord(f *testing.F) {
	b, err := pki.CreateBundle(filepath.Join(f.TempDir(), "bundle"))
	require.NoError(f, err)
	ring, err := FirstGossipRing(b, pki.PoolNodes)
	require.NoError(f, err)
	ring, err = ring.begin(bytes.Repeat([]byte{9}, pki.GossipKeySize), time.Unix(0, 0), time.Minute, "admin")
	require.NoError(f, err)
	record, err := ring.seal(b)
	require.NoError(f, err)
	f.Add(record)
	f.Add([]byte("1{}"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, found, err := OpenGossipRing(b, raw)
		if err == nil && found {
			require.NoError(t, pki.CheckGossipKeys(got.Secrets))
			require.Equal(t, pki.GossipKeyIDs(got.Secrets), got.IDs())
		}
	})
}
