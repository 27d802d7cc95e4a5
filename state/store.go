package state

import (
	"container/heap"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/tidwall/btree"
)

var (
	// ErrCompacted is wrapped when a revision is older than the history window.
	ErrCompacted = errors.New("revision is older than the history kept")
	// ErrFutureRevision is wrapped when this replica has not reached a revision.
	ErrFutureRevision = errors.New("revision has not been reached")
	// ErrApplied is wrapped when an entry is not newer than what was applied.
	ErrApplied = errors.New("entry is already applied")
)

// KV is a key with its value at some revision. Value is shared and must not be
// changed.
type KV struct {
	Key            string
	Value          []byte
	CreateRevision int64 // of the put that made the key
	ModRevision    int64 // of the last put
	ExpiresAt      int64 // Unix seconds, 0 for never

	// memo is not part of the state. Being unexported, it crosses no encoding.
	memo *Memo
}

// String returns the KV for tests and logs. It does not tell of the memo, so the
// KVs of two replicas print the same.
func (kv KV) String() string {
	return fmt.Sprintf("%s=%q@%d/%d!%d", kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.ExpiresAt)
}

// Options bounds the history window, which is this replica's own: it is not part of
// the replicated state, and others may have other bounds. The zero value takes the
// defaults.
//
// What is promised: a revision that was the newest on a replica at some time within
// HistoryAge can be watched from, and be read at, on every replica that was not a
// tenth of HistoryAge behind. More than HistoryBytes or HistoryLargeBytes are not
// held for it: beyond, those resources lose their oldest events, in the namespaces,
// that hold most; for all others the promise stands. A watch or a read of what has
// lost some gets [ErrCompacted], never less than all.
type Options struct {
	// HistoryAge is the age promised, by this replica's clock ([Store.Tick]).
	// Default 5 minutes.
	HistoryAge time.Duration
	// HistoryBytes is the greatest size of what the history alone holds: replaced and
	// deleted values, and an allowance for each change. A value that is still live is
	// not the history's. Default 64 MiB.
	HistoryBytes int64
	// HistoryLargeBytes is the greatest size of the parts of values beyond 4 KiB in
	// it, or a quarter of the state if that is more: a few clients that write large
	// objects are not to fill HistoryBytes, which may be large. Default HistoryBytes/2,
	// 32 MiB at most.
	HistoryLargeBytes int64
	// HistoryChanges is the greatest number of changes kept. Default 0: no limit.
	HistoryChanges int
	// HistoryAgeless is how many of the newest changes are kept whatever their age,
	// within 4 MiB, so that a watch resumes after a quiet night. Default 1,000;
	// negative for none.
	HistoryAgeless int
	// HistoryFolder is where [Store.Spill] makes files. Default "": all of the history
	// stays in memory.
	HistoryFolder string
	// HistoryRestBytes is how much of it Spill leaves in memory: the newest, after which
	// watches mostly resume. Default 4 MiB.
	HistoryRestBytes int64
	// HistoryDiskBytes is the greatest size of those files; beyond it the oldest events
	// go. Default twice HistoryBytes.
	HistoryDiskBytes int64
	// NewestVersion is the newest cluster version that this program can run under.
	// Default [NewestVersion]; less is for tests of upgrades.
	NewestVersion int
}

func (o Options) withDefaults() Options {
	if o.HistoryAge <= 0 {
		o.HistoryAge = 5 * time.Minute
	}
	if o.HistoryBytes <= 0 {
		o.HistoryBytes = 64 << 20
	}
	if o.HistoryLargeBytes <= 0 {
		o.HistoryLargeBytes = min(o.HistoryBytes/2, 32<<20)
	}
	if o.HistoryAgeless == 0 {
		o.HistoryAgeless = 1000
	}
	if o.HistoryRestBytes <= 0 {
		o.HistoryRestBytes = 4 << 20
	}
	if o.HistoryDiskBytes <= 0 {
		o.HistoryDiskBytes = 2 * o.HistoryBytes
	}
	if o.NewestVersion <= 0 {
		o.NewestVersion = NewestVersion
	}
	return o
}

// Entry is a committed log entry that carries a marshalled [Txn].
type Entry struct {
	Index, Term uint64
	Command     []byte
}

// Result is what applying an entry came to, the same on every replica.
type Result struct {
	// Succeeded says that all conditions held and the changes were done.
	Succeeded bool
	// Revision is that of the last change, or the current one if none was done.
	Revision int64
	// Failed holds, for each condition that did not hold, the key as it is; its
	// ModRevision is 0 if it does not exist.
	Failed []KV
	// Err is set when the command could not be read or was already applied;
	// nothing was done then. One that wraps ErrNewerVersion is not the same on every
	// replica, and the entries after it must not be applied.
	Err error
}

type tree = btree.Map[string, *KV]

// treeDegree was chosen by BenchmarkApply and BenchmarkRange: bigger nodes list
// a little faster but are copied whole by the first write after each view.
const treeDegree = 16

