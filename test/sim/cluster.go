package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"timonel/consensus"
	"timonel/internal/replicated"
	"timonel/state"
	"timonel/test/history"
	"timonel/test/medium"
	"timonel/test/replica"
)

// cluster is the replicas of one run.
type cluster struct {
	log      *slog.Logger
	network  *network
	names    []string
	nodes    map[string]*node
	recorder history.Recorder
	options  state.Options
	promised time.Duration // how old a revision may be that clients come back to
	slow     string        // the node whose clock is, if one is

	mu       sync.Mutex
	problems []string
	stuck    string         // why the replicas had to be restarted to be the same
	ending   sync.WaitGroup // lives that end
	changed  chan struct{}  // closed and renewed when a life begins or ends
}

// node is a replica with its disk, across its lives.
type node struct {
	name string
	c    *cluster
	disk *disk
	// pace scales its timeouts, as clocks that run at different speeds would.
	pace float64
	life *life // nil while it is down; c.mu guards it
	busy bool  // it starts or stops, and its disk is in use; likewise
}

// life is one process of a replica.
type life struct {
	node    *node
	replica *consensus.Replica
	store   *state.Store
	end     *end
	handle  *handle
	ctx     context.Context // ends with it
	cancel  context.CancelFunc
}

func newCluster(seed uint64, size int, w weather, log *slog.Logger) *cluster {
	random := rand.New(rand.NewPCG(seed, 3))
	c := &cluster{log: log, network: newNetwork(seed, w), nodes: map[string]*node{}, changed: make(chan struct{})}
	// Some runs have a window that watchers fall out of.
	c.options, c.promised = state.Options{HistoryAge: time.Hour, HistoryBytes: 1 << 20}, 3*time.Second
	switch random.IntN(3) {
	case 0:
		c.options = state.Options{HistoryAge: time.Second, HistoryAgeless: 20}
	case 1:
		c.options = state.Options{HistoryAge: 3 * time.Second, HistoryAgeless: 20}
	}
	// All but the newest chunk is taken out of memory whenever there is more.
	c.options.HistoryFolder, c.options.HistoryRestBytes = os.TempDir(), 1
	if age := c.options.HistoryAge - 2*historyTick; age < c.promised {
		c.promised = age
	}
	for i := range size {
		name := fmt.Sprintf("c%d", i+1)
		c.names = append(c.names, name)
		c.nodes[name] = &node{name: name, c: c, disk: newDisk(seed*31 + uint64(i)), pace: 0.7 + 0.6*random.Float64()}
	}
	if random.IntN(4) == 0 { // a leader whose clock is slow does not notice in time that another was elected
		c.slow = c.names[random.IntN(size)]
		c.nodes[c.slow].pace = 4
	}
	return c
}

// Names implements [replica.Cluster].
func (c *cluster) Names() []string { return c.names }

// Replica implements [replica.Cluster].
func (c *cluster) Replica(name string) (replica.Replica, context.Context, bool) {
	l := c.alive(name)
	if l == nil {
		return nil, nil, false
	}
	return replica.Local{Log: l.replica, Store: l.store}, l.ctx, true
}

// Problem implements [replica.Cluster].
func (c *cluster) Problem(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

// peers is what gossip would see.
func (c *cluster) peers() (out []consensus.Server) {
	for _, name := range c.names {
		out = append(out, consensus.Server{ID: name, Addr: address(name)})
	}
	return out
}

// alive returns a node's life, nil while it is down.
func (c *cluster) alive(name string) *life {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nodes[name].life
}

func (c *cluster) setLife(n *node, l *life) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n.life = l
	close(c.changed)
	c.changed = make(chan struct{})
}

// historyTick is how often the history is told the time. What came in between is that
// much older to it.
const historyTick = 200 * time.Millisecond

