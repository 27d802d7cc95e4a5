package consensus

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"timonel/internal/durable"
)

// journalSuffix is what follows the name of the log file in that of its journal.
const journalSuffix = ".journal"

// Of a journal.
const (
	journalHalf = 4 << 20
	// journalKeep is for how long, and journalFlush for how many bytes, entries wait to
	// be moved into the log file.
	journalKeep  = time.Second
	journalFlush = 1 << 20
)

// journalKey is what the log file keeps the least generation under that counts.
var journalKey = []byte("TimonelJournal")

// saltsKey is what the log file keeps the salts' secret under.
var saltsKey = []byte("TimonelJournalSalts")

// journaled is raft-boltdb with a journal before it. A commit of bbolt writes pages
// and syncs them, then writes the meta page and syncs that; the journal is a file of
// fixed size, written from start to end and over again, that takes an append with one
// sync of a few blocks. The log file gets the entries later, many at once.
//
// The journal's two halves are written in turn. Each append is a record; the records
// of a half have one generation, which grows with every half begun, consecutive
// numbers, and a secret salt, so that nothing that lies behind them from before, and
// no client's data, is taken for one (see salts). A half is written over when all it holds is in
// the log file. What is in the journal counts if its generation is at least that of
// journalKey and its indexes follow the log file's last.
//
// A write that fails may be on the disk all the same, or parts of it, or be lost by a
// later power cut although a later sync succeeds. So nothing is written behind it or in
// its place: all that was acknowledged is moved into the log file, and the journal begins
// anew, with a generation before which nothing counts (see renew). The same goes for a
// change of journalKey that fails: which of the two it is now is not known until one is
// written.
//
// One goroutine at a time appends.
type journaled struct {
	bolt raft.LogStore
	raft.StableStore
	close func() error
	file  journalFile
	half  int64

	writing gate // held by appends and by deletions at the end

	// Where the next record goes; writing guards these.
	salts                 salts
	generation, seq, salt uint64
	current               int       // the half that is written
	offset                int64     // in it
	last                  [2]uint64 // the last index in each half, 0 for none
	failed                bool      // a write did: the journal must begin anew

	flushing gate // held while entries are moved

	mu     sync.Mutex
	tail   []*raft.Log   // consecutive, not in the log file yet
	bytes  int           // of their data
	err    error         // of the last move, nil when it succeeded
	wake   chan struct{} // there are entries to move
	full   chan struct{} // and many
	closed chan struct{}
	done   chan struct{}
}

// journalFile is the journal on disk. What WriteAt wrote is there for certain after
// Sync.
type journalFile interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Close() error
}

// openJournal opens the journal of the log file at path, makes it if there is none,
// and moves what it holds into the log file.
func openJournal(path string, bolt *boltLog) (*journaled, error) {
	path += journalSuffix
	least, err := journalGeneration(bolt)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if least == 0 { // the log file was never used with one
		err = makeJournal(f)
	}
	var j *journaled
	if err == nil {
		j, err = newJournaled(bolt, bolt, bolt.Close, newDataFile(f), journalHalf, least)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return j, nil
}

// makeJournal fills the file with zeros: all its blocks are there then, and a sync
// writes nothing but data.
func makeJournal(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := f.WriteAt(make([]byte, 2*journalHalf), 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return durable.SyncParents(f.Name()) // of the log file as well
}

// journalGeneration returns the least generation that counts, 0 if the log file has
// no journal.
func journalGeneration(s raft.StableStore) (uint64, error) {
	n, err := s.GetUint64(journalKey)
	if errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return 0, nil
	}
	return n, err
}

// journalSalts returns the journal's salts, nil if it has none of this kind yet.
func journalSalts(s raft.StableStore) (salts, error) {
	b, err := s.Get(saltsKey)
	if errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return nil, nil
	}
	return b, err
}

