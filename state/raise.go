package state

import (
	"fmt"
	"io"
	"math"
)

// SnapshotInfo is what a snapshot says of itself.
type SnapshotInfo struct {
	Revision int64
	// CompactRevision is the oldest revision that its history reaches.
	CompactRevision int64
	Index, Term     uint64 // of the last log entry in it
	Hash            uint64 // see [View.Hash]
	Keys            int
}

// Raise says by how much a snapshot's revisions grow, and what its place in the
// log becomes.
type Raise struct {
	By          int64
	Index, Term uint64
}

// ScanSnapshot reads a snapshot up to its end, one record at a time, and calls
// each, which may be nil, with every key in order. The KV's value is only valid
// during the call. The checksum is verified last, so what each was told counts
// only when the error is nil. Errors wrap [ErrCorrupt] unless reading, or each,
// failed.
func ScanSnapshot(r io.Reader, each func(KV) error) (SnapshotInfo, error) {
	s := &snapshotScanner{each: each}
	if err := readRecords(r, s.record); err != nil {
		return SnapshotInfo{}, fmt.Errorf("read snapshot: %w", err)
	}
	return s.info(), nil
}

// RaiseSnapshot copies a snapshot from r to w, one record at a time, with every
// revision in it greater by raise.By and without its history. For who knows the
// cluster that the snapshot is of, the copy is in its future: no watch resumes
// and no list continues ([ErrCompacted]), every key has a revision greater than
// any that it had, and none is given twice, whatever the cluster wrote after the
// snapshot, up to raise.By changes. It returns what the copy says of itself. On
// an error, w holds nothing of use.
func RaiseSnapshot(w io.Writer, r io.Reader, raise Raise) (SnapshotInfo, error) {
	s := &snapshotScanner{}
	err := writeRecords(w, func(e *snapshotEncoder) {
		s.began = func(v *version, keys uint64) error {
			if raise.By < 0 || raise.By > math.MaxInt64/2-v.revision {
				return fmt.Errorf("revision %d cannot be raised by %d", v.revision, raise.By)
			}
			raised := *v
			raised.revision += raise.By
			raised.hist = newHistory(raised.revision + 1)
			raised.index, raised.term = raise.Index, raise.Term
			e.meta(&raised, raised.revision+1, keys)
			return e.err
		}
		s.each = func(kv KV) error {
			kv.CreateRevision += raise.By
			kv.ModRevision += raise.By
			e.kv(&kv)
			return e.err
		}
		if err := readRecords(r, s.record); err != nil {
			e.err = err
			return
		}
		e.b = append(e.b[:0], recordEnd)
		e.flush()
	})
	if err != nil {
		return SnapshotInfo{}, fmt.Errorf("raise the revisions of a snapshot: %w", err)
	}
	info := s.info()
	info.Revision += raise.By
	info.CompactRevision = info.Revision
	info.Index, info.Term = raise.Index, raise.Term
	return info, nil
}

// snapshotScanner checks a snapshot's records without keeping them.
type snapshotScanner struct {
	began func(v *version, keys uint64) error
	each  func(KV) error

	reader  snapshotReader // for its meta record alone
	keys    uint64         // seen so far
	lastKey string
	events  int64
}

func (s *snapshotScanner) record(kind byte, d *decoder) (end bool, err error) {
	v := &s.reader.v
	switch {
	case kind == recordMeta && !s.reader.began:
		if s.reader.meta(d); s.reader.err != nil {
			return false, s.reader.err
		} else if d.err == nil && s.began != nil {
			return false, s.began(v, s.reader.keys)
		}
	case !s.reader.began:
		d.fail("does not begin with its meta record")
	case kind == recordKV && s.events == 0:
		kv := KV{Key: d.string("key"), Value: d.raw("value")}
		d.numbers(&kv, v.revision)
		if s.keys > 0 && kv.Key <= s.lastKey {
			d.fail(keysOutOfOrder)
		}
		s.keys++
		s.lastKey = kv.Key
		if d.err == nil && s.each != nil {
			return false, s.each(kv)
		}
	case kind == recordEvent:
		s.events++
		d.b = nil // the checksum vouches for it
	case s.reader.gaps && (kind == recordFloors || kind == recordCut):
		d.b = nil
	case s.reader.gaps && kind == recordGap:
		s.events += d.number("gap")
	case kind == recordEnd:
		if s.keys != s.reader.keys || s.reader.first+s.events != v.revision+1 {
			d.fail("keys or events are missing")
		}
		return true, nil
	default:
		d.fail(fmt.Sprintf("unexpected record of type %q", kind))
	}
	return false, nil
}

func (s *snapshotScanner) info() SnapshotInfo {
	v := &s.reader.v
	return SnapshotInfo{Revision: v.revision, CompactRevision: s.reader.first - 1, Index: v.index, Term: v.term, Hash: v.hash, Keys: int(s.keys)}
}
