package storage

import (
	"sync"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/runtime"

	"timonel/state"
)

// decoded is an object decoded from a stored value. While it is kept, the value's
// memo points at its self.
type decoded struct {
	self  any // the *decoded
	store *Store
	turn  atomic.Uint64 // of the cache when it was last used; 0 if never kept

	done atomic.Bool // obj or err is set
	once sync.Once
	obj  runtime.Object
	err  error

	selectable atomic.Pointer[attrs] // nil until a selector asked
	weight     atomic.Int64          // 0 until a list asked

	memo  *state.Memo
	size  int // of its encoding
	place int // in its generation; the cache's mu guards it
}

// inMemo returns what a memo holds, whatever storage it is of, or nil.
func inMemo(m *state.Memo) *decoded {
	if p := m.Load(); p != nil {
		d, _ := (*p).(*decoded)
		return d
	}
	return nil
}

// objectCache bounds the decoded objects that are kept in the memos of stored
// values, in two generations: what is used moves to the young one; when that is
// half of the limit, the old one is dropped. An object that is young is found
// without a lock.
type objectCache struct {
	limit int64
	turn  atomic.Uint64 // counts generations, from 1: the young objects have it, the old ones one less

	mu         sync.Mutex // all that follows, and what memos hold of this cache's objects
	young, old generation
	bytes      int64 // of young
	oldBytes   int64
}

// generation is the objects that were last used in the same turn.
type generation []*decoded

func (g *generation) add(d *decoded) {
	d.place = len(*g)
	*g = append(*g, d)
}

func (g *generation) remove(d *decoded) {
	end := len(*g) - 1
	last := (*g)[end]
	(*g)[d.place], last.place = last, d.place
	(*g)[end] = nil
	*g = (*g)[:end]
}

func newObjectCache(limit int64) *objectCache {
	c := &objectCache{limit: limit}
	c.turn.Store(1)
	return c
}

// entry finds an object, or makes an empty entry. With keep, it is kept and counts
// as used.
func (c *objectCache) entry(s *Store, kv *state.KV, keep bool) *decoded {
	memo := kv.Memo()
	if memo == nil {
		return &decoded{store: s}
	}
	d := inMemo(memo)
	if d != nil && d.store == s {
		if keep && d.turn.Load() != c.turn.Load() {
			c.renew(d)
		}
		return d
	}
	fresh := &decoded{store: s, memo: memo, size: len(kv.Value)}
	if !keep {
		return fresh
	}
	if d != nil {
		// A value that two storages read, such as a custom resource in two
		// versions, is kept for the last of them: if it were for the first, the
		// other would decode at every read until the first forgets it.
		d.store.caches.objects.forget(d)
	}
	return c.keep(fresh)
}

// keep puts an entry into its memo and returns it, or the one that was there first.
func (c *objectCache) keep(fresh *decoded) *decoded {
	c.mu.Lock()
	defer c.mu.Unlock()
	fresh.self = fresh
	if fresh.memo.CompareAndSwap(nil, &fresh.self) {
		c.join(fresh)
	} else if d := inMemo(fresh.memo); d != nil && d.store == fresh.store {
		return d
	}
	return fresh
}

// join puts an object into the young generation, and when that is big makes it the
// old one. c.mu is held.
func (c *objectCache) join(d *decoded) {
	turn := c.turn.Load()
	d.turn.Store(turn)
	c.young.add(d)
	if c.bytes += int64(d.size); c.bytes > c.limit/2 {
		c.nextTurn()
	}
}

// nextTurn drops the old generation and makes the young one old. c.mu is held.
func (c *objectCache) nextTurn() {
	for _, d := range c.old {
		d.memo.CompareAndSwap(&d.self, nil)
	}
	clear(c.old)
	c.young, c.old, c.bytes, c.oldBytes = c.old[:0], c.young, 0, c.bytes
	c.turn.Add(1)
}

// age drops what was not used since the last call but one.
func (c *objectCache) age() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nextTurn()
	if cap(c.young) > 2*len(c.old) { // of a time when there was much
		c.young = nil
	}
}

// held is the size of the encodings of the objects kept.
func (c *objectCache) held() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes + c.oldBytes
}

// renew moves an object that is used to the young generation, if it is still kept.
func (c *objectCache) renew(d *decoded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d.memo.Load() == &d.self && d.turn.Load() != c.turn.Load() {
		c.old.remove(d)
		c.oldBytes -= int64(d.size)
		c.join(d)
	}
}

// forget drops an object if it is kept.
func (c *objectCache) forget(d *decoded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leave(d)
}

// leave takes an object out of its memo and generation. c.mu is held.
func (c *objectCache) leave(d *decoded) {
	if d.memo == nil || !d.memo.CompareAndSwap(&d.self, nil) {
		return
	}
	if d.turn.Load() != c.turn.Load() {
		c.old.remove(d)
		c.oldBytes -= int64(d.size)
		return
	}
	c.young.remove(d)
	c.bytes -= int64(d.size)
}

// forgetStore drops all objects of a storage.
func (c *objectCache) forgetStore(s *Store) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range []*generation{&c.young, &c.old} {
		for i := len(*g) - 1; i >= 0; i-- { // from the end, as leave moves the last
			if d := (*g)[i]; d.store == s {
				c.leave(d)
			}
		}
	}
}
