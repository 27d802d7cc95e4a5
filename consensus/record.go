package consensus

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

const (
	// A record of the journal: CRC-32C of what follows, length of the entries,
	// generation, sequence number, salt; then the entries.
	recordHeader = 4 + 4 + 8 + 8 + 8
	recordAlign  = 8
)

// record is one append as the journal holds it.
type record struct {
	generation, seq, salt uint64
	logs                  []*raft.Log
	size                  int64 // with the padding
}

// readJournal returns the entries that a store lacks, in order, and the newest
// generation there is. A record that was cut off ends its half, as after a crash: it
// was never acknowledged. One that cannot be read although later ones can is damage.
func readJournal(file io.ReaderAt, half int64, store raft.LogStore, least uint64, salts salts) (logs []*raft.Log, newest uint64, err error) {
	stored, err := store.LastIndex()
	if err != nil {
		return nil, 0, err
	}
	type content struct {
		b     []byte
		chain []record
		end   int64
	}
	var halves []content
	for i := range int64(2) {
		c := content{b: make([]byte, half)}
		if _, err := file.ReadAt(c.b, i*half); err != nil {
			return nil, 0, err
		}
		for c.end < half {
			r, ok := readRecord(c.b[c.end:], func(generation, salt uint64) bool {
				if len(c.chain) > 0 {
					return generation == c.chain[0].generation && salt == c.chain[0].salt
				}
				return generation >= least && salts.right(generation, salt)
			})
			if !ok || r.seq != uint64(len(c.chain)) {
				break
			}
			c.chain = append(c.chain, r)
			c.end += r.size
		}
		halves = append(halves, c)
	}
	slices.SortFunc(halves, func(a, b content) int {
		generation := func(c content) uint64 {
			if len(c.chain) == 0 {
				return 0
			}
			return c.chain[0].generation
		}
		return cmp.Compare(generation(a), generation(b))
	})
	last := stored
	for _, h := range halves {
		for _, r := range h.chain {
			newest = max(newest, r.generation)
			for _, l := range r.logs {
				switch {
				case l.Index <= stored: // moved, and perhaps deleted since
					continue
				case last != 0 && l.Index != last+1:
					return nil, 0, fmt.Errorf("entry %d follows entry %d: the journal is damaged", l.Index, last)
				}
				last = l.Index
				logs = append(logs, l)
			}
		}
	}
	for _, h := range halves {
		for at := h.end + recordAlign; at < half; at += recordAlign {
			r, ok := readRecord(h.b[at:], func(generation, salt uint64) bool {
				return generation >= least && (len(h.chain) == 0 || salt == h.chain[0].salt) && salts.right(generation, salt)
			})
			if !ok {
				continue
			}
			if end := r.logs[len(r.logs)-1].Index; end > last {
				return nil, 0, fmt.Errorf("entry %d cannot be read, entries up to %d follow: the journal is damaged", last+1, end)
			}
		}
	}
	return logs, newest, nil
}

// writeHeader completes a record: b is room for its header, and the entries.
func writeHeader(b []byte, generation, seq, salt uint64) {
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)-recordHeader))
	binary.LittleEndian.PutUint64(b[8:], generation)
	binary.LittleEndian.PutUint64(b[16:], seq)
	binary.LittleEndian.PutUint64(b[24:], salt)
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
}

// readRecord reads the record at the start of b; false if there is none, or not one
// that is wanted. Only of those that are is the rest looked at: at any place in what
// clients have written, bytes may say that a record of megabytes follows.
func readRecord(b []byte, wanted func(generation, salt uint64) bool) (r record, ok bool) {
	if len(b) < recordHeader {
		return r, false
	}
	r.generation, r.seq, r.salt = binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	sum, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	if size == 0 || int64(size) > int64(len(b)-recordHeader) || !wanted(r.generation, r.salt) || crc32.Checksum(b[4:recordHeader+size], castagnoli) != sum {
		return r, false
	}
	r.size = align(recordHeader + int64(size))
	logs, ok := decodeLogs(b[recordHeader : recordHeader+size])
	r.logs = logs
	return r, ok && len(logs) > 0
}

// salts are the salts of a journal's generations: what a secret, in the log file, makes
// of their numbers. So nothing that a client wrote passes for a record, also where the
// first one of a half cannot be read. Nil in a data folder that was last used by a
// program whose journal had a salt by lot for each generation: any is right then.
type salts []byte

// newSalts draws the secret.
func newSalts() salts {
	s := make(salts, 16)
	rand.Read(s)
	return s
}

func (s salts) of(generation uint64) uint64 {
	sum := sha256.Sum256(binary.LittleEndian.AppendUint64(bytes.Clone(s), generation))
	return binary.LittleEndian.Uint64(sum[:])
}

func (s salts) right(generation, salt uint64) bool { return s == nil || salt == s.of(generation) }

func align(n int64) int64 { return (n + recordAlign - 1) / recordAlign * recordAlign }

// appendLogs encodes entries: of each index, term, type, time in nanoseconds (0 for
// none), and data and extensions with their lengths, numbers as varints.
func appendLogs(b []byte, logs []*raft.Log) []byte {
	for _, l := range logs {
		b = binary.AppendUvarint(b, l.Index)
		b = binary.AppendUvarint(b, l.Term)
		b = append(b, byte(l.Type))
		var at int64
		if !l.AppendedAt.IsZero() {
			at = l.AppendedAt.UnixNano()
		}
		b = binary.AppendVarint(b, at)
		b = binary.AppendUvarint(b, uint64(len(l.Data)))
		b = append(b, l.Data...)
		b = binary.AppendUvarint(b, uint64(len(l.Extensions)))
		b = append(b, l.Extensions...)
	}
	return b
}

// decodeLogs decodes what appendLogs made.
func decodeLogs(b []byte) (logs []*raft.Log, ok bool) {
	number := func() uint64 {
		n, size := binary.Uvarint(b)
		if ok = ok && size > 0; ok {
			b = b[size:]
		}
		return n
	}
	blob := func() []byte {
		n := number()
		if ok = ok && n <= uint64(len(b)); !ok || n == 0 {
			return nil
		}
		out := bytes.Clone(b[:n])
		b = b[n:]
		return out
	}
	ok = true
	for ok && len(b) > 0 {
		l := &raft.Log{Index: number(), Term: number()}
		if ok = ok && len(b) > 0; !ok {
			break
		}
		l.Type, b = raft.LogType(b[0]), b[1:]
		at, size := binary.Varint(b)
		if ok = size > 0; !ok {
			break
		}
		if b = b[size:]; at != 0 {
			l.AppendedAt = time.Unix(0, at)
		}
		l.Data, l.Extensions = blob(), blob()
		logs = append(logs, l)
	}
	return logs, ok
}
