//go:build !race

package consensus

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/hashicorp/raft"

	"timonel/test/medium"
)

// The log file goes on after a commit that failed, wherever it did, and the power is cut
// in one of the commits that follow. All that was written before is there. (bbolt alone
// goes on from a meta page that the disk may not have, and overwrites what the one before
// refers to.) It starts no goroutine, and the race detector would make four minutes of it.
func TestBoltGoesOnAfterAFailedCommit(t *testing.T) {
	t.Parallel()
	// A commit here is some six writes and syncs: each of them fails, and each of those of
	// the next two commits is the last.
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 0))
		fails, cut := 1+int(seed)%7, 1+int(seed)/7%12
		device := medium.New(random)
		device.Off = errPowerCut
		open := func() (*boltLog, *medium.BoltFile) {
			file, err := device.OpenBolt("raft.db")
			must(t, err)
			store, err := openLog(file.Path, logExtent{}, testLog(t))
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			store.settle = file.Attach(store.BoltStore)
			return store, file
		}
		var logs []*raft.Log
		write := func(s *boltLog) error {
			for range 3 { // over more than one page, some of which split
				logs = append(logs, &raft.Log{Index: uint64(len(logs) + 1), Term: 1, Type: raft.LogNoop, Data: make([]byte, 500)})
			}
			return s.StoreLogs(logs[len(logs)-3:])
		}
		store, file := open()
		for range 20 {
			must(t, write(store))
		}
		device.FailAt(fails)
		failed := write(store)
		for failed == nil {
			failed = write(store)
		}
		acknowledged := len(logs) - 3
		logs = logs[:acknowledged] // it is tried again, as Raft does
		device.CutIn(cut)
		for {
			err := write(store)
			if errors.Is(err, errPowerCut) {
				break
			}
			must(t, err)
			acknowledged = len(logs)
		}
		must(t, store.Close())
		must(t, file.Remove())

		store, file = open()
		err := guard(func() error {
			last, err := store.LastIndex()
			if err == nil && (last < uint64(acknowledged) || last > uint64(len(logs))) {
				err = fmt.Errorf("the log ends at entry %d, must at %d to %d", last, acknowledged, len(logs))
			}
			return errors.Join(err, sameLog(store, logs[:min(last, uint64(len(logs)))]))
		})
		if err != nil {
			t.Errorf("seed %d: after %q at write %d and a power cut: %v", seed, failed, fails, err)
		}
		must(t, store.Close())
		must(t, file.Remove())
	}
}
