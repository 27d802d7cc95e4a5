package consensus

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"timonel/internal/durable"
)

// Replica is one replica of the log. Its methods may be called concurrently.
type Replica struct {
	cfg       Config
	log       *slog.Logger
	folder    *dataFolder
	advertise string
	fsync     time.Duration // measured at start
	logFile   string        // name of the log's file or folder in the data folder
	stream    *stream
	machine   *machine
	store     LogStore
	disk      *disk
	snapshots *snapshotStore
	queueDone chan struct{} // closed when nothing writes the log's queue any more
	stop      chan struct{} // closed when Close begins
	closing   sync.Once
	closeErr  error
	done      chan struct{} // closed when Close is through

	// ctx ends with the replica; wg counts its goroutines.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	node    atomic.Pointer[raft.Raft] // nil until the replica is a member
	trans   *transport                // set before node
	changed *signal                   // leader, term, role or membership may have changed
	peers   peerCache
	leads   leaderships
	deduper deduper
	local   batcher // read index rounds of this replica as the leader
	remote  batcher // and as a follower
	forward forwarder
	room    *room // of what is on its way for this replica's callers
	// forwarded is how many bytes others have brought that Raft has not answered.
	forwarded atomic.Int64
	lostCh    chan lostPeer
	stalled   atomic.Bool
	// handingOver: no entries are taken while another becomes the leader.
	handingOver atomic.Bool
	// diverged says that replicas differ and none can be said to be right.
	diverged atomic.Pointer[string]
	members  membersState
	// generation is the folder's; removed says that this replica is not a member
	// any more.
	generation atomic.Uint64
	life       []byte // the folder's incarnation, which does not change
	removed    atomic.Bool
	touch      touch

	failedMu sync.Mutex
	failed   error         // why this replica stands still for good
	failedCh chan struct{} // closed then
	notes    []string      // problems found at start
}

// Open opens the data folder, or makes it, and starts the replica. It returns
// without waiting for the cluster: a replica without data looks for it in the
// background, through Config.Peers and Config.PeerConn, so serve what Register
// registers soon. ctx bounds opening alone. The caller must call Close.
//
// Errors are one line that names the file or field and says what to do; nothing
// in a data folder is changed when it is another replica's or damaged.
func Open(ctx context.Context, cfg Config, fsm FSM) (_ *Replica, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r := &Replica{
		cfg: cfg, log: cfg.Logger.With("replica", cfg.ID),
		stop: make(chan struct{}), done: make(chan struct{}), failedCh: make(chan struct{}),
		changed: newSignal(), lostCh: make(chan lostPeer, 16),
		members: membersState{start: newGate(), change: newGate()},
	}
	r.cfg.Logger = r.log
	r.touch.init()
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.local.round, r.remote.round = r.confirmLead, r.askReadIndex
	r.deduper.keep, r.deduper.most = 2*cfg.ProposeTimeout, mostRemembered
	r.room = newRoom(cfg.ProposalBytes / sharers)
	r.forward = forwarder{ctx: r.ctx, id: cfg.ID, open: r.openForward, learn: r.learnCommit}
	defer func() {
		if err != nil {
			r.cancel()
			r.release()
		}
	}()

	r.machine = newMachine(fsm, r.stop)
	r.machine.onCorrupt, r.machine.newest = r.fail, byte(cfg.NewestVersion)
	started, err := r.openParts()
	if err != nil {
		return nil, err
	}
	if started {
		if err := r.start(); err != nil {
			return nil, err
		}
	}
	r.queueDone = make(chan struct{})
	go func() { // ends with the replica, if the disk lets it
		defer close(r.queueDone)
		r.disk.writeQueue()
	}()
	r.goFunc(r.watchDisk)
	r.goFunc(r.deathwatch)
	r.goFunc(r.freeCandidate)
	r.goFunc(r.upkeep)
	r.goFunc(r.keepLogShort)
	r.goFunc(r.watchTouch)
	r.goFunc(r.prove)
	r.goFunc(r.compareFingerprints)
	if !started {
		r.goFunc(r.findCluster)
	}
	return r, nil
}

