package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"timonel/consensus"
	"timonel/test/medium"
)

// journalHalf is so small that a run fills it some times over.
const journalHalf = 16 << 10

// disk is what survives a crash: the log's files, sector by sector, under the journal
// and bbolt themselves; and snapshots and identity, which are there whole or not at all.
type disk struct {
	medium *medium.Disk // under the log

	mu     sync.Mutex
	random *rand.Rand
	synced contents
	slow   time.Duration // at most, of an append, and of a commit of bbolt
	opened []*medium.BoltFile
}

// contents is what a disk holds beside the log.
type contents struct {
	snapshots []*snapshot
	identity  []byte
}

func (c *contents) clone() contents {
	return contents{snapshots: append([]*snapshot(nil), c.snapshots...), identity: c.identity}
}

func newDisk(seed uint64) *disk {
	return &disk{random: rand.New(rand.NewPCG(seed, 2)), medium: medium.New(rand.New(rand.NewPCG(seed, 4)))}
}

// calm ends all faults.
func (d *disk) calm() {
	d.medium.CutIn(0)
	d.medium.Fail(false)
	d.setSlow(0)
}

func (d *disk) setSlow(most time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slow = most
}

// wipe loses all that is on it.
func (d *disk) wipe() {
	d.medium.Clear()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.synced = contents{}
}

// remove removes what real files there are.
func (d *disk) remove() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.opened {
		f.Remove()
	}
}

// pause takes the time of an append, or of a commit of bbolt.
func (d *disk) pause(least time.Duration) {
	d.mu.Lock()
	took := least
	if least > 0 {
		took += time.Duration(d.random.Int64N(int64(time.Millisecond)))
	}
	if d.slow > 0 {
		took += time.Duration(d.random.Int64N(int64(d.slow)))
	}
	d.mu.Unlock()
	if took > 0 {
		time.Sleep(took)
	}
}

// handle is the disk as one process sees it: what it wrote, synced or not. It
// implements consensus.LogStore and raft.SnapshotStore. A process that is dead
// goes on in a world of its own, of which nothing reaches the disk.
type handle struct {
	consensus.LogStore
	disk *disk
	life int

	mu       sync.Mutex
	cached   contents
	attached bool
}

// open gives a new process what is on the disk. crash kills it, and must not block.
func (d *disk) open(crash func()) (*handle, error) {
	d.medium.CutIn(0)
	d.medium.Fail(false)
	bolt, err := d.medium.OpenBolt("raft.db")
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.slow = 0
	d.opened = append(d.opened, bolt)
	h := &handle{disk: d, life: d.medium.Life(), cached: d.synced.clone(), attached: true}
	d.mu.Unlock()
	h.LogStore, err = consensus.OpenLog(consensus.LogFiles{
		Bolt: bolt.Path, Attach: bolt.Attach, Stall: func() { d.pause(0) },
		Journal: d.medium.Open("raft.db.journal", 2*journalHalf), Half: journalHalf,
	})
	d.medium.OnCut = crash
	return h, err
}

// detach ends what the process can do to the disk.
func (h *handle) detach() {
	if h.disk.medium.Life() == h.life {
		h.disk.medium.Cut()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attached = false
}

// StoreLogs implements raft.LogStore.
func (h *handle) StoreLogs(logs []*raft.Log) error {
	h.disk.pause(50 * time.Microsecond)
	return h.LogStore.StoreLogs(logs)
}

// StoreLog implements raft.LogStore.
func (h *handle) StoreLog(l *raft.Log) error { return h.StoreLogs([]*raft.Log{l}) }

// write does one write of what is not the log: into the process's view, and with the
// sync that follows onto the disk. When the power is cut in it, or it fails, it may have
// reached the disk all the same.
func (h *handle) write(do func(*contents)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	off, fails := h.disk.medium.Step(h.life)
	d := h.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	reached := d.random.IntN(2) == 0
	switch {
	case off:
		do(&h.cached)
		if h.attached && reached {
			do(&d.synced)
		}
		h.attached = false
	case fails && reached: // it was the last sync that failed
		do(&h.cached)
		do(&d.synced)
		return medium.ErrNoSync
	case fails:
		return medium.ErrNoSpace
	default:
		do(&h.cached)
		do(&d.synced)
	}
	return nil
}

// keep writes the replica's identity.
func (h *handle) keep(b []byte) error {
	b = bytes.Clone(b)
	return h.write(func(c *contents) { c.identity = b })
}

func (h *handle) identity() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cached.identity
}

// snapshot is a snapshot that is complete.
type snapshot struct {
	meta raft.SnapshotMeta
	data []byte
}

// Create implements raft.SnapshotStore.
func (h *handle) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, at uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	return &sink{h: h, meta: raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixNano()), Index: index, Term: term,
		Configuration: c.Clone(), ConfigurationIndex: at,
	}}, nil
}

// List implements raft.SnapshotStore: newest first.
func (h *handle) List() (out []*raft.SnapshotMeta, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := len(h.cached.snapshots) - 1; i >= 0; i-- {
		meta := h.cached.snapshots[i].meta
		out = append(out, &meta)
	}
	return out, nil
}

// Open implements raft.SnapshotStore.
func (h *handle) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.cached.snapshots {
		if s.meta.ID == id {
			meta := s.meta
			return &meta, io.NopCloser(bytes.NewReader(s.data)), nil
		}
	}
	return nil, nil, errors.New("no snapshot " + id)
}

// sink takes a snapshot; it is on the disk once it is closed.
type sink struct {
	h    *handle
	meta raft.SnapshotMeta
	data bytes.Buffer
	over bool
}

func (s *sink) Write(b []byte) (int, error) { return s.data.Write(b) }
func (s *sink) ID() string                  { return s.meta.ID }
func (s *sink) Cancel() error               { s.over = true; return nil }

func (s *sink) Close() error {
	if s.over {
		return nil
	}
	s.over = true
	s.meta.Size = int64(s.data.Len())
	done := &snapshot{meta: s.meta, data: s.data.Bytes()}
	return s.h.write(func(c *contents) {
		c.snapshots = append(c.snapshots, done)
		// By index, as Raft's file store orders them; two are kept.
		for i := len(c.snapshots) - 1; i > 0 && newer(c.snapshots[i-1], c.snapshots[i]); i-- {
			c.snapshots[i-1], c.snapshots[i] = c.snapshots[i], c.snapshots[i-1]
		}
		if n := len(c.snapshots); n > 2 {
			c.snapshots = append([]*snapshot(nil), c.snapshots[n-2:]...)
		}
	})
}

func newer(a, b *snapshot) bool {
	if a.meta.Term != b.meta.Term {
		return a.meta.Term > b.meta.Term
	}
	return a.meta.Index > b.meta.Index
}
