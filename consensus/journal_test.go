package consensus

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/raft"
)

var errPowerCut = errors.New("the power is off")

// powerCut ends everything at one of the writes to come.
type powerCut struct {
	mu sync.Mutex
	in int // 0: never; 1: it is off
}

// strike reports that the power is off.
func (p *powerCut) strike() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.in > 1 {
		p.in--
	}
	return p.in == 1
}

// sectors is a file of which a power cut leaves what was synced, and of each write
// after that some sectors of 512 bytes.
type sectors struct {
	cut    *powerCut
	random *rand.Rand

	mu           sync.Mutex
	now, certain []byte
}

func newSectors(size int, random *rand.Rand, cut *powerCut) *sectors {
	return &sectors{cut: cut, random: random, now: make([]byte, size), certain: make([]byte, size)}
}

func (s *sectors) ReadAt(b []byte, at int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return copy(b, s.now[at:]), nil
}

func (s *sectors) WriteAt(b []byte, at int64) (int, error) {
	off := s.cut.strike()
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(s.now[at:], b)
	if off {
		return 0, errPowerCut
	}
	return len(b), nil
}

func (s *sectors) Sync() error {
	if s.cut.strike() {
		return errPowerCut
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(s.certain, s.now)
	return nil
}

func (s *sectors) Close() error { return nil }

// after is the file as it is after a power cut.
func (s *sectors) after(cut *powerCut) *sectors {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := newSectors(len(s.now), s.random, cut)
	for at := 0; at < len(s.now); at += 512 {
		from := s.certain
		if s.random.IntN(2) == 0 {
			from = s.now
		}
		copy(next.now[at:min(at+512, len(s.now))], from[at:])
	}
	copy(next.certain, next.now)
	return next
}

// cutStore is a store that writes all of a call or nothing.
type cutStore struct {
	*raft.InmemStore
	cut *powerCut
}

func (s *cutStore) StoreLogs(logs []*raft.Log) error {
	if s.cut.strike() {
		return errPowerCut
	}
	return s.InmemStore.StoreLogs(logs)
}

func (s *cutStore) DeleteRange(first, last uint64) error {
	if s.cut.strike() {
		return errPowerCut
	}
	if err := s.InmemStore.DeleteRange(first, last); err != nil {
		return err
	}
	if f, _ := s.FirstIndex(); f != 0 {
		if l, _ := s.LastIndex(); f > l { // it goes on counting
			*s.InmemStore = *emptied(s.InmemStore)
		}
	}
	return nil
}

func emptied(s *raft.InmemStore) *raft.InmemStore {
	n, _ := s.GetUint64(journalKey)
	next := raft.NewInmemStore()
	_ = next.SetUint64(journalKey, n)
	return next
}

func (s *cutStore) SetUint64(key []byte, value uint64) error {
	if s.cut.strike() {
		return errPowerCut
	}
	return s.InmemStore.SetUint64(key, value)
}

// TestJournalPowerCut appends, cuts ends off, shortens and empties a log, and cuts
// the power at any write. What was acknowledged is there afterwards, what was removed
// is not; of what was under way all or nothing is.
func TestJournalPowerCut(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 0))
		const half = 4096
		cut := &powerCut{}
		file, store := newSectors(2*half, random, cut), &cutStore{raft.NewInmemStore(), cut}
		var model []*raft.Log // consecutive
		next := uint64(1)     // the index after it
		for life := range 12 {
			cut = &powerCut{}
			file, store = file.after(cut), &cutStore{store.InmemStore, cut}
			least, err := store.GetUint64(journalKey)
			if err != nil && err.Error() != "not found" {
				t.Fatal(err)
			}
			j, err := newJournaled(store, store, func() error { return nil }, file, half, least)
			if err != nil {
				t.Fatalf("seed %d, life %d: %v", seed, life, err)
			}
			if err := sameLog(j, model); err != nil {
				t.Fatalf("seed %d, life %d: %v", seed, life, err)
			}
			cut.mu.Lock()
			cut.in = 2 + random.IntN(60)
			cut.mu.Unlock()
			for err == nil {
				before := model
				switch p := random.IntN(20); {
				case p == 0 && len(model) > 0: // its end is another leader's
					n := random.IntN(len(model))
					err = j.DeleteRange(model[n].Index, next-1)
					model, next = model[:n:n], model[n].Index
				case p == 1 && len(model) > 1: // a snapshot was taken
					n := 1 + random.IntN(len(model)-1)
					err = j.DeleteRange(model[0].Index, model[n-1].Index)
					model = model[n:]
				case p == 2 && len(model) > 0: // one was installed
					err = j.DeleteRange(model[0].Index, next-1)
					model, next = nil, next+uint64(random.IntN(50))
				case p == 3:
					err = j.moveAll()
				default:
					size := 400
					if random.IntN(20) == 0 {
						size = half
					}
					var logs []*raft.Log
					for range 1 + random.IntN(5) {
						logs = append(logs, &raft.Log{Index: next, Term: uint64(life), Data: bytes.Repeat([]byte{byte(next)}, random.IntN(size))})
						next++
					}
					err = j.StoreLogs(logs)
					model = append(model[:len(model):len(model)], logs...)
				}
				if err != nil { // all or nothing: look which
					close(j.closed)
					<-j.done
					if which, again := peek(file, store, half), before; sameLog(which, model) != nil {
						if now := sameLog(which, model); sameLog(which, again) != nil {
							t.Fatalf("seed %d, life %d: neither what was before: %v; nor after: %v", seed, life, sameLog(which, again), now)
						}
						model = before
					}
					if next = 1; len(model) > 0 {
						next = model[len(model)-1].Index + 1
					}
				} else if err := sameLog(j, model); err != nil {
					t.Fatalf("seed %d, life %d: %v", seed, life, err)
				}
			}
		}
	}
}

// peek returns the log as it would be found; each time one life's lottery of sectors
// is drawn anew, so it makes it the file's content.
func peek(file *sectors, store *cutStore, half int64) raft.LogStore {
	found := file.after(&powerCut{})
	copy(file.now, found.now)
	copy(file.certain, found.now)
	least, _ := store.GetUint64(journalKey)
	out := raft.NewInmemStore()
	first, _ := store.FirstIndex()
	last, _ := store.LastIndex()
	for i := first; i <= last && i > 0; i++ {
		var l raft.Log
		if store.GetLog(i, &l) == nil {
			_ = out.StoreLog(&l)
		}
	}
	logs, _, err := readJournal(found, half, store, least)
	if err != nil {
		panic(err)
	}
	_ = out.StoreLogs(logs)
	return out
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

func overwrite(t *testing.T, file string, at int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 512), at)
	must(t, errors.Join(err, f.Close()))
}

func FuzzJournalRecord(f *testing.F) {
	f.Add(appendLogs(nil, []*raft.Log{{Index: 7, Term: 3, Data: []byte("data"), Extensions: []byte("more")}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		logs, ok := decodeLogs(b)
		if !ok {
			return
		}
		again, ok := decodeLogs(appendLogs(nil, logs))
		if !ok || fmt.Sprint(deref(again)) != fmt.Sprint(deref(logs)) {
			t.Errorf("%v became %v", deref(logs), deref(again))
		}
		_, _ = readRecord(b)
	})
}

func deref(logs []*raft.Log) (out []raft.Log) {
	for _, l := range logs {
		out = append(out, *l)
	}
	return out
}
