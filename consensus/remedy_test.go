package consensus

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// Nobody is told to remove data that is whole.
func TestRemedy(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		err     error
		want    string
		damaged bool
	}{
		{&fs.PathError{Op: "write", Path: "raft.db", Err: syscall.ENOSPC}, "make room on the file system of /data", false},
		{&fs.PathError{Op: "write", Path: "raft.db", Err: syscall.EDQUOT}, "make room on the file system of /data", false},
		{&fs.PathError{Op: "open", Path: "raft.db", Err: syscall.EROFS}, "writable", false},
		{&fs.PathError{Op: "open", Path: "raft.db", Err: syscall.EACCES}, "let this process read and write", false},
		{&fs.PathError{Op: "open", Path: "raft.db", Err: syscall.EMFILE}, "give this process", false},
		{errors.New("entry 7: the checksum does not match"), "remove /data and start again", true},
		{fmt.Errorf("%w: a page", errDamaged), "remove /data and start again", true},
		{&fs.PathError{Op: "read", Path: "raft.db", Err: syscall.EIO}, "remove /data and start again", true},
	} {
		r := &Replica{cfg: Config{DataDir: "/data"}}
		got := r.damage("/data/raft.db", fmt.Errorf("open: %w", x.err)).Error()
		if !strings.HasPrefix(got, "/data/raft.db: open: "+x.err.Error()+": ") || !strings.Contains(got, x.want) || strings.Contains(got, "do not remove it") == x.damaged {
			t.Errorf("of %v it says %q", x.err, got)
		}
	}
}

// A log that another process has open is not damaged.
func TestLogInUseIsNotDamaged(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1).startAll(1)
	c.leader().put(t, "a", "b")
	c.kill("c1")
	file := filepath.Join(c.dir, "c1", logFile)
	db, err := bbolt.Open(file, 0o600, nil)
	must(t, err)
	_, err = c.tryStart("c1")
	must(t, db.Close())
	if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "another process has the file open") || strings.Contains(err.Error(), "restore a backup") {
		t.Errorf("it says %v", err)
	}
	if got := c.start("c1"); got == nil {
		t.Error("it does not start afterwards")
	}
}

// A log that cannot be compacted, for want of room for as little as bbolt's first pages,
// serves as it is.
func TestFullDiskHasNoRoomToCompact(t *testing.T) {
	t.Parallel()
	needs.Root(t, "mounts a small file system")
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	file := filepath.Join(dir, logFile)
	store, err := openLog(file, logExtent{}, testLog(t))
	must(t, err)
	must(t, store.StoreLog(&raft.Log{Index: 1, Term: 1, Type: raft.LogNoop}))
	must(t, store.Close())
	fill(t, filepath.Join(dir, "ballast"))
	store, err = openLog(file, logExtent{size: compactAbove}, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	must(t, sameLog(store, []*raft.Log{{Index: 1, Term: 1}}))
	must(t, store.Close())
}
