package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	pb "timonel/proto/timonel/v1"
)

// How a replica without data finds its cluster.
//
// It asks its peers what they are. If any has data, the cluster exists: the
// replica asks the leader to be let in, as a non-voter. Its Raft does not run
// until then, so that a replica whose folder was wiped neither votes in a term
// it voted in before nor counts as holding entries it has lost.
//
// If none has data and BootstrapExpect of them are there, they found the
// cluster. The one with the least name proposes the set; each promises, on disk,
// to found the cluster with that set alone; when all have, the proposer starts
// and tells the others to. A replica never takes part in two foundings, so two
// clusters cannot come out of one, and a replica wiped after its promise is not
// mistaken for one that has not started yet.

const helloTimeout = time.Second

// findCluster runs until this replica is a member.
func (r *Replica) findCluster() {
	limit := newLogLimiter(15 * time.Second)
	say := func(msg string, args ...any) {
		if limit.allow(msg) {
			r.log.Info(msg, args...)
		}
	}
	var metLeader time.Time
	for {
		changed := r.changed.wait()
		if r.node.Load() != nil {
			return
		}
		answers := r.helloAll(r.ctx)
		leader, exists := "", false
		for _, a := range newestGeneration(answers) {
			exists = exists || a.HasState
			if a.LeaderId != "" && a.LeaderId != r.cfg.ID {
				leader = a.LeaderId
			}
		}
		switch {
		case exists && leader == "":
			metLeader = time.Time{}
			say("this replica has no data; others have, and no leader: waiting for one to let it in")
		case exists:
			if metLeader.IsZero() {
				metLeader = time.Now()
			}
			// Who has promised is about to be told to start; let that come first.
			if r.promised() && time.Since(metLeader) < 3*time.Second {
				break
			}
			if err := r.enter(leader); err != nil {
				say("this replica has no data and asked to join", "leader", leader, "error", err)
			}
		case r.cfg.BootstrapExpect == 0:
			say("this replica has no data and waits for a cluster to join", "peers seen", len(answers))
		default:
			if err := r.found(answers); err != nil {
				say("the cluster is not founded yet", "why", err)
			}
		}
		if r.node.Load() != nil {
			return
		}
		t := time.NewTimer(r.cfg.UpkeepInterval)
		select {
		case <-changed:
		case <-t.C:
		case <-r.ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
	}
}

// newestGeneration leaves out replicas with data from before the cluster was
// recovered or restored on another.
func newestGeneration(answers []*pb.HelloResponse) []*pb.HelloResponse {
	newest := uint64(0)
	for _, a := range answers {
		newest = max(newest, a.Generation)
	}
	return slices.DeleteFunc(slices.Clone(answers), func(a *pb.HelloResponse) bool { return a.HasState && a.Generation < newest })
}

// helloAll asks all peers at once and returns the answers that came.
func (r *Replica) helloAll(ctx context.Context) []*pb.HelloResponse {
	var (
		mu      sync.Mutex
		answers []*pb.HelloResponse
		wg      sync.WaitGroup
	)
	for _, p := range r.cfg.Peers() {
		if p.ID == r.cfg.ID {
			continue
		}
		wg.Go(func() {
			a, err := r.hello(ctx, p.ID, pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil)
			if err != nil {
				r.log.Debug("peer does not answer", "peer", p.ID, "error", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			answers = append(answers, a)
		})
	}
	wg.Wait()
	return answers
}

func (r *Replica) hello(ctx context.Context, id string, step pb.BootstrapStep, set []Server) (*pb.HelloResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	conn, err := r.cfg.PeerConn(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("reach %s: %w", id, err)
	}
	req := &pb.HelloRequest{ClusterId: r.cfg.ClusterID, Id: r.cfg.ID, Address: r.advertise, Step: step}
	for _, s := range set {
		req.Proposed = append(req.Proposed, &pb.RaftServer{Id: s.ID, Address: s.Addr})
	}
	a, err := pb.NewMembershipClient(conn).Hello(ctx, req)
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask %s: %w", id, err)
	case a.ClusterId != r.cfg.ClusterID || a.Id != id:
		return nil, fmt.Errorf("ask %s: replica %q of cluster %q answers", id, a.Id, a.ClusterId)
	}
	return a, nil
}

// found founds the cluster if this replica's name is the least of those there.
// The error says what is still missing.
func (r *Replica) found(answers []*pb.HelloResponse) error {
	set := []Server{{ID: r.cfg.ID, Addr: r.advertise}}
	for _, a := range answers {
		if int(a.Expect) != r.cfg.BootstrapExpect {
			return fmt.Errorf("replica %s expects %d replicas, this one %d: give all the same bootstrap-expect", a.Id, a.Expect, r.cfg.BootstrapExpect)
		}
		set = append(set, Server{ID: a.Id, Addr: a.Address})
	}
	slices.SortFunc(set, func(a, b Server) int { return strings.Compare(a.ID, b.ID) })
	if len(set) < r.cfg.BootstrapExpect {
		return fmt.Errorf("%d of %d replicas are there", len(set), r.cfg.BootstrapExpect)
	}
	set = set[:r.cfg.BootstrapExpect]
	if set[0].ID != r.cfg.ID {
		return fmt.Errorf("waiting for %s to propose it", set[0].ID)
	}
	if err := r.promise(set, r.cfg.ID); err != nil {
		return err
	}
	for _, s := range set[1:] {
		a, err := r.hello(r.ctx, s.ID, pb.BootstrapStep_BOOTSTRAP_STEP_PROPOSE, set)
		if err != nil {
			return err
		}
		if !a.Accepted {
			return fmt.Errorf("replica %s refuses: %s", s.ID, a.Refusal)
		}
	}
	if err := r.Bootstrap(set...); err != nil {
		return err
	}
	r.startOthers()
	return nil
}

// startOthers tells the replicas that promised to found the cluster with this
// one that all have, until each has started.
func (r *Replica) startOthers() {
	r.members.start.Lock()
	set, mine := r.folder.Promise, r.folder.PromisedTo == r.cfg.ID
	r.members.start.Unlock()
	if !mine {
		return
	}
	var wg sync.WaitGroup
	for _, s := range set {
		if s.ID != r.cfg.ID {
			wg.Go(func() {
				a, err := r.hello(r.ctx, s.ID, pb.BootstrapStep_BOOTSTRAP_STEP_START, set)
				if err == nil && !a.Accepted {
					err = errors.New(a.Refusal)
				}
				if err != nil {
					r.log.Debug("cannot start a founding replica", "peer", s.ID, "error", err)
				}
			})
		}
	}
	wg.Wait()
}

// bootstrapStep answers the proposer of the first bootstrap.
func (r *Replica) bootstrapStep(req *pb.HelloRequest) (accepted bool, refusal string) {
	var set []Server
	for _, s := range req.Proposed {
		set = append(set, Server{ID: s.Id, Addr: s.Address})
	}
	var err error
	switch req.Step {
	case pb.BootstrapStep_BOOTSTRAP_STEP_PROPOSE:
		err = r.promise(set, req.Id)
	case pb.BootstrapStep_BOOTSTRAP_STEP_START:
		err = r.startAsPromised(set, req.Id)
	default:
		err = fmt.Errorf("unknown step %v", req.Step)
	}
	if err != nil {
		return false, err.Error()
	}
	return true, ""
}

// startAsPromised founds the cluster, as the proposer asks, unless this replica
// has asked a leader to let it in meanwhile: that one may have taken it out of
// the founders' configuration and be about to add it as an empty member.
func (r *Replica) startAsPromised(set []Server, proposer string) error {
	r.members.start.Lock()
	defer r.members.start.Unlock()
	switch {
	case r.node.Load() != nil: // told twice
		return nil
	case r.folder.PromisedTo != proposer || !slices.Equal(r.folder.Promise, set) || r.folder.Asked:
		return errors.New("no such promise: it has no data and has to be let in by a leader")
	}
	return r.bootstrap(set)
}

func (r *Replica) promised() bool {
	r.members.start.Lock()
	defer r.members.start.Unlock()
	return r.folder.Promise != nil
}

// promise binds this replica to found the cluster with the set and no other.
// Only the one who asked for it may ask for another.
func (r *Replica) promise(set []Server, to string) error {
	r.members.start.Lock()
	defer r.members.start.Unlock()
	self := Server{ID: r.cfg.ID, Addr: r.advertise}
	switch {
	case r.node.Load() != nil:
		return errors.New("it has data already")
	case len(set) != r.cfg.BootstrapExpect:
		return fmt.Errorf("%d replicas proposed, bootstrap-expect is %d", len(set), r.cfg.BootstrapExpect)
	case !slices.Contains(set, self):
		return fmt.Errorf("it is not in the set as %s at %s", self.ID, self.Addr)
	case r.folder.Promise != nil && r.folder.PromisedTo != to:
		return fmt.Errorf("it promised %s to found the cluster: start that one, or wipe the folders of all replicas, which have no data yet", r.folder.PromisedTo)
	case r.folder.Asked:
		return errors.New("it has asked the leader of a cluster to let it in: start the replicas of that one, or wipe the folder of this one")
	case r.folder.PromisedTo == to && slices.Equal(r.folder.Promise, set):
		return nil
	}
	return r.folder.change(func(i *identity) { i.Promise, i.PromisedTo = set, to })
}

// Bootstrap founds a cluster of the servers given, of which this replica is
// one, and starts it. Config.BootstrapExpect does so by itself; call it only
// for a cluster that has never run, with the same servers on each replica that
// it is called on. It fails when this replica has data.
func (r *Replica) Bootstrap(servers ...Server) error {
	r.members.start.Lock()
	defer r.members.start.Unlock()
	return r.bootstrap(servers)
}

// bootstrap is Bootstrap with r.members.start held.
func (r *Replica) bootstrap(servers []Server) error {
	if r.node.Load() != nil {
		return errors.New("bootstrap: this replica has data already")
	}
	var c raft.Configuration
	for _, s := range servers {
		c.Servers = append(c.Servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(s.ID), Address: raft.ServerAddress(s.Addr)})
	}
	if r.folder.Started { // and then something else failed
		return r.start()
	}
	if err := r.disk.clear(); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	if err := raft.BootstrapCluster(r.raftConfig(), r.disk, r.disk, r.snapshots, nil, c); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	r.log.Info("founding the cluster", "cluster", r.cfg.ClusterID, "replicas", servers)
	return r.start()
}

// giveUpPromise makes a promise void, on disk, before a leader is asked to let
// this replica in.
func (r *Replica) giveUpPromise() error {
	r.members.start.Lock()
	defer r.members.start.Unlock()
	if r.node.Load() != nil || r.folder.Promise == nil || r.folder.Asked {
		return nil
	}
	return r.folder.change(func(i *identity) { i.Asked = true })
}

// enter asks the leader to be let in and starts as an empty member.
func (r *Replica) enter(leader string) error {
	ctx, cancel := context.WithTimeout(r.ctx, r.cfg.ProposeTimeout)
	defer cancel()
	conn, err := r.cfg.PeerConn(ctx, leader)
	if err != nil {
		return err
	}
	if err := r.giveUpPromise(); err != nil {
		return err
	}
	let, err := pb.NewMembershipClient(conn).Enter(ctx, &pb.EnterRequest{
		ClusterId: r.cfg.ClusterID, Id: r.cfg.ID, Address: r.advertise, Incarnation: r.incarnation(),
		NewestVersion: uint32(r.cfg.NewestVersion),
	})
	if err != nil {
		return err
	}
	r.members.start.Lock()
	defer r.members.start.Unlock()
	if r.node.Load() != nil {
		return nil
	}
	if err := r.folder.change(func(i *identity) { i.Generation = let.Generation }); err != nil {
		return err
	}
	r.generation.Store(let.Generation)
	r.log.Info("let in without data: catching up from the leader", "leader", leader)
	return r.start()
}
