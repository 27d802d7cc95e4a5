package consensus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"timonel/test/medium"
)

var errPowerCut = errors.New("the power is off")

// TestJournalPowerCut appends, cuts ends off, shortens and empties a log on a disk whose
// writes and syncs fail now and then or that is full, goes on after each failure as Raft's
// disk does, and cuts the power at any write, or kills the process; and it fails and cuts
// while the log is opened. What was acknowledged is there afterwards, what was removed is
// not; of what failed or was under way all or nothing is.
// It is not parallel: it takes a processor, and others have elections.
func TestJournalPowerCut(t *testing.T) {
	for seed := range uint64(lessRaced(60)) {
		synctest.Test(t, func(t *testing.T) { journalLives(t, seed) })
	}
}

func journalLives(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	device := medium.New(rand.New(rand.NewPCG(seed, 1))) // of its own: the journal writes from other goroutines
	device.Off = errPowerCut
	possible := [][]*raft.Log{nil} // what the log may be
	for life := range 12 {
		possible = journalLife(t, seed, life, random, device, possible)
	}
}

const testHalf = 4096

func journalLife(t *testing.T, seed uint64, life int, random *rand.Rand, device *medium.Disk, possible [][]*raft.Log) [][]*raft.Log {
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("seed %d, life %d: %s", seed, life, fmt.Sprintf(format, args...))
	}
	device.Fail(false)
	for random.IntN(3) == 0 { // a start that comes to nothing
		switch n := 1 + random.IntN(12); random.IntN(3) {
		case 0:
			device.CutIn(n)
		case 1:
			device.FailAt(n)
		case 2:
			device.Fill(true)
		}
		store, bolt, err := openOn(t, device, random)
		if err != nil && !errors.Is(err, errPowerCut) && !errors.Is(err, medium.ErrNoSpace) && !errors.Is(err, medium.ErrNoSync) {
			fail("%v", err)
		}
		if random.IntN(2) == 0 {
			device.Cut()
		} else {
			device.Kill()
		}
		if err == nil {
			_ = store.Close()
		}
		must(t, bolt.Remove())
		device.Fill(false)
	}
	store, bolt, err := openOn(t, device, random)
	defer bolt.Remove()
	if err != nil {
		fail("%v", err)
	}
	var model []*raft.Log
	for i, p := range possible {
		if err = sameLog(store, p); err == nil {
			model = p
			break
		}
		if i == len(possible)-1 {
			fail("it is none of the %d that it may be, the last: %v", len(possible), err)
		}
	}
	w := &journalWriter{j: store.(*journaled), model: model, random: random, life: uint64(life)}
	steps := 1000 // until it is killed
	if random.IntN(3) == 0 {
		steps = 1 + random.IntN(60)
	} else {
		device.CutIn(2 + random.IntN(150))
	}
	defer func() { // a failure, too, ends what runs
		device.Cut()
		_ = store.Close()
	}()
	for err = nil; !errors.Is(err, errPowerCut); time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond) {
		if steps--; steps == 0 {
			device.Kill()
			break
		}
		device.Fail(random.IntN(4) == 0)
		device.Fill(random.IntN(6) == 0)
		err = w.step()
		w.trace("  = %v", err)
		if err == nil && w.unsure == 0 { // else what failed may be there
			if err := sameLog(w.j, w.model); err != nil {
				fail("%v\n%s", err, strings.Join(w.done, "\n"))
			}
		}
	}
	device.Fill(false)
	return append(w.others, w.model)
}

// openOn opens a log on a simulated disk whose journal is written past the page cache, or
// not, or is not because the device wants larger sectors.
func openOn(t *testing.T, device *medium.Disk, random *rand.Rand) (LogStore, *medium.BoltFile, error) {
	t.Helper()
	bolt, err := device.OpenBolt("raft.db")
	must(t, err)
	journal := device.Open("journal", 2*testHalf)
	files := LogFiles{
		Bolt: bolt.Path, Attach: bolt.Attach, Half: testHalf, Journal: journal,
		Stall: func() { time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond) }, // not random: from other goroutines
	}
	if align := []int64{0, sector, sector, 4096}[random.IntN(4)]; align != 0 {
		files.Direct = journal.Direct(align)
	}
	store, err := OpenLog(files)
	return store, bolt, err
}

