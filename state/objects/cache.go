package objects

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/tidwall/btree"
	"golang.org/x/time/rate"

	"timonel/state"
)

// A snapshot is published for each change until there are more than publishBurst in a
// row, then publishRate in a second: each copies parts of the trees, and wakes all who
// wait for it, so that under load many changes share one.
const publishRate, publishBurst = rate.Limit(200), 32

// changesKept is how many changes Changes can look back, changesBytes how much of
// what they replaced, by the size of its encoding: decoded it takes some four times
// that. Who knows an older snapshot is answered with Reset.
const (
	changesKept  = 16384
	changesBytes = 16 << 20
)

// Cache follows a store and decodes what is in it.
type Cache struct {
	store  *state.Store
	kinds  map[string]kind
	prefix string
	log    *slog.Logger

	// Run alone writes these.
	metas *metaTree
	indexes
	undecodable map[string]bool // keys of objects that could not be decoded, so that each is logged once

	mu       sync.Mutex
	snapshot *Snapshot
	moved    chan struct{} // closed when there is a newer snapshot
	changes  []Changed     // the last changes, ascending revisions
	replaced int64         // bytes of what changes replaced
	since    int64         // revision after which changes holds all
	gaps     []gap         // where they do not, ascending
}

// gap is where the state was read whole instead of followed: what was deleted
// within is known only to who saw the snapshot at from.
type gap struct{ from, to int64 }

// gapsKept bounds how many gaps are told from what is not known any more.
const gapsKept = 64

// Option changes how a Cache works.
type Option func(*Cache)

// WithLogger sets where objects that cannot be decoded are reported. Default
// slog.Default().
func WithLogger(log *slog.Logger) Option { return func(c *Cache) { c.log = log } }

// WithPrefix sets the prefix of all objects' keys. Default [DefaultPrefix].
func WithPrefix(prefix string) Option { return func(c *Cache) { c.prefix = prefix } }

// NewCache returns a cache of the store's objects. Its snapshot is empty at
// revision 0 until Run has filled it.
func NewCache(store *state.Store, options ...Option) *Cache {
	c := &Cache{store: store, kinds: typedKinds(), prefix: DefaultPrefix, log: slog.Default(), moved: make(chan struct{})}
	for _, o := range options {
		o(c)
	}
	c.clear()
	c.snapshot = c.freeze(0)
	return c
}

func (c *Cache) clear() {
	c.metas = newTree()
	c.indexes = newIndexes()
	c.undecodable = map[string]bool{}
}

func newTree() *metaTree { return btree.NewMap[string, *Meta](16) }

// rank is the number of keys less than key.
func rank(tree *metaTree, key string) int {
	return sort.Search(tree.Len(), func(i int) bool {
		k, _, _ := tree.GetAt(i)
		return k >= key
	})
}

// freeze returns a snapshot of the trees as they are.
func (c *Cache) freeze(revision int64) *Snapshot {
	return &Snapshot{
		revision: revision, prefix: c.prefix, metas: c.metas.Copy(),
		indexes: c.indexes.copy(),
	}
}

// Snapshot returns the newest snapshot. It costs nothing.
func (c *Cache) Snapshot() *Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.snapshot
}

// WaitRevision returns when the snapshot has reached revision, or ctx's error.
func (c *Cache) WaitRevision(ctx context.Context, revision int64) error {
	for {
		c.mu.Lock()
		reached, moved := c.snapshot.revision >= revision, c.moved
		c.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("wait for objects at revision %d: %w", revision, ctx.Err())
		}
	}
}

// Changed is an object that was created (Old is nil), changed or deleted (New is
// nil).
type Changed struct {
	Old, New *Meta
	Revision int64
}

// replaced is the size of what only the change still holds.
func (c Changed) replaced() int64 {
	if c.Old == nil {
		return 0
	}
	return int64(c.Old.size)
}

// Meta is the object as it is, or as it was if it is deleted.
func (c Changed) Meta() *Meta {
	if c.New != nil {
		return c.New
	}
	return c.Old
}

// Changes is what happened between two snapshots.
type Changes struct {
	// Snapshot is the newer of the two.
	Snapshot *Snapshot
	// Changed are the changes in order, empty if Reset is set.
	Changed []Changed
	// Reset says that the changes are not known any more: anything may have.
	Reset bool
}

// Changes returns what changed after a revision, which is that of the snapshot
// the caller knows, 0 for none. It waits until there is something, or returns
// ctx's error. A revision that no snapshot of this cache had, before it was filled
// or while it read everything again, is answered with Reset: objects that were
// deleted since are not known.
func (c *Cache) Changes(ctx context.Context, after int64) (Changes, error) {
	for {
		c.mu.Lock()
		changes, moved := c.changesAfter(after), c.moved
		c.mu.Unlock()
		if changes.Reset || len(changes.Changed) > 0 {
			return changes, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return Changes{}, ctx.Err()
		}
	}
}

// ChangesNow is Changes without the wait: when there is nothing, it says so by the
// newest snapshot alone.
func (c *Cache) ChangesNow(after int64) Changes {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changesAfter(after)
}

// changesAfter is what is known to have changed after a revision. c.mu is held.
func (c *Cache) changesAfter(after int64) Changes {
	s := c.snapshot
	if s.revision == 0 || s.revision == after {
		return Changes{Snapshot: s}
	}
	if after < c.since || after > s.revision || c.inGap(after) {
		return Changes{Snapshot: s, Reset: true}
	}
	i := sort.Search(len(c.changes), func(i int) bool { return c.changes[i].Revision > after })
	return Changes{Snapshot: s, Changed: append([]Changed(nil), c.changes[i:]...)}
}