// newJournaled puts a journal before a store, and moves what it holds there. least is
// the generation that journalGeneration returned.
func newJournaled(bolt raft.LogStore, stable raft.StableStore, closeStore func() error, file journalFile, half int64, least uint64) (*journaled, error) {
	j := &journaled{bolt: bolt, StableStore: stable, close: closeStore, file: file, half: half,
		writing: newGate(), flushing: newGate(), wake: make(chan struct{}, 1), full: make(chan struct{}, 1), closed: make(chan struct{}), done: make(chan struct{})}
	var err error
	if j.salts, err = journalSalts(stable); err != nil {
		return nil, err
	}
	logs, newest, err := readJournal(file, half, bolt, least, j.salts)
	if err != nil {
		return nil, err
	}
	if len(logs) > 0 {
		if err := bolt.StoreLogs(logs); err != nil {
			return nil, err
		}
	}
	if j.salts == nil { // what it held is in the log file: with other salts it counts no more
		j.salts = newSalts()
		if err := stable.Set(saltsKey, j.salts); err != nil {
			return nil, err
		}
	}
	j.generation = max(least, newest)
	if err := j.forget(); err != nil {
		return nil, err
	}
	go j.move()
	return j, nil
}

// inspectJournal reads the journal of the log file at path, without changing it, and
// returns the entries that the log file lacks.
func inspectJournal(path string, bolt *raftboltdb.BoltStore) ([]*raft.Log, error) {
	path += journalSuffix
	least, err := journalGeneration(bolt)
	if err != nil || least == 0 {
		return nil, err
	}
	name := filepath.Base(path)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s, which has the end of the log, is missing", name)
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != 2*journalHalf {
		return nil, fmt.Errorf("%s, which has the end of the log, is truncated: %d bytes of %d", name, info.Size(), 2*journalHalf)
	}
	salts, err := journalSalts(bolt)
	if err != nil {
		return nil, err
	}
	logs, _, err := readJournal(f, journalHalf, bolt, least, salts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return logs, nil
}

// forget begins a new generation, before which nothing in the journal counts. All of
// it must be in the log file.
func (j *journaled) forget() error {
	j.failed = true // until it has succeeded: the key may be on disk all the same
	if err := j.SetUint64(journalKey, j.generation+1); err != nil {
		return err
	}
	j.last = [2]uint64{}
	j.begin(0)
	j.failed = false
	return nil
}

// renew begins the journal anew after a write that failed.
func (j *journaled) renew() error {
	if !j.failed {
		return nil
	}
	if err := j.moveAll(); err != nil {
		return err
	}
	return j.forget()
}

// begin begins a half.
func (j *journaled) begin(half int) {
	j.generation++
	j.seq, j.salt, j.current, j.offset = 0, j.salts.of(j.generation), half, 0
}

// StoreLog implements raft.LogStore.
func (j *journaled) StoreLog(l *raft.Log) error { return j.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. It fails while entries cannot be moved to the
// log file, on a full disk say, for the journal would fill up too.
func (j *journaled) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	j.writing.Lock()
	defer j.writing.Unlock()
	if err := j.moveErr(); err != nil {
		return err
	}
	if err := j.renew(); err != nil {
		return err
	}
	last, err := j.LastIndex()
	if err != nil {
		return err
	}
	consecutive := last == 0 || logs[0].Index == last+1
	size := 2 * recordHeader
	for i, l := range logs {
		size += len(l.Data) + len(l.Extensions) + 64
		consecutive = consecutive && (i == 0 || l.Index == logs[i-1].Index+1)
	}
	b := appendLogs(make([]byte, recordHeader, size), logs)
	room := align(int64(len(b)))
	if !consecutive || room > j.half {
		return j.straight(logs)
	}
	if j.offset+room > j.half {
		if err := j.turn(); err != nil {
			return err
		}
	}
	writeHeader(b, j.generation, j.seq, j.salt)
	// What lies behind it from before must not look like the next: an end follows.
	b = append(b, make([]byte, room-int64(len(b))+min(recordHeader, j.half-j.offset-room))...)
	if err := j.write(b, int64(j.current)*j.half+j.offset); err != nil {
		return err
	}
	j.offset += room
	j.seq++
	j.last[j.current] = logs[len(logs)-1].Index
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, l := range logs {
		j.tail = append(j.tail, l)
		j.bytes += len(l.Data)
	}
	poke(j.wake)
	if int64(j.bytes) >= min(journalFlush, j.half/4) {
		poke(j.full)
	}
	return nil
}

// write writes a record; it is on disk when it returns nil.
func (j *journaled) write(b []byte, at int64) error {
	_, err := j.file.WriteAt(b, at)
	if err == nil {
		err = j.file.Sync()
	}
	if err != nil {
		j.failed = true
	}
	return err
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// turn begins the other half, after what it holds is in the log file.
func (j *journaled) turn() error {
	other := 1 - j.current
	if first := j.firstWaiting(); first != 0 && first <= j.last[other] {
		if err := j.moveAll(); err != nil {
			return err
		}
	}
	j.last[other] = 0
	j.begin(other)
	return nil
}

// straight stores entries that the journal cannot take in the log file.
func (j *journaled) straight(logs []*raft.Log) error {
	if err := j.moveAll(); err != nil {
		return err
	}
	if err := j.forget(); err != nil {
		return err
	}
	return j.bolt.StoreLogs(logs)
}

// move moves entries into the log file some time after they came, until the journal
// is closed.
func (j *journaled) move() {
	defer close(j.done)
	for {
		select {
		case <-j.closed:
			return
		case <-j.wake:
		}
		timer := time.NewTimer(journalKeep)
		select {
		case <-j.closed:
		case <-j.full:
		case <-timer.C:
		}
		timer.Stop()
		for j.moveAll() != nil {
			select {
			case <-j.closed:
				return
			case <-time.After(retryWrite):
			}
		}
	}
}

// moveAll moves all entries that wait into the log file.
func (j *journaled) moveAll() error {
	j.flushing.Lock()
	defer j.flushing.Unlock()
	j.mu.Lock()
	logs := j.tail
	j.mu.Unlock()
	var err error
	if len(logs) > 0 {
		err = j.bolt.StoreLogs(logs)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err = err; err == nil {
		j.tail = slices.Clone(j.tail[len(logs):]) // not the array of those that are gone
		for _, l := range logs {
			j.bytes -= len(l.Data)
		}
	}
	return err
}

func (j *journaled) moveErr() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.err
}

// firstWaiting is the first index that is not in the log file yet, 0 for none.
func (j *journaled) firstWaiting() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.tail) == 0 {
		return 0
	}
	return j.tail[0].Index
}