// journalWriter uses a log as Raft's disk does.
type journalWriter struct {
	j      *journaled
	random *rand.Rand
	life   uint64

	model  []*raft.Log   // consecutive; what was acknowledged
	others [][]*raft.Log // what it may be instead, after a failure
	unsure uint64        // the last append failed, and began with this entry
	again  func() error  // a removal that is repeated until it succeeds

	done []string // for whoever reads a failure
}

// trace notes what is done, and where the log is then.
func (w *journalWriter) trace(format string, args ...any) {
	w.j.mu.Lock()
	tail := len(w.j.tail)
	w.j.mu.Unlock()
	first, _ := w.j.bolt.FirstIndex()
	last, _ := w.j.bolt.LastIndex()
	w.done = append(w.done, fmt.Sprintf(format, args...)+fmt.Sprintf(" (%d to %d moved, %d waiting)", first, last, tail))
}

func (w *journalWriter) next() uint64 {
	if n := len(w.model); n > 0 {
		return w.model[n-1].Index + 1
	}
	return 1
}

func (w *journalWriter) step() error {
	if w.again != nil {
		return w.again()
	}
	next := w.next()
	switch p := w.random.IntN(20); {
	case p == 0 && len(w.model) > 0: // its end is another leader's
		n := w.random.IntN(len(w.model))
		return w.remove(w.model[n].Index, next-1, w.model[:n:n])
	case p == 1 && len(w.model) > 1: // a snapshot was taken
		n := 1 + w.random.IntN(len(w.model)-1)
		return w.remove(w.model[0].Index, w.model[n-1].Index, w.model[n:])
	case p == 2 && len(w.model) > 0: // one was installed
		return w.remove(w.model[0].Index, next-1, nil)
	case p == 3:
		return w.j.moveAll()
	case p == 4:
		return w.j.SetUint64([]byte("CurrentTerm"), next)
	}
	if len(w.model) == 0 && w.unsure == 0 {
		next += uint64(w.random.IntN(50))
	}
	size := 400
	if w.random.IntN(20) == 0 {
		size = int(w.j.half)
	}
	var logs []*raft.Log
	for i := range uint64(1 + w.random.IntN(5)) {
		logs = append(logs, &raft.Log{Index: next + i, Term: w.life, Type: raft.LogNoop, Data: bytes.Repeat([]byte{byte(next)}, w.random.IntN(size))})
	}
	return w.append(logs)
}

// append is disk.appendNow.
func (w *journalWriter) append(logs []*raft.Log) error {
	after := append(w.model[:len(w.model):len(w.model)], logs...)
	w.others = append(w.others, after)
	w.trace("append %d-%d", logs[0].Index, logs[len(logs)-1].Index)
	err := w.dropUnsure()
	if err == nil {
		err = w.j.StoreLogs(logs)
	}
	if w.unsure = 0; err != nil {
		w.unsure = logs[0].Index
	} else {
		w.model, w.others = after, nil
	}
	return err
}

// dropUnsure is disk.dropUnsure.
func (w *journalWriter) dropUnsure() error {
	last, err := w.j.LastIndex()
	if err == nil && w.unsure != 0 && last >= w.unsure {
		err = w.j.DeleteRange(w.unsure, last)
	}
	return err
}

// remove is disk.DeleteRange. What failed before stays behind what is removed from the
// start, and goes with what is removed from the end.
func (w *journalWriter) remove(first, last uint64, after []*raft.Log) error {
	var others [][]*raft.Log
	if end := w.next() - 1; last < end {
		for _, o := range w.others {
			others = append(others, slices.DeleteFunc(slices.Clone(o), func(l *raft.Log) bool { return l.Index <= last }))
		}
	}
	w.others = append(append(w.others, others...), after)
	w.again = func() error {
		w.trace("remove %d-%d", first, last)
		err := w.dropUnsure()
		if err == nil {
			err = w.j.DeleteRange(first, last)
		}
		if err == nil {
			w.model, w.others, w.again = after, others, nil
		}
		return err
	}
	return w.again()
}

