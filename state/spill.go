package state

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/cespare/xxhash/v2"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	// spillBatch is how much of the history goes into one file, or a chunk of it.
	spillBatch = 64 << 20
	// diskLeft is how much room files leave on a disk: the log needs it more.
	diskLeft = 256 << 20
	// busyRevisions is after how many changes meanwhile there is no rest any more.
	busyRevisions = 2000
	// readBytes bounds the blocks that are kept because others may read them next.
	readBytes = 4 << 20
)

// historyFile is a file that nobody else knows.
type historyFile interface {
	io.Writer
	io.ReaderAt
	io.Closer
}

// spillFile is a file with a part of the history. It has no name: its room is the disk's
// again when no chunk is of it any more and the collector has seen that.
type spillFile struct {
	spill *spill
	file  historyFile
	size  int64
	alive int // events that are left; Store.mu guards it
}

// spill is the part of the history that is in files.
type spill struct {
	create func() (historyFile, error) // nil when all stays in memory

	running sync.Mutex // one Spill at a time
	encoder *zstd.Encoder
	packed  []byte

	bytes int64 // of the history's, in files; Store.mu guards it
	disk  int64 // size of the files that are in use; Store.mu guards it

	mu      sync.Mutex
	lost    error // why something could not be read
	decoder *zstd.Decoder
	recent  []readBlock // the last read, oldest first
	held    int         // their bytes
}

type readBlock struct {
	of      *block
	records []byte
}

// Spill takes what is not the newest of the history out of memory, into files in
// Options.HistoryFolder, and lets go of states of the past that were not read lately. It
// is for times of rest: when much is written meanwhile it stops where it is. What cannot
// be written leaves the history, as does what could not be read since the last call; the
// error tells why.
func (s *Store) Spill() error {
	s.spill.running.Lock()
	defer s.spill.running.Unlock()
	return errors.Join(s.spill.forget(), s.spillAll())
}

func (s *Store) spillAll() error {
	if s.spill.create == nil {
		return nil
	}
	start := s.current.Load()
	limit := start.hist.coldLimit(s.options.HistoryRestBytes)
	defer func() {
		s.past.rest(limit)
		s.spill.encoder, s.spill.packed = nil, nil
	}()
	for {
		v := s.current.Load()
		chunks := v.hist.tooHot(limit)
		if len(chunks) == 0 || v.epoch != start.epoch || v.revision > start.revision+busyRevisions {
			return nil
		}
		if err := s.spillChunks(v, chunks); err != nil {
			last := chunks[len(chunks)-1] + historyChunk - 1
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.head.epoch == v.epoch {
				s.dropTo(last, last)
				s.publish()
			}
			return fmt.Errorf("the history up to revision %d is not kept: %w", last, err)
		}
	}
}

// coldLimit returns the first revision that stays in memory, of which rest bytes may; or
// one that is in none, when what is more is not worth a file.
func (h *history) coldLimit(rest int64) int64 {
	kept, more := int64(0), int64(0)
	limit := h.base
	for i := len(h.chunks) - 2; i >= 0; i-- { // the last is not full
		hot := h.chunks[i].hot.Load()
		if hot == nil {
			break
		}
		bytes := hot.bytes()
		if kept+bytes <= rest {
			kept += bytes
			continue
		}
		if kept = rest; more == 0 {
			limit = h.base + int64(i+1)*historyChunk
		}
		more += max(bytes, 1)
	}
	if more < rest/4 {
		return h.base
	}
	return limit
}

// bytes is what the history alone holds of the events.
func (c *hotChunk) bytes() int64 {
	n := int64(0)
	for i := range c.events {
		if e := c.events[i].Load(); e != nil {
			bytes, _ := e.cost()
			n += bytes
		}
	}
	return n
}

// tooHot returns the first revisions of chunks in memory before limit, as many as go
// into one file.
func (h *history) tooHot(limit int64) (firsts []int64) {
	n := int64(0)
	for i, c := range h.chunks {
		first := h.base + int64(i)*historyChunk
		if first+historyChunk > limit || n >= spillBatch {
			break
		}
		if hot := c.hot.Load(); hot != nil {
			firsts = append(firsts, first)
			n += hot.bytes()
		}
	}
	return firsts
}

