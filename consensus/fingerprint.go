package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// Fingerprinter is an FSM that can tell whether it is equal to another's: state
// machines that applied the same entries have the same hash at each position.
// The leader compares them (Config.FingerprintInterval), and a replica that
// differs from the majority stops, as etcd's corruption check does.
type Fingerprinter interface {
	// Fingerprint returns the newest position, which grows with every change, and
	// the hash of all changes up to it.
	Fingerprint() (position int64, hash uint64)
	// FingerprintAt returns the hash at a position; ok is false when it is not
	// reached yet or no longer known.
	FingerprintAt(position int64) (hash uint64, ok bool)
	// AwaitFingerprint returns when the position is reached, or ctx's error.
	AwaitFingerprint(ctx context.Context, position int64) error
}

// fingerprintWait is how long a replica waits to reach a position it is asked
// for.
const fingerprintWait = 2 * time.Second

// compareFingerprints compares the replicas while this one leads. Nothing is
// asked while nothing changes.
func (r *Replica) compareFingerprints() {
	own, ok := r.machine.fsm.(Fingerprinter)
	if !ok || r.cfg.FingerprintInterval < 0 {
		return
	}
	tick := time.NewTicker(r.cfg.FingerprintInterval)
	defer tick.Stop()
	compared := int64(-1)
	for {
		select {
		case <-tick.C:
		case <-r.ctx.Done():
			return
		}
		l := r.leads.get()
		if l == nil || !l.isReady() {
			compared = -1 // the next leader starts anew
			continue
		}
		position, hash := own.Fingerprint()
		if position == compared {
			continue
		}
		if r.comparePosition(l.ctx, position, hash) {
			compared = position
		}
	}
}

// comparePosition asks all members for their hash at a position. It reports
// whether all answered.
func (r *Replica) comparePosition(ctx context.Context, position int64, hash uint64) (all bool) {
	members := r.Members()
	hashes := map[string]uint64{r.cfg.ID: hash}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, m := range members {
		if m.ID == r.cfg.ID {
			continue
		}
		wg.Go(func() {
			a, err := r.askFingerprint(ctx, m.ID, &pb.FingerprintRequest{Position: position})
			if err != nil || !a.Known {
				return // away, or behind: asked again next time
			}
			mu.Lock()
			defer mu.Unlock()
			hashes[m.ID] = a.Hash
		})
	}
	wg.Wait()
	majority, differing := verdict(hashes, len(members))
	switch {
	case len(differing) == 0:
		r.setDiverged("")
		return len(hashes) == len(members)
	case majority == nil:
		r.setDiverged(fmt.Sprintf("replicas differ at revision %d and no majority agrees (%s): stop writing, compare backups, and restore the right one", position, strings.Join(differing, ", ")))
		return false
	}
	for _, id := range differing {
		if id == r.cfg.ID {
			continue
		}
		if _, err := r.askFingerprint(ctx, id, &pb.FingerprintRequest{Position: position, Majority: *majority, Differs: true}); err != nil {
			r.log.Error("a replica differs from the majority and does not hear of it", "replica", id, "revision", position, "error", err)
		}
	}
	if slices.Contains(differing, r.cfg.ID) {
		r.stopDiverged(position, hash, *majority)
	}
	return false
}

// verdict returns the hash that more than half of the members have, nil if there
// is none, and who differs from it (all, if there is none).
func verdict(hashes map[string]uint64, members int) (majority *uint64, differing []string) {
	count := map[uint64]int{}
	for _, h := range hashes {
		count[h]++
	}
	if len(count) < 2 {
		return nil, nil
	}
	for h, n := range count {
		if 2*n > members {
			majority = &h
		}
	}
	for id, h := range hashes {
		if majority == nil || h != *majority {
			differing = append(differing, id)
		}
	}
	slices.Sort(differing)
	return majority, differing
}

func (r *Replica) askFingerprint(ctx context.Context, id string, req *pb.FingerprintRequest) (*pb.FingerprintResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, fingerprintWait+helloTimeout)
	defer cancel()
	conn, err := r.cfg.PeerConn(ctx, id)
	if err != nil {
		return nil, err
	}
	req.ClusterId, req.Id = r.cfg.ClusterID, r.cfg.ID
	return pb.NewMembershipClient(conn).Fingerprint(ctx, req)
}

// Fingerprint implements the Membership service.
func (s *membershipServer) Fingerprint(ctx context.Context, req *pb.FingerprintRequest) (*pb.FingerprintResponse, error) {
	r := s.r
	if err := r.sameCluster(req.ClusterId, req.Id); err != nil {
		return nil, err
	}
	own, ok := r.machine.fsm.(Fingerprinter)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "the state has no hash")
	}
	ctx, cancel := context.WithTimeout(ctx, fingerprintWait)
	defer cancel()
	if err := own.AwaitFingerprint(ctx, req.Position); err != nil {
		return &pb.FingerprintResponse{}, nil
	}
	hash, known := own.FingerprintAt(req.Position)
	if known && req.Differs && hash != req.Majority {
		r.stopDiverged(req.Position, hash, req.Majority)
	}
	return &pb.FingerprintResponse{Known: known, Hash: hash}, nil
}

// stopDiverged stops this replica, which differs from the majority.
func (r *Replica) stopDiverged(position int64, hash, majority uint64) {
	go r.fail(fmt.Errorf("the state differs from the majority's at revision %d (hash %016x, theirs %016x): start again; if it stops again, remove %s, to catch up from the other replicas: %w",
		position, hash, majority, r.cfg.DataDir, ErrDiverged))
}

// ErrDiverged is wrapped by Err of a replica that stopped because its state
// differs from that of the majority.
var ErrDiverged = errors.New("this replica's state is corrupt")

// setDiverged says in Status that no majority agrees; "" takes it back.
func (r *Replica) setDiverged(problem string) {
	if old := r.diverged.Swap(&problem); problem != "" && (old == nil || *old != problem) {
		r.log.Error(problem)
	}
}