func sameLog(s raft.LogStore, want []*raft.Log) error {
	first, err := s.FirstIndex()
	if err != nil {
		return err
	}
	last, err := s.LastIndex()
	if err != nil {
		return err
	}
	if len(want) == 0 {
		if first != 0 && first <= last {
			return fmt.Errorf("it has entries %d to %d, must be empty", first, last)
		}
		return nil
	}
	if first != want[0].Index || last != want[len(want)-1].Index {
		return fmt.Errorf("it has entries %d to %d, must have %d to %d", first, last, want[0].Index, want[len(want)-1].Index)
	}
	for _, w := range want {
		var l raft.Log
		if err := s.GetLog(w.Index, &l); err != nil || l.Index != w.Index || l.Term != w.Term || !bytes.Equal(l.Data, w.Data) {
			return fmt.Errorf("entry %d: %v of term %d with %d bytes, must be of term %d with %d", w.Index, err, l.Term, len(l.Data), w.Term, len(w.Data))
		}
	}
	return nil
}

// TestJournalDamage spoils the journal of a replica that was killed.
func TestJournalDamage(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		name  string
		spoil func(t *testing.T, file string)
		want  string // empty: it starts
	}{
		{"its first block", func(t *testing.T, file string) { overwrite(t, file, 0) }, "cannot be read, entries up to"},
		{"one in between", func(t *testing.T, file string) { overwrite(t, file, 8192) }, "cannot be read, entries up to"},
		{"it is missing", func(t *testing.T, file string) { must(t, os.Remove(file)) }, "is missing"},
		{"it is truncated", func(t *testing.T, file string) { must(t, os.Truncate(file, 4096)) }, "truncated: 4096 bytes of 8388608"},
		{"not at all", func(*testing.T, string) {}, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), logFile)
			store, err := openLog(path, logExtent{}, slog.New(slog.DiscardHandler))
			must(t, err)
			j, err := openJournal(path, store)
			must(t, err)
			j.flushing.Lock() // nothing is moved
			for i := range uint64(30) {
				must(t, j.StoreLog(&raft.Log{Index: i + 1, Type: raft.LogNoop, Data: bytes.Repeat([]byte("x"), 1000)}))
			}
			must(t, store.Close()) // as a kill does
			x.spoil(t, path+journalSuffix)
			held, err := inspectLog(path, true)
			switch {
			case x.want == "" && (err != nil || held.first != 1 || held.last != 30):
				t.Errorf("%+v, %v", held, err)
			case x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), logFile+journalSuffix)):
				t.Errorf("%v, want %q", err, x.want)
			}
			j.flushing.Unlock()
		})
	}
}

// The journal of a program that drew a salt by lot for each generation is read, and from
// then on no record that has not the folder's own.
func TestJournalOfAnEarlierProgram(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), logFile)
	store, err := openLog(path, logExtent{}, testLog(t))
	must(t, err)
	must(t, store.StoreLogs([]*raft.Log{{Index: 1, Type: raft.LogNoop}}))
	must(t, store.SetUint64(journalKey, 7))
	must(t, store.Close())
	file := make([]byte, 2*journalHalf)
	put := func(at int, generation, seq, salt uint64, logs ...*raft.Log) int {
		b := appendLogs(make([]byte, recordHeader), logs)
		writeHeader(b, generation, seq, salt)
		return at + int(align(int64(copy(file[at:], b))))
	}
	entry := func(i uint64) *raft.Log { return &raft.Log{Index: i, Type: raft.LogNoop, Data: []byte{byte(i)}} }
	put(put(0, 7, 0, 1234, entry(2), entry(3)), 7, 1, 1234, entry(4))
	put(journalHalf, 8, 0, 99, entry(5))
	must(t, os.WriteFile(path+journalSuffix, file, 0o600))
	want := []*raft.Log{{Index: 1}, entry(2), entry(3), entry(4), entry(5)}
	for range 3 {
		x, err := inspectLog(path, true)
		if err != nil || x.first != 1 || x.last != 5 {
			t.Fatalf("%+v, %v", x, err)
		}
		store, err := openLog(path, x, testLog(t))
		must(t, err)
		j, err := openJournal(path, store)
		must(t, err)
		must(t, sameLog(j, want))
		must(t, j.Close())
		put(0, 100, 0, 1234, entry(6)) // as the earlier program would write it
		must(t, os.WriteFile(path+journalSuffix, file, 0o600))
	}
}

func overwrite(t *testing.T, file string, at int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 512), at)
	must(t, errors.Join(err, f.Close()))
}

