package consensus

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// disk is the log store and the stable store as Raft sees them: it times each
// write, so that a stalled disk is noticed, and keeps a failing one from ending
// the process.
type disk struct {
	store     LogStore
	logs      raft.LogStore // the store, or a cache above it
	newest    *logCache     // that cache, nil if there is none
	snapshots raft.SnapshotStore
	log       *slog.Logger
	stop      <-chan struct{} // the replica closes

	// queue holds what a leader appends until it is on disk: see StoreLogs.
	queue queue
	// leads reports that Raft leads; false in doubt. snapshot is the last index of the
	// newest snapshot that Raft has taken or installed.
	leads    func() bool
	snapshot func() uint64
	// onDamage is told once that the store is damaged.
	onDamage func(error)

	// overwrite is an index at which Raft remembers an entry that dropStale removed,
	// 0 for none: until it is written anew, it looks like one of another term.
	overwrite atomic.Uint64
	// cut: the log's end was cut off, for other entries to take its place.
	cut atomic.Bool
	// held: Raft's main loop waits for an append that must not fail.
	held atomic.Bool

	// voteTerm is the term of the vote that Raft is writing.
	voteTerm uint64
	// unsure is the first index of an append that failed, 0 for none: entries from there
	// on may be in the store, and Raft does not know of them.
	unsure atomic.Uint64

	// portion is how many bytes of entries are in a message to a follower, 0 for any
	// number, and message how many entries Raft reads for one.
	portion int64
	message uint64

	// ahead is how many bytes of entries Raft may hold for the state machine, and applied
	// the last one that this has applied: see notYet.
	ahead   int64
	applied atomic.Uint64

	weighing sync.Mutex
	weights  weights // of the entries in the log and, until they are on disk, none of the queue's

	// fault, if set by a test, runs before each write and may delay or fail it.
	fault atomic.Pointer[func(what string) error]

	mu      sync.Mutex
	writes  map[uint64]time.Time // in progress, by number: since when
	next    uint64
	err     error // of the last write, nil when it succeeded
	appends DiskStats
}

// DiskStats are figures of the log's appends since the start.
type DiskStats struct {
	// Appends is how many batches were written, each with one sync; Entries how
	// many log entries they held.
	Appends, Entries uint64
	// Total and Max are the time they took, and the longest.
	Total, Max time.Duration
}

func newDisk(store LogStore, snapshots raft.SnapshotStore, log *slog.Logger, stop <-chan struct{}) *disk {
	return &disk{
		store: store, logs: store, snapshots: snapshots, log: log, stop: stop, writes: map[uint64]time.Time{},
		leads: func() bool { return false }, snapshot: func() uint64 { return 0 }, onDamage: func(error) {},
		queue: newQueue(stop),
	}
}

// cache keeps the newest entries in memory: so many, and so many bytes of them.
func (d *disk) cache(entries int, bytes int64) {
	d.newest = newLogCache(&checked{LogStore: d.store, damaged: d.meetDamage}, entries, bytes)
	d.logs = d.newest
}

// meetDamage is told that a running replica's log is damaged, and the replica ends.
// Raft's main loop would panic on an error; it comes to its end here. Its
// replications give up.
func (d *disk) meetDamage(err error) {
	d.onDamage(err)
	if calledBy("raft.(*Raft).run") {
		<-d.stop
		runtime.Goexit()
	}
}

// calledBy reports that a function whose name contains a text is on the stack.
func calledBy(name string) bool {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	for {
		f, more := frames.Next()
		if strings.Contains(f.Function, name) {
			return true
		}
		if !more {
			return false
		}
	}
}

// checked is a log store whose entries are verified when they are read, and that
// turns what reading a damaged file may do into an error and a call of damaged.
type checked struct {
	raft.LogStore
	damaged func(error)
}

// GetLog implements raft.LogStore.
func (c *checked) GetLog(index uint64, l *raft.Log) error {
	err := guard(func() error { return c.LogStore.GetLog(index, l) })
	if err == nil {
		err = verify(index, l)
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		c.damaged(fmt.Errorf("entry %d: %w", index, err))
	}
	return err
}

// StoreLogs implements raft.LogStore.
func (c *checked) StoreLogs(logs []*raft.Log) error {
	return c.write(func() error { return c.LogStore.StoreLogs(logs) })
}

// DeleteRange implements raft.LogStore.
func (c *checked) DeleteRange(first, last uint64) error {
	return c.write(func() error { return c.LogStore.DeleteRange(first, last) })
}

