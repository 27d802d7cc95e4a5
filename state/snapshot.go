package state

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/tidwall/btree"
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
	for _, ev := range w.events {
		if e.err != nil {
			return
		}
		if gap == maxGap {
			e.gap(gap)
			gap = 0
		}
		if ev == nil {
			gap++
			continue
		}
		e.gap(gap)
		gap = 0
		e.event(v, w, ev, v.hist.timeAt(ev.Revision), v.hist.mustHash(ev.Revision))
	}
	e.gap(gap)
	e.b = append(e.b[:0], recordEnd)
	e.flush()
}

// window is the part of the history that goes into a snapshot: events from first on,
// nil where one was dropped.
type window struct {
	first       int64
	events      []*Event
	watch, read int64
	cut         map[string]int64
}

// window takes what is left of the history of v. Without v.gaps it is what there is
// without a gap.
func (v *version) window() *window {
	h := &v.hist
	w := &window{first: h.first, events: make([]*Event, h.next-h.first)}
	for r := h.next - 1; r >= h.first; r-- {
		e := h.at(r)
		if e == nil && !v.gaps() {
			w.first, w.events = r+1, w.events[r+1-h.first:]
			break
		}
		w.events[r-h.first] = e
	}
	h.floors.mu.RLock()
	defer h.floors.mu.RUnlock()
	w.watch, w.read, w.cut = min(h.floors.watch, v.revision), min(h.floors.read, v.revision), maps.Clone(h.floors.cut)
	return w
}

// has says whether the window has the event of a revision.
func (w *window) has(revision int64) bool {
	return revision >= w.first && w.events[revision-w.first] != nil
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

// Restore replaces the whole state by the snapshot in r, of which it reads
// everything up to the end. It verifies the checksum and the snapshot's sense
// before it replaces anything: on an error, which wraps [ErrCorrupt] unless
// reading failed, the store is as it was. Watchers go on after the last event
// they returned, or get [ErrCompacted] if that is outside the new history or the
// new state is older than the former.
func (s *Store) Restore(r io.Reader) error {
	v, err := readSnapshot(r)
	if err == nil {
		v.clusterVersion, err = s.options.versionOf(v.root)
	}
	if err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	back := v.revision < s.head.revision
	s.root, s.expiry = v.root, v.expiry
	v.epoch = s.head.epoch + 1
	s.head, s.changed, s.fresh = v, true, nil
	s.shares, s.memos = newShares(), 0
	h := &s.head.hist
	for r := h.first; r < h.next; r++ {
		if e := h.at(r); e != nil {
			s.shares.add(e)
		}
	}
	if s.now != 0 { // the events are as old by this clock as they were by that one
		h.shift(s.now - v.clock)
	}
	s.trim()
	s.past.reset()
	s.groups.restored(s.publishView(), back)
	return nil
}

// gapsVersion is the cluster version from which on snapshots may tell of a history with
// gaps. Before, they hold the part of the history after the last gap.
const gapsVersion = 2

func (v *version) gaps() bool { return v.clusterVersion >= gapsVersion }

// snapshotDecoder reads records and hashes what it read.
type snapshotDecoder struct {
	r   *bufio.Reader
	sum *bufio.Writer // of the hash, which is slow byte by byte
	buf bytes.Buffer
}

func (d *snapshotDecoder) record() (byte, *decoder, error) {
	size, err := d.uvarint()
	if err != nil {
		return 0, nil, truncated(err)
	}
	if size == 0 || size > maxRecord {
		return 0, nil, fmt.Errorf("%w: record of %d bytes", ErrCorrupt, size)
	}
	// The buffer grows with what arrives, not with what a length claims.
	d.buf.Reset()
	if _, err := io.CopyN(&d.buf, d.r, int64(size)); err != nil {
		return 0, nil, truncated(err)
	}
	b := d.buf.Bytes()
	_, _ = d.sum.Write(b) // a hash does not fail
	return b[0], &decoder{b: b[1:]}, nil
}

// uvarint reads and hashes a length.
func (d *snapshotDecoder) uvarint() (uint64, error) {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		b, err := d.r.ReadByte()
		if err != nil {
			return 0, err
		}
		_ = d.sum.WriteByte(b)
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%w: bad length", ErrCorrupt)
}

func truncated(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends too early", ErrCorrupt)
	}
	return err
}

