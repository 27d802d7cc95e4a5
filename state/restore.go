package state

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/tidwall/btree"
)

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
	s.spill.bytes, s.spill.disk = 0, 0 // its files are not of this history
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
		s.v.hist.gap()
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