func (c *checked) write(f func() error) error {
	err := guard(f)
	if errors.Is(err, errDamaged) {
		c.damaged(err)
	}
	return err
}

// dropStale removes the log when its entry at the snapshot's index is not the one
// that the snapshot stands for, but of an earlier leader and never counted, or
// missing. (Ongaro & Ousterhout, figure 13, step 7.) Raft would keep it, compare
// it with what its leader sends, never agree, and as a leader send it to others.
//
// A running Raft also remembers the log's end: see overwrite.
func (d *disk) dropStale(index, term uint64) error {
	if err := d.queue.flush(); err != nil {
		return err
	}
	first, err := d.logs.FirstIndex()
	if err != nil || first == 0 || first > index {
		return err
	}
	last, err := d.logs.LastIndex()
	if err != nil {
		return err
	}
	var l raft.Log
	switch err := d.logs.GetLog(index, &l); {
	case err == nil && l.Term == term:
		return nil
	case err != nil && !errors.Is(err, raft.ErrLogNotFound):
		return err
	}
	d.log.Info("removing log entries that a snapshot contradicts", "from", first, "to", last, "snapshot", index)
	cut := d.cut.Load()
	if err := d.DeleteRange(first, last); err != nil {
		return err
	}
	d.cut.Store(cut) // Raft knows the snapshot
	if last >= index {
		d.overwrite.Store(index)
	}
	return nil
}

// contradicted returns the snapshot entry in overwrite, with its term.
func (d *disk) contradicted() (index, term uint64) {
	index = d.overwrite.Load()
	if list, err := d.snapshots.List(); err == nil && index != 0 {
		for _, s := range list {
			if s.Index == index {
				return index, s.Term
			}
		}
	}
	return 0, 0
}

// timed runs one write.
func (d *disk) timed(what string, entries int, write func() error) error {
	start := time.Now()
	d.mu.Lock()
	n := d.next
	d.next++
	d.writes[n] = start
	d.mu.Unlock()

	var err error
	if fault := d.fault.Load(); fault != nil {
		err = (*fault)(what)
	}
	if err == nil {
		err = write()
	}

	took := time.Since(start)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.writes, n)
	if err != nil && d.err == nil {
		d.log.Error("cannot write the log: this replica does not lead until it can", "what", what, "error", err)
	} else if err == nil && d.err != nil {
		d.log.Info("the log can be written again")
	}
	d.err = err
	if entries > 0 && err == nil {
		d.appends.Appends++
		d.appends.Entries += uint64(entries)
		d.appends.Total += took
		d.appends.Max = max(d.appends.Max, took)
	}
	return err
}

// busy returns for how long the oldest write in progress has been so.
func (d *disk) busy() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	var longest time.Duration
	for _, t := range d.writes {
		longest = max(longest, time.Since(t))
	}
	return longest
}

// DiskErr returns why this replica cannot write its log now: the error of its
// last write, or that a write has been in progress for longer than
// Config.DiskStallTimeout. Nil when all is well.
func (r *Replica) DiskErr() error {
	if _, err := r.disk.stats(); err != nil {
		return fmt.Errorf("cannot write the log in %s: %w", r.cfg.DataDir, err)
	}
	if busy := r.disk.busy(); busy > r.cfg.DiskStallTimeout {
		return fmt.Errorf("the disk of %s stalls: a write has taken %v so far", r.cfg.DataDir, busy.Round(time.Millisecond))
	}
	return nil
}

// fit reports that the last write went through.
func (d *disk) fit() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err == nil
}

func (d *disk) stats() (DiskStats, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.appends, d.err
}

// StoreLogs implements raft.LogStore.
//
// A leader's commands are queued, so that the followers write them at the same time
// as the leader does (Ongaro, Consensus: Bridging Theory and Practice, 10.2.1).
// Raft counts the leader among those that have an entry as soon as this returns; so
// until the entry is on disk here it is not applied (machine.durable), followers are
// not told that it is committed (transport.durable), and this replica acknowledges
// nothing to another leader (transport.flush). All else is on disk on return.
//
// Raft cuts a conflicting end off and then appends; when the append fails it goes
// on remembering the end that is gone, and refuses for ever what its leader sends
// (a TODO in its appendEntries). So that append waits, without an answer, until
// there is room or the replica closes. So does a leader's change of members: when its
// append fails Raft goes on by it all the same, and counts votes by what no log says
// (its appendConfigurationEntry). The replica falls silent meanwhile, as with a disk
// that stalls, and another leads.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	leads := d.leads()
	if leads && !slices.ContainsFunc(logs, func(l *raft.Log) bool { return l.Type != raft.LogCommand }) {
		return d.queue.add(logs)
	}
	members := leads && slices.ContainsFunc(logs, func(l *raft.Log) bool { return l.Type == raft.LogConfiguration })
	defer d.held.Store(false)
	for {
		err := d.queue.flush()
		if err == nil {
			err = d.appendNow(logs)
		}
		if err == nil {
			d.cut.Store(false)
			return nil
		}
		if !members && !d.cut.Load() {
			return err
		}
		d.held.Store(members)
		select {
		case <-d.stop:
			if members {
				runtime.Goexit() // Raft is shutting down, and must not act by it
			}
			return err
		case <-time.After(retryWrite):
		}
	}
}

