package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"timonel/dispatch"
	"timonel/internal/durable"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

const (
	keysTimeout = 1500 * time.Millisecond // for the state to be known to be the newest
	askTimeout  = 3 * time.Second         // for others to tell their keys, which takes them as long at most
	keysRetry   = time.Second             // between attempts to know the newest keys
	keysAlone   = 3 * time.Second         // out of touch for so long, the others are asked
	maxKeysFile = 64 << 10
)

// keyrings are the keys of both pools of gossip that this controller uses.
//
// They are what the state says. The state comes over Raft, which finds the members by
// the log and needs no gossip. Until it is known to be the newest, after a start or
// while this controller is out of touch, counts the newest of what is known: by the
// file of the last time, by the state, and by what other controllers tell who are asked
// over TLS, where --join and the log say that they are. So a controller that knows no
// more than the bundle, or keys of long ago, finds the others.
type keyrings struct {
	vault trust.Vault
	file  string
	log   *slog.Logger
	use   func(pool string, keys [][]byte) error // nil until the pools are open

	mu      sync.Mutex
	rings   map[string]trust.GossipRing
	problem string
	kept    bool // there is a file

	// For what other controllers ask; set before they can.
	registry *trust.Registry
	replica  upToDate
}

// upToDate says whether this controller's state is what the cluster has.
// [consensus.Replica] does.
type upToDate interface {
	InTouch() (lost <-chan struct{}, err error)
	ReadBarrier(ctx context.Context) error
}

// keptKeys is the file.
type keptKeys struct {
	Records [][]byte `json:"records"` // as in the state
}

// newKeyrings reads what was kept in dir, and else takes the bundle's first keys. kept
// says whether there is something: it is from when this controller first knew what the
// cluster has.
func newKeyrings(vault trust.Vault, dir string, log *slog.Logger) (r *keyrings, kept bool, err error) {
	r = &keyrings{vault: vault, file: filepath.Join(dir, "gossip-keys.json"), log: log, rings: map[string]trust.GossipRing{}}
	for _, pool := range trust.GossipPools {
		if r.rings[pool], err = trust.FirstGossipRing(vault, pool); err != nil {
			return nil, false, err
		}
	}
	records, err := r.read()
	switch {
	case err == nil:
		r.kept = true
	case !errors.Is(err, fs.ErrNotExist): // what is newer comes from the others, or the log
		log.Warn("the keys of gossip that were kept cannot be read", "file", r.file, "err", err)
	}
	for _, ring := range r.open(records) {
		r.rings[ring.Pool] = ring
	}
	return r, r.kept, nil
}

func (r *keyrings) read() ([][]byte, error) {
	info, err := os.Stat(r.file)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxKeysFile) {
		err = errors.New("it is not what a controller writes")
	}
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(r.file)
	if err != nil {
		return nil, err
	}
	var kept keptKeys
	return kept.Records, json.Unmarshal(raw, &kept)
}

// open reads records, and passes over those that cannot be read.
func (r *keyrings) open(records [][]byte) (out []trust.GossipRing) {
	for _, record := range records {
		if ring, found, err := trust.OpenGossipRing(r.vault, record); err != nil {
			r.log.Warn("keys of gossip cannot be read", "err", err)
		} else if found {
			out = append(out, ring)
		}
	}
	return out
}

// secrets are a pool's keys.
func (r *keyrings) secrets(pool string) [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rings[pool].Secrets
}

// adopt uses rings. If it is not sure that they are the cluster's, those count that are
// newer than what is used.
func (r *keyrings) adopt(sure bool, rings ...trust.GossipRing) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	changed := sure && !r.kept
	for _, ring := range rings {
		was := r.rings[ring.Pool]
		if ring.Generation == was.Generation && slices.Equal(ring.IDs(), was.IDs()) || !sure && ring.Generation <= was.Generation {
			continue
		}
		r.rings[ring.Pool], changed = ring, true
		if !slices.Equal(ring.IDs(), was.IDs()) {
			r.log.Info("the keys of gossip are others", "pool", ring.Pool, "keys", ring.IDs(), "before", was.IDs(), "step", ring.Step)
		}
	}
	if changed {
		r.kept = true
		// Before they are used: what this controller seals with it knows after a restart.
		if err := r.write(); err != nil {
			r.log.Error("keys of gossip are not kept: after a restart this controller asks the others for them", "err", err)
		}
	}
	var errs []error
	for _, ring := range r.rings {
		if r.use != nil {
			errs = append(errs, r.use(ring.Pool, ring.Secrets))
		}
	}
	return errors.Join(errs...)
}

// write keeps the rings that are not the bundle's first. The caller holds r.mu.
func (r *keyrings) write() error {
	kept := keptKeys{Records: [][]byte{}}
	for _, pool := range trust.GossipPools {
		if record := r.rings[pool].Record; record != nil {
			kept.Records = append(kept.Records, record)
		}
	}
	raw, err := json.Marshal(kept)
	if err != nil {
		return err
	}
	return durable.WriteFile(r.file, raw, 0o600)
}

// start gives the pools what they use from now on.
func (r *keyrings) start(use func(pool string, keys [][]byte) error) error {
	r.mu.Lock()
	r.use = use
	r.mu.Unlock()
	return r.adopt(false)
}

// Uses implements [dispatch.Keys].
func (r *keyrings) Uses(pool string, ids []string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	ring, ok := r.rings[pool]
	return ok && r.use != nil && slices.Equal(ring.IDs(), ids)
}