// openParts opens the network and the disk. It reports whether the disk shows
// that this replica was a member before.
func (r *Replica) openParts() (started bool, err error) {
	cfg := r.cfg
	if cfg.Parts != nil {
		return r.useParts(cfg.Parts)
	}
	if r.folder, err = openDataFolder(cfg.DataDir, cfg.ClusterID, cfg.ID); err != nil {
		return false, err
	}
	r.generation.Store(r.folder.Generation)
	r.removed.Store(r.folder.Removed)
	r.life, _ = hex.DecodeString(r.folder.Incarnation)
	ln := cfg.Listener
	if ln == nil {
		if ln, err = net.Listen("tcp", cfg.BindAddress); err != nil {
			return false, fmt.Errorf("listen for other replicas: %w", err)
		}
	}
	r.advertise = cfg.AdvertiseAddress
	if r.advertise == "" {
		r.advertise = ln.Addr().String()
		if err := checkHostPort(r.advertise, false); err != nil {
			ln.Close()
			return false, fmt.Errorf("consensus config: AdvertiseAddress: is needed when listening on all addresses: %w", err)
		}
	}
	r.stream = newStream(r.cfg, ln, r.advertise)
	r.stream.refuse = r.refuseRaft
	r.stream.leads = r.fitLeader
	r.stream.lost = r.peerLost
	r.stream.generation = func() (uint64, bool) { return r.generation.Load(), r.node.Load() != nil }
	r.stream.superseded = r.superseded
	r.stream.start()

	switch r.fsync, err = measureFsync(cfg.DataDir); {
	case isFull(err):
		r.notes = append(r.notes, fmt.Sprintf("the file system of %s was full when this replica started: %s", cfg.DataDir, remedy(err, cfg.DataDir)))
		r.log.Warn("the file system is full", "folder", cfg.DataDir, "error", err)
	case err != nil:
		return false, err
	}
	if r.fsync > cfg.SlowFsync {
		r.notes = append(r.notes, fmt.Sprintf("slow disk: a sync takes %v (above %v), and so does each write at least", r.fsync.Round(10*time.Microsecond), cfg.SlowFsync))
		r.log.Warn("the disk is slow", "folder", cfg.DataDir, "fsync", r.fsync, "wanted", cfg.SlowFsync)
	}
	return r.openData()
}

// openData opens and verifies log and snapshots. It reports whether they show
// that this replica was a member before.
func (r *Replica) openData() (started bool, err error) {
	dir := r.cfg.DataDir
	kind, err := logKindIn(dir, r.cfg.LogStore)
	if err != nil {
		return false, err
	}
	file := r.folder.file(kind.file)
	r.logFile = kind.file
	damage := r.damage
	newest, damaged, err := checkSnapshots(r.folder.file(snapshotDir))
	if err != nil {
		return false, fmt.Errorf("snapshots: %w", err)
	}
	held, err := kind.inspect(file, r.folder.Started)
	if err != nil {
		return false, damage(file, err)
	}
	for id, why := range damaged {
		if held.first == 0 || held.first > newest+1 || held.last < snapshotIndex(id) {
			return false, damage("snapshot", why)
		}
		note := fmt.Sprintf("damaged snapshot ignored, as an older one and the log hold the same: %v", why)
		r.notes = append(r.notes, note)
		r.log.Warn(note)
	}
	if held.first > newest+1 {
		return false, damage(r.folder.file(snapshotDir), fmt.Errorf("the log starts at entry %d and no snapshot reaches there", held.first))
	}
	if r.store, err = kind.open(file, held, r.log); err != nil {
		return false, damage(file, err)
	}
	fss, err := raft.NewFileSnapshotStoreWithLogger(dir, r.cfg.SnapshotRetain, newRaftLog(r.log))
	if err != nil {
		return false, fmt.Errorf("snapshots: %w", err)
	}
	if err := durable.SyncDir(dir); err != nil { // the snapshots' folder may be new
		return false, fmt.Errorf("snapshots: %w", err)
	}
	r.snapshots = &snapshotStore{SnapshotStore: fss, dir: r.folder.file(snapshotDir), damaged: damaged}
	r.useDisk()
	r.disk.weights = held.weights
	return r.hasData(held.last == 0 && newest == 0)
}

