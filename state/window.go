package state

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// floors says what has left the history: for all keys, and for the keys with some
// prefix beside. It only ever rises. It is raised before anything is dropped, so
// that who read something and then asks here knows whether it read all.
type floors struct {
	mu    sync.RWMutex
	watch int64            // events up to it may be gone whatever their key
	read  int64            // the state before it may not be asked for
	cut   map[string]int64 // prefix to the newest event of it that is gone
	most  int64            // the highest in cut, and watch
}

// maxCut bounds cut: beyond it, what is cut is told of more coarsely.
const maxCut = 256

// of returns the revision after which all events of the prefix are there.
func (f *floors) of(prefix string) int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.locked(prefix)
}

func (f *floors) locked(prefix string) int64 {
	floor := f.watch
	for cut, revision := range f.cut {
		if revision > floor && (strings.HasPrefix(cut, prefix) || strings.HasPrefix(prefix, cut)) {
			floor = revision
		}
	}
	return floor
}

// readable returns the oldest revision at which the keys with the prefix can be told.
func (f *floors) readable(prefix string) int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	floor := f.read
	for cut, revision := range f.cut {
		if revision > floor && (strings.HasPrefix(cut, prefix) || strings.HasPrefix(prefix, cut)) {
			floor = revision
		}
	}
	return floor
}

// highest returns the revision after which all events of all keys are there.
func (f *floors) highest() int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.most
}

// raise says that events up to a revision are gone whatever their key.
func (f *floors) raise(watch, read int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watch, f.read = max(f.watch, watch), max(f.read, read)
	f.most = max(f.most, f.watch)
	for prefix, revision := range f.cut {
		if revision <= f.watch {
			delete(f.cut, prefix)
		}
	}
}

// raiseOf says that events of the directory up to a revision are gone.
func (f *floors) raiseOf(directory string, revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cut == nil {
		f.cut = map[string]int64{}
	}
	at := directory
	for _, coarser := range []string{familyOf(directory), ""} {
		if _, ok := f.cut[coarser]; ok {
			at = coarser
		}
	}
	f.cut[at] = max(f.cut[at], revision)
	f.most = max(f.most, revision)
	for level := 0; len(f.cut) > maxCut; level++ { // of the families, then of all
		coarse := map[string]int64{}
		for prefix, revision := range f.cut {
			if prefix = familyOf(prefix); level > 0 {
				prefix = ""
			}
			coarse[prefix] = max(coarse[prefix], revision)
		}
		f.cut = coarse
	}
}

// directoryOf returns the key up to its last slash: a resource of one namespace, or
// a resource without namespaces.
func directoryOf(key string) string { return key[:strings.LastIndexByte(key, '/')+1] }

// familyOf returns the directory round a directory, such as the resource in all
// namespaces, but no less than two names: "/registry/nodes/" is its own.
func familyOf(directory string) string {
	if strings.Count(directory, "/") < 4 {
		return directory
	}
	return directoryOf(directory[:len(directory)-1])
}

// weight is what something holds of the history.
type weight struct{ bytes, large int64 }

func (w *weight) add(bytes, large int64) { w.bytes, w.large = w.bytes+bytes, w.large+large }

// family is the events of directories that belong together.
type family struct {
	weight
	directories map[*directory]struct{}
}

// directory is the events of the keys of one directory that are in the history.
type directory struct {
	weight
	name      string
	family    *family
	revisions []int64 // ascending, from begin on
	begin     int
}

func (d *directory) oldest() int64 { return d.revisions[d.begin] }

// shares divides the history by directories, so that what one writes costs another
// nothing. Store.mu guards it.
type shares struct {
	weight
	families    map[string]*family
	directories map[string]*directory
}

func newShares() shares {
	return shares{families: map[string]*family{}, directories: map[string]*directory{}}
}

func (s *shares) add(e *Event) {
	name := directoryOf(e.KV.Key)
	d := s.directories[name]
	if d == nil {
		f := s.families[familyOf(name)]
		if f == nil {
			f = &family{directories: map[*directory]struct{}{}}
			s.families[familyOf(name)] = f
		}
		d = &directory{name: name, family: f}
		s.directories[name] = d
		f.directories[d] = struct{}{}
	}
	d.revisions = append(d.revisions, e.Revision)
	bytes, large := e.cost()
	d.add(bytes, large)
	d.family.add(bytes, large)
	s.weight.add(bytes, large)
}

