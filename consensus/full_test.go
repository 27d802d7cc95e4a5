package consensus

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// A replica whose disk is full, a real one, says so and leaves the log to the
// others; what was acknowledged stays, and when there is room it catches up.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	needs.Root(t, "mounts a small file system")
	for _, kind := range logKinds {
		for _, role := range []string{"follower", "leader"} {
			t.Run(kind.name+" "+role, func(t *testing.T) {
				t.Parallel()
				testFullDisk(t, kind.name, role)
			})
		}
	}
}

func testFullDisk(t *testing.T, logStore, role string) {
	c := newCluster(t, 3)
	c.logStore = logStore
	dir := filepath.Join(c.dir, "c1")
	must(t, os.Mkdir(dir, 0o700))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=160m"))
	t.Cleanup(func() {
		c.kill("c1")
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	c.startAll(3)
	acked := map[string]string{}
	write := func(n *node, k string) error {
		v := strings.Repeat(k, 4000/len(k))
		_, err := n.Apply(context.Background(), []byte(k+"="+v))
		if err == nil {
			acked[k] = v
		}
		return err
	}
	for i := range 20 {
		must(t, write(c.leader(), fmt.Sprintf("before-%02d", i)))
	}
	lead := c.node("c1")
	if role == "follower" {
		lead = c.node("c2")
	}
	eventually(t, "the right one to lead", func() error {
		if c.leader() == lead {
			return nil
		}
		_ = c.leader().TransferLeadership(lead.cfg.ID)
		return errors.New("another leads")
	})

	ballast := filepath.Join(dir, "ballast")
	fill(t, ballast)
	victim, other := c.node("c1"), c.node("c3")
	// The room in the log's own file comes first.
	for i := 0; victim.DiskErr() == nil; i++ {
		if i > 2000 {
			t.Fatal("the disk never fills up")
		}
		_, _ = other.Apply(context.Background(), fmt.Appendf(nil, "filling=%0200000d", i))
	}
	if err := victim.DiskErr(); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), dir) {
		t.Errorf("it says %v", err)
	}
	eventually(t, "the others to go on", func() error { return write(other, "others") })
	eventually(t, "another to lead", func() error {
		if l, _, ok := other.Replica.Leader(); !ok || l == "c1" {
			return fmt.Errorf("%q", l)
		}
		return nil
	})
	for i := range 20 {
		must(t, write(other, fmt.Sprintf("during-%d", i)))
	}

	must(t, os.Remove(ballast))
	must(t, write(other, "room"))
	eventually(t, "it to catch up", func() error {
		if got := victim.fsm.get("room"); got != acked["room"] {
			return errors.New("it lags")
		}
		return victim.DiskErr()
	})
	for k, v := range acked {
		for _, n := range []*node{victim, other} {
			if n.fsm.get(k) != v {
				t.Fatalf("%s: %s was acknowledged and is not there", n.cfg.ID, k)
			}
		}
	}
}

// fill makes a file of all the room that there is.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	for chunk := make([]byte, 1<<20); len(chunk) > 0; {
		_, err := f.Write(chunk)
		if errors.Is(err, syscall.ENOSPC) {
			chunk = chunk[:len(chunk)/2]
			continue
		}
		must(t, err)
	}
}
