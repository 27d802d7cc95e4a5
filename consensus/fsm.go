package consensus

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"github.com/hashicorp/raft"
)

// Entry is one committed command.
type Entry struct {
	// Index is the entry's place in the log. Indexes ascend; there are gaps.
	Index uint64
	// Term is the term of the leader that appended it.
	Term uint64
	// Command is what was given to Apply. It must not be changed.
	Command []byte
}

// FSM is the state machine that the log drives, the same on every replica.
// ApplyBatch, Snapshot and Restore are called from one goroutine at a time.
type FSM interface {
	// ApplyBatch applies the entries in order and returns one result each. It
	// must be deterministic: what is wrong with a command is a result. An error says
	// that this program cannot read an entry, of which and of those after it nothing
	// was applied: the replica stands still, so as not to differ from those that can.
	ApplyBatch([]Entry) ([]any, error)
	// Snapshot returns the state as of now, in O(1): WriteTo is called later,
	// while entries are applied. If it also has a Release() method, that is
	// called when the snapshot is no longer needed, written or not.
	Snapshot() (SnapshotWriter, error)
	// Restore replaces the state by what a SnapshotWriter wrote. On an error the
	// state must be as before.
	Restore(io.Reader) error
}

// SnapshotWriter writes one state as it was when it was taken.
type SnapshotWriter interface {
	WriteTo(io.Writer) (int64, error)
}

// outcomeKind says what became of an entry that somebody waits for.
type outcomeKind int

const (
	outcomeApplied outcomeKind = iota // result holds the FSM's result
	outcomeDropped                    // it is not in the log, and never will be
	outcomeUnknown                    // a snapshot was installed over it
)

type outcome struct {
	kind   outcomeKind
	result any
	index  uint64
}

// waiter waits on this replica for one entry to be applied here.
type waiter struct {
	term     uint64       // the entry's fence
	done     chan outcome // holds one
	index    uint64       // where it was appended; 0 while unknown
	restored bool         // a snapshot that may contain the entry was installed meanwhile
}

// machine is the state machine as Raft sees it: it strips entry headers, drops
// entries whose fence is not their term, knows how far this replica has
// applied, and tells waiters what became of their entries.
type machine struct {
	fsm FSM
	// onApply is told of each batch's last index and term, from Raft's apply
	// goroutine. It must not block.
	onApply func(index, term uint64)
	// newest is the newest cluster version whose entries are read.
	newest byte
	// onCorrupt is told of an entry that cannot be read. Nothing is applied
	// after it.
	onCorrupt func(error)
	// durable waits until this replica has an entry on disk; false when it closes
	// before.
	durable func(index uint64) bool
	// read reads an entry of the log that came without its data.
	read func(index uint64, l *raft.Log) error
	// stop ends the wait of a machine that met a corrupt entry.
	stop <-chan struct{}

	mu       sync.Mutex
	applied  uint64        // last index this replica has applied
	term     uint64        // and its term
	advanced chan struct{} // closed and renewed when applied grows
	waiters  map[requestID]*waiter
	corrupt  error // nothing is applied any more
}

func newMachine(fsm FSM, stop <-chan struct{}) *machine {
	return &machine{
		fsm: fsm, stop: stop, newest: entryVersion,
		onApply: func(uint64, uint64) {}, onCorrupt: func(error) {}, durable: func(uint64) bool { return true },
		read:     func(index uint64, _ *raft.Log) error { return fmt.Errorf("entry %d has no data", index) },
		advanced: make(chan struct{}), waiters: map[requestID]*waiter{},
	}
}

// expect registers a waiter for an entry about to be proposed with the fence.
// The caller must call forget when it stops waiting.
func (m *machine) expect(id requestID, term uint64) *waiter {
	w := &waiter{term: term, done: make(chan outcome, 1)}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.term > term {
		w.done <- outcome{kind: outcomeDropped}
		return w
	}
	m.waiters[id] = w
	return w
}