// remove takes out the oldest event of its directory.
func (s *shares) remove(revision int64, of holding) {
	d := s.directories[of.directory]
	if d.oldest() != revision {
		panic("state: an event leaves the history out of order") // would break every bound; never seen
	}
	d.add(-of.bytes, -of.large)
	d.family.add(-of.bytes, -of.large)
	s.weight.add(-of.bytes, -of.large)
	if d.begin++; d.begin == len(d.revisions) {
		delete(s.directories, d.name)
		if delete(d.family.directories, d); len(d.family.directories) == 0 {
			delete(s.families, familyOf(d.name))
		}
	} else if d.begin > 64 && d.begin > len(d.revisions)/2 {
		d.revisions, d.begin = append([]int64(nil), d.revisions[d.begin:]...), 0
	}
}

// level returns down to which level the weights have to be cut to be that much less
// in all: who holds most gives most.
func level(weights []int64, excess int64) int64 {
	slices.SortFunc(weights, func(a, b int64) int { return cmp.Compare(b, a) })
	sum := int64(0)
	for i, w := range weights {
		next := int64(0)
		if i+1 < len(weights) {
			next = weights[i+1]
		}
		if sum += w; sum-int64(i+1)*next >= excess {
			return max(0, (sum-excess)/int64(i+1))
		}
	}
	return 0
}

func bytesOf(w *weight) int64 { return w.bytes }
func largeOf(w *weight) int64 { return w.large }

// remember adds a change to the history.
func (s *Store) remember(e *Event) {
	s.head.hist.append(e, s.head.hash, s.now)
	s.shares.add(e)
}

// trim drops from the history what is over its limits. It makes a little more room
// than it must, so that it has not to look for whom to take from at each change.
func (s *Store) trim() {
	h, o := &s.head.hist, &s.options
	if o.HistoryChanges > 0 {
		if over := h.next - int64(o.HistoryChanges) - 1; over >= h.first {
			s.dropTo(over, max(over, h.read))
		}
	}
	if limit := max(o.HistoryLargeBytes, s.head.bytes/4); s.shares.large > limit {
		s.cut(largeOf, limit-limit/16)
	}
	if s.shares.bytes > o.HistoryBytes {
		s.cut(bytesOf, o.HistoryBytes-o.HistoryBytes/16)
	}
}

// cut drops the oldest events of those who hold most, families first and then the
// directories in them, until no more than limit is held.
func (s *Store) cut(of func(*weight) int64, limit int64) {
	h := &s.head.hist
	var weights []int64
	for _, f := range s.shares.families {
		weights = append(weights, of(&f.weight))
	}
	most := level(weights, of(&s.shares.weight)-limit)
	for _, f := range s.shares.families {
		if of(&f.weight) <= most {
			continue
		}
		weights = weights[:0]
		for d := range f.directories {
			weights = append(weights, of(&d.weight))
		}
		mostOf := level(weights, of(&f.weight)-most)
		for d := range f.directories {
			s.cutDirectory(d, of, mostOf)
		}
	}
	h.shrink()
}

// cutDirectory drops a directory's oldest events until it holds no more than most.
func (s *Store) cutDirectory(d *directory, of func(*weight) int64, most int64) {
	h, end := &s.head.hist, d.begin
	for left := of(&d.weight); end < len(d.revisions) && left > most; end++ {
		held, _ := h.holds(d.revisions[end])
		left -= of(&weight{held.bytes, held.large})
	}
	if end == d.begin {
		return
	}
	gone := slices.Clone(d.revisions[d.begin:end])
	h.floors.raiseOf(d.name, gone[len(gone)-1])
	for _, revision := range gone {
		s.drop(revision)
	}
}

// drop forgets the oldest event of its directory, if it is still there.
func (s *Store) drop(revision int64) {
	h := &s.head.hist
	held, ok := h.holds(revision)
	if !ok {
		return
	}
	s.shares.remove(revision, held)
	h.empty(revision)
	if held.cold {
		s.thawed(revision, held.bytes)
	} else {
		s.dropped += held.bytes
	}
}

// dropTo forgets all events up to and including a revision, 0 for none, and that the
// state could be asked for before read.
func (s *Store) dropTo(revision, read int64) {
	h := &s.head.hist
	revision, read = min(revision, h.next-1), min(read, h.next-1)
	h.floors.raise(revision, read)
	h.read = max(h.read, read)
	for r := h.first; r <= revision; r++ {
		s.drop(r)
	}
	h.shrink()
}

// memoAge is how long, in seconds, what readers left beside a value that is not the
// newest is kept. Watchers of a change ask for it at once.
const memoAge = 10