// useDisk puts the store and the snapshots under what Raft sees of them.
func (r *Replica) useDisk() {
	r.disk = newDisk(r.store, r.snapshots, r.log, r.stop)
	r.disk.cache(4*r.cfg.MaxAppendEntries, r.cfg.LogCacheBytes)
	r.disk.queue.limit = r.cfg.QueueBytes
	r.disk.ahead = r.cfg.ApplyBytes
	r.machine.read = r.disk.read
	r.disk.portion, r.disk.message = r.cfg.MaxAppendBytes, uint64(r.cfg.MaxAppendEntries)
	r.disk.leads = func() bool {
		node := r.node.Load()
		return node != nil && node.State() == raft.Leader
	}
	r.machine.durable = r.disk.queue.awaitDurable
	r.disk.onDamage = func(err error) { r.fail(r.damage(filepath.Join(r.cfg.DataDir, r.logFile), err)) }
	r.disk.snapshot = func() uint64 {
		node := r.node.Load()
		if node == nil {
			return 0
		}
		index, _ := strconv.ParseUint(node.Stats()["last_snapshot_index"], 10, 64) // it says it nowhere else
		return index
	}
	r.snapshots.taken = func(index, term uint64) error {
		r.boundTrailing()
		return r.disk.dropStale(index, term)
	}
}

// hasData reports whether the disk shows that this replica was a member before.
func (r *Replica) hasData(empty bool) (bool, error) {
	if list, err := r.snapshots.List(); err != nil {
		return false, err
	} else if len(list) > 0 { // a crash may have come between the snapshot and this
		if err := r.disk.dropStale(list[0].Index, list[0].Term); err != nil {
			return false, fmt.Errorf("remove entries that the newest snapshot contradicts: %w", err)
		}
		r.disk.overwrite.Store(0) // Raft does not run, and remembers nothing
	}
	exists, err := raft.HasExistingState(r.disk, r.disk, r.snapshots)
	if err == nil && exists && !r.folder.Started && empty {
		// The founding was cut off between its two writes, before Raft ran.
		return false, r.disk.clear()
	}
	return exists, err
}

// snapshotIndex reads the index from a snapshot's id, term-index-time.
func snapshotIndex(id string) uint64 {
	parts := strings.Split(id, "-")
	if len(parts) != 3 {
		return 0
	}
	n, _ := strconv.ParseUint(parts[1], 10, 64)
	return n
}

// start runs Raft on the opened data.
func (r *Replica) start() error {
	if r.ctx.Err() != nil {
		return ErrClosed
	}
	if !r.folder.Started {
		if err := r.folder.change(func(i *identity) { i.Started = true }); err != nil {
			return err
		}
	}
	logger := newRaftLog(r.log)
	r.trans = newTransport(r.newWire(logger))
	r.trans.leads = r.leadsPeer
	r.trans.holds = r.holdsSnapshot
	r.trans.contradicted = r.disk.contradicted
	r.trans.shorten = r.shorten
	r.trans.follows = r.follows
	r.trans.clock, r.trans.heard, r.trans.confirmed = r.touch.clock, r.hear, r.confirmed
	r.trans.fill, r.trans.portions = r.disk.fill, r.disk.portions
	r.trans.durable, r.trans.flush = r.disk.queue.durable, r.disk.queue.flush
	r.machine.onApply = func(index, term uint64) {
		r.disk.applied.Store(index)
		r.trans.applied(index, term)
	}
	r.trans.start()

	notify := make(chan bool, 8)
	conf := r.raftConfig()
	conf.NotifyCh, conf.Logger = notify, logger
	node, err := raft.NewRaft(conf, r.machine, r.disk, r.disk, r.snapshots, r.trans)
	if err != nil {
		r.trans.Close()
		return r.damage("start from "+r.folder.file(snapshotDir), err)
	}
	observed := make(chan raft.Observation, 64)
	node.RegisterObserver(raft.NewObserver(observed, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState, raft.PeerObservation:
			return true
		}
		return false
	}))
	r.node.Store(node)
	r.goFunc(func() { r.watchLeadership(node, notify) })
	r.goFunc(func() {
		for {
			select {
			case <-observed:
				r.changed.send()
			case <-r.ctx.Done():
				return
			}
		}
	})
	r.changed.send()
	return nil
}

