package consensus

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// Snapshots that a full disk has no room for leave the room that there was to the log,
// whether it ends in the state, its last bytes or at the beginning; and one that another
// goroutine writes meanwhile is left alone.
func TestFullDiskKeepsNothingOfASnapshot(t *testing.T) {
	t.Parallel()
	needs.Root(t, "mounts a small file system")
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() {
		eventually(t, "nothing to be open", func() error {
			runtime.GC() // Raft's store leaves files open
			return unix.Unmount(dir, 0)
		})
	})
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, 2, newRaftLog(testLog(t)))
	must(t, err)
	store := &snapshotStore{SnapshotStore: files, dir: filepath.Join(dir, snapshotDir)}
	_, transport := raft.NewInmemTransport("c1")
	defer transport.Close()
	create := func(index uint64) (raft.SnapshotSink, error) {
		return store.Create(raft.SnapshotVersionMax, index, 1, raft.Configuration{}, 1, transport)
	}
	room := func() uint64 {
		var s unix.Statfs_t
		must(t, unix.Statfs(dir, &s))
		return s.Bfree * uint64(s.Bsize)
	}
	other, err := create(1)
	must(t, err)
	_, err = other.Write(make([]byte, 100_000))
	must(t, err)
	before := room()
	for i := range uint64(5) {
		sink, err := create(10 + i)
		must(t, err)
		for err == nil {
			_, err = sink.Write(make([]byte, 64<<10))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		if i%2 == 0 {
			_ = sink.Cancel() // it says that the disk is full, too
		} else if err := sink.Close(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("closed with %v", err)
		}
		if left, err := filepath.Glob(filepath.Join(dir, snapshotDir, "*")); err != nil || len(left) != 1 {
			t.Errorf("beside the other one there is %q (%v)", left, err)
		}
		if room() < before-8192 {
			t.Errorf("%d bytes are free after one that did not fit, %d were before", room(), before)
		}
	}
	must(t, other.Close())

	fill(t, filepath.Join(dir, "ballast"))
	for i := range uint64(5) {
		if sink, err := create(20 + i); err == nil {
			t.Fatalf("a full disk takes %s", sink.ID())
		}
	}
	must(t, os.Remove(filepath.Join(dir, "ballast")))
	sink, err := create(30)
	must(t, err)
	must(t, sink.Close())
	list, err := store.List()
	if err != nil || len(list) != 2 || list[0].Index != 30 || list[1].Index != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, snapshotDir, "*")); err != nil || len(left) != 2 {
		t.Errorf("there is %q (%v)", left, err)
	}
}

// What was left by a process that was killed while it compacted its log, or took a
// snapshot, is gone after the next start.
func TestLeftoversOfAKilledProcessGo(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1).startAll(1)
	c.leader().put(t, "a", "b")
	c.kill("c1")
	dir := filepath.Join(c.dir, "c1")
	left := []string{filepath.Join(dir, logFile+compactSuffix), filepath.Join(dir, snapshotDir, "1-2-3"+partial, stateFile)}
	for _, file := range left {
		must(t, os.MkdirAll(filepath.Dir(file), 0o700))
		must(t, os.WriteFile(file, make([]byte, 1<<20), 0o600))
	}
	n := c.start("c1")
	for _, file := range left {
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", file, err)
		}
	}
	if got := n.fsm.get("a"); got != "" && got != "b" {
		t.Errorf("a is %q", got)
	}
}
