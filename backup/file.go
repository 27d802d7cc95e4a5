package backup

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"time"

	"timonel/state"
)

const (
	magic  = "TMNLSNAP"
	format = 1

	// maxHeader and maxChunk bound what a length can make a reader allocate.
	maxHeader = 64 << 10
	maxChunk  = 1 << 20
	chunk     = 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCorrupt is wrapped by the error of reading what is not a whole and
// unchanged snapshot file.
var ErrCorrupt = errors.New("the snapshot file is damaged")

// Header says what a file holds. Save fills all but ClusterID, Version and Time
// from the view.
type Header struct {
	Format    int       `json:"format"`
	ClusterID string    `json:"clusterID"`
	Version   string    `json:"version"` // of the Timonel that wrote it
	Time      time.Time `json:"time"`    // when it was taken
	Revision  int64     `json:"revision"`
	Index     uint64    `json:"index"` // of the last log entry in it
	Term      uint64    `json:"term"`  // of that entry
	Keys      int       `json:"keys"`
	Hash      string    `json:"hash"` // of all changes up to Revision, equal on every replica
}

func hexHash(hash uint64) string { return fmt.Sprintf("%016x", hash) }

// Save writes the view to w as a snapshot file and returns its length.
func Save(w io.Writer, view state.View, h Header) (int64, error) {
	h.Format = format
	h.Revision, h.Keys, h.Hash = view.Revision(), view.Len(), hexHash(view.Hash())
	h.Index, h.Term = view.Applied()
	h.Time = h.Time.UTC().Truncate(time.Second)
	header, err := json.Marshal(h)
	if err != nil {
		return 0, fmt.Errorf("snapshot header: %w", err)
	}
	f := &fileWriter{w: w, sum: sha256.New()}
	f.write([]byte(magic))
	f.write(binary.BigEndian.AppendUint32(nil, uint32(len(header))))
	f.write(header)
	f.write(binary.BigEndian.AppendUint32(nil, crc32.Checksum(header, castagnoli)))
	chunks := bufio.NewWriterSize(chunkWriter{f}, chunk)
	if _, err := view.WriteTo(chunks); err != nil {
		return f.n, err
	}
	if err := chunks.Flush(); err != nil {
		return f.n, fmt.Errorf("write snapshot: %w", err)
	}
	f.write(make([]byte, 4))
	f.write(f.sum.Sum(nil))
	if f.err != nil {
		return f.n, fmt.Errorf("write snapshot: %w", f.err)
	}
	return f.n, nil
}

// fileWriter hashes and counts what it writes and keeps the first error.
type fileWriter struct {
	w   io.Writer
	sum hash.Hash
	n   int64
	err error
}

func (f *fileWriter) write(b []byte) {
	if f.err != nil {
		return
	}
	f.sum.Write(b)
	var n int
	n, f.err = f.w.Write(b)
	f.n += int64(n)
}

type chunkWriter struct{ f *fileWriter }

func (c chunkWriter) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), maxChunk)
		c.f.write(binary.BigEndian.AppendUint32(nil, uint32(n)))
		c.f.write(rest[:n])
		rest = rest[n:]
	}
	return len(b), c.f.err
}

// Reader reads the state's own snapshot out of a snapshot file. It returns
// io.EOF only after it has verified the checksum and that nothing follows it.
type Reader struct {
	header Header
	name   string // of the file, for errors; may be empty
	r      *bufio.Reader
	sum    hash.Hash
	left   int // bytes of the current chunk not read yet
	size   int64
	digest []byte // the file's checksum, when all was read
	err    error
}

// NewReader reads and checks the header. The name, if any, begins every error.
func NewReader(r io.Reader, name string) (*Reader, error) {
	f := &Reader{name: name, r: bufio.NewReaderSize(r, chunk), sum: sha256.New()}
	if err := f.readHeader(); err != nil {
		return nil, f.named(err)
	}
	return f, nil
}

// Header is the file's.
func (f *Reader) Header() Header { return f.header }