// start starts a node on what its disk holds, if it is down.
func (n *node) start() {
	c := n.c
	c.mu.Lock()
	taken := n.busy || n.life != nil
	n.busy = n.busy || !taken
	c.mu.Unlock()
	if taken {
		return
	}
	defer c.free(n)
	l := &life{node: n, store: state.New(c.options), end: c.network.attach(n.name)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	var err error
	l.handle, err = n.disk.open(func() {
		l.end.cut() // nobody hears of what it believes to have written
		l.cancel()
		go l.crash()
	})
	if err != nil {
		n.refused("the log of %s does not open: %v", err)
		l.end.cut()
		return
	}
	timeout := time.Duration(n.pace * float64(300*time.Millisecond))
	log, err := consensus.Open(context.Background(), consensus.Config{
		ID: n.name, ClusterID: "sim", DataDir: n.name,
		PeerConn: func(_ context.Context, id string) (grpc.ClientConnInterface, error) {
			return &conn{from: l.end, to: id}, nil
		},
		Peers: c.peers, BootstrapExpect: len(c.names),
		HeartbeatTimeout: timeout, ElectionTimeout: timeout, LeaderLeaseTimeout: timeout,
		CommitTimeout: 100 * time.Millisecond, ProposeTimeout: 3 * time.Second,
		SnapshotInterval: time.Second, SnapshotThreshold: 40, TrailingLogs: 10,
		MaxAppendBytes:   2000, // a few entries
		DiskStallTimeout: 400 * time.Millisecond, FingerprintInterval: time.Second,
		Logger: c.log,
		Parts:  &consensus.Parts{Wire: l.end, Log: l.handle, Snapshots: l.handle, Identity: l.handle.identity(), Keep: l.handle.keep},
	}, replicated.Machine{Store: l.store})
	if err != nil {
		l.handle.detach(false)
		n.refused("%s does not start: %v", err)
		l.end.cut()
		return
	}
	l.replica = log
	log.Register(l.end)
	c.setLife(n, l)
	c.ending.Go(func() { // the clock of its history
		for ; l.ctx.Err() == nil; time.Sleep(historyTick) {
			l.store.Tick(time.Now())
			if err := l.store.Spill(); err != nil {
				c.log.Warn("spill", "node", n.name, "err", err)
			}
		}
	})
	c.ending.Go(func() {
		select {
		case <-log.Failed():
			if l.ctx.Err() == nil {
				c.Problem("%s stopped: %v", n.name, log.Err())
			}
		case <-l.ctx.Done():
		}
	})
}

// refused is told why a replica does not start. For want of room on its disk it may; it is
// started again when there is some.
func (n *node) refused(format string, err error) {
	if !errors.Is(err, medium.ErrNoSpace) {
		n.c.Problem(format, n.name, err)
	}
}

func (c *cluster) free(n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n.busy = false
}

// crash ends the process without a word, with the power: what it had not synced is lost.
func (l *life) crash() { l.die(true) }

// die ends the process without a word. Its goroutines, which cannot be killed, go on with
// neither network nor disk until Raft has given up all that it was asked.
func (l *life) die(power bool) {
	l.handle.detach(power)
	l.end.cut()
	l.over()
	l.node.c.ending.Go(func() {
		time.Sleep(10 * time.Second)
		l.replica.Close()
	})
}

// stop ends the process in order.
func (l *life) stop() {
	l.node.c.mu.Lock()
	l.node.busy = true
	l.node.c.mu.Unlock()
	defer l.node.c.free(l.node)
	l.over() // clients are sent away first
	if err := l.replica.Close(); err != nil {
		l.node.c.Problem("%s does not stop in order: %v", l.node.name, err)
	}
	l.handle.detach(true)
	l.end.cut()
}

func (l *life) over() {
	l.cancel()
	l.node.c.mu.Lock()
	current := l.node.life == l
	l.node.c.mu.Unlock()
	if current {
		l.node.c.setLife(l.node, nil)
	}
}

// leader returns the node that the most advanced replica holds for the leader.
func (c *cluster) leader() *life {
	for _, name := range c.names {
		if l := c.alive(name); l != nil && l.replica.Status().Role == "leader" {
			return l
		}
	}
	return nil
}

// settle mends everything and waits until all replicas are the same. Replicas that
// do not come to it are restarted once, and stuck says why.
func (c *cluster) settle() {
	c.network.calm()
	for _, name := range c.names {
		n := c.nodes[name]
		n.disk.calm()
	}
	why := c.await()
	if why == nil {
		return
	}
	c.stuck = fmt.Sprintf("the cluster did not recover within 2m after everything was mended: %v\n%s", why, c.describe())
	for _, name := range c.names {
		if l := c.alive(name); l != nil {
			l.crash()
		}
	}
	if why := c.await(); why != nil {
		c.Problem("%s\nnor after all were restarted: %v\n%s", c.stuck, why, c.describe())
	}
}

// await waits up to two minutes for all replicas to be the same.
func (c *cluster) await() (why error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	why = errors.New("no replica answers")
	for ctx.Err() == nil {
		for _, n := range c.nodes {
			n.start()
		}
		if why = c.same(ctx); why == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return why
}

func (c *cluster) describe() string {
	var b strings.Builder
	for _, name := range c.names {
		if l := c.alive(name); l != nil {
			s := l.replica.Status()
			fmt.Fprintf(&b, "%s: %s in term %d, leader %s, log %d to %d, committed %d, applied %d, snapshot %d, %v\n", name, s.Role, s.Term, s.Leader.ID,
				s.FirstIndex, s.LastIndex, s.CommitIndex, s.AppliedIndex, s.SnapshotIndex, s.Problems)
		}
	}
	return b.String()
}

// same reports in what the replicas differ.
func (c *cluster) same(ctx context.Context) error {
	var first *life
	for _, name := range c.names {
		l := c.alive(name)
		if l == nil {
			return fmt.Errorf("%s is down", name)
		}
		barrier, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := l.replica.ReadBarrier(barrier)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if first == nil {
			first = l
		}
		a, b := first.store.View(), l.store.View()
		if a.Revision() != b.Revision() || a.Hash() != b.Hash() {
			return fmt.Errorf("%s is at revision %d with hash %x, %s at %d with %x", first.node.name, a.Revision(), a.Hash(), name, b.Revision(), b.Hash())
		}
		for _, m := range l.replica.Members() {
			if !m.Voter {
				return fmt.Errorf("%s says that %s does not vote yet", name, m.ID)
			}
		}
		if n := len(l.replica.Members()); n != len(c.names) {
			return fmt.Errorf("%s knows %d members of %d", name, n, len(c.names))
		}
	}
	return nil
}

// matching reports entries of the same index and term that are not the same in two
// logs, which Raft's log matching rules out.
func (c *cluster) matching() {
	logs := map[string]map[uint64]raft.Log{}
	for _, name := range c.names {
		logs[name] = map[uint64]raft.Log{}
		l := c.alive(name)
		if l == nil {
			continue
		}
		first, _ := l.handle.FirstIndex()
		last, _ := l.handle.LastIndex()
		for i := first; i <= last && i != 0; i++ {
			var entry raft.Log
			if err := l.handle.GetLog(i, &entry); err == nil {
				logs[name][i] = entry
			} else if !errors.Is(err, raft.ErrLogNotFound) {
				c.Problem("entry %d of %s: %v", i, name, err)
			}
		}
		snapshots, _ := l.handle.List()
		for _, s := range snapshots { // its last entry may be a stand-in: see consensus, transport.forget
			delete(logs[name], s.Index)
		}
	}
	for i, one := range c.names {
		for _, other := range c.names[i+1:] {
			for index, a := range logs[one] {
				b, ok := logs[other][index]
				if ok && a.Term == b.Term && (a.Type != b.Type || !bytes.Equal(a.Data, b.Data)) {
					c.Problem("entry %d of term %d is %v with %d bytes on %s, %v with %d bytes on %s", index, a.Term, a.Type, len(a.Data), one, b.Type, len(b.Data), other)
					return
				}
			}
		}
	}
}

// shutdown ends all lives, after Raft has answered all that it was asked.
func (c *cluster) shutdown() {
	for _, name := range c.names {
		if l := c.alive(name); l != nil {
			l.crash()
		}
	}
	c.ending.Wait()
	for _, n := range c.nodes {
		n.disk.remove()
	}
}