// checkpointEvery is after how many revisions a tree is kept for [Store.At].
const checkpointEvery = 4096

// Store holds the state of one replica. All methods may be called at any time
// from many goroutines; writers (ApplyBatch, Restore) take turns, readers never
// wait for them.
type Store struct {
	options Options

	mu      sync.Mutex // writers; also guards the fields up to the blank line
	root    *tree
	expiry  *tree // expiryKey to KV, of the keys that expire
	head    version
	fresh   []*Event // applied but not yet published
	changed bool     // root or expiry differ from the published ones
	groups  watchGroups
	shares  shares // of the history
	now     int64  // as of the last Tick, 0 before
	began   int64  // the first Tick
	memos   int64  // revision up to which memos of former values were emptied
	dropped int64  // bytes of history dropped since watchers were looked after

	current atomic.Pointer[version]
	past    pastVersions
	waiters revisionWaiters
	spill   spill
}

// version is one published state. It is immutable.
type version struct {
	root   *tree
	expiry *tree // nil for versions rebuilt by At
	hist   history

	revision int64
	index    uint64 // of the last entry applied
	term     uint64 // of that entry
	clock    int64  // as of the last Tick; before the first, the greatest Txn.Time seen
	hash     uint64 // rolling hash over all changes
	bytes    int64  // keys and values

	clusterVersion int // see VersionKey

	epoch uint64 // counts Restores, so that two histories are never mixed
}

// firstRevision is that of an empty store.
const firstRevision = 1

// New returns an empty store at revision 1 (so that no client ever sees
// resourceVersion 0, which has a meaning of its own).
func New(o Options) *Store {
	s := &Store{
		options: o.withDefaults(),
		root:    btree.NewMap[string, *KV](treeDegree),
		expiry:  btree.NewMap[string, *KV](treeDegree),
		head:    version{revision: firstRevision, hist: newHistory(firstRevision + 1), clusterVersion: 1},
		shares:  newShares(),
		changed: true,
	}
	if s.options.HistoryFolder != "" {
		s.spill.create = fileIn(s.options.HistoryFolder)
	}
	s.groups.init()
	s.publishView()
	return s
}

// ApplyBatch applies entries in order and returns a result for each, up to one that
// only a newer program can read ([ErrNewerVersion]), which all after it share. Views
// and watchers see the batch as a whole, when it returns at the latest.
func (s *Store) ApplyBatch(entries []Entry) []Result {
	results := make([]Result, len(entries))
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range entries {
		if i > 0 && errors.Is(results[i-1].Err, ErrNewerVersion) {
			results[i] = results[i-1]
			continue
		}
		results[i] = s.apply(&entries[i])
	}
	s.publish()
	return results
}

func (s *Store) apply(e *Entry) Result {
	if e.Index != 0 {
		if e.Index <= s.head.index {
			return Result{Revision: s.head.revision, Err: fmt.Errorf("%w: index %d, applied up to %d", ErrApplied, e.Index, s.head.index)}
		}
	}
	var txn Txn
	err := txn.Unmarshal(e.Command)
	version := s.head.clusterVersion
	if err == nil {
		version, err = s.versionAfter(&txn)
	}
	if errors.Is(err, ErrNewerVersion) {
		return Result{Revision: s.head.revision, Err: err}
	}
	if e.Index != 0 {
		s.head.index, s.head.term = e.Index, e.Term
	}
	if err != nil {
		return Result{Revision: s.head.revision, Err: err}
	}
	if s.now == 0 { // else it is this replica's own
		s.head.clock = max(s.head.clock, txn.Time)
	}

	var failed []KV
	for i := range txn.Conditions {
		c := &txn.Conditions[i]
		kv, ok := s.root.Get(c.Key)
		switch {
		case !ok && c.ModRevision != 0:
			failed = append(failed, KV{Key: c.Key})
		case ok && kv.ModRevision != c.ModRevision:
			failed = append(failed, *kv)
		}
	}
	if failed == nil {
		for i := range txn.Changes {
			s.change(&txn.Changes[i])
		}
		s.head.clusterVersion = version
	}
	if txn.Compact > 0 {
		s.dropTo(txn.Compact, txn.Compact)
	}
	s.trim()
	return Result{Succeeded: failed == nil, Revision: s.head.revision, Failed: failed}
}