// retryWrite is how long a write that failed waits before it is tried again.
const retryWrite = 200 * time.Millisecond

// appendNow writes entries; they are on disk when it returns nil.
func (d *disk) appendNow(logs []*raft.Log) error {
	err := d.timed("append", len(logs), func() error {
		if err := d.dropUnsure(); err != nil {
			return err
		}
		return d.logs.StoreLogs(logs)
	})
	if err != nil {
		d.unsure.Store(logs[0].Index)
		return err
	}
	d.unsure.Store(0)
	d.overwrite.Store(0)
	d.weigh(func(w *weights) { w.add(logs...) })
	return nil
}

// writeQueue writes what is queued, until the replica closes.
func (d *disk) writeQueue() {
	for {
		logs := d.queue.next()
		if logs == nil {
			return
		}
		err := d.appendNow(logs)
		d.queue.wrote(logs, err)
		if err != nil {
			select {
			case <-d.stop:
				return
			case <-time.After(retryWrite):
			}
		}
	}
}

// dropUnsure removes what an append that failed has left all the same: when its
// last sync fails, bbolt's pages are written, and count when the file is next read.
// Raft does not know of these entries, and would leave those behind its own end.
func (d *disk) dropUnsure() error {
	first := d.unsure.Load()
	if first == 0 {
		return nil
	}
	last, err := d.logs.LastIndex()
	if err != nil || last < first {
		return err
	}
	return d.logs.DeleteRange(first, last)
}

