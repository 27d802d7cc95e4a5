package state

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
)

// A snapshot is: the magic; records, each a uvarint length and that many bytes,
// the first of which is the record's type; the SHA-256 of all that. The records
// are one meta, the keys in ascending order, the history, one end. The history is its
// events in ascending order, none missing; an event does not repeat a value that a
// key or an earlier event of the snapshot holds. In version 2 it begins with the
// floors, one for each prefix of which something was cut beside, and between events
// there are gaps, each of so many revisions whose events were dropped.
const (
	snapshotMagic       = "TIMONEL\x00"
	snapshotVersion     = 1
	snapshotVersionGaps = 2

	recordMeta   = 'M'
	recordKV     = 'K'
	recordFloors = 'F'
	recordCut    = 'C'
	recordGap    = 'G'
	recordEvent  = 'E'
	recordEnd    = 'Z'

	// maxRecord bounds one record; API objects are limited to a few MiB.
	maxRecord = 256 << 20

	// snapshotBuffer is read, written and hashed at once.
	snapshotBuffer = 256 << 10

	valueInline = 0 // the value follows
	valueLive   = 1 // the key's current value
	valueEvent  = 2 // the value that the event of the KV's revision put
	valueNone   = 3 // no KV

	keysOutOfOrder = "keys out of order"
)

// ErrCorrupt is wrapped by the error of a Restore from bytes that are not a
// whole and unchanged snapshot.
var ErrCorrupt = errors.New("snapshot is corrupt")

// Save writes a snapshot of the newest state; see [View.WriteTo].
func (s *Store) Save(w io.Writer) error {
	_, err := s.View().WriteTo(w)
	return err
}

// WriteTo writes a snapshot of the view: keys, revision, applied index and term, and
// what this replica has by now of the history up to there, with a checksum. Replicas
// that applied the same entries write the same but for the history, which is each
// one's own. A view of the past, made by [Store.At], has no snapshot.
func (v View) WriteTo(w io.Writer) (int64, error) {
	if v.v.expiry == nil {
		return 0, fmt.Errorf("snapshot of revision %d: only a view that was the newest can be written", v.v.revision)
	}
	counter := &countingWriter{w: w}
	if err := writeRecords(counter, func(e *snapshotEncoder) { e.view(v.v) }); err != nil {
		return counter.n, fmt.Errorf("write snapshot of revision %d: %w", v.v.revision, err)
	}
	return counter.n, nil
}

