package consensus

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	pb "timonel/proto/timonel/v1"
)

// The cluster version says which formats may be written: the least that the programs
// of all members can run under. The state machine keeps it and counts it up by a
// command like any other; this package tells what the members can, writes entries of
// it, and lets nobody in who runs under less.

// AgreeVersion asks all members, of which this replica is the leader, for the newest
// cluster version that their programs can run under. When the least of these is
// greater than the current one, it calls raise with it, which commits it; no member
// is let in meanwhile. It returns the least, and, below this replica's own, why it is
// not more, naming the members; a member that does not answer keeps the version as it
// is. ErrNotLeader on other replicas.
func (r *Replica) AgreeVersion(ctx context.Context, raise func(ctx context.Context, version int) error) (least int, held string, err error) {
	l := r.leads.get()
	if l == nil || !l.isReady() {
		return 0, "", ErrNotLeader
	}
	r.members.change.Lock()
	defer r.members.change.Unlock()
	ctx, cancel := context.WithTimeout(ctx, r.cfg.ProposeTimeout)
	defer cancel()

	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		holds []string
	)
	current := r.cfg.ClusterVersion()
	least = r.cfg.NewestVersion
	for _, s := range r.configuration() {
		if string(s.ID) == r.cfg.ID {
			continue
		}
		wg.Go(func() {
			newest, why := current, "does not answer"
			if a, err := r.hello(ctx, string(s.ID), pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil); err == nil {
				newest = newestVersion(a.NewestVersion)
				why = fmt.Sprintf("runs %s, which knows cluster version %d", a.Version, newest)
			}
			mu.Lock()
			defer mu.Unlock()
			if newest < r.cfg.NewestVersion {
				holds = append(holds, fmt.Sprintf("%s %s", s.ID, why))
			}
			least = min(least, newest)
		})
	}
	wg.Wait()
	slices.Sort(holds)
	held = strings.Join(holds, "; ")
	if least <= current {
		return least, held, nil
	}
	return least, held, raise(WithTerm(ctx, l.term), least)
}

// newestVersion reads a number of a message; programs that do not know of it send 0.
func newestVersion(n uint32) int { return int(max(n, 1)) }

// tooOld says why a replica whose program knows cluster versions up to newest cannot be
// a member; empty if it can.
func (r *Replica) tooOld(newest uint32) string {
	if now := r.cfg.ClusterVersion(); newestVersion(newest) < now {
		return fmt.Sprintf("its program knows cluster version %d, and this cluster writes the formats of %d: run a newer one there", newestVersion(newest), now)
	}
	return ""
}