func (s *Store) change(c *Change) {
	prev, exists := s.root.Get(c.Key)
	if c.Delete && !exists {
		return
	}
	h := &s.head
	h.revision++
	e := &Event{Type: Put, Revision: h.revision}
	if exists {
		e.Prev = *prev
		h.bytes -= int64(len(prev.Key) + len(prev.Value))
		if prev.ExpiresAt != 0 {
			s.expiry.Delete(expiryKey(prev))
		}
	}
	if c.Delete {
		e.Type = Delete
		e.KV = KV{Key: prev.Key, ModRevision: h.revision}
		s.root.Delete(prev.Key)
	} else {
		kv := newKV(c.Key, c.Value)
		kv.CreateRevision, kv.ModRevision, kv.ExpiresAt = h.revision, h.revision, c.ExpiresAt
		if exists {
			kv.Key, kv.CreateRevision = prev.Key, prev.CreateRevision // one copy of the key in memory
		}
		s.root.Set(kv.Key, kv)
		if kv.ExpiresAt != 0 {
			s.expiry.Set(expiryKey(kv), kv)
		}
		h.bytes += int64(len(kv.Key) + len(kv.Value))
		e.KV = *kv
	}
	h.hash = rollHash(h.hash, e)
	s.remember(e)
	s.fresh = append(s.fresh, e)
	s.changed = true
}

// publish makes what was applied visible to readers, then to watchers.
func (s *Store) publish() {
	v := s.publishView()
	s.groups.deliver(s.fresh, v, s.sweepDue(v))
	clear(s.fresh)
	s.fresh = s.fresh[:0]
	if cap(s.fresh) > 4096 {
		s.fresh = nil
	}
}

func (s *Store) publishView() *version {
	if s.changed {
		s.head.root, s.head.expiry = s.root.Copy(), s.expiry.Copy()
		s.changed = false
	}
	v := s.head
	s.current.Store(&v)
	s.past.published(&v)
	s.waiters.reached(v.revision)
	return &v
}

// rollHash chains the hash of e to the hash of all before it.
func rollHash(hash uint64, e *Event) uint64 {
	var n [25]byte
	binary.LittleEndian.PutUint64(n[0:], hash)
	binary.LittleEndian.PutUint64(n[8:], uint64(e.KV.ExpiresAt))
	binary.LittleEndian.PutUint64(n[16:], uint64(len(e.KV.Key)))
	n[24] = byte(e.Type)
	var d xxhash.Digest
	d.Reset()
	_, _ = d.Write(n[:])
	_, _ = d.WriteString(e.KV.Key)
	_, _ = d.Write(e.KV.Value)
	return d.Sum64()
}

// expiryKey orders by time, then key.
func expiryKey(kv *KV) string {
	b := make([]byte, 0, 8+len(kv.Key))
	b = binary.BigEndian.AppendUint64(b, uint64(kv.ExpiresAt))
	return string(append(b, kv.Key...))
}

// View returns the newest state. It costs nothing and never changes.
func (s *Store) View() View { return View{s.current.Load()} }

// CompactRevision is the oldest revision that [Store.At] answers for, where nothing
// was cut beside for want of room.
func (s *Store) CompactRevision() int64 { return s.current.Load().hist.read }

// Applied returns the index and term of the last entry applied, also after
// [Store.Restore].
func (s *Store) Applied() (index, term uint64) {
	v := s.current.Load()
	return v.index, v.term
}

// WaitRevision returns when this replica has reached revision, or ctx's error.
func (s *Store) WaitRevision(ctx context.Context, revision int64) error {
	if s.current.Load().revision >= revision {
		return nil
	}
	w := s.waiters.add(revision)
	// The revision may have been reached before the waiter was in.
	if s.current.Load().revision >= revision {
		s.waiters.remove(w)
		return nil
	}
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		s.waiters.remove(w)
		return fmt.Errorf("wait for revision %d: %w", revision, ctx.Err())
	}
}

// revisionWaiters is a heap, so that a publish looks at the nearest waiter only.
type revisionWaiters struct {
	mu   sync.Mutex
	heap waiterHeap
}

type waiter struct {
	revision int64
	done     chan struct{}
	pos      int // in the heap, -1 when out
}

func (r *revisionWaiters) add(revision int64) *waiter {
	w := &waiter{revision: revision, done: make(chan struct{})}
	r.mu.Lock()
	heap.Push(&r.heap, w)
	r.mu.Unlock()
	return w
}

func (r *revisionWaiters) remove(w *waiter) {
	r.mu.Lock()
	if w.pos >= 0 {
		heap.Remove(&r.heap, w.pos)
	}
	r.mu.Unlock()
}

func (r *revisionWaiters) reached(revision int64) {
	r.mu.Lock()
	for len(r.heap) > 0 && r.heap[0].revision <= revision {
		close(heap.Pop(&r.heap).(*waiter).done)
	}
	r.mu.Unlock()
}

type waiterHeap []*waiter

func (h waiterHeap) Len() int           { return len(h) }
func (h waiterHeap) Less(i, j int) bool { return h[i].revision < h[j].revision }
func (h waiterHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].pos, h[j].pos = i, j
}
func (h *waiterHeap) Push(x any) {
	w := x.(*waiter)
	w.pos = len(*h)
	*h = append(*h, w)
}
func (h *waiterHeap) Pop() any {
	old := *h
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	w.pos = -1
	return w
}