// Tick tells the store what time it is: changes from now on came at that time, and
// the history that is older than Options.HistoryAge goes. It is this replica's own
// clock and should not jump; without Tick no history ages.
func (s *Store) Tick(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.head.hist
	if s.now == 0 {
		s.began = now.Unix()
	}
	s.now = max(s.now, now.Unix())
	s.head.clock = s.now
	// A tenth beyond what is promised, for clients of a replica that was a little
	// behind this one.
	oldest := s.now - int64((s.options.HistoryAge + s.options.HistoryAge/10).Seconds())
	read := h.read
	for read < h.next-1 && s.cameAt(read+1) < oldest {
		read++
	}
	last := h.first - 1 // that goes
	for left := s.shares.bytes; last < read && (h.next-1-last > int64(s.options.HistoryAgeless) || left > agelessBytes); last++ {
		if held, ok := h.holds(last + 1); ok {
			left -= held.bytes
		}
	}
	// What could not be read is gone, and so is all before it.
	h.floors.mu.RLock()
	last, read = max(last, min(h.floors.watch, h.next-1)), max(read, min(h.floors.read, h.next-1))
	h.floors.mu.RUnlock()
	if last < h.first {
		last = 0
	}
	if read > h.read || last > 0 {
		s.dropTo(last, read)
		s.publish()
	}
	s.emptyMemos()
}

// HistoryAge is the age that the history is promised to have: see [Options].
func (s *Store) HistoryAge() time.Duration { return s.options.HistoryAge }

// cameAt returns when the event of a revision from the history's base on came.
func (s *Store) cameAt(revision int64) int64 {
	if t := s.head.hist.timeAt(revision); t != 0 {
		return t
	}
	return s.began // it came before there was a clock
}

// agelessBytes bounds what is kept of Options.HistoryAgeless.
const agelessBytes = 4 << 20

// emptyMemos lets go of what was left beside values that were replaced a while ago.
func (s *Store) emptyMemos() {
	h := &s.head.hist
	r := max(s.memos, h.base-1)
	for r+1 < h.next && s.cameAt(r+1) <= s.now-memoAge {
		r++
		if e := h.inMemory(r); e != nil && e.Prev.memo != nil {
			e.Prev.memo.Store(nil)
		}
	}
	s.memos = r
}

// HistoryStats says how far back the history of a replica goes.
type HistoryStats struct {
	// Bytes is what it holds beside the state, Large the part of it that counts
	// against Options.HistoryLargeBytes, Spilled the part that is not in memory but in
	// files, which are Disk bytes.
	Bytes, Large, Spilled, Disk int64
	// Limit and LargeLimit are the bounds of the two.
	Limit, LargeLimit int64
	// Changes is how many events it has.
	Changes int
	// Age is how long ago the newest revision ceased to be the newest that every
	// watch can start after, and every list be read at; no more than
	// Options.HistoryAge, which is what it should be.
	Age time.Duration
	// Cut is the age of the resources that had to give up some of theirs: for each
	// the prefix of its keys.
	Cut map[string]time.Duration
}

// Worst returns the n in Cut with the least age.
func (h *HistoryStats) Worst(n int) map[string]time.Duration {
	out := map[string]time.Duration{}
	prefixes := slices.Sorted(maps.Keys(h.Cut))
	slices.SortStableFunc(prefixes, func(a, b string) int { return cmp.Compare(h.Cut[a], h.Cut[b]) })
	for _, p := range prefixes[:min(n, len(prefixes))] {
		out[p] = h.Cut[p]
	}
	return out
}

// History tells of the history as of the last Tick.
func (s *Store) History() HistoryStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.head.hist
	out := HistoryStats{
		Bytes: s.shares.bytes, Large: s.shares.large, Spilled: s.spill.bytes, Disk: s.spill.disk, Limit: s.options.HistoryBytes,
		LargeLimit: max(s.options.HistoryLargeBytes, s.head.bytes/4), Cut: map[string]time.Duration{},
	}
	for _, d := range s.shares.directories {
		out.Changes += len(d.revisions) - d.begin
	}
	age := func(floor int64) time.Duration {
		if floor <= firstRevision || floor+1 >= h.next {
			return s.options.HistoryAge // nothing is missing
		}
		return min(time.Duration(s.now-s.cameAt(max(floor+1, h.base)))*time.Second, s.options.HistoryAge)
	}
	h.floors.mu.RLock()
	defer h.floors.mu.RUnlock()
	out.Age = age(h.floors.read)
	for prefix, floor := range h.floors.cut {
		name := familyOf(prefix)
		if a, ok := out.Cut[name]; !ok || age(floor) < a {
			out.Cut[name] = age(floor)
		}
	}
	return out
}
