package trust

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"timonel/pki"
	"timonel/state"
)

// gossipPrefix is where the keys of gossip are, a record for each pool. The keys in it
// are sealed for who has the cluster's bundle: the state is in backups.
const gossipPrefix = Prefix + "gossip/"

// GossipVersion is the cluster version from which on keys of gossip can be rotated:
// programs of before take them from the bundle.
const GossipVersion = 3

// GossipPools are the pools of gossip.
var GossipPools = []string{pki.PoolControllers, pki.PoolNodes}

// Vault is what the cluster's bundle does for the keys of gossip. [pki.Bundle] has it.
type Vault interface {
	ClusterID() string
	// FirstGossipKey is that of a pool until it is rotated.
	FirstGossipKey(pool string) ([]byte, error)
	Seal(plain, with []byte) ([]byte, error)
	Unseal(sealed, with []byte) ([]byte, error)
}

// GossipStep is how far a rotation of a pool's key is. Each step begins when all
// members that live have done what the one before asked for, so that at any time any
// two of them have a key in common.
type GossipStep string

// The steps of a rotation.
const (
	GossipRest    GossipStep = ""        // none is on: there is one key
	GossipInstall GossipStep = "install" // all take the new key besides the old, which seals
	GossipUse     GossipStep = "use"     // all seal with the new key; the old still opens
)

// Bounds of the time that a step waits for members that live and do not follow.
const (
	DefaultGossipWait = 10 * time.Minute
	MinGossipWait     = time.Second
	MaxGossipWait     = 7 * 24 * time.Hour
)

// GossipKey is a key of a pool, as everybody may know it.
type GossipKey struct {
	ID    string    `json:"id"`             // [pki.GossipKeyID]
	Made  time.Time `json:"made,omitzero"`  // zero: it came with the bundle
	Seals time.Time `json:"seals,omitzero"` // since when it seals, zero: always, or not yet
}

// GossipRing is the keys of a pool: the first seals, any opens.
type GossipRing struct {
	Pool    string `json:"pool"`
	Cluster string `json:"cluster"`
	// Generation counts the changes. A ring of the bundle's first key is 0.
	Generation int64       `json:"generation"`
	Step       GossipStep  `json:"step,omitempty"`
	Since      time.Time   `json:"since,omitzero"` // when the step began
	Wait       int64       `json:"wait,omitempty"` // seconds that a step waits for those who do not follow
	By         string      `json:"by,omitempty"`
	Keys       []GossipKey `json:"keys"`
	Sealed     []byte      `json:"sealed"`

	// Secrets are the keys themselves, in the order of Keys.
	Secrets [][]byte `json:"-"`
	// Record is what the ring was read from; nil for the bundle's first key.
	Record []byte `json:"-"`
}

// IDs name the keys, in their order.
func (g GossipRing) IDs() []string {
	out := make([]string, 0, len(g.Keys))
	for _, k := range g.Keys {
		out = append(out, k.ID)
	}
	return out
}

// with is what the sealed keys belong to.
func (g GossipRing) with() []byte {
	return fmt.Appendf(nil, "gossip %s %s %s", g.Cluster, g.Pool, strings.Join(g.IDs(), " "))
}

// begin is the ring with a new key, which opens besides the one there is.
func (g GossipRing) begin(key []byte, now time.Time, wait time.Duration, by string) (GossipRing, error) {
	if g.Step != GossipRest {
		return g, refuse("the key of pool %s is being rotated already, since %s", g.Pool, g.Since.Format(time.RFC3339))
	}
	g.Generation++
	g.Step, g.Since, g.Wait, g.By = GossipInstall, now, int64(wait/time.Second), by
	g.Keys = append(slices.Clone(g.Keys), GossipKey{ID: pki.GossipKeyID(key), Made: now})
	g.Secrets = append(slices.Clone(g.Secrets), key)
	return g, nil
}

// next is the ring after the step that it is in: the new key seals, and then it is
// alone.
func (g GossipRing) next(now time.Time) GossipRing {
	last := len(g.Keys) - 1
	switch g.Step {
	case GossipInstall:
		g.Step = GossipUse
		g.Keys = append([]GossipKey{g.Keys[last]}, g.Keys[:last]...)
		g.Keys[0].Seals = now
		g.Secrets = append([][]byte{g.Secrets[last]}, g.Secrets[:last]...)
	case GossipUse:
		g.Step, g.Wait = GossipRest, 0
		g.Keys, g.Secrets = g.Keys[:1:1], g.Secrets[:1:1]
	default:
		return g
	}
	g.Generation++
	g.Since = now
	return g
}

// Ready says whether a rotation goes on to its next step, when so many of the members
// that live have not done what this one asks for.
func (g GossipRing) Ready(now time.Time, waiting int) bool {
	return g.Step != GossipRest && (waiting == 0 || now.Sub(g.Since) >= time.Duration(g.Wait)*time.Second)
}

// seal makes the record of a ring.
func (g GossipRing) seal(vault Vault) ([]byte, error) {
	sealed, err := vault.Seal(slices.Concat(g.Secrets...), g.with())
	if err != nil {
		return nil, fmt.Errorf("keys of gossip pool %s: %w", g.Pool, err)
	}
	g.Sealed = sealed
	return encode(g), nil
}

