package consensus

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Large entries make a snapshot due long before their number does, and few of them stay
// in the log after it; so it is after a restart.
func TestSnapshotsAreDueByBytes(t *testing.T) {
	t.Parallel()
	for _, kind := range logKinds {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 1)
			c.logStore = kind.name
			c.tune = func(cfg *Config) {
				cfg.SnapshotInterval, cfg.SnapshotBytes, cfg.TrailingBytes = 10*time.Millisecond, 8<<20, 3<<20
			}
			c.startAll(1)
			value := strings.Repeat("v", 1<<20)
			put := func(n int) {
				for range n {
					c.leader().put(t, "k", value)
				}
			}
			short := func(after uint64) {
				t.Helper()
				eventually(t, "a short log", func() error {
					s := c.leader().Status()
					if s.SnapshotIndex <= after || s.LastIndex-s.FirstIndex > 12 {
						return fmt.Errorf("a snapshot of %d and entries %d to %d", s.SnapshotIndex, s.FirstIndex, s.LastIndex)
					}
					return nil
				})
			}
			put(30)
			short(0)
			before := c.leader().Status()
			since := c.leader().sinceSnapshot(before.SnapshotIndex)
			c.kill("c1")
			c.start("c1")
			if held := c.leader().sinceSnapshot(before.SnapshotIndex); held < since-2*weightGrain || held > since+2*weightGrain {
				t.Errorf("%d bytes of entries since the snapshot after a start, %d before it", held, since)
			}
			put(9)
			short(before.SnapshotIndex)
			if size := sizeOf(t, filepath.Join(c.dir, "c1", kind.file)); size > 3*12<<20+2*walSegment {
				t.Errorf("the log takes %d bytes", size)
			}
			must(t, c.leader().ReadBarrier(context.Background()))
		})
	}
}

// The weights are those of the entries, to a grain and an entry, whatever is removed.
func TestWeights(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	const largest = 3 * weightGrain
	data := make([]byte, largest)
	var w weights
	var log []*raft.Log
	next := uint64(1)
	for step := range 2000 {
		switch n := random.IntN(12); {
		case n == 0 && len(log) > 20:
			k := random.IntN(20)
			log = log[:len(log)-k]
			next -= uint64(k)
			w.cut(next)
		case n == 1 && len(log) > 20:
			k := random.IntN(len(log) - 10)
			w.shorten(log[k].Index)
			log = log[k+1:]
		default:
			l := &raft.Log{Index: next, Data: data[:random.IntN(largest)>>random.IntN(20)]}
			next++
			log = append(log, l)
			w.add(l)
		}
		if len(log) == 0 {
			continue
		}
		// What was cut off within a grain still counts.
		const slack = 2*weightGrain + 2*largest
		sum := int64(0)
		from := w.newest(5 << 20)
		for i := len(log) - 1; i >= 0; i-- {
			if got := w.after(log[i].Index); got < sum || got > sum+slack {
				t.Fatalf("step %d: %d bytes after entry %d, it says %d", step, sum, log[i].Index, got)
			}
			sum += int64(len(log[i].Data)) + 64
			if log[i].Index == from && sum > 5<<20+slack {
				t.Fatalf("step %d: from %d on it takes %d bytes", step, from, sum)
			}
		}
		if from == 0 && sum > 5<<20 {
			t.Fatalf("step %d: all of it is %d bytes", step, sum)
		}
		if len(w.marks) > int((sum+slack)/weightGrain)+2 {
			t.Fatalf("step %d: %d marks for %d bytes", step, len(w.marks), sum)
		}
	}
}

// sizeOf is how many bytes a file has, or all files below a folder.
func sizeOf(t *testing.T, path string) (n int64) {
	t.Helper()
	must(t, filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return nil // a segment may go meanwhile
	}))
	return n
}