// writeRecords writes the magic, what write encodes, and the checksum.
func writeRecords(w io.Writer, write func(e *snapshotEncoder)) error {
	sum := sha256.New()
	buffered := bufio.NewWriterSize(io.MultiWriter(w, sum), snapshotBuffer)
	e := &snapshotEncoder{w: buffered}
	_, e.err = buffered.WriteString(snapshotMagic)
	write(e)
	if e.err == nil {
		e.err = buffered.Flush()
	}
	if e.err == nil {
		_, e.err = w.Write(sum.Sum(nil))
	}
	return e.err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

type snapshotEncoder struct {
	w   *bufio.Writer
	b   []byte // the record being built
	len [binary.MaxVarintLen64]byte
	err error
}

func (e *snapshotEncoder) flush() {
	if e.err == nil {
		_, e.err = e.w.Write(e.len[:binary.PutUvarint(e.len[:], uint64(len(e.b)))])
	}
	if e.err == nil {
		_, e.err = e.w.Write(e.b)
	}
}

func (e *snapshotEncoder) view(v *version) {
	w := v.window()
	e.meta(v, w.first, uint64(v.root.Len()))
	v.root.Scan(func(_ string, kv *KV) bool {
		e.kv(kv)
		return e.err == nil
	})
	if v.gaps() {
		e.floors(w)
	}
	gap := uint64(0)
	for r := w.first; r < v.hist.next && e.err == nil; r++ {
		if gap == maxGap {
			e.gap(gap)
			gap = 0
		}
		if !w.has(r) {
			gap++
			continue
		}
		e.gap(gap)
		gap = 0
		past, time, err := w.event(r)
		if err != nil { // what is before it is written already, so it is for another snapshot to do without
			v.hist.lose(w.parts[(r-w.base)/historyChunk].cold, err)
			e.err = err
			return
		}
		e.event(v, w, past.event, time, past.hash)
	}
	e.gap(gap)
	e.b = append(e.b[:0], recordEnd)
	e.flush()
}

// window is the part of the history that goes into a snapshot: what events there were
// from first on when it was taken, whatever leaves the history meanwhile.
type window struct {
	first, base int64
	parts       []part
	watch, read int64
	cut         map[string]int64
}

// part is a chunk: its events in memory, or which of those in its file there were.
type part struct {
	hot    *hotChunk
	events []*Event
	cold   *coldChunk
	alive  uint64
}

// window takes what is left of the history of v. Without v.gaps it is what there is
// without a gap.
func (v *version) window() *window {
	h := &v.hist
	w := &window{first: h.first, base: h.base, parts: make([]part, len(h.chunks))}
	for n, c := range h.chunks {
		p := &w.parts[n]
		if p.hot = c.hot.Load(); p.hot == nil {
			p.cold = c.cold.Load()
			p.alive = p.cold.alive.Load()
			continue
		}
		p.events = make([]*Event, historyChunk)
		for i := range p.events {
			if h.base+int64(n*historyChunk+i) < h.next {
				p.events[i] = p.hot.events[i].Load()
			}
		}
	}
	if !v.gaps() {
		w.first = h.next
		for w.first > h.first && w.slot(w.first-1) {
			w.first--
		}
	}
	h.floors.mu.RLock()
	defer h.floors.mu.RUnlock()
	w.watch, w.read, w.cut = min(h.floors.watch, v.revision), min(h.floors.read, v.revision), maps.Clone(h.floors.cut)
	return w
}

// slot says whether there was an event of a revision from base to the newest.
func (w *window) slot(revision int64) bool {
	i := revision - w.base
	p := &w.parts[i/historyChunk]
	i %= historyChunk
	if p.events != nil {
		return p.events[i] != nil
	}
	return p.alive>>i&1 != 0
}

// has says whether the window has the event of a revision.
func (w *window) has(revision int64) bool { return revision >= w.first && w.slot(revision) }

// event returns an event that the window has, and when it came.
func (w *window) event(revision int64) (past pastEvent, time int64, err error) {
	i := revision - w.base
	p := &w.parts[i/historyChunk]
	i %= historyChunk
	if p.events != nil {
		return pastEvent{p.events[i], p.hot.hashes[i]}, p.hot.times[i], nil
	}
	past, err = p.cold.read(i)
	return past, p.cold.time(i), err
}

func (e *snapshotEncoder) meta(v *version, first int64, keys uint64) {
	format := byte(snapshotVersion)
	if v.gaps() {
		format = snapshotVersionGaps
	}
	e.b = append(e.b[:0], recordMeta, format)
	for _, n := range []uint64{uint64(v.revision), uint64(first), v.index, v.term, uint64(v.clock), v.hash, keys} {
		e.b = binary.AppendUvarint(e.b, n)
	}
	e.flush()
}

func (e *snapshotEncoder) floors(w *window) {
	e.b = append(e.b[:0], recordFloors)
	e.b = binary.AppendUvarint(e.b, uint64(w.watch))
	e.b = binary.AppendUvarint(e.b, uint64(w.read))
	e.flush()
	for _, prefix := range slices.Sorted(maps.Keys(w.cut)) {
		e.b = append(e.b[:0], recordCut)
		e.b = appendString(e.b, prefix)
		e.b = binary.AppendUvarint(e.b, uint64(w.cut[prefix]))
		e.flush()
	}
}

func (e *snapshotEncoder) gap(n uint64) {
	if n > 0 && e.err == nil {
		e.b = append(e.b[:0], recordGap)
		e.b = binary.AppendUvarint(e.b, n)
		e.flush()
	}
}

func (e *snapshotEncoder) kv(kv *KV) {
	e.b = append(e.b[:0], recordKV)
	e.b = appendString(e.b, kv.Key)
	e.b = appendBytes(e.b, kv.Value)
	e.b = appendNumbers(e.b, kv)
	e.flush()
}

func (e *snapshotEncoder) event(v *version, w *window, ev *Event, time int64, hash uint64) {
	e.b = append(e.b[:0], recordEvent, byte(ev.Type))
	e.b = appendString(e.b, ev.KV.Key)
	e.b = binary.AppendUvarint(e.b, uint64(time))
	e.b = binary.AppendUvarint(e.b, hash)
	if ev.Type == Put {
		if live, ok := v.root.Get(ev.KV.Key); ok && live.ModRevision == ev.Revision {
			e.b = append(e.b, valueLive)
		} else {
			e.b = append(e.b, valueInline)
			e.b = appendBytes(e.b, ev.KV.Value)
			e.b = appendNumbers(e.b, &ev.KV)
		}
	}
	switch prev := &ev.Prev; {
	case prev.ModRevision == 0:
		e.b = append(e.b, valueNone)
	case w.has(prev.ModRevision):
		e.b = append(e.b, valueEvent)
		e.b = binary.AppendUvarint(e.b, uint64(prev.ModRevision))
	default:
		e.b = append(e.b, valueInline)
		e.b = appendBytes(e.b, prev.Value)
		e.b = appendNumbers(e.b, prev)
	}
	e.flush()
}

func appendNumbers(b []byte, kv *KV) []byte {
	b = binary.AppendUvarint(b, uint64(kv.CreateRevision))
	b = binary.AppendUvarint(b, uint64(kv.ModRevision))
	return binary.AppendUvarint(b, uint64(kv.ExpiresAt))
}

// gapsVersion is the cluster version from which on snapshots may tell of a history with
// gaps. Before, they hold the part of the history after the last gap.
const gapsVersion = 2

func (v *version) gaps() bool { return v.clusterVersion >= gapsVersion }
