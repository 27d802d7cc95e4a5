package network

import (
	"sync"
	"time"

	"github.com/tidwall/btree"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// maxGone is how many removed keys a Log remembers. A stream that has not told its
// agent of an older one compares anew.
const maxGone = 1 << 14

// entry is an item, or a key that was removed. It never changes.
type entry struct {
	key      wire.Key
	item     *pb.NetworkItem // nil: removed
	sum      wire.Sum
	bucket   int
	sequence uint64
}

func (e *entry) size() int {
	if e.item == nil {
		return e.key.Size()
	}
	return len(e.item.Object) + 8
}

type sequenceMap = btree.Map[uint64, *entry]

// Log is items in the order of their last changes.
type Log struct {
	mu       sync.Mutex
	entries  map[wire.Key]*entry
	order    sequenceMap
	gone     sequenceMap // of those in order the removed ones
	digests  map[pb.NetworkKind]*wire.Digest
	sequence uint64
	floor    uint64 // of removals up to here not all are known
	bytes    int64
	maxGone  int

	published *view
}

// view is a Log at one moment.
type view struct {
	sequence, floor uint64
	at              time.Time // of its publication
	order           *sequenceMap
	wholes          map[pb.NetworkKind]wire.Sum
	moved           chan struct{} // closed when there is a newer one

	mu     sync.Mutex
	shared map[span]part // what streams at the same position share
}

// NewLog returns an empty Log.
func NewLog() *Log {
	l := &Log{maxGone: maxGone, entries: make(map[wire.Key]*entry), digests: make(map[pb.NetworkKind]*wire.Digest)}
	l.published = &view{order: &sequenceMap{}, moved: make(chan struct{}), shared: make(map[span]part)}
	return l
}

// weight is what an item counts for in bounds.
func weight(key wire.Key, object []byte) int64 {
	return int64(len(object) + key.Size() + wire.ItemBytes)
}

// Set puts an item and says whether it is new.
func (l *Log) Set(key wire.Key, object []byte) bool {
	bucket, sum := wire.SumOf(key, object)
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.entries[key]
	if old != nil && old.item != nil && old.sum == sum {
		return false
	}
	l.drop(old)
	l.digest(key.Kind).Toggle(bucket, sum)
	l.bytes += weight(key, object)
	l.put(&entry{key: key, item: &pb.NetworkItem{Kind: key.Kind, Object: object}, sum: sum, bucket: bucket})
	return true
}

// Remove removes an item and says whether it was there.
func (l *Log) Remove(key wire.Key) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.entries[key]
	if old == nil || old.item == nil {
		return false
	}
	l.drop(old)
	e := &entry{key: key, bucket: old.bucket}
	l.put(e)
	l.gone.Set(e.sequence, e)
	for l.gone.Len() > l.maxGone {
		_, oldest, _ := l.gone.PopMin()
		l.order.Delete(oldest.sequence)
		delete(l.entries, oldest.key)
		l.floor = oldest.sequence
	}
	return true
}

func (l *Log) put(e *entry) {
	l.sequence++
	e.sequence = l.sequence
	l.entries[e.key] = e
	l.order.Set(e.sequence, e)
}

// drop takes an entry that is replaced out of the order.
func (l *Log) drop(old *entry) {
	if old == nil {
		return
	}
	l.order.Delete(old.sequence)
	if old.item == nil {
		l.gone.Delete(old.sequence)
		return
	}
	l.digest(old.key.Kind).Toggle(old.bucket, old.sum)
	l.bytes -= weight(old.key, old.item.Object)
}

func (l *Log) digest(kind pb.NetworkKind) *wire.Digest {
	d := l.digests[kind]
	if d == nil {
		d = &wire.Digest{}
		l.digests[kind] = d
	}
	return d
}

// Publish shows streams what there is, and returns how many bytes of items are new
// to a stream that was up to date.
func (l *Log) Publish() (fresh int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.publish()
}