// OpenGossipRing reads a record of a ring. found is false for one of another cluster,
// as in a state that was restored with another bundle.
func OpenGossipRing(vault Vault, record []byte) (g GossipRing, found bool, err error) {
	fail := func(err error) (GossipRing, bool, error) {
		return GossipRing{}, false, fmt.Errorf("keys of gossip pool %q: %w", g.Pool, err)
	}
	if len(record) == 0 || record[0] != format {
		return fail(fmt.Errorf("the record is of another format than this program's: run a newer version"))
	}
	if err := json.Unmarshal(record[1:], &g); err != nil {
		return fail(err)
	}
	if g.Cluster != vault.ClusterID() {
		return GossipRing{}, false, nil
	}
	plain, err := vault.Unseal(g.Sealed, g.with())
	if err != nil {
		return fail(err)
	}
	if len(plain) != len(g.Keys)*pki.GossipKeySize || !slices.Contains(GossipPools, g.Pool) || g.Generation < 1 {
		return fail(fmt.Errorf("generation %d with %d keys in %d bytes", g.Generation, len(g.Keys), len(plain)))
	}
	g.Record = record
	for key := range slices.Chunk(plain, pki.GossipKeySize) {
		g.Secrets = append(g.Secrets, key)
	}
	if err := pki.CheckGossipKeys(g.Secrets); err != nil {
		return fail(err)
	}
	if !slices.Equal(pki.GossipKeyIDs(g.Secrets), g.IDs()) {
		return fail(fmt.Errorf("the keys are not those that are named"))
	}
	return g, true, nil
}

// FirstGossipRing is a pool's until its key is rotated.
func FirstGossipRing(vault Vault, pool string) (GossipRing, error) {
	key, err := vault.FirstGossipKey(pool)
	if err != nil {
		return GossipRing{}, err
	}
	return GossipRing{Pool: pool, Cluster: vault.ClusterID(), Keys: []GossipKey{{ID: pki.GossipKeyID(key)}}, Secrets: [][]byte{key}}, nil
}

// GossipRing returns the keys of a pool as this replica's state has them. The error
// means that there is a record and it cannot be read.
func (r *Registry) GossipRing(pool string) (GossipRing, error) {
	g, _, err := r.gossipRing(r.state.Store().View(), pool)
	return g, err
}

func (r *Registry) gossipRing(view state.View, pool string) (g GossipRing, revision int64, err error) {
	kv, there := view.Get(gossipPrefix + pool)
	if there {
		found := false
		if g, found, err = OpenGossipRing(r.vault, kv.Value); err != nil || found {
			return g, kv.ModRevision, err
		}
	}
	g, err = FirstGossipRing(r.vault, pool)
	return g, kv.ModRevision, err
}

// RotateGossip begins to rotate the keys of pools. wait is how long each step waits for
// members that live and do not follow. A refusal is a [RefusedError], and changes
// nothing of any pool.
func (r *Registry) RotateGossip(ctx context.Context, pools []string, wait time.Duration, by string) error {
	if wait < MinGossipWait || wait > MaxGossipWait {
		return refuse("wait: %s is not between %s and %s", wait, MinGossipWait, MaxGossipWait)
	}
	if len(pools) == 0 {
		return refuse("pools: none is named: %s", strings.Join(GossipPools, " or "))
	}
	for i, pool := range pools {
		if !slices.Contains(GossipPools, pool) || slices.Contains(pools[:i], pool) {
			return refuse("pools: %q is not %s, once each", pool, strings.Join(GossipPools, " or "))
		}
	}
	return r.change(ctx, func(view state.View, now time.Time) (*state.Txn, error) {
		if version := view.ClusterVersion(); version < GossipVersion {
			return nil, refuse("keys of gossip are rotated from cluster version %d on, and this cluster writes the formats of version %d until all controllers' programs know more: upgrade them (`timonel status` says which)", GossipVersion, version)
		}
		txn := &state.Txn{}
		for _, pool := range pools {
			ring, revision, err := r.gossipRing(view, pool)
			if err != nil {
				return nil, err
			}
			key := make([]byte, pki.GossipKeySize)
			rand.Read(key) // never fails
			if ring, err = ring.begin(key, now.UTC().Truncate(time.Second), wait, by); err != nil {
				return nil, err
			}
			if err := r.putRing(txn, ring, revision); err != nil {
				return nil, err
			}
		}
		return txn, nil
	})
}

// AdvanceGossip ends the step that a rotation is in, if the ring is still of the
// generation that was judged by [GossipRing.Ready].
func (r *Registry) AdvanceGossip(ctx context.Context, pool string, generation int64) error {
	return r.change(ctx, func(view state.View, now time.Time) (*state.Txn, error) {
		ring, revision, err := r.gossipRing(view, pool)
		if err != nil || ring.Generation != generation || ring.Step == GossipRest {
			return nil, err
		}
		txn := &state.Txn{}
		return txn, r.putRing(txn, ring.next(now.UTC().Truncate(time.Second)), revision)
	})
}

func (r *Registry) putRing(txn *state.Txn, ring GossipRing, revision int64) error {
	record, err := ring.seal(r.vault)
	if err != nil {
		return err
	}
	key := gossipPrefix + ring.Pool
	txn.Conditions = append(txn.Conditions, state.Condition{Key: key, ModRevision: revision})
	txn.Changes = append(txn.Changes, state.Change{Key: key, Value: record})
	return nil
}
