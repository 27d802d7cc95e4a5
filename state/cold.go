package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
)

// blockBytes is how much of events is compressed together, or one event.
const blockBytes = 128 << 10

// coldChunk is a chunk of the history in a file, and what has to be known of its events
// without reading them. Only alive is ever changed.
type coldChunk struct {
	first int64 // revision
	since int64 // the least of the times
	times [historyChunk]uint32

	alive atomic.Uint64 // a bit for each event, from the lowest on
	*coldEvents
}

// coldEvents is what is not needed any more when no event of a chunk is left.
type coldEvents struct {
	file        *spillFile
	blocks      []block
	directories []string
	of          [historyChunk]uint8 // in directories
	bytes       [historyChunk]uint32
	large       []uint32 // nil if there is none
}

// block is a part of a file: events from a slot on, compressed.
type block struct {
	first  int64 // slot
	offset int64
	size   int
	sum    uint64
}

// last is the revision of the last event.
func (c *coldChunk) last() int64 { return c.first + historyChunk - 1 }

func (c *coldChunk) has(i int64) bool { return c.alive.Load()>>i&1 != 0 }

// empty drops an event. The store's lock is held.
func (c *coldChunk) empty(i int64) { c.alive.And(^(uint64(1) << i)) }

// isEmpty says that no event is left.
func (c *coldChunk) isEmpty() bool { return c.alive.Load() == 0 }

// bare is the chunk without what its events had.
func (c *coldChunk) bare() *coldChunk {
	return &coldChunk{first: c.first, since: c.since, times: c.times}
}

func (c *coldChunk) time(i int64) int64 { return c.since + int64(c.times[i]) }

// mayHave says whether there may be events of keys with the prefix.
func (c *coldChunk) mayHave(prefix string) bool {
	if c.coldEvents == nil {
		return false
	}
	return slices.ContainsFunc(c.directories, func(d string) bool {
		return strings.HasPrefix(d, prefix) || strings.HasPrefix(prefix, d)
	})
}

func (c *coldChunk) holds(i int64) (holding, bool) {
	if !c.has(i) {
		return holding{}, false
	}
	h := holding{directory: c.directories[c.of[i]], bytes: int64(c.bytes[i]), cold: true}
	if c.large != nil {
		h.large = int64(c.large[i])
	}
	return h, true
}

// pastEvent is an event that is in a file, with the rolling hash up to it.
type pastEvent struct {
	event *Event // nil if it was dropped before the chunk was written
	hash  uint64
}

var errNoEvents = errors.New("all events of this part of the history are gone")

// read reads an event, also one that was dropped meanwhile.
func (c *coldChunk) read(i int64) (pastEvent, error) {
	if c.coldEvents == nil {
		return pastEvent{}, errNoEvents
	}
	n := sort.Search(len(c.blocks), func(n int) bool { return c.blocks[n].first > i }) - 1
	records, err := c.file.spill.read(c.file, &c.blocks[n])
	if err != nil {
		return pastEvent{}, fmt.Errorf("read the history at revision %d: %w", c.first+i, err)
	}
	record, err := recordOf(records, int(i-c.blocks[n].first))
	if err != nil {
		return pastEvent{}, fmt.Errorf("read the history at revision %d: %w: %w", c.first+i, ErrCorrupt, err)
	}
	past, err := decodePast(record, c.first+i)
	if err != nil {
		return pastEvent{}, fmt.Errorf("read the history at revision %d: %w: %w", c.first+i, ErrCorrupt, err)
	}
	return past, nil
}

// A block is, uncompressed, the offsets of its records' ends, each a uint32, their
// number, and before all that the records.
func appendEnds(records []byte, ends []uint32) []byte {
	for _, end := range ends {
		records = binary.LittleEndian.AppendUint32(records, end)
	}
	return binary.LittleEndian.AppendUint32(records, uint32(len(ends)))
}

