package consensus

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// killedEnv makes the test binary a replica that writes until it is killed, in that folder.
const killedEnv = "TIMONEL_TEST_WRITES_IN"

// TestKilledOnAFullDisk kills a replica again and again while it writes, on a real disk
// that fills up and gets room again, at any time, also at a start. What it acknowledged is
// there afterwards. It starts, or says that there is no room.
func TestKilledOnAFullDisk(t *testing.T) {
	t.Parallel()
	if dir := os.Getenv(killedEnv); dir != "" {
		writeUntilKilled(t, dir)
		return
	}
	needs.Root(t, "mounts a small file system")
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=48m"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	ballast := filepath.Join(dir, "ballast")
	random := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	acked, told := 0, 0 // the last number that was acknowledged; how often it said that there is no room
	for life := range lessRaced(16) {
		full := life%2 == 1
		if full && life%4 == 3 { // before the start, the next time while it writes
			fill(t, ballast)
		}
		last, err := oneLife(t, filepath.Join(dir, "c1"), acked, time.Duration(random.IntN(700))*time.Millisecond, func() {
			if full && life%4 == 1 {
				fill(t, ballast)
			}
		})
		switch {
		case err == nil:
			acked = last
		case full && strings.Contains(err.Error(), "no space left on device") && strings.Contains(err.Error(), "do not remove it"):
			told++
		default:
			t.Fatalf("life %d, after %d writes: %v", life, acked, err)
		}
		if err := os.Remove(ballast); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	t.Logf("%d writes were acknowledged; at %d starts there was no room", acked, told)
	if acked == 0 {
		t.Error("nothing was ever acknowledged")
	}
}

// oneLife starts the replica, checks that it has all that was acknowledged, and kills it
// some time after it began to write. It returns the last number that it acknowledged.
func oneLife(t *testing.T, dir string, acked int, lasts time.Duration, begun func()) (int, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run", "^TestKilledOnAFullDisk$")
	cmd.Env = append(os.Environ(), killedEnv+"="+dir, "TMPDIR="+t.TempDir()) // it removes nothing
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	has := -1
	var said []string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		what, number, _ := strings.Cut(lines.Text(), " ")
		n, _ := strconv.Atoi(number)
		switch what {
		case "has":
			if n < acked {
				_ = cmd.Process.Kill()
				return 0, fmt.Errorf("it has the writes up to %d, of %d that were acknowledged", n, acked)
			}
			has, acked = n, n
			begun()
			defer time.AfterFunc(lasts, func() { _ = cmd.Process.Kill() }).Stop()
		case "acked":
			acked = n
		default:
			said = append(said, lines.Text())
		}
	}
	if has < 0 {
		return 0, fmt.Errorf("it did not start: %s", strings.Join(said, "\n"))
	}
	return acked, nil
}

// writeUntilKilled writes one number after the other, each a few kilobytes, and says which
// it has found and which were acknowledged.
func writeUntilKilled(t *testing.T, dir string) {
	c := newCluster(t, 1)
	c.dir = filepath.Dir(dir)
	c.tune = func(cfg *Config) {
		cfg.SnapshotThreshold, cfg.TrailingLogs, cfg.SnapshotInterval = 200, 50, 20*time.Millisecond
	}
	n, err := c.tryStart(filepath.Base(dir))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for n.ReadBarrier(context.Background()) != nil { // until it leads
		time.Sleep(time.Millisecond)
	}
	number, _, _ := strings.Cut(n.fsm.get("last"), " ")
	last, _ := strconv.Atoi(number)
	fmt.Println("has", last)
	for i := last + 1; ; {
		if _, err := n.Apply(context.Background(), fmt.Appendf(nil, "last=%d %04000d", i, i)); err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		fmt.Println("acked", i)
		i++
	}
}