func (f *Reader) named(err error) error {
	if f.name == "" || err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("%s: %w", f.name, err)
}

func corrupt(why string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(why, args...))
}

// full reads and hashes len(b) bytes.
func (f *Reader) full(b []byte) error {
	n, err := io.ReadFull(f.r, b)
	f.sum.Write(b[:n])
	f.size += int64(n)
	return cutOff(err)
}

func cutOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corrupt("it ends too early")
	}
	return err
}

func (f *Reader) length() (int, error) {
	var b [4]byte
	err := f.full(b[:])
	return int(binary.BigEndian.Uint32(b[:])), err
}

func (f *Reader) readHeader() error {
	start := make([]byte, len(magic))
	switch err := f.full(start); {
	case errors.Is(err, ErrCorrupt) || err == nil && string(start) != magic:
		return corrupt("it does not begin as a snapshot of Timonel")
	case err != nil:
		return err
	}
	n, err := f.length()
	if err != nil {
		return err
	}
	if n > maxHeader {
		return corrupt("a header of %d bytes", n)
	}
	b := make([]byte, n)
	if err := f.full(b); err != nil {
		return err
	}
	sum, err := f.length()
	if err != nil {
		return err
	}
	if uint32(sum) != crc32.Checksum(b, castagnoli) {
		return corrupt("its header's checksum differs")
	}
	if err := json.Unmarshal(b, &f.header); err != nil {
		return corrupt("its header: %v", err)
	}
	if f.header.Format != format {
		return fmt.Errorf("a snapshot file of format %d, this program reads format %d: use Timonel %s", f.header.Format, format, f.header.Version)
	}
	return nil
}

// Read implements io.Reader.
func (f *Reader) Read(b []byte) (int, error) {
	if f.err == nil && f.left == 0 {
		f.err = f.named(f.nextChunk())
	}
	if f.err != nil || len(b) == 0 {
		return 0, f.err
	}
	n, err := f.r.Read(b[:min(len(b), f.left)])
	f.sum.Write(b[:n])
	f.size += int64(n)
	f.left -= n
	if err != nil {
		f.err = f.named(cutOff(err))
	}
	return n, f.err
}

// nextChunk returns io.EOF after the last one.
func (f *Reader) nextChunk() error {
	n, err := f.length()
	switch {
	case err != nil:
		return err
	case n > maxChunk:
		return corrupt("a chunk of %d bytes", n)
	case n > 0:
		f.left = n
		return nil
	}
	want := f.sum.Sum(nil)
	got := make([]byte, len(want))
	if err := f.full(got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return corrupt("its checksum differs")
	}
	switch _, err := f.r.ReadByte(); {
	case err == nil:
		return corrupt("bytes after its end")
	case !errors.Is(err, io.EOF):
		return err
	}
	f.digest = want
	return io.EOF
}

// check compares what the header says with what the state's snapshot says.
func (f *Reader) check(info state.SnapshotInfo) error {
	h := f.header
	if h.Revision != info.Revision || h.Index != info.Index || h.Term != info.Term || h.Keys != info.Keys || h.Hash != hexHash(info.Hash) {
		return f.named(corrupt("its header is not that of what it holds"))
	}
	return nil
}

// stateError says of the state's error, whose name for damage is its own, that
// the file is damaged.
func (f *Reader) stateError(err error) error {
	switch {
	case f.err != nil && !errors.Is(f.err, io.EOF):
		return f.err
	case errors.Is(err, state.ErrCorrupt):
		return f.named(fmt.Errorf("%w: %w", ErrCorrupt, err))
	}
	return err
}

// File is a snapshot file on disk.
type File struct {
	*Reader
	file *os.File
}

// Open opens a file and checks its header.
func Open(path string) (*File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r, err := NewReader(file, path)
	if err != nil {
		file.Close()
		return nil, err
	}
	return &File{Reader: r, file: file}, nil
}

// Close closes the file.
func (f *File) Close() error { return f.file.Close() }
