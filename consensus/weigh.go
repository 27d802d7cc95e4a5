package consensus

import (
	"errors"
	"slices"
	"sort"
	"time"

	"github.com/hashicorp/raft"
)

// weights is how many bytes the log's entries take from which index on, to the grain.
type weights struct {
	total int64  // of all that were added, those removed at the start included
	marks []mark // ascending
}

// mark says how much was in the log before an entry.
type mark struct {
	index  uint64
	before int64
}

// weightGrain is about how many bytes of entries are between two marks.
const weightGrain = 256 << 10

// add adds entries at the end.
func (w *weights) add(logs ...*raft.Log) {
	for _, l := range logs {
		if n := len(w.marks); n == 0 || w.total-w.marks[n-1].before >= weightGrain {
			w.marks = append(w.marks, mark{l.Index, w.total})
		}
		w.total += int64(len(l.Data)+len(l.Extensions)) + 64
	}
}

// cut forgets the entries from an index on.
func (w *weights) cut(first uint64) {
	for n := len(w.marks); n > 0 && w.marks[n-1].index >= first; n-- {
		w.total = w.marks[n-1].before
		w.marks = w.marks[:n-1]
	}
}

// shorten forgets the entries up to an index.
func (w *weights) shorten(last uint64) {
	if i := w.at(last); i > 0 {
		w.marks = slices.Delete(w.marks, 0, i)
	}
}

// at is the place of the mark at or before an index, 0 if there is none.
func (w *weights) at(index uint64) int {
	return max(0, sort.Search(len(w.marks), func(i int) bool { return w.marks[i].index > index })-1)
}

// after is how many bytes the entries after an index take, or somewhat more.
func (w *weights) after(index uint64) int64 {
	if len(w.marks) == 0 {
		return 0
	}
	return w.total - w.marks[w.at(index+1)].before
}

// newest is the index from which on the log takes so many bytes at most; 0 when all of
// it does, and the last known one when not even that is little enough.
func (w *weights) newest(bytes int64) uint64 {
	i := sort.Search(len(w.marks), func(i int) bool { return w.total-w.marks[i].before <= bytes })
	switch {
	case i == 0:
		return 0
	case i == len(w.marks):
		i--
	}
	return w.marks[i].index
}

// weigh looks at the log's weights, or changes them.
func (d *disk) weigh(f func(*weights)) {
	d.weighing.Lock()
	defer d.weighing.Unlock()
	f(&d.weights)
}

// keepLogShort takes a snapshot when the entries since the last one take
// Config.SnapshotBytes: Raft counts entries, and looks once a minute or two. They take
// as much as that snapshot did as well, lest a large state is written all the time.
func (r *Replica) keepLogShort() {
	tick := time.NewTicker(min(r.cfg.SnapshotInterval, time.Second))
	defer tick.Stop()
	var after time.Time
	for {
		select {
		case <-tick.C:
		case <-r.ctx.Done():
			return
		}
		node := r.node.Load()
		if node == nil || time.Now().Before(after) || !r.snapshotDue() {
			continue
		}
		// Raft says why it failed.
		if err := node.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
			after = time.Now().Add(r.cfg.SnapshotInterval)
		}
	}
}

func (r *Replica) snapshotDue() bool {
	if r.sinceSnapshot(0) < r.cfg.SnapshotBytes { // the whole log
		return false
	}
	index, size := uint64(0), int64(0)
	if list, err := r.snapshots.List(); err != nil {
		return false
	} else if len(list) > 0 {
		index, size = list[0].Index, list[0].Size
	}
	return r.sinceSnapshot(index) >= max(r.cfg.SnapshotBytes, size)
}

// sinceSnapshot is how many bytes the entries after an index take.
func (r *Replica) sinceSnapshot(index uint64) (bytes int64) {
	r.disk.weigh(func(w *weights) { bytes = w.after(index) })
	return bytes
}

// boundTrailing has Raft keep so few entries after a snapshot that they take no more
// than Config.TrailingBytes. It is called when one is on disk, before Raft shortens the
// log.
func (r *Replica) boundTrailing() {
	node := r.node.Load()
	last, err := r.disk.LastIndex()
	if node == nil || err != nil {
		return
	}
	keep := r.cfg.TrailingLogs
	r.disk.weigh(func(w *weights) {
		if from := w.newest(r.cfg.TrailingBytes); from != 0 {
			keep = min(keep, last-min(last, from)+1)
		}
	})
	if c := node.ReloadableConfig(); c.TrailingLogs != keep {
		c.TrailingLogs = keep
		if err := node.ReloadConfig(c); err != nil {
			r.log.Warn("cannot bound the log's size", "error", err)
		}
	}
}