func (r *Replica) raftConfig() *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(r.cfg.ID)
	c.HeartbeatTimeout = r.cfg.HeartbeatTimeout
	c.ElectionTimeout = r.cfg.ElectionTimeout
	c.LeaderLeaseTimeout = r.cfg.LeaderLeaseTimeout
	c.CommitTimeout = r.cfg.CommitTimeout
	c.MaxAppendEntries = r.cfg.MaxAppendEntries
	c.BatchApplyCh = true
	c.ShutdownOnRemove = false
	c.TrailingLogs = r.cfg.TrailingLogs
	c.SnapshotInterval = r.cfg.SnapshotInterval
	c.SnapshotThreshold = r.cfg.SnapshotThreshold
	c.NoLegacyTelemetry = true
	c.Logger = newRaftLog(r.log)
	return c
}

// configuration returns Raft's latest configuration.
func (r *Replica) configuration() []raft.Server {
	node := r.node.Load()
	if node == nil {
		return nil
	}
	f := node.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	return f.Configuration().Servers
}

// refuseRaft says why this replica takes no Raft connections now; nil if it does.
func (r *Replica) refuseRaft() error {
	if r.node.Load() == nil {
		return errors.New("this replica has no data and is not a member yet")
	}
	return nil
}

// fitLeader reports that this replica leads and its disk takes writes.
func (r *Replica) fitLeader() bool {
	node := r.node.Load()
	return node != nil && node.State() == raft.Leader && r.disk.fit() && !r.stalled.Load()
}

// follows reports that this replica follows the sender of a heartbeat in its term.
func (r *Replica) follows(req *raft.AppendEntriesRequest) (last uint64, ok bool) {
	node := r.node.Load()
	if node == nil {
		return 0, false
	}
	_, leader := node.LeaderWithID()
	last = node.LastIndex()
	return last, string(leader) == string(req.ID) && node.State() == raft.Follower && node.CurrentTerm() == req.Term
}

// leadsPeer reports that this replica leads the term, and the peer is a member.
func (r *Replica) leadsPeer(term uint64, id raft.ServerID) bool {
	node := r.node.Load()
	if node == nil || node.State() != raft.Leader || node.CurrentTerm() != term {
		return false
	}
	for _, s := range r.configuration() {
		if s.ID == id {
			return true
		}
	}
	return false
}

// holdsSnapshot reports that a snapshot the leader sends brings nothing new: this
// replica has applied as much, or its log has the snapshot's last entry, and so all
// before it. (Ongaro & Ousterhout, figure 13, step 6.) Raft would install it, keep the
// entries after it, and forget which configuration the last of these is.
//
// The log is looked at in the leader's term alone: an older leader may still cut it.
func (r *Replica) holdsSnapshot(req *raft.InstallSnapshotRequest) bool {
	node := r.node.Load()
	switch {
	case node == nil || req.Term < node.CurrentTerm():
		return false
	case req.LastLogIndex <= node.AppliedIndex():
		return true
	case req.Term != node.CurrentTerm() || r.disk.queue.flush() != nil:
		return false
	}
	var last raft.Log
	return r.disk.GetLog(req.LastLogIndex, &last) == nil && last.Term == req.LastLogTerm
}