// What was made a record is read as one, and what a bit of it is changed in is not.
func FuzzJournalRecord(f *testing.F) {
	f.Add(appendLogs(nil, []*raft.Log{{Index: 7, Term: 3, Data: []byte("data"), Extensions: []byte("more")}}), uint64(4), uint64(0), uint64(9), uint16(77))
	f.Add([]byte{}, uint64(0), uint64(0), uint64(0), uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, generation, seq, salt uint64, bit uint16) {
		logs, ok := decodeLogs(b)
		if again, fine := decodeLogs(appendLogs(nil, logs)); ok && (!fine || fmt.Sprint(deref(again)) != fmt.Sprint(deref(logs))) {
			t.Errorf("%v became %v", deref(logs), deref(again))
		}
		any := func(uint64, uint64) bool { return true }
		if r, is := readRecord(b, any); is && (len(r.logs) == 0 || r.size < recordHeader || r.size > align(int64(len(b)))) {
			t.Errorf("%d bytes hold a record of %d bytes with %d entries", len(b), r.size, len(r.logs))
		}
		record := append(make([]byte, recordHeader), b...)
		writeHeader(record, generation, seq, salt)
		r, is := readRecord(append(record, 1, 2, 3), any)
		switch {
		case is != (ok && len(logs) > 0):
			t.Errorf("a record of %d entries (%v) is one: %v", len(logs), ok, is)
		case is && (r.generation != generation || r.seq != seq || r.salt != salt || r.size != align(int64(len(record))) || fmt.Sprint(deref(r.logs)) != fmt.Sprint(deref(logs))):
			t.Errorf("%+v", r)
		}
		if _, is := readRecord(record, func(g, s uint64) bool { return g == generation+1 || s == salt+1 }); is {
			t.Error("one that is not wanted is read")
		}
		n := int(bit) % (8 * len(record))
		record[n/8] ^= 1 << (n % 8)
		if _, is := readRecord(record, any); is {
			t.Errorf("with bit %d changed it still is a record", n)
		}
	})
}

// What a client wrote passes for no record, nor does looking for records take time that
// grows with the square of it: here each 56 bytes are the start of one that reaches to the
// end of the half, of a later generation and with entries that are still to come.
func TestClientsCannotForgeRecords(t *testing.T) {
	t.Parallel()
	const half = 4 << 20
	forged := func() []byte {
		b := make([]byte, half-4096)
		end := len(b)
		for at := end - 56; at >= 0; at -= 56 {
			h := b[at:end]
			n := len(h) - recordHeader
			entry := appendLogs(nil, []*raft.Log{{Index: 1 << 40, Type: raft.LogNoop}})
			entry = entry[:len(entry)-2] // without data and extensions
			for digits := 1; digits < 5; digits++ {
				if size := binary.AppendUvarint(nil, uint64(max(0, n-len(entry)-digits-1))); len(size) == digits {
					copy(h[recordHeader:], append(entry, size...))
					break
				}
			}
			binary.LittleEndian.PutUint32(h[4:], uint32(n))
			binary.LittleEndian.PutUint64(h[8:], 1<<40)
			if n < 8192 { // some of them are right but for the salt
				writeHeader(h, 1<<40, 0, 0)
			}
		}
		return b
	}()
	dir := t.TempDir()
	path := filepath.Join(dir, logFile)
	open := func() *journaled {
		x, err := inspectLog(path, false)
		must(t, err)
		store, err := openLog(path, x, testLog(t))
		must(t, err)
		j, err := openJournal(path, store)
		must(t, err)
		return j
	}
	j := open()
	must(t, j.StoreLog(&raft.Log{Index: 1, Type: raft.LogNoop, Data: []byte("before")}))
	// Aligned as records are, in both halves.
	for i := range uint64(2) {
		must(t, j.StoreLog(&raft.Log{Index: 2 + i, Type: raft.LogNoop, Data: forged}))
	}
	must(t, j.Close())
	began := time.Now()
	j = open() // nothing in the journal counts any more
	must(t, j.Close())
	j = open()
	want := []*raft.Log{{Index: 1, Data: []byte("before")}}
	for i := range uint64(2) {
		want = append(want, &raft.Log{Index: 2 + i, Data: forged})
	}
	must(t, sameLog(j, want))
	must(t, j.Close())
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v to open", took)
	}
}

func deref(logs []*raft.Log) (out []raft.Log) {
	for _, l := range logs {
		out = append(out, *l)
	}
	return out
}