// Trim forgets the oldest changes until what the others replaced is of that many bytes
// at most. Who knows an older snapshot is answered with Reset.
func (c *Cache) Trim(replaced int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forget(replaced)
	c.changes = slices.Clone(c.changes) // the array was as large as it ever had to be
}

// forget drops the oldest changes, of which there are too many or that replaced too
// much. c.mu is held.
func (c *Cache) forget(replaced int64) {
	over := 0
	for len(c.changes)-over > changesKept || c.replaced > replaced {
		c.replaced -= c.changes[over].replaced()
		over++
	}
	if over > 0 {
		c.since = c.changes[over-1].Revision
		clear(c.changes[:over])
		c.changes = c.changes[over:]
	}
}

// inGap says whether a revision lies strictly within a gap. c.mu is held.
func (c *Cache) inGap(revision int64) bool {
	for _, g := range c.gaps {
		if g.from < revision && revision < g.to {
			return true
		}
	}
	return false
}

// publish makes the trees the newest snapshot. whole says that they were read
// from a view instead of following what led to it.
func (c *Cache) publish(revision int64, changed []Changed, whole bool) {
	s := c.freeze(revision)
	c.mu.Lock()
	defer c.mu.Unlock()
	if revision < c.snapshot.revision { // an older state was installed
		c.changes, c.replaced, c.since, c.gaps = nil, 0, revision, nil
	} else {
		if whole && revision > c.snapshot.revision+1 {
			c.gaps = append(c.gaps, gap{c.snapshot.revision, revision})
		}
		c.changes = append(c.changes, changed...)
		for i := range changed {
			c.replaced += changed[i].replaced()
		}
		c.forget(changesBytes)
		if len(c.gaps) > gapsKept {
			c.since = max(c.since, c.gaps[0].to)
		}
		for len(c.gaps) > 0 && c.gaps[0].to <= c.since {
			c.gaps = c.gaps[1:]
		}
	}
	c.snapshot = s
	close(c.moved)
	c.moved = make(chan struct{})
}

// Run fills the cache and keeps it up to date until ctx ends, whose error it
// returns.
func (c *Cache) Run(ctx context.Context) error {
	for {
		err := c.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, state.ErrCompacted) {
			return err
		}
		c.log.Info("object cache fell behind the history, reading everything again")
	}
}

// follow loads the newest view and applies events until it falls behind.
func (c *Cache) follow(ctx context.Context) error {
	view := c.store.View()
	// All keys, as the snapshot's revision has to follow changes of others too:
	// whoever waits for a revision knows only the state's.
	w, err := c.store.Watch("", view.Revision())
	if err != nil {
		return err
	}
	defer w.Close()
	c.publish(view.Revision(), c.load(view), true)
	pace := rate.NewLimiter(publishRate, publishBurst)
	for {
		if err := pace.Wait(ctx); err != nil {
			return err
		}
		events, err := w.Next(ctx)
		if err != nil {
			return err
		}
		changed := make([]Changed, 0, len(events))
		for _, e := range events {
			if !strings.HasPrefix(e.KV.Key, c.prefix) {
				continue
			}
			if ch := c.apply(e.KV.Key, &e.KV, e.Type == state.Delete); ch.Old != nil || ch.New != nil {
				ch.Revision = e.Revision
				changed = append(changed, ch)
			}
		}
		c.publish(w.Progress(), changed, false)
	}
}

// load makes the trees equal to the view and returns what that changed. The
// changes' revisions are the view's: it is not known when they happened.
func (c *Cache) load(view state.View) []Changed {
	var changed []Changed
	note := func(ch Changed) {
		if ch.Old != nil || ch.New != nil {
			ch.Revision = view.Revision()
			changed = append(changed, ch)
		}
	}
	var gone []string
	c.metas.Scan(func(key string, m *Meta) bool {
		if _, ok := view.Get(key); !ok {
			gone = append(gone, key)
		}
		return true
	})
	for _, key := range gone {
		note(c.apply(key, nil, true))
	}
	for kv := range view.Range(c.prefix, "") {
		if m, ok := c.metas.Get(kv.Key); !ok || m.Revision != kv.ModRevision {
			note(c.apply(kv.Key, &kv, false))
		}
	}
	return changed
}

// apply puts or deletes one key.
func (c *Cache) apply(key string, kv *state.KV, deleted bool) Changed {
	var ch Changed
	if old, ok := c.metas.Get(key); ok {
		ch.Old = old
	}
	if !deleted {
		m, err := decode(kv, c.kinds[resourceOf(strings.TrimPrefix(key, c.prefix))])
		if err == nil {
			ch.New = m
			delete(c.undecodable, key)
		} else if !c.undecodable[key] {
			c.undecodable[key] = true
			c.log.Warn("object cannot be decoded and is ignored", "key", key, "err", err)
		}
	} else {
		delete(c.undecodable, key)
	}
	if ch.Old != nil {
		c.unindex(ch.Old)
		if ch.New == nil {
			c.metas.Delete(key)
		}
	}
	if ch.New != nil {
		c.metas.Set(key, ch.New)
		c.index(ch.New)
	}
	return ch
}