func readSnapshot(r io.Reader) (version, error) {
	s := &snapshotReader{}
	err := readRecords(r, func(kind byte, fields *decoder) (end bool, err error) {
		s.record(kind, fields)
		return s.ended, s.err
	})
	if err != nil {
		return version{}, err
	}
	return s.v, nil
}

// readRecords calls each with the records of a snapshot up to the one that it
// calls the end, then verifies the checksum and that nothing follows.
func readRecords(r io.Reader, each func(kind byte, fields *decoder) (end bool, err error)) error {
	sum := sha256.New()
	d := &snapshotDecoder{r: bufio.NewReaderSize(r, snapshotBuffer), sum: bufio.NewWriterSize(sum, snapshotBuffer)}
	magic := make([]byte, len(snapshotMagic))
	if _, err := io.ReadFull(d.r, magic); err != nil {
		return truncated(err)
	}
	if string(magic) != snapshotMagic {
		return fmt.Errorf("%w: it does not begin as a Timonel snapshot", ErrCorrupt)
	}
	_, _ = d.sum.Write(magic)
	for end := false; !end; {
		kind, fields, err := d.record()
		if err != nil {
			return err
		}
		if end, err = each(kind, fields); err != nil {
			return err
		}
		if fields.err == nil && len(fields.b) > 0 {
			fields.fail("bytes after the end of a record")
		}
		if fields.err != nil {
			return fmt.Errorf("%w: %w", ErrCorrupt, fields.err)
		}
	}
	_ = d.sum.Flush()
	want := sum.Sum(nil)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(d.r, got); err != nil {
		return truncated(err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: checksum differs", ErrCorrupt)
	}
	if _, err := d.r.ReadByte(); err == nil {
		return fmt.Errorf("%w: bytes after its end", ErrCorrupt)
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// snapshotReader builds a version from records.
type snapshotReader struct {
	v        version
	began    bool
	ended    bool
	err      error  // why nothing more is read
	gaps     bool   // as of version 2
	keys     uint64 // announced by the meta record
	first    int64  // first revision of the history
	lastKey  string
	haveKeys bool // all keys were read
}

func (s *snapshotReader) record(kind byte, d *decoder) {
	switch {
	case kind == recordMeta && !s.began:
		s.meta(d)
	case !s.began:
		d.fail("does not begin with its meta record")
	case kind == recordKV && !s.haveKeys:
		s.kv(d)
	case kind == recordEvent:
		s.event(d)
	case s.gaps && kind == recordFloors && s.v.hist.next == s.first:
		s.haveKeys = true
		s.floors(d)
	case s.gaps && kind == recordCut && s.v.hist.next == s.first:
		s.haveKeys = true
		if prefix, floor := d.string("prefix"), d.number("floor"); d.err == nil {
			s.v.hist.floors.raiseOf(prefix, floor)
		}
	case s.gaps && kind == recordGap:
		s.haveKeys = true
		s.gap(d)
	case kind == recordEnd:
		if uint64(s.v.root.Len()) != s.keys || s.v.hist.next != s.v.revision+1 {
			d.fail("keys or events are missing")
		}
		s.ended = true
	default:
		d.fail(fmt.Sprintf("unexpected record of type %q", kind))
	}
}

func (s *snapshotReader) floors(d *decoder) {
	watch, read := d.number("watch floor"), d.number("read floor")
	if h := &s.v.hist; d.err == nil && (watch > s.v.revision || read > s.v.revision) {
		d.fail("impossible floors")
	} else {
		h.floors.raise(watch, read)
		h.read = max(h.read, read)
	}
}

func (s *snapshotReader) gap(d *decoder) {
	n := d.number("gap")
	if h := &s.v.hist; d.err == nil && (n < 1 || n > s.v.revision+1-h.next || n > maxGap) {
		d.fail("impossible gap")
		return
	}
	for range n {
		s.v.hist.skip()
	}
}

func (s *snapshotReader) meta(d *decoder) {
	v := d.byte("version")
	if d.err == nil && v > snapshotVersionGaps {
		s.err = fmt.Errorf("%w (snapshot of version %d, this program reads %d)", ErrNewerVersion, v, snapshotVersionGaps)
		return
	} else if v == 0 {
		d.fail("no version")
	}
	s.gaps = v == snapshotVersionGaps
	s.v.revision = d.number("revision")
	s.first = d.number("first revision")
	s.v.index = d.uvarint("index")
	s.v.term = d.uvarint("term")
	s.v.clock = d.number("clock")
	s.v.hash = d.uvarint("hash")
	s.keys = d.uvarint("number of keys")
	if d.err == nil && (s.v.revision < 1 || s.first < 2 || s.first > s.v.revision+1) {
		d.fail("impossible revisions")
	}
	s.v.root = btree.NewMap[string, *KV](treeDegree)
	s.v.expiry = btree.NewMap[string, *KV](treeDegree)
	s.v.hist = newHistory(s.first)
	s.began = true
}

func (s *snapshotReader) kv(d *decoder) {
	kv := newKV(d.string("key"), d.bytes("value"))
	d.numbers(kv, s.v.revision)
	if d.err == nil && s.v.root.Len() > 0 && kv.Key <= s.lastKey {
		d.fail(keysOutOfOrder)
	}
	if d.err != nil {
		return
	}
	s.lastKey = kv.Key
	s.v.root.Load(kv.Key, kv)
	s.v.bytes += int64(len(kv.Key) + len(kv.Value))
	if kv.ExpiresAt != 0 {
		s.v.expiry.Set(expiryKey(kv), kv)
	}
}

func (s *snapshotReader) event(d *decoder) {
	s.haveKeys = true
	h := &s.v.hist
	if h.next > s.v.revision {
		d.fail("more events than revisions")
		return
	}
	e := &Event{Type: EventType(d.byte("event type")), Revision: h.next}
	e.KV = KV{Key: d.string("event key"), ModRevision: e.Revision}
	time, hash := d.number("event time"), d.uvarint("event hash")
	live, isLive := s.v.root.Get(e.KV.Key)
	if isLive {
		e.KV.Key = live.Key // one copy of the key in memory
	}
	switch e.Type {
	case Put:
		switch d.byte("kind of value") {
		case valueLive:
			if !isLive || live.ModRevision != e.Revision {
				d.fail("event refers to a value that is not there")
				return
			}
			e.KV = *live
		case valueInline:
			e.KV.Value, e.KV.memo = d.bytes("value"), new(Memo)
			d.numbers(&e.KV, e.Revision)
			if e.KV.ModRevision != e.Revision {
				d.fail("event has two revisions")
			}
		default:
			d.fail("unknown kind of value")
		}
	case Delete:
	default:
		d.fail("unknown event type")
	}
	switch d.byte("kind of previous value") {
	case valueNone:
		if e.Type == Delete {
			d.fail("delete of nothing")
		}
	case valueEvent:
		r := d.number("revision of the previous value")
		var before *Event
		if d.err == nil && r >= s.first && r < e.Revision {
			before = h.at(r)
		}
		if before == nil || before.Type != Put || before.KV.Key != e.KV.Key {
			d.fail("event refers to a value that is not there")
			return
		}
		e.Prev = before.KV
	case valueInline:
		e.Prev = KV{Key: e.KV.Key, Value: d.bytes("previous value"), memo: new(Memo)}
		d.numbers(&e.Prev, s.newestBefore(e))
	default:
		d.fail("unknown kind of previous value")
	}
	if d.err == nil {
		h.append(e, hash, time)
	}
}

// newestBefore bounds the revision of a value before an event that no event of the
// snapshot put: in version 1 all before it have.
func (s *snapshotReader) newestBefore(e *Event) int64 {
	if s.gaps {
		return e.Revision - 1
	}
	return s.first - 1
}

// maxGap bounds a gap, so that a few bytes do not take much memory.
const maxGap = 1 << 20

// number reads a uvarint that is a revision or a time.
func (d *decoder) number(what string) int64 {
	v := int64(d.uvarint(what))
	if v < 0 {
		d.fail(what + " out of range")
		return 0
	}
	return v
}

// numbers reads what appendNumbers wrote; newest bounds the revisions.
func (d *decoder) numbers(kv *KV, newest int64) {
	kv.CreateRevision = d.number("create revision")
	kv.ModRevision = d.number("mod revision")
	kv.ExpiresAt = d.number("expiry")
	if d.err == nil && (kv.CreateRevision < 1 || kv.CreateRevision > kv.ModRevision || kv.ModRevision > newest) {
		d.fail("impossible revisions of " + kv.Key)
	}
}