// Newest implements [dispatch.Keys].
func (r *keyrings) Newest(ctx context.Context) (records [][]byte, newest bool) {
	if rings, sure, err := r.fromState(ctx); err == nil && sure {
		for _, ring := range rings {
			if ring.Record != nil {
				records = append(records, ring.Record)
			}
		}
		return records, true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, ring := range r.rings {
		if ring.Record != nil {
			records = append(records, ring.Record)
		}
	}
	return records, false
}

var _ dispatch.Keys = (*keyrings)(nil)

// fromState are the rings that the state has, and whether it is the cluster's newest.
func (r *keyrings) fromState(ctx context.Context) (rings []trust.GossipRing, sure bool, err error) {
	_, lost := r.replica.InTouch()
	sure = lost == nil && r.replica.ReadBarrier(ctx) == nil
	for _, pool := range trust.GossipPools {
		ring, err := r.registry.GossipRing(pool)
		if err != nil {
			return nil, false, err
		}
		rings = append(rings, ring)
	}
	return rings, sure, nil
}

// follow uses what the state says, until ctx ends, whose error it returns.
func (r *keyrings) follow(ctx context.Context) error {
	return whileFollowing(ctx, r.registry, func(ctx context.Context, changed <-chan struct{}) error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed:
			}
			for !r.take(ctx) {
				if !pause(ctx, keysRetry) {
					return ctx.Err()
				}
			}
		}
	})
}

// whileFollowing runs f, and has changed say that the keys in the state may be others, as
// they may be at the beginning. It returns when one of both ends, with why.
func whileFollowing(ctx context.Context, registry *trust.Registry, f func(ctx context.Context, changed <-chan struct{}) error) error {
	changed := make(chan struct{}, 1)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return registry.Follow(ctx, func(c trust.Changes) {
			if c.Reset || c.Gossip {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
		})
	})
	group.Go(func() error { return f(ctx, changed) })
	return group.Wait()
}

// take uses what the state says, and reports whether that is what the cluster has.
func (r *keyrings) take(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, keysTimeout)
	defer cancel()
	rings, sure, err := r.fromState(ctx)
	if err == nil {
		err = r.adopt(sure, rings...)
	}
	r.setProblem(err)
	return sure && err == nil
}

func (r *keyrings) setProblem(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.problem = ""
	if err != nil {
		r.problem = "the keys of gossip that the state has are not used: " + err.Error()
	}
}

// sentences are for the operator.
func (r *keyrings) sentences() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problem != "" {
		out = append(out, r.problem)
	}
	for _, pool := range trust.GossipPools {
		if ring := r.rings[pool]; ring.Step != trust.GossipRest {
			out = append(out, fmt.Sprintf("the gossip key of %s is being rotated, step %q since %s: `timonel gossip keys` shows who is waited for", pool, ring.Step, ring.Since.Format(time.RFC3339)))
		}
	}
	return out
}

// dialKeys makes a connection to another controller's cluster port.
type dialKeys func(ctx context.Context) (grpc.ClientConnInterface, func(), error)

// ask has other controllers tell their keys, all at once, and uses the newest. It
// reports whether one of them knew what the cluster has.
func (r *keyrings) ask(ctx context.Context, others []dialKeys) bool {
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answers := make(chan *pb.GossipKeysResponse, len(others))
	for _, dial := range others {
		work.Go(func() {
			conn, done, err := dial(ctx)
			if err != nil {
				answers <- nil
				return
			}
			defer done()
			answer, err := pb.NewPeersClient(conn).GossipKeys(ctx, &pb.GossipKeysRequest{})
			if err != nil {
				r.log.Debug("another controller does not tell its keys of gossip", "err", err)
			}
			answers <- answer
		})
	}
	for range others {
		answer := <-answers
		if answer == nil {
			continue
		}
		rings := r.open(answer.GetRecords())
		if answer.GetNewest() {
			for _, pool := range trust.GossipPools { // those without record
				if !slices.ContainsFunc(rings, func(ring trust.GossipRing) bool { return ring.Pool == pool }) {
					first, err := trust.FirstGossipRing(r.vault, pool)
					if err == nil {
						rings = append(rings, first)
					}
				}
			}
		}
		if err := r.adopt(answer.GetNewest(), rings...); err != nil {
			r.log.Error("keys of gossip that another controller told are not used", "err", err)
		} else if answer.GetNewest() {
			return true
		}
	}
	return false
}

// keySources are where other controllers may tell their keys: where --join says, and
// the members of the log.
func (k *controller) keySources(identity *pki.Controller) (out []dialKeys) {
	for _, addr := range moved(k.join, k.clusterPort-k.gossipPort) {
		if addr == k.advertised(k.clusterPort) {
			continue
		}
		out = append(out, func(context.Context) (grpc.ClientConnInterface, func(), error) {
			options := append(dispatch.DialOptions(), grpc.WithTransportCredentials(credentials.NewTLS(identity.ClusterClientTLS())))
			conn, err := grpc.NewClient("passthrough:///"+addr, options...)
			if err != nil {
				return nil, nil, err
			}
			return conn, func() { conn.Close() }, nil
		})
	}
	for _, m := range k.directory.members() {
		if m.ID == k.name {
			continue
		}
		out = append(out, func(ctx context.Context) (grpc.ClientConnInterface, func(), error) {
			conn, err := k.peers.conn(ctx, m.ID)
			return conn, func() {}, err
		})
	}
	return out
}

// askForKeys asks the others while this controller is out of touch, until ctx ends,
// whose error it returns.
func (k *controller) askForKeys(ctx context.Context, identity *pki.Controller) error {
	var since time.Time // out of touch
	for {
		lost, err := k.replica.InTouch()
		if err == nil {
			since = time.Time{}
			select {
			case <-lost:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		if since.IsZero() {
			since = time.Now()
		}
		if time.Since(since) >= keysAlone {
			k.keys.ask(ctx, k.keySources(identity))
		}
		if !pause(ctx, keysRetry) {
			return ctx.Err()
		}
	}
}
