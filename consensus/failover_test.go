package consensus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func TestKillLeaderLosesAndDoublesNothing(t *testing.T) {
	forLogStores(t, testKillLeaderLosesAndDoublesNothing)
}

func testKillLeaderLosesAndDoublesNothing(t *testing.T, c *cluster) {
	c.startAll(3)
	ctx, cancel := context.WithCancel(context.Background())
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		acked   = map[string]string{}
		unknown atomic.Int64
	)
	ids := []string{"c1", "c2", "c3"}
	for w := range 6 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				n := c.node(ids[(w+i)%3])
				k := fmt.Sprintf("w%d-%d", w, i)
				_, err := n.Apply(ctx, []byte(k+"="+k))
				switch {
				case err == nil:
					mu.Lock()
					acked[k] = k
					mu.Unlock()
				case errors.Is(err, ErrUnknownOutcome):
					unknown.Add(1)
				}
			}
		})
	}
	for range 3 {
		mu.Lock()
		before := len(acked)
		mu.Unlock()
		eventually(t, "writes to go on", func() error {
			mu.Lock()
			defer mu.Unlock()
			if len(acked) < before+50 {
				return fmt.Errorf("%d since", len(acked)-before)
			}
			return nil
		})
		id := c.leader().cfg.ID
		start := time.Now()
		c.kill(id)
		c.leader()
		t.Logf("killed %s: another led after %v", id, time.Since(start).Round(time.Millisecond))
		c.start(id)
	}
	cancel()
	wg.Wait()
	for _, id := range ids {
		n := c.node(id)
		must(t, n.ReadBarrier(context.Background()))
		for k := range acked {
			if n.fsm.get(k) != k {
				t.Fatalf("acknowledged write %s is missing on %s", k, id)
			}
		}
	}
	c.sameState()
	// Every command has a key of its own: more commands than keys would mean
	// that one was applied twice.
	if s := c.leader().fsm.state(); s.N != len(s.Data) {
		t.Errorf("%d commands were applied for %d distinct writes", s.N, len(s.Data))
	}
	t.Logf("%d writes acknowledged, %d of unknown outcome", len(acked), unknown.Load())
}