func (l *Log) publish() (fresh int) {
	old := l.published
	if old.sequence == l.sequence {
		return 0
	}
	next := &view{
		sequence: l.sequence, floor: l.floor, at: time.Now(), order: l.order.Copy(), moved: make(chan struct{}),
		wholes: make(map[pb.NetworkKind]wire.Sum, len(l.digests)), shared: make(map[span]part),
	}
	for kind, d := range l.digests {
		next.wholes[kind] = d.Whole()
	}
	next.order.Ascend(old.sequence+1, func(_ uint64, e *entry) bool {
		fresh += e.size()
		return true
	})
	l.published = next
	close(old.moved)
	return fresh
}

// view is what streams may see.
func (l *Log) view() *view {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.published
}

// compare publishes what there is, and returns it with the buckets of kinds in which
// somebody has something else than is in the log, or beside it.
func (l *Log) compare(have *wire.Digest, kinds kindSet, beside *wire.Digest) (*view, wire.Set, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.publish()
	var own wire.Digest
	for kind, d := range l.digests {
		if kinds.has(kind) {
			own.Add(d)
		}
	}
	if beside != nil {
		own.Add(beside)
	}
	set, differs := own.Differing(have)
	return l.published, set, differs
}

// Held is how many bytes the items count for, and how many there are.
func (l *Log) Held() (bytes int64, items int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes, len(l.entries) - l.gone.Len()
}

// Weight is what an item counts for, 0 when it is not there.
func (l *Log) Weight(key wire.Key) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[key]
	if e == nil || e.item == nil {
		return 0
	}
	return weight(key, e.item.Object)
}

// Keys are those of all items, in no order.
func (l *Log) Keys() []wire.Key {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]wire.Key, 0, len(l.entries))
	for key, e := range l.entries {
		if e.item != nil {
			out = append(out, key)
		}
	}
	return out
}

// kindSet is the kinds that an agent wants.
type kindSet uint64

func kindsOf(list []pb.NetworkKind) (out kindSet) {
	for _, k := range list {
		if _, known := pb.NetworkKind_name[int32(k)]; known && k > 0 && k < 64 {
			out |= 1 << k
		}
	}
	return out
}

func (s kindSet) has(k pb.NetworkKind) bool { return k >= 0 && k < 64 && s&(1<<k) != 0 }

// whole is the digest of all items of some kinds.
func (v *view) whole(kinds kindSet) (sum wire.Sum) {
	for kind, s := range v.wholes {
		if kinds.has(kind) {
			sum = sum.AddWhole(s)
		}
	}
	return sum
}

// span names a part of a view: what of some kinds changed after a position. In a list
// that is of some buckets alone, and what was removed is not in it.
type span struct {
	after uint64
	kinds kindSet
	list  bool
	set   wire.Set
}

// part is as much of a span as one batch takes.
type part struct {
	items []*pb.NetworkItem
	gone  []*pb.NetworkKey
	size  int
	last  uint64 // the position after it
	end   bool   // of the view
}

// maxShared bounds the parts that a view keeps for the next stream that comes to the
// same position.
const maxShared = 4096

// next is the first part of a span. It is shared and must not be changed.
func (v *view) next(at span) part {
	v.mu.Lock()
	defer v.mu.Unlock()
	if p, ok := v.shared[at]; ok {
		return p
	}
	p := part{last: v.sequence, end: true}
	after := at.after
	v.order.Ascend(after+1, func(sequence uint64, e *entry) bool {
		if !at.kinds.has(e.key.Kind) || at.list && (e.item == nil || !at.set.Has(e.bucket)) {
			return true
		}
		if p.size > 0 && p.size+e.size() > wire.MaxBatch {
			p.last, p.end = after, false
			return false
		}
		p.size += e.size()
		after = sequence
		if e.item == nil {
			p.gone = append(p.gone, e.key.Proto())
		} else {
			p.items = append(p.items, e.item)
		}
		return true
	})
	if len(v.shared) < maxShared {
		v.shared[at] = p
	}
	return p
}