// clear removes what a founding that failed before Raft ran has written.
func (d *disk) clear() error {
	first, err := d.logs.FirstIndex()
	if err != nil {
		return err
	}
	if first != 0 {
		last, err := d.logs.LastIndex()
		if err != nil {
			return err
		}
		if err := d.DeleteRange(first, last); err != nil {
			return err
		}
	}
	return d.timed("term", 0, func() error { return d.store.SetUint64([]byte("CurrentTerm"), 0) })
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// FirstIndex implements raft.LogStore.
func (d *disk) FirstIndex() (uint64, error) {
	first, err := d.logs.FirstIndex()
	if err == nil && first == 0 {
		first, _ = d.queue.extent()
	}
	return first, err
}

// LastIndex implements raft.LogStore.
func (d *disk) LastIndex() (uint64, error) {
	if _, last := d.queue.extent(); last != 0 {
		return last, nil
	}
	return d.logs.LastIndex()
}

// GetLog implements raft.LogStore. For the entry that the newest snapshot ends
// with, should the log lack it, it returns index and term alone: Raft compares
// these before it appends, and a follower that got a snapshot and entries after
// it could otherwise never be sent the first of them again. (Raft sends an entry
// only when it has the one before as well, so this one is never sent.) Raft must know
// the snapshot: one whose last sync failed is listed as well.
func (d *disk) GetLog(index uint64, l *raft.Log) error {
	if d.queue.get(index, l) {
		return nil
	}
	if (d.newest == nil || d.newest.get(index) == nil) && d.later(index) {
		*l = raft.Log{Index: index, Type: laterType}
		return nil
	}
	err := d.read(index, l)
	if err == nil && l.Type == raft.LogCommand && d.notYet(index) {
		l.Data, l.Extensions = nil, nil
	}
	return err
}

// read is GetLog of an entry in full.
func (d *disk) read(index uint64, l *raft.Log) error {
	if d.queue.get(index, l) {
		return nil
	}
	err := d.logs.GetLog(index, l)
	if !errors.Is(err, raft.ErrLogNotFound) || index <= 1 {
		return err
	}
	list, listErr := d.snapshots.List()
	if listErr != nil || len(list) == 0 || list[0].Index != index || d.snapshot() < index {
		return err
	}
	*l = raft.Log{Index: index, Term: list[0].Term, Type: raft.LogNoop}
	if d.overwrite.Load() == index {
		l.Term = 0
	}
	return nil
}

// IsMonotonic implements raft.MonotonicLogStore: a write-ahead log takes no gaps.
func (d *disk) IsMonotonic() bool {
	m, ok := d.store.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// DeleteRange implements raft.LogStore.
func (d *disk) DeleteRange(first, last uint64) error {
	if queued, _ := d.queue.extent(); queued != 0 && last >= queued {
		if err := d.queue.flush(); err != nil {
			return err
		}
	}
	// What is left of an append that failed is behind what Raft takes for the end: cut off
	// before it, the log would have a hole. (When the log is shortened at its start, in
	// another goroutine than Raft's, it may have been appended anew by now.)
	if unsure := d.unsure.Load(); unsure != 0 && last >= unsure-1 {
		if err := d.timed("truncate", 0, d.dropUnsure); err != nil {
			return err
		}
	}
	end, err := d.LastIndex()
	if err != nil || end == 0 || first > end {
		return err
	}
	last = min(last, end)
	// A suffix that conflicts goes at once, lest a hole stay; and a write-ahead log
	// drops whole files.
	if last >= end || d.IsMonotonic() {
		return d.truncate(first, last, last >= end)
	}
	for ; first <= last; first += deleteChunk {
		to := min(last, first+deleteChunk-1)
		if err := d.timed("shorten", 0, func() error { return d.logs.DeleteRange(first, to) }); err != nil {
			return err
		}
		d.weigh(func(w *weights) { w.shorten(to) })
	}
	return nil
}

// truncate removes entries at once. Those at the end it removes in any case, and
// waits for that: when the last sync of a truncation fails they are gone all the
// same, and Raft, told of an error, would go on remembering them.
func (d *disk) truncate(first, last uint64, end bool) error {
	for {
		err := d.timed("truncate", 0, func() error { return d.logs.DeleteRange(first, last) })
		switch {
		case err == nil && end:
			d.weigh(func(w *weights) { w.cut(first) })
			d.cut.Store(true)
			return nil
		case err == nil:
			d.weigh(func(w *weights) { w.shorten(last) })
			return nil
		case !end:
			return err
		}
		select {
		case <-d.stop:
			return err
		case <-time.After(retryWrite):
		}
	}
}

// Raft's keys for its vote.
const (
	voteTermKey      = "LastVoteTerm"
	voteCandidateKey = "LastVoteCand"
)

// Set implements raft.StableStore. Raft writes the term of its vote and then the
// candidate; between the two the disk would say that it voted, in the new term, for
// whom it voted for before, who would then be granted the vote again without a look
// at its log. So the candidate is written first: a candidate of a past term says
// nothing.
func (d *disk) Set(key, value []byte) error {
	return d.timed("vote", 0, func() error {
		if err := d.store.Set(key, value); err != nil || string(key) != voteCandidateKey {
			return err
		}
		return d.store.SetUint64([]byte(voteTermKey), d.voteTerm)
	})
}

// SetUint64 implements raft.StableStore. Raft panics when its term cannot be
// written, so a failing disk makes it wait here instead, without a vote or a
// voice, until there is room or the replica closes.
func (d *disk) SetUint64(key []byte, value uint64) error {
	if string(key) == voteTermKey {
		d.voteTerm = value // Set follows
		return nil
	}
	for {
		err := d.timed("term", 0, func() error { return d.store.SetUint64(key, value) })
		if err == nil {
			return nil
		}
		select {
		case <-d.stop:
			// An answer sent now would promise what is not on disk, and an error
			// would panic: end this goroutine of Raft, which is shutting down.
			runtime.Goexit()
		case <-time.After(retryWrite):
		}
	}
}

// Get implements raft.StableStore.
func (d *disk) Get(key []byte) ([]byte, error) { return d.store.Get(key) }

// GetUint64 implements raft.StableStore.
func (d *disk) GetUint64(key []byte) (uint64, error) { return d.store.GetUint64(key) }

// measureFsync returns the median time that writing and syncing 4 KiB takes in
// the folder.
func measureFsync(dir string) (time.Duration, error) {
	path := filepath.Join(dir, "fsync.tmp")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, fmt.Errorf("measure the disk: %w", err)
	}
	defer os.Remove(path)
	defer f.Close()
	block := make([]byte, 4096)
	var took []time.Duration
	for i := range 9 {
		start := time.Now()
		if _, err := f.WriteAt(block, int64(i*len(block))); err != nil {
			return 0, fmt.Errorf("measure the disk: %w", err)
		}
		if err := f.Sync(); err != nil {
			return 0, fmt.Errorf("measure the disk: %w", err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}