func TestReadBarrierIsNeverStale(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	var latest atomic.Int64 // the last acknowledged value
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := int64(1); ctx.Err() == nil; i++ {
			n := c.node(fmt.Sprintf("c%d", i%3+1))
			if _, err := n.Apply(ctx, fmt.Appendf(nil, "x=%d", i)); err == nil {
				latest.Store(i)
			} else if ctx.Err() == nil {
				t.Errorf("write: %v", err)
			}
		}
	})
	var reads atomic.Int64
	for i := range 6 {
		n := c.node(fmt.Sprintf("c%d", i%3+1))
		wg.Go(func() {
			for ctx.Err() == nil {
				want := latest.Load()
				if err := n.ReadBarrier(ctx); err != nil {
					continue
				}
				var got int64
				fmt.Sscan(n.fsm.get("x"), &got)
				if got < want {
					t.Errorf("%s read %d after %d was acknowledged", n.cfg.ID, got, want)
					return
				}
				reads.Add(1)
			}
		})
	}
	wg.Go(func() { // leadership moves meanwhile
		for ctx.Err() == nil {
			_ = c.leader().TransferLeadership("")
			select {
			case <-time.After(300 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	wg.Wait()
	t.Logf("%d reads, %d writes", reads.Load(), latest.Load())
	if reads.Load() < 10 { // a busy machine has few
		t.Errorf("only %d reads came through", reads.Load())
	}
}

func TestGracefulCloseHandsOver(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	leader, other := c.leader(), c.followers()[0]
	done := make(chan error)
	go func() { done <- leader.Close() }()
	start := time.Now()
	for i := range 20 {
		other.put(t, "a", fmt.Sprint(i))
	}
	t.Logf("20 writes took %v while the leader closed", time.Since(start).Round(time.Millisecond))
	must(t, <-done)
	if _, err := leader.Apply(context.Background(), []byte("a=b")); !errors.Is(err, ErrClosed) {
		t.Errorf("write to a closed replica: %v, want ErrClosed", err)
	}
}

func TestDiskStallGivesUpLeadership(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.DiskStallTimeout = 200 * time.Millisecond }
	c.startAll(3)
	leader := c.leader()
	release := make(chan struct{})
	fault := func(string) error { <-release; return nil }
	leader.disk.fault.Store(&fault)
	other := c.followers()[0]
	start := time.Now()
	other.put(t, "a", "1") // through the stalled leader at first, then through its successor
	t.Logf("write came through after %v", time.Since(start).Round(time.Millisecond))
	if id, _, _ := other.Leader(); id == leader.cfg.ID {
		t.Errorf("the leader with the stalled disk still leads")
	}
	if p := leader.Status().Problems; len(p) == 0 {
		t.Errorf("no problem in the status of the stalled replica")
	}
	leader.disk.fault.Store(nil)
	close(release)
	must(t, leader.ReadBarrier(context.Background()))
	if leader.fsm.get("a") != "1" {
		t.Errorf("the replica did not catch up after its disk answered again")
	}
	c.sameState()
}

func TestFullDiskStopsOneReplicaNotTheCluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	leader := c.leader()
	fault := func(string) error { return syscall.ENOSPC }
	leader.disk.fault.Store(&fault)
	for _, n := range c.followers() {
		n.put(t, "a", n.cfg.ID)
	}
	if p := leader.Status().Problems; len(p) == 0 {
		t.Errorf("no problem in the status of the replica with the full disk")
	}
	leader.disk.fault.Store(nil)
	must(t, leader.ReadBarrier(context.Background()))
	c.sameState()
	eventually(t, "the problem to go", func() error {
		if p := leader.Status().Problems; len(p) > 0 {
			return fmt.Errorf("%q", p)
		}
		return nil
	})
}

func TestLeadRunsOncePerTermAfterABarrier(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type start struct {
		id   string
		term uint64
		seen string
	}
	starts := make(chan start, 16)
	var running atomic.Int32
	var wg sync.WaitGroup
	for _, id := range []string{"c1", "c2", "c3"} {
		n := c.node(id)
		wg.Go(func() {
			err := n.Lead(ctx, func(ctx context.Context, term uint64) error {
				running.Add(1)
				defer running.Add(-1)
				if TermFrom(ctx) != term {
					t.Errorf("context is fenced to %d, the term is %d", TermFrom(ctx), term)
				}
				starts <- start{id, term, n.fsm.get("last")}
				<-ctx.Done()
				return ctx.Err()
			})
			if !errors.Is(err, context.Canceled) && !errors.Is(err, ErrClosed) {
				t.Errorf("Lead returned %v", err)
			}
		})
	}
	first := <-starts
	c.node(first.id).put(t, "last", "written")
	must(t, c.node(first.id).TransferLeadership(""))
	second := <-starts
	for range 4 { // on a busy machine the heir may lose its election, and the first win the next
		if second.id != first.id || second.term <= first.term {
			break
		}
		first = second
		if err := c.node(first.id).TransferLeadership(""); err != nil {
			t.Logf("transfer: %v", err)
		}
		second = <-starts
	}
	if second.id == first.id || second.term <= first.term || second.seen != "written" {
		t.Errorf("after %+v came %+v", first, second)
	}
	if n := running.Load(); n > 1 {
		eventually(t, "the first to return", func() error {
			if running.Load() > 1 {
				return errors.New("both run")
			}
			return nil
		})
	}
	cancel()
	wg.Wait()
}

func TestIdleClusterAppendsNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.leader().put(t, "a", "b")
	before := c.leader().Status()
	time.Sleep(time.Second) // the period of rest under test
	after := c.leader().Status()
	if before.LastIndex != after.LastIndex || before.Term != after.Term {
		t.Errorf("at rest the log went from entry %d in term %d to %d in %d", before.LastIndex, before.Term, after.LastIndex, after.Term)
	}
}

func TestConcurrentWritesShareSyncs(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	leader := c.leader()
	slow := func(what string) error { time.Sleep(5 * time.Millisecond); return nil } // so that writes queue up
	leader.disk.fault.Store(&slow)
	before := leader.Status().Disk
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for j := range 5 {
				leader.put(t, fmt.Sprint(i), fmt.Sprint(j))
			}
		})
	}
	wg.Wait()
	after := leader.Status().Disk
	appends, entries := after.Appends-before.Appends, after.Entries-before.Entries
	t.Logf("%d entries in %d appends", entries, appends)
	if entries < 320 || appends*4 > entries {
		t.Errorf("%d entries took %d appends, at most a quarter of that is wanted", entries, appends)
	}
}

