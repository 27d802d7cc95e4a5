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

// The log's files.
const (
	boltFile    = "raft.db"
	journalFile = "raft.db.journal"
)

// disk is what survives a crash: the log's files, sector by sector, under the journal
// and bbolt themselves; and snapshots and identity, which are there whole or not at all.
type disk struct {
	medium *medium.Disk // under the log

	mu     sync.Mutex
	random *rand.Rand
	synced contents
	told   promises      // what the log has said is on it
	slow   time.Duration // at most, of an append, and of a commit of bbolt
	opened []*medium.BoltFile
	// half is half a journal: so little that a run fills it some times over.
	half int64
	// align is what direct writes are to be aligned to, 0 for none; the journal's are to 512.
	align int64
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
	d := &disk{random: rand.New(rand.NewPCG(seed, 2)), medium: medium.New(rand.New(rand.NewPCG(seed, 4)))}
	d.half = []int64{4 << 10, 16 << 10}[d.random.IntN(2)]
	d.align = []int64{0, 512, 512, 4096}[d.random.IntN(4)]
	return d
}

// calm ends all faults.
func (d *disk) calm() {
	d.medium.Calm()
	d.medium.Fill(false)
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
	d.synced, d.told = contents{}, promises{}
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
	d.medium.Calm()
	bolt, err := d.medium.OpenBolt(boltFile)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.slow = 0
	d.opened = append(d.opened, bolt)
	h := &handle{disk: d, life: d.medium.Life(), cached: d.synced.clone(), attached: true}
	d.mu.Unlock()
	journal := d.medium.Open(journalFile, 2*d.half)
	files := consensus.LogFiles{
		Bolt: bolt.Path, Attach: bolt.Attach, Stall: func() { d.pause(0) },
		Journal: journal, Half: d.half,
	}
	if d.align != 0 {
		files.Direct = journal.Direct(d.align)
	}
	if h.LogStore, err = consensus.OpenLog(files); err != nil {
		d.medium.Kill()
		return nil, err
	}
	d.medium.OnCut = crash
	return h, d.kept(h.LogStore)
}

// detach ends what the process can do to the disk: with the power, or without.
func (h *handle) detach(power bool) {
	if h.disk.medium.Life() == h.life {
		if power {
			h.disk.medium.Cut()
		} else {
			h.disk.medium.Kill()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attached = false
}

// write does one write of what is not the log: into the process's view, and with the
// sync that follows onto the disk. When the power is cut in it, or it fails, it may have
// reached the disk all the same.
func (h *handle) write(do func(*contents)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	over, err := h.disk.medium.Step(h.life)
	d := h.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	reached := d.random.IntN(2) == 0
	switch {
	case over:
		do(&h.cached)
		if h.attached && reached {
			do(&d.synced)
		}
		h.attached = false
	case errors.Is(err, medium.ErrNoSync) && reached: // it was the last sync that failed
		do(&h.cached)
		do(&d.synced)
		return err
	case err != nil:
		return err
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