// recordOf returns one of the records of a block.
func recordOf(b []byte, i int) ([]byte, error) {
	n := len(b) - 4
	if n < 0 || uint64(binary.LittleEndian.Uint32(b[n:]))*4 > uint64(n) || i >= int(binary.LittleEndian.Uint32(b[n:])) {
		return nil, errors.New("truncated block")
	}
	ends := b[n-4*int(binary.LittleEndian.Uint32(b[n:])) : n]
	start, end := uint32(0), binary.LittleEndian.Uint32(ends[4*i:])
	if i > 0 {
		start = binary.LittleEndian.Uint32(ends[4*(i-1):])
	}
	if start > end || int64(end) > int64(n-len(ends)) {
		return nil, errors.New("records out of place")
	}
	return b[start:end], nil
}

// appendPast appends the record of an event, which may be nil, to b: the hash, the type, key
// and values.
func appendPast(b []byte, e *Event, hash uint64) []byte {
	b = binary.LittleEndian.AppendUint64(b, hash)
	if e == nil {
		b = append(b, 0)
	} else {
		b = append(b, byte(e.Type))
		b = appendString(b, e.KV.Key)
		if e.Type == Put {
			b = appendNumbers(b, &e.KV)
			b = appendBytes(b, e.KV.Value)
		}
		b = appendNumbers(b, &e.Prev)
		if e.Prev.ModRevision != 0 {
			b = appendBytes(b, e.Prev.Value)
		}
	}
	return b
}

func decodePast(record []byte, revision int64) (pastEvent, error) {
	if len(record) < 9 {
		return pastEvent{}, errors.New("truncated event")
	}
	past := pastEvent{hash: binary.LittleEndian.Uint64(record)}
	d := decoder{b: record[8:]}
	e := &Event{Type: EventType(d.byte("event type")), Revision: revision}
	if e.Type == 0 {
		return past, nil
	}
	key := d.string("event key")
	e.KV = KV{Key: key, ModRevision: revision}
	if e.Type == Put {
		d.numbers(&e.KV, revision)
		e.KV.Value, e.KV.memo = d.bytes("value"), new(Memo)
	}
	prev := KV{CreateRevision: d.number("create revision"), ModRevision: d.number("mod revision"), ExpiresAt: d.number("expiry")}
	if prev.ModRevision != 0 {
		prev.Key, prev.Value, prev.memo = key, d.bytes("previous value"), new(Memo)
		e.Prev = prev
	}
	past.event = e
	return past, d.err
}

// chill writes the events of a chunk in memory, the first of which has a revision, to
// the file.
func (s *Store) chill(hot *hotChunk, first int64, file *spillFile) (*coldChunk, error) {
	cold := &coldChunk{first: first, since: slices.Min(hot.times[:]), coldEvents: &coldEvents{file: file}}
	var records []byte
	var ends []uint32
	start := int64(0)
	for i := range int64(historyChunk) {
		cold.times[i] = uint32(min(hot.times[i]-cold.since, math.MaxUint32))
		e := hot.events[i].Load()
		records = appendPast(records, e, hot.hashes[i])
		ends = append(ends, uint32(len(records)))
		if e != nil {
			cold.note(i, e)
		}
		if len(records) < blockBytes && i < historyChunk-1 {
			continue
		}
		b, err := s.writeBlock(file, appendEnds(records, ends))
		if err != nil {
			return nil, err
		}
		b.first = start
		cold.blocks = append(cold.blocks, b)
		records, ends, start = records[:0], ends[:0], i+1
	}
	return cold, nil
}

// note keeps of an event what has to be known of it.
func (c *coldChunk) note(i int64, e *Event) {
	name := directoryOf(e.KV.Key)
	of := slices.Index(c.directories, name)
	if of < 0 {
		of = len(c.directories)
		c.directories = append(c.directories, strings.Clone(name)) // the key is not to be held
	}
	bytes, large := e.cost()
	c.of[i], c.bytes[i] = uint8(of), uint32(bytes)
	if large > 0 {
		if c.large == nil {
			c.large = make([]uint32, historyChunk)
		}
		c.large[i] = uint32(large)
	}
}