func TestFollowerCatchesUpSoonAfterALongAbsence(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	f := c.followers()[0].cfg.ID
	c.kill(f)
	for i := 0; i < 30; i++ { // Raft's own back-off would grow to seconds
		c.leader().put(t, "a", fmt.Sprint(i))
		time.Sleep(100 * time.Millisecond)
	}
	n := c.start(f)
	start := time.Now()
	must(t, n.ReadBarrier(context.Background()))
	if took := time.Since(start); took > 1500*time.Millisecond {
		t.Errorf("the follower took %v to catch up", took)
	} else {
		t.Logf("caught up after %v", took.Round(time.Millisecond))
	}
}

func TestNonVotersDoNotConfirmReads(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { // long enough for the leader not to notice on its own
		cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = 5*time.Second, 5*time.Second, 5*time.Second
	}
	c.startAll(3)
	leader := c.leader()
	// A non-voter that the leader's upkeep cannot ask, and so never promotes.
	cfg := c.config("c4")
	cfg.BootstrapExpect, cfg.Peers = 0, nil
	fsm := newMapFSM()
	n, err := Open(context.Background(), cfg, fsm)
	must(t, err)
	t.Cleanup(func() { n.close(false) })
	n.members.start.Lock()
	must(t, n.start())
	n.members.start.Unlock()
	must(t, leader.AddNonvoter(context.Background(), "c4", n.advertise))
	leader.put(t, "a", "b")
	eventually(t, "the non-voter to have it", func() error {
		if fsm.get("a") != "b" {
			return errors.New("not yet")
		}
		return nil
	})
	must(t, leader.ReadBarrier(context.Background()))
	for _, f := range c.followers() {
		c.kill(f.cfg.ID)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := leader.ReadBarrier(ctx); err == nil {
		t.Error("a read was confirmed by the non-voter alone")
	}
}

// A candidate that takes a late message for that of a leader forgets it again, and
// does not refuse its vote to others for ever.
func TestCandidateForgetsALeaderThatIsNone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) {
		cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = 300*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	}
	c.startAll(3)
	leader, followers := c.leader(), c.followers()
	left := followers[0]
	c.kill(leader.cfg.ID)
	c.kill(followers[1].cfg.ID)
	node := left.node.Load()
	believes := func() bool {
		_, id := node.LeaderWithID()
		return node.State() == raft.Candidate && string(id) == leader.cfg.ID
	}
	eventually(t, "it to take a late message for a leader's", func() error {
		must(t, left.trans.elect())
		for range 20 {
			late := raft.RPC{RespChan: make(chan raft.RPCResponse, 1), Command: &raft.AppendEntriesRequest{
				RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(leader.cfg.ID), Addr: []byte(encodeAddr(raft.ServerID(leader.cfg.ID), raft.ServerAddress(leader.raft)))},
				Term:      node.CurrentTerm(),
			}}
			select {
			case left.trans.rpcs <- late:
			case <-time.After(5 * time.Second):
				return errors.New("Raft takes no messages")
			}
			if believes() {
				return nil
			}
		}
		return errors.New("it does not")
	})
	eventually(t, "it to forget that", func() error {
		if believes() {
			return errors.New("it believes it still")
		}
		return nil
	})
	c.start(followers[1].cfg.ID)
	c.leader().put(t, "after", "1")
}

// A leader whose disk fails while members change counts no votes by a change that no
// log holds: another leads, and when the disk works again the change is nowhere.
func TestDiskFailsWhileMembersChange(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	leader, other := c.leader(), c.followers()[0]
	other.put(t, "a", "1")
	fault := func(string) error { return syscall.EIO }
	leader.disk.fault.Store(&fault)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := leader.AddNonvoter(ctx, "c4", "127.0.0.1:1"); err == nil {
		t.Fatal("a member was added without a log")
	}
	other.put(t, "a", "2")
	if id, _, _ := other.Leader(); id == leader.cfg.ID {
		t.Errorf("the leader whose disk fails still leads")
	}
	if err := leader.DiskErr(); !errors.Is(err, syscall.EIO) {
		t.Errorf("it says %v", err)
	}
	leader.disk.fault.Store(nil)
	eventually(t, "it to catch up", func() error {
		if got := leader.fsm.get("a"); got != "2" {
			return fmt.Errorf("a is %q", got)
		}
		return leader.DiskErr()
	})
	for _, n := range []*node{leader, other} {
		if got := n.configuration(); len(got) != 3 {
			t.Errorf("%s has members %v", n.cfg.ID, got)
		}
	}
	c.sameState()
}
