package consensus

import (
	"math"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// maxQueued is from how many entries on an append to the queue waits for the disk,
// maxWrite how many of them share one write. So do a quarter of its bytes at most, or one
// entry.
const (
	maxQueued = 4096
	maxWrite  = 1024
)

// queue is the end of a leader's log that is not on disk yet. One goroutine adds and
// flushes, Raft's; another writes; all may read.
type queue struct {
	stop  <-chan struct{} // the replica closes
	limit int64           // from how many bytes on an append waits

	// first is the index of the first entry, 0 when there is none.
	first atomic.Uint64

	mu      sync.Mutex
	logs    []*raft.Log   // consecutive
	bytes   int64         // of them
	err     error         // of the last write, nil when it succeeded
	changed chan struct{} // closed and renewed with every change
}

func newQueue(stop <-chan struct{}) queue {
	return queue{stop: stop, limit: defaultQueueBytes, changed: make(chan struct{})}
}

// update changes the queue and wakes all who wait.
func (q *queue) update(f func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f()
	if len(q.logs) == 0 {
		q.first.Store(0)
	} else {
		q.first.Store(q.logs[0].Index)
	}
	close(q.changed)
	q.changed = make(chan struct{})
}

// await waits until f is true of the queue; false when the replica closes first.
func (q *queue) await(f func() bool) bool {
	for {
		q.mu.Lock()
		is, changed := f(), q.changed
		q.mu.Unlock()
		if is {
			return true
		}
		select {
		case <-changed:
		case <-q.stop:
			return false
		}
	}
}

// add queues entries that follow those in the queue or on disk. It fails, and takes
// none, when the last write did.
func (q *queue) add(logs []*raft.Log) error {
	var err error
	if !q.await(func() bool {
		err = q.err
		return err != nil || len(q.logs) < maxQueued && q.bytes < q.limit
	}) {
		return ErrClosed
	}
	if err == nil {
		q.update(func() {
			q.logs = append(q.logs, logs...)
			for _, l := range logs {
				q.bytes += inMemory(l)
			}
		})
	}
	return err
}

// flush waits until all is on disk. It fails when the disk does, or the replica
// closes.
func (q *queue) flush() error {
	if q.first.Load() == 0 {
		return nil
	}
	var err error
	if !q.await(func() bool {
		if err = q.err; len(q.logs) == 0 {
			err = nil
		}
		return err != nil || len(q.logs) == 0
	}) {
		return ErrClosed
	}
	return err
}

// next waits for entries to write; nil when the replica closes.
func (q *queue) next() (logs []*raft.Log) {
	if !q.await(func() bool {
		n, bytes := 0, int64(0)
		for ; n < min(len(q.logs), maxWrite); n++ {
			if bytes += inMemory(q.logs[n]); n > 0 && bytes > q.limit/4 {
				break
			}
		}
		logs = q.logs[:n]
		return n > 0
	}) {
		return nil
	}
	return logs
}

// wrote is told what became of what next returned.
func (q *queue) wrote(logs []*raft.Log, err error) {
	q.update(func() {
		if q.err = err; err == nil {
			for i, l := range logs {
				q.bytes -= inMemory(l)
				q.logs[i] = nil // the array stays until append needs a larger one
			}
			q.logs = q.logs[len(logs):]
		}
	})
}

// held is how many bytes are in the queue.
func (q *queue) held() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes
}

// failure is the error of the last write while entries wait for another.
func (q *queue) failure() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// durable is the last index that is on disk for certain, if the log is that long.
func (q *queue) durable() uint64 {
	if first := q.first.Load(); first != 0 {
		return first - 1
	}
	return math.MaxUint64
}

// awaitDurable waits until the entry is on disk; false when the replica closes
// first.
func (q *queue) awaitDurable(index uint64) bool {
	return q.durable() >= index || q.await(func() bool { return q.durable() >= index })
}

// extent is the first and the last index in the queue; zeros when it is empty.
func (q *queue) extent() (first, last uint64) {
	if q.first.Load() == 0 {
		return 0, 0
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.logs) == 0 {
		return 0, 0
	}
	return q.logs[0].Index, q.logs[len(q.logs)-1].Index
}

// get copies an entry of the queue.
func (q *queue) get(index uint64, l *raft.Log) bool {
	if first := q.first.Load(); first == 0 || index < first {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.logs) == 0 || index < q.logs[0].Index || index > q.logs[len(q.logs)-1].Index {
		return false
	}
	*l = *q.logs[index-q.logs[0].Index]
	return true
}
