package state

import (
	"fmt"
	"iter"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
)

// View is the whole state at one revision. It never changes; copies are cheap.
// The zero View is not usable: views come from a [Store].
type View struct{ v *version }

// Revision is the view's.
func (v View) Revision() int64 { return v.v.revision }

// CompactRevision is the oldest revision that was kept when the view was newest.
func (v View) CompactRevision() int64 { return v.v.hist.read }

// Applied returns the index and term of the last log entry in the view, zeros if
// the view is one of the past made by [Store.At].
func (v View) Applied() (index, term uint64) { return v.v.index, v.v.term }

// Hash is a rolling hash over all changes up to the view: replicas at the same
// revision have the same hash, or one of them is corrupt.
func (v View) Hash() uint64 { return v.v.hash }

// HashAt returns what [View.Hash] was at a revision, as long as the revision is
// reached and within the history.
func (s *Store) HashAt(revision int64) (hash uint64, ok bool) {
	v := s.current.Load()
	switch {
	case revision == v.revision:
		return v.hash, true
	case revision > v.revision:
		return 0, false
	}
	return v.hist.hashAt(revision)
}

// Len is the number of keys.
func (v View) Len() int { return v.v.root.Len() }

// Bytes is the size of all keys and values.
func (v View) Bytes() int64 { return v.v.bytes }

// Get returns the key's value, or false.
func (v View) Get(key string) (KV, bool) {
	kv, ok := v.v.root.Get(key)
	if !ok {
		return KV{}, false
	}
	return *kv, true
}

// Range yields the keys with the prefix in ascending order, from start on if
// that is greater than prefix.
func (v View) Range(prefix, start string) iter.Seq[KV] {
	return func(yield func(KV) bool) {
		n, end := 0, math.MaxInt
		v.v.root.Ascend(max(prefix, start), func(key string, kv *KV) bool {
			switch {
			case n == countAfter: // a long range: from here on by number, as keys are far apart in memory
				end = n + v.CountFrom(prefix, key)
			case n < countAfter && !strings.HasPrefix(key, prefix):
				return false
			}
			if n == end {
				return false
			}
			n++
			return yield(*kv)
		})
	}
}

// countAfter is after how many keys of a range the rest is counted.
const countAfter = 128

// Count returns the number of keys with the prefix in O(log² n).
func (v View) Count(prefix string) int {
	return v.CountFrom(prefix, prefix)
}

// CountFrom returns the number of keys with the prefix that are not less than
// start.
func (v View) CountFrom(prefix, start string) int {
	root := v.v.root
	end := root.Len()
	if limit, ok := prefixEnd(prefix); ok {
		end = rank(root, limit)
	}
	return max(0, end-rank(root, max(prefix, start)))
}

// rank is the number of keys less than key.
func rank(root *tree, key string) int {
	return sort.Search(root.Len(), func(i int) bool {
		k, _, _ := root.GetAt(i)
		return k >= key
	})
}

// prefixEnd returns the least key greater than all keys with the prefix, or
// false if there is none.
func prefixEnd(prefix string) (string, bool) {
	b := []byte(prefix)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] < 0xff {
			b[i]++
			return string(b[:i+1]), true
		}
	}
	return "", false
}

// Expired returns the keys whose time to live ended at or before now, in Unix
// seconds, in order of their times. It costs only what is taken of it.
func (v View) Expired(now int64) iter.Seq[KV] {
	return func(yield func(KV) bool) {
		if v.v.expiry == nil { // a view of the past has no index
			v.v.root.Scan(func(_ string, kv *KV) bool {
				return kv.ExpiresAt == 0 || kv.ExpiresAt > now || yield(*kv)
			})
			return
		}
		v.v.expiry.Scan(func(_ string, kv *KV) bool {
			return kv.ExpiresAt <= now && yield(*kv)
		})
	}
}

// NextExpiry returns the earliest time at which a key expires, in Unix seconds,
// and false if none does. A view of the past has none.
func (v View) NextExpiry() (int64, bool) {
	if v.v.expiry == nil {
		return 0, false
	}
	_, kv, ok := v.v.expiry.Min()
	if !ok {
		return 0, false
	}
	return kv.ExpiresAt, true
}

// At returns the state as it was at revision. Its error wraps [ErrCompacted] or
// [ErrFutureRevision]. It undoes the changes since, from the nearest later state that
// is kept, and keeps the last views so made, so the next page of a list costs nothing.
func (s *Store) At(revision int64) (View, error) { return s.AtPrefix("", revision) }

