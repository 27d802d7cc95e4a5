package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// contents is what a disk holds. Entries are not changed once written.
type contents struct {
	logs        map[uint64]raft.Log
	first, last uint64
	values      map[string][]byte
	snapshots   []*snapshot
	identity    []byte
}

func newContents() *contents {
	return &contents{logs: map[uint64]raft.Log{}, values: map[string][]byte{}}
}

func (c *contents) clone() *contents {
	d := *c
	d.logs, d.values = maps.Clone(c.logs), maps.Clone(c.values)
	d.snapshots = append([]*snapshot(nil), c.snapshots...)
	return &d
}

func (c *contents) store(logs []*raft.Log) {
	for _, l := range logs {
		c.logs[l.Index] = *l
		if c.first == 0 || l.Index < c.first {
			c.first = l.Index
		}
		c.last = max(c.last, l.Index)
	}
}

func (c *contents) deleteRange(first, last uint64) {
	for i := first; i <= last; i++ {
		delete(c.logs, i)
	}
	c.first, c.last = 0, 0
	for i := range c.logs {
		if c.first == 0 || i < c.first {
			c.first = i
		}
		c.last = max(c.last, i)
	}
}

// disk is the medium: what is on it survives a crash.
type disk struct {
	mu     sync.Mutex
	random *rand.Rand
	synced *contents
	// Faults of the process that uses it now.
	crashIn int           // crash at this write from now, 0: never
	slow    time.Duration // at most, of an append
	failing bool          // writes fail
}

func newDisk(seed uint64) *disk {
	return &disk{random: rand.New(rand.NewPCG(seed, 2)), synced: newContents()}
}

// handle is the disk as one process sees it: what it wrote, synced or not. It
// implements consensus.LogStore and raft.SnapshotStore. A process that is dead
// goes on in a world of its own, of which nothing reaches the disk.
type handle struct {
	disk  *disk
	crash func() // kills the process; must not block

	mu       sync.Mutex
	cached   *contents
	attached bool
}

// open gives a new process what is on the disk.
func (d *disk) open(crash func()) *handle {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashIn, d.slow, d.failing = 0, 0, false
	return &handle{disk: d, crash: crash, cached: d.synced.clone(), attached: true}
}

// detach ends what the process can do to the disk.
func (h *handle) detach() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attached = false
}

var (
	errNoSpace = &osError{"append", syscall.ENOSPC}
	errNoSync  = &osError{"sync", syscall.EIO}
)

type osError struct {
	what string
	err  error
}

func (e *osError) Error() string { return e.what + ": " + e.err.Error() }
func (e *osError) Unwrap() error { return e.err }

// write does one write: into the process's view, and with the sync that follows
// onto the disk. part is what of it may reach the disk when the process dies in
// the middle, or the write fails; nil for nothing.
func (h *handle) write(do func(*contents), part func(*contents)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.attached {
		do(h.cached)
		return nil
	}
	d := h.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	torn := func() {
		switch d.random.IntN(3) {
		case 0: // nothing of it
		case 1:
			if part != nil {
				part(d.synced)
			}
		case 2: // all of it, and nobody was told
			do(d.synced)
		}
	}
	if d.crashIn > 0 {
		if d.crashIn--; d.crashIn == 0 {
			torn()
			h.attached = false
			do(h.cached)
			h.crash()
			return nil
		}
	}
	if d.failing {
		if d.random.IntN(3) == 0 { // it was the last sync that failed
			do(h.cached)
			do(d.synced)
			return errNoSync
		}
		return errNoSpace
	}
	do(h.cached)
	do(d.synced) // the sync
	return nil
}

// StoreLogs implements raft.LogStore.
func (h *handle) StoreLogs(logs []*raft.Log) error {
	h.disk.mu.Lock()
	took := 50*time.Microsecond + time.Duration(h.disk.random.Int64N(int64(time.Millisecond)))
	if h.disk.slow > 0 {
		took += time.Duration(h.disk.random.Int64N(int64(h.disk.slow)))
	}
	some := h.disk.random.IntN(len(logs) + 1)
	h.disk.mu.Unlock()
	time.Sleep(took)
	return h.write(func(c *contents) { c.store(logs) }, func(c *contents) { c.store(logs[:some]) })
}

// StoreLog implements raft.LogStore.
func (h *handle) StoreLog(l *raft.Log) error { return h.StoreLogs([]*raft.Log{l}) }

// GetLog implements raft.LogStore.
func (h *handle) GetLog(index uint64, l *raft.Log) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	found, ok := h.cached.logs[index]
	if !ok {
		return raft.ErrLogNotFound
	}
	*l = found
	return nil
}

// FirstIndex implements raft.LogStore.
func (h *handle) FirstIndex() (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cached.first, nil
}

// LastIndex implements raft.LogStore.
func (h *handle) LastIndex() (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cached.last, nil
}

// DeleteRange implements raft.LogStore.
func (h *handle) DeleteRange(first, last uint64) error {
	return h.write(func(c *contents) { c.deleteRange(first, last) }, nil)
}

// Close implements io.Closer.
func (h *handle) Close() error { return nil }

// Set implements raft.StableStore.
func (h *handle) Set(key, value []byte) error {
	value = bytes.Clone(value)
	return h.write(func(c *contents) { c.values[string(key)] = value }, nil)
}

// Get implements raft.StableStore.
func (h *handle) Get(key []byte) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return bytes.Clone(h.cached.values[string(key)]), nil
}

// SetUint64 implements raft.StableStore.
func (h *handle) SetUint64(key []byte, value uint64) error {
	return h.Set(key, fmt.Appendf(nil, "%d", value))
}

// GetUint64 implements raft.StableStore.
func (h *handle) GetUint64(key []byte) (n uint64, err error) {
	b, _ := h.Get(key)
	if b == nil {
		return 0, nil
	}
	_, err = fmt.Sscan(string(b), &n)
	return n, err
}

// keep writes the replica's identity.
func (h *handle) keep(b []byte) error {
	b = bytes.Clone(b)
	return h.write(func(c *contents) { c.identity = b }, nil)
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
	}, nil)
}

func newer(a, b *snapshot) bool {
	if a.meta.Term != b.meta.Term {
		return a.meta.Term > b.meta.Term
	}
	return a.meta.Index > b.meta.Index
}