// FirstIndex implements raft.LogStore.
func (j *journaled) FirstIndex() (uint64, error) {
	waiting := j.firstWaiting()
	if first, err := j.bolt.FirstIndex(); err != nil || first != 0 {
		return first, err
	}
	return waiting, nil
}

// LastIndex implements raft.LogStore.
func (j *journaled) LastIndex() (uint64, error) {
	j.mu.Lock()
	n := len(j.tail)
	if n > 0 {
		defer j.mu.Unlock()
		return j.tail[n-1].Index, nil
	}
	j.mu.Unlock()
	return j.bolt.LastIndex()
}

// GetLog implements raft.LogStore.
func (j *journaled) GetLog(index uint64, l *raft.Log) error {
	j.mu.Lock()
	if len(j.tail) > 0 && index >= j.tail[0].Index && index-j.tail[0].Index < uint64(len(j.tail)) {
		*l = *j.tail[index-j.tail[0].Index]
		j.mu.Unlock()
		return nil
	}
	j.mu.Unlock()
	return j.bolt.GetLog(index, l)
}

// DeleteRange implements raft.LogStore.
func (j *journaled) DeleteRange(first, last uint64) error {
	if end, err := j.bolt.LastIndex(); err != nil {
		return err
	} else if last < end { // those in the journal are others, or their indexes are passed
		return j.shorten(first, last)
	}
	j.writing.Lock()
	defer j.writing.Unlock()
	if err := j.moveAll(); err != nil {
		return err
	}
	if err := j.forget(); err != nil {
		return err
	}
	return j.bolt.DeleteRange(first, last)
}

// shorten removes entries that are in the log file and do not reach to its end.
func (j *journaled) shorten(first, last uint64) error {
	j.flushing.Lock()
	defer j.flushing.Unlock()
	if err := j.bolt.DeleteRange(first, last); err != nil {
		return err
	}
	// A move that failed has left some in the log file all the same; they wait to be moved
	// again, and would come back.
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.tail) > 0 && j.tail[0].Index <= last {
		j.bytes -= len(j.tail[0].Data)
		j.tail = j.tail[1:]
	}
	return nil
}

// Close closes journal and log file, which has all entries then, unless it cannot be
// written: the journal keeps them.
func (j *journaled) Close() error {
	close(j.closed)
	<-j.done
	j.writing.Lock()
	defer j.writing.Unlock()
	_ = j.moveAll() // a failure was told to who appended
	return errors.Join(j.file.Close(), j.close())
}
