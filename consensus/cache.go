package consensus

import (
	"sync"

	"github.com/hashicorp/raft"
)

// besideData is about what an entry takes in memory beside its data.
const besideData = 256

// inMemory is about how many bytes an entry takes.
func inMemory(l *raft.Log) int64 {
	return int64(cap(l.Data)+cap(l.Extensions)) + besideData
}

// logCache is a log store with the newest entries in memory, as raft.LogCache, which
// keeps a number of entries of any size: this one keeps so many bytes of them at most.
type logCache struct {
	raft.LogStore
	limit int64

	mu          sync.RWMutex
	ring        []*raft.Log // by index modulo its length
	first, last uint64      // what is held, without gaps; zeros for nothing
	bytes       int64       // of it
}

func newLogCache(store raft.LogStore, entries int, bytes int64) *logCache {
	return &logCache{LogStore: store, limit: bytes, ring: make([]*raft.Log, max(entries, 1))}
}

// GetLog implements raft.LogStore.
func (c *logCache) GetLog(index uint64, l *raft.Log) error {
	if held := c.get(index); held != nil {
		*l = *held
		return nil
	}
	return c.LogStore.GetLog(index, l)
}

func (c *logCache) get(index uint64) *raft.Log {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if index < c.first || index > c.last || c.last == 0 {
		return nil
	}
	return *c.slot(index)
}

func (c *logCache) slot(index uint64) **raft.Log { return &c.ring[index%uint64(len(c.ring))] }

// StoreLog implements raft.LogStore.
func (c *logCache) StoreLog(l *raft.Log) error { return c.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (c *logCache) StoreLogs(logs []*raft.Log) error {
	if err := c.LogStore.StoreLogs(logs); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range logs {
		if c.last == 0 || l.Index != c.last+1 {
			c.drop(c.first, c.last)
			c.first = l.Index
		}
		if l.Index-c.first >= uint64(len(c.ring)) {
			c.drop(c.first, c.first)
		}
		if c.last == 0 { // all of a ring of one went
			c.first = l.Index
		}
		*c.slot(l.Index), c.last = l, l.Index
		c.bytes += inMemory(l)
		for c.bytes > c.limit {
			c.drop(c.first, c.first)
		}
	}
	return nil
}

// drop forgets what is held from first to last, which begins or ends there.
func (c *logCache) drop(first, last uint64) {
	if c.last == 0 {
		return
	}
	for i := first; i <= last; i++ {
		at := c.slot(i)
		c.bytes -= inMemory(*at)
		*at = nil
	}
	switch {
	case first == c.first && last == c.last:
		c.first, c.last = 0, 0
	case first == c.first:
		c.first = last + 1
	default:
		c.last = first - 1
	}
}

// DeleteRange implements raft.LogStore.
func (c *logCache) DeleteRange(first, last uint64) error {
	c.mu.Lock()
	if c.last != 0 && first <= c.last && last >= c.first {
		from, to := max(first, c.first), min(last, c.last)
		if from != c.first {
			to = c.last // what is held has no gaps
		}
		c.drop(from, to)
	}
	c.mu.Unlock()
	return c.LogStore.DeleteRange(first, last)
}

// trim forgets the oldest entries until that many bytes are left at most.
func (c *logCache) trim(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.bytes > bytes {
		c.drop(c.first, c.first)
	}
}

// held is how many bytes the cache holds.
func (c *logCache) held() int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.bytes
}