// spillChunks writes chunks of a version's history to a file, then takes them out of
// memory.
func (s *Store) spillChunks(v *version, firsts []int64) error {
	f, err := s.spill.create()
	if err != nil {
		return err
	}
	file := &spillFile{spill: &s.spill, file: f}
	var chunks []*coldChunk
	for _, first := range firsts {
		chunk, _ := v.hist.slot(first)
		cold, err := s.chill(chunk.hot.Load(), first, file)
		if err != nil {
			return errors.Join(err, f.Close())
		}
		chunks = append(chunks, cold)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.head.epoch != v.epoch { // another state was installed
		return nil
	}
	for _, cold := range chunks {
		s.chilled(cold)
	}
	if file.alive > 0 {
		s.spill.disk += file.size
	}
	return nil
}

// writeBlock writes a block of records. If need be, the oldest of what is in other files
// makes room for it.
func (s *Store) writeBlock(f *spillFile, records []byte) (block, error) {
	p := &s.spill
	p.packed = p.compress(p.packed[:0], records)
	if limit := s.options.HistoryDiskBytes; !s.makeRoom(limit - f.size - int64(len(p.packed))) {
		return block{}, fmt.Errorf("more than the %d bytes that files of it may take", limit)
	}
	if _, err := f.file.Write(p.packed); err != nil {
		return block{}, err
	}
	b := block{offset: f.size, size: len(p.packed), sum: xxhash.Sum64(p.packed)}
	f.size += int64(b.size)
	return b, nil
}

// chilled takes a chunk that is in a file out of memory. mu is held.
func (s *Store) chilled(cold *coldChunk) {
	h := &s.head.hist
	if cold.first < h.base {
		return // it has left meanwhile
	}
	chunk, _ := h.slot(cold.first)
	hot := chunk.hot.Load()
	for i := range hot.events {
		if hot.events[i].Load() != nil {
			cold.alive.Or(1 << i)
			cold.file.alive++
			s.spill.bytes += int64(cold.bytes[i])
		}
	}
	if cold.isEmpty() {
		cold = cold.bare()
	}
	chunk.cold.Store(cold)
	chunk.hot.Store(nil)
}

// thawed is told that an event in a file was dropped. mu is held.
func (s *Store) thawed(revision, bytes int64) {
	chunk, _ := s.head.hist.slot(revision)
	cold := chunk.cold.Load()
	s.spill.bytes -= bytes
	if cold.file.alive--; cold.file.alive == 0 {
		s.spill.disk -= cold.file.size
	}
	if cold.isEmpty() {
		chunk.cold.Store(cold.bare())
	}
}

// makeRoom drops the oldest of the history until its files take no more than that.
func (s *Store) makeRoom(most int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, dropped := &s.head.hist, false
	for s.spill.disk > max(most, 0) {
		i := slices.IndexFunc(h.chunks, func(c *chunk) bool { cold := c.cold.Load(); return cold != nil && !cold.isEmpty() })
		if i < 0 {
			panic("state: files of the history have events of no chunk") // would fill the disk; never seen
		}
		last := h.chunks[i].cold.Load().last()
		s.dropTo(last, last)
		dropped = true
	}
	if dropped {
		s.publish()
	}
	return most >= 0
}

// compress appends the compressed records to b.
func (p *spill) compress(b, records []byte) []byte {
	if p.encoder == nil {
		p.encoder, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(1<<20), zstd.WithEncoderCRC(false)) // the options are right
	}
	return p.encoder.EncodeAll(records, b)
}

// read returns the records of a block.
func (p *spill) read(f *spillFile, b *block) ([]byte, error) {
	p.mu.Lock()
	for _, r := range p.recent {
		if r.of == b {
			p.mu.Unlock()
			return r.records, nil
		}
	}
	if p.decoder == nil {
		p.decoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(1<<30))
	}
	decoder := p.decoder
	p.mu.Unlock()
	packed := make([]byte, b.size)
	if _, err := f.file.ReadAt(packed, b.offset); err != nil {
		return nil, err
	}
	if xxhash.Sum64(packed) != b.sum {
		return nil, fmt.Errorf("%w: checksum differs", ErrCorrupt)
	}
	records, err := decoder.DecodeAll(packed, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recent = append(p.recent, readBlock{b, records})
	for p.held += len(records); p.held > readBytes; p.recent = p.recent[1:] {
		p.held -= len(p.recent[0].records)
		p.recent[0] = readBlock{}
	}
	return records, nil
}

// lose notes that something could not be read.
func (p *spill) lose(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost = err
}

// forget lets go of what was read, and returns why something could not be.
func (p *spill) forget() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.lost
	p.recent, p.held, p.decoder, p.lost = nil, 0, nil, nil
	return err
}

// fileIn returns what makes files without names in a folder.
func fileIn(folder string) func() (historyFile, error) {
	return func() (historyFile, error) {
		var disk unix.Statfs_t
		if err := unix.Statfs(folder, &disk); err != nil {
			return nil, &os.PathError{Op: "statfs", Path: folder, Err: err}
		}
		if disk.Bavail*uint64(disk.Bsize) < diskLeft {
			return nil, fmt.Errorf("%s: the disk has less than %d MiB left", folder, diskLeft>>20)
		}
		f, err := os.CreateTemp(folder, "history-*")
		if err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
}