// shorten lets a message begin after what this replica has applied, when it begins
// before its log does. A leader that went that far back would be refused, send a
// snapshot that this replica is past, and come back to the same place. What is
// applied is committed, so the leader has the same.
func (r *Replica) shorten(req *raft.AppendEntriesRequest) {
	applied, term := r.machine.position()
	if req.PrevLogEntry == 0 || req.PrevLogEntry >= applied {
		return
	}
	if err := r.disk.GetLog(req.PrevLogEntry, new(raft.Log)); !errors.Is(err, raft.ErrLogNotFound) {
		return
	}
	req.Entries = slices.DeleteFunc(req.Entries, func(l *raft.Log) bool { return l.Index <= applied })
	req.PrevLogEntry, req.PrevLogTerm = applied, term
}

// fail makes the replica stand still for good: see Failed.
func (r *Replica) fail(err error) {
	r.failedMu.Lock()
	first := r.failed == nil
	if first {
		r.failed = err
		close(r.failedCh)
	}
	r.failedMu.Unlock()
	if !first {
		return
	}
	r.log.Error("this replica stops", "error", err)
	if node := r.node.Load(); node != nil {
		r.mute(true)
		node.Shutdown()
	}
}

// Failed returns a channel that is closed when the replica found its own data
// damaged while running and stopped, so as not to differ from the others; Err
// then says what. The process should end.
func (r *Replica) Failed() <-chan struct{} { return r.failedCh }

// Err returns why Failed is closed, or nil.
func (r *Replica) Err() error {
	r.failedMu.Lock()
	defer r.failedMu.Unlock()
	return r.failed
}

func (r *Replica) goFunc(f func()) {
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		f()
	}()
}

// Close hands leadership over if this replica leads, stops it and releases the
// data folder. Applies in progress return ErrUnknownOutcome.
func (r *Replica) Close() error { return r.close(true) }

func (r *Replica) close(graceful bool) error {
	r.closing.Do(func() {
		defer close(r.done)
		node := r.node.Load()
		if graceful && node != nil && node.State() == raft.Leader && len(r.configuration()) > 1 {
			if err := r.transfer(""); err != nil {
				r.log.Info("could not hand over leadership before closing", "error", err)
			}
		}
		close(r.stop)
		r.cancel()
		r.members.start.Lock() // a start in progress comes first
		node = r.node.Load()
		r.members.start.Unlock()
		if node != nil {
			f := node.Shutdown()
			r.hangUp() // ends what Raft waits for
			r.closeErr = within(closeTimeout, func() error {
				<-r.queueDone
				return f.Error()
			})
			if errors.Is(r.closeErr, errNoAnswer) {
				r.closeErr = fmt.Errorf("the disk of %s does not answer: left the log open", r.cfg.DataDir)
				return
			}
			r.trans.Close()
		}
		r.wg.Wait()
		r.closeErr = errors.Join(r.closeErr, r.release())
	})
	<-r.done
	return r.closeErr
}

// closeTimeout bounds how long Close waits for a disk that does not answer.
const closeTimeout = 5 * time.Second

var errNoAnswer = errors.New("no answer in time")

// within returns f's error, or errNoAnswer when it takes longer: Raft's futures
// wait for its main loop, which waits for the disk.
func within(d time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return errNoAnswer
	}
}

// release frees what Open took.
func (r *Replica) release() error {
	var errs []error
	if r.stream != nil {
		r.stream.Close()
	}
	if r.store != nil {
		errs = append(errs, r.store.Close())
	}
	if r.folder != nil {
		errs = append(errs, r.folder.close())
	}
	return errors.Join(errs...)
}

// signal wakes everybody who waits for something to change.
type signal struct {
	mu sync.Mutex
	ch chan struct{}
}

func newSignal() *signal { return &signal{ch: make(chan struct{})} }

// wait returns a channel that the next send closes. Look at what may have
// changed after calling it.
func (s *signal) wait() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ch
}

func (s *signal) send() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.ch)
	s.ch = make(chan struct{})
}