// AtPrefix is At for who will read keys with the prefix alone: what the history had
// to give up of other keys does not matter. Other keys in the view may be of a later
// revision.
func (s *Store) AtPrefix(prefix string, revision int64) (View, error) {
	current := s.current.Load()
	switch {
	case revision == current.revision:
		return View{current}, nil
	case revision > current.revision:
		return View{}, fmt.Errorf("revision %d: %w (now at %d)", revision, ErrFutureRevision, current.revision)
	}
	floors := current.hist.floors
	if floor := floors.readable(prefix); revision < floor {
		return View{}, fmt.Errorf("revision %d: %w (from %d on)", revision, ErrCompacted, floor)
	}
	v := s.past.at(revision, current)
	// What was dropped in the meantime was not undone.
	if floor := floors.readable(prefix); revision < floor {
		return View{}, fmt.Errorf("revision %d: %w (from %d on)", revision, ErrCompacted, floor)
	}
	return View{v}, nil
}

// Keep remembers v for the next calls of [Store.At] with its revision, which are
// then free. A list of which only the first page was taken calls it.
func (s *Store) Keep(v View) { s.past.keep(v.v) }

// keptViews is how many views of the past are remembered.
const keptViews = 16

// pastVersions are trees to start from when a state of the past is rebuilt.
type pastVersions struct {
	mu          sync.Mutex // also serializes tree.Copy of published trees, which writes to them
	checkpoints []*version // ascending revisions
	recent      []*recent  // the last made or kept, oldest first
	epoch       uint64     // of the versions; see version.epoch
}

// recent is a version that was made or kept for who may ask again.
type recent struct {
	*version
	asked bool // since rest was last called
}

// maxCheckpoints bounds the trees kept: each holds the nodes that were copied since.
const maxCheckpoints = 16

// published adds a checkpoint now and then and forgets what is older than something
// that left the history: its tree would hold the values that left.
func (p *pastVersions) published(v *version) {
	oldest := max(v.hist.read, v.hist.floors.highest())
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.checkpoints); n == 0 || v.revision-p.checkpoints[n-1].revision >= checkpointEvery {
		p.checkpoints = append(p.checkpoints, v)
	}
	if len(p.checkpoints) > maxCheckpoints {
		odd := 0
		p.checkpoints = slices.DeleteFunc(p.checkpoints, func(*version) bool { odd++; return odd%2 == 0 })
	}
	p.checkpoints = slices.DeleteFunc(p.checkpoints, func(c *version) bool { return c.revision < oldest })
	p.recent = slices.DeleteFunc(p.recent, func(r *recent) bool { return r.revision < oldest })
}

// rest forgets checkpoints before a revision, whose trees hold values that are in files,
// and the versions that were not asked for since it was last called.
func (p *pastVersions) rest(revision int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.checkpoints = slices.DeleteFunc(p.checkpoints, func(v *version) bool { return v.revision < revision })
	p.recent = slices.DeleteFunc(p.recent, func(r *recent) bool { return !r.asked })
	for _, r := range p.recent {
		r.asked = false
	}
}

func (p *pastVersions) reset() {
	p.mu.Lock()
	p.checkpoints, p.recent = nil, nil
	p.epoch++
	p.mu.Unlock()
}

func (p *pastVersions) keep(v *version) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.epoch != p.epoch {
		return
	}
	for _, r := range p.recent {
		if r.revision == v.revision {
			r.asked = true
			return
		}
	}
	if len(p.recent) == keptViews {
		copy(p.recent, p.recent[1:])
		p.recent = p.recent[:keptViews-1]
	}
	p.recent = append(p.recent, &recent{v, true})
}

// at rebuilds the state at a revision within current's history.
func (p *pastVersions) at(revision int64, current *version) *version {
	base := current
	p.mu.Lock()
	nearer := func(v *version) bool {
		return v.epoch == current.epoch && v.revision >= revision && v.revision < base.revision
	}
	for _, v := range p.checkpoints {
		if nearer(v) {
			base = v
		}
	}
	for _, r := range p.recent {
		if nearer(r.version) {
			base = r.version
			r.asked = r.asked || r.revision == revision
		}
	}
	if base.revision == revision {
		p.mu.Unlock()
		return base
	}
	root := base.root.Copy()
	p.mu.Unlock()

	bytes := base.bytes
	for r := base.revision; r > revision; r-- {
		e := current.hist.at(r)
		if e == nil { // of keys that who asked does not want, or AtPrefix will see
			continue
		}
		if e.Type == Put {
			bytes -= int64(len(e.KV.Key) + len(e.KV.Value))
		}
		if e.Prev.ModRevision == 0 {
			root.Delete(e.KV.Key)
			continue
		}
		prev := e.Prev
		root.Set(prev.Key, &prev)
		bytes += int64(len(prev.Key) + len(prev.Value))
	}
	v := &version{root: root, hist: current.hist, revision: revision, clock: current.clock, bytes: bytes, epoch: current.epoch, clusterVersion: current.clusterVersion}
	v.hist.next = revision + 1
	v.hash, _ = v.hist.hashAt(revision)
	p.keep(v)
	return v
}