func (m *machine) forget(id requestID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.waiters, id)
}

// placed tells where the leader appended the entry. When a snapshot that
// contains it was installed here, its result will not come.
func (m *machine) placed(id requestID, index uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if w := m.waiters[id]; w != nil {
		w.index = index
		if w.restored && index <= m.applied {
			m.resolve(id, w, outcome{kind: outcomeUnknown})
		}
	}
}

func (m *machine) resolve(id requestID, w *waiter, o outcome) {
	delete(m.waiters, id)
	w.done <- o
}

// position returns the last applied index and its term.
func (m *machine) position() (index, term uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.applied, m.term
}

// waitApplied returns when this replica has applied index, or with ctx's error.
func (m *machine) waitApplied(ctx context.Context, index uint64) error {
	for {
		m.mu.Lock()
		applied, advanced := m.applied, m.advanced
		m.mu.Unlock()
		if applied >= index {
			return nil
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Apply implements raft.FSM; Raft calls ApplyBatch instead.
func (m *machine) Apply(l *raft.Log) any { return m.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM.
func (m *machine) ApplyBatch(logs []*raft.Log) []any {
	for rest := logs; len(rest) > 0; {
		portion, read, err := m.portion(rest)
		if !m.applyAll(portion, err) {
			break
		}
		for _, l := range read {
			l.Data = nil
		}
		rest = rest[len(portion):]
	}
	return make([]any, len(logs))
}

// applyAll applies entries, after which comes one that cannot be read if corrupt is not
// nil. It returns false when the replica closes, having met something that it cannot go
// on after.
func (m *machine) applyAll(logs []*raft.Log, unread error) bool {
	var (
		entries = make([]Entry, 0, len(logs))
		ids     = make([]requestID, 0, len(logs))
		dropped []requestID
	)
	if n := len(logs); n > 0 && !m.durable(logs[n-1].Index) {
		m.mu.Lock()
		m.corrupt = ErrClosed // lest Raft takes what is not applied for part of a snapshot
		m.mu.Unlock()
	}
	m.mu.Lock()
	corrupt, after := m.corrupt, m.applied
	m.mu.Unlock()
	for _, l := range logs {
		if corrupt != nil {
			break
		}
		if l.Index <= after {
			corrupt = fmt.Errorf("log entry %d came after entry %d: what is applied never goes back", l.Index, after)
			break
		}
		after = l.Index
		if l.Type != raft.LogCommand {
			continue
		}
		e, err := decodeEntry(l.Data)
		if err != nil {
			corrupt = fmt.Errorf("log entry %d: %w", l.Index, err)
			break
		}
		if e.version > m.newest {
			corrupt = fmt.Errorf("log entry %d: %w (entry of cluster version %d, this program is held at %d)", l.Index, ErrNewerVersion, e.version, m.newest)
			break
		}
		switch {
		case e.term != l.Term:
			dropped = append(dropped, e.id)
		case e.kind == kindMarker:
			m.mu.Lock()
			if w := m.waiters[e.id]; w != nil {
				m.resolve(e.id, w, outcome{kind: outcomeApplied, index: l.Index})
			}
			m.mu.Unlock()
		default:
			entries = append(entries, Entry{Index: l.Index, Term: l.Term, Command: e.command})
			ids = append(ids, e.id)
		}
	}
	if corrupt == nil {
		corrupt = unread
	}
	var results []any
	if corrupt == nil && len(entries) > 0 {
		if results, corrupt = m.fsm.ApplyBatch(entries); corrupt == nil && len(results) != len(entries) {
			panic(fmt.Sprintf("consensus: the state machine returned %d results for %d entries", len(results), len(entries)))
		}
	}
	if corrupt != nil {
		// Going on would make this replica differ from the others: stand still
		// until it is closed.
		m.mu.Lock()
		m.corrupt = corrupt
		m.mu.Unlock()
		if !errors.Is(corrupt, ErrClosed) {
			m.onCorrupt(corrupt)
		}
		<-m.stop
		return false
	}

	last := logs[len(logs)-1]

	m.mu.Lock()
	for i, id := range ids {
		if w := m.waiters[id]; w != nil {
			m.resolve(id, w, outcome{kind: outcomeApplied, result: results[i], index: entries[i].Index})
		}
	}
	for _, id := range dropped {
		if w := m.waiters[id]; w != nil {
			m.resolve(id, w, outcome{kind: outcomeDropped})
		}
	}
	if last.Term > m.term {
		m.endTerms(last.Term)
	}
	m.applied, m.term = last.Index, last.Term
	close(m.advanced)
	m.advanced = make(chan struct{})
	m.mu.Unlock()

	m.onApply(last.Index, last.Term)
	return true
}

// endTerms resolves who waits for an entry of a term before the one given:
// terms ascend along the log, so what has not come by now never will.
func (m *machine) endTerms(term uint64) {
	for id, w := range m.waiters {
		if w.term >= term {
			continue
		}
		kind := outcomeDropped
		if w.restored {
			kind = outcomeUnknown
		}
		m.resolve(id, w, outcome{kind: kind})
	}
}

// Our part of a snapshot, before the state machine's own: magic, applied index,
// its term, CRC-32C of these.
const (
	snapshotMagic      = "TIMONEL\x01"
	snapshotHeaderSize = 8 + 8 + 8 + 4
)

// Snapshot implements raft.FSM.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	m.mu.Lock()
	applied, term, corrupt := m.applied, m.term, m.corrupt
	m.mu.Unlock()
	if corrupt != nil {
		return nil, corrupt
	}
	w, err := m.fsm.Snapshot()
	if err != nil {
		return nil, err
	}
	return &machineSnapshot{applied: applied, term: term, state: w}, nil
}

// Restore implements raft.FSM.
func (m *machine) Restore(rc io.ReadCloser) error {
	var h [snapshotHeaderSize]byte
	if _, err := io.ReadFull(rc, h[:]); err != nil {
		return fmt.Errorf("read snapshot header: %w", err)
	}
	if string(h[:8]) != snapshotMagic {
		return fmt.Errorf("not a Timonel snapshot of a known version (it starts with %q)", h[:8])
	}
	if binary.LittleEndian.Uint32(h[24:]) != crc32.Checksum(h[:24], castagnoli) {
		return fmt.Errorf("snapshot header: checksum does not match")
	}
	index, term := binary.LittleEndian.Uint64(h[8:]), binary.LittleEndian.Uint64(h[16:])
	if applied, _ := m.position(); index < applied {
		return fmt.Errorf("the snapshot ends with entry %d, and %d is applied already: state never goes back", index, applied)
	}
	if err := m.fsm.Restore(rc); err != nil {
		return err
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	for id, w := range m.waiters {
		w.restored = true
		if w.index != 0 && w.index <= index {
			m.resolve(id, w, outcome{kind: outcomeUnknown})
		}
	}
	if term > m.term {
		m.endTerms(term)
	}
	m.applied, m.term = index, term
	close(m.advanced)
	m.advanced = make(chan struct{})
	return nil
}

type machineSnapshot struct {
	applied, term uint64
	state         SnapshotWriter
}

// Persist implements raft.FSMSnapshot.
func (s *machineSnapshot) Persist(sink raft.SnapshotSink) error {
	var h [snapshotHeaderSize]byte
	copy(h[:], snapshotMagic)
	binary.LittleEndian.PutUint64(h[8:], s.applied)
	binary.LittleEndian.PutUint64(h[16:], s.term)
	binary.LittleEndian.PutUint32(h[24:], crc32.Checksum(h[:24], castagnoli))
	if _, err := sink.Write(h[:]); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if _, err := s.state.WriteTo(sink); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	return nil
}

// Release implements raft.FSMSnapshot.
func (s *machineSnapshot) Release() {
	if r, ok := s.state.(interface{ Release() }); ok {
		r.Release()
	}
}
