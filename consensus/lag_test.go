//go:build !race

package consensus

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// A follower that was away while 200 MiB were written catches up over a link that takes
// longer for these than a message may. (The race detector makes minutes of it.)
func TestAFollowerFarBehindCatchesUpOverASlowLink(t *testing.T) {
	t.Parallel()
	const entries, rate, timeout = 200, 40 << 20, 2 * time.Second
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.TransportTimeout, cfg.LogCacheBytes = timeout, 8<<20 }
	c.startAll(3)
	leader, away := c.leader(), c.followers()[0]
	c.kill(away.cfg.ID)
	value := strings.Repeat("v", 1<<20)
	for i := range entries {
		leader.put(t, "k", fmt.Sprintf("%d%s", i, value))
	}
	before := heap()
	c.tune = func(cfg *Config) {
		l, err := net.Listen("tcp", away.raft)
		must(t, err)
		cfg.TransportTimeout, cfg.LogCacheBytes, cfg.Listener = timeout, 8<<20, &slowListener{l, rate}
	}
	back := c.start(away.cfg.ID)
	began, most, flew := time.Now(), uint64(0), int64(0)
	for want := fmt.Sprintf("%d%s", entries-1, value); back.fsm.get("k") != want; time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("it is at entry %d of %d after %v", back.Status().LastIndex, leader.Status().LastIndex, time.Since(began))
		}
		most = max(most, heap())
		flew = max(flew, leader.Held().Replication)
	}
	if held := leader.Held(); flew == 0 || flew > held.ReplicationLimit+int64(MessagesOnTheirWay*(1<<20+1<<10)) {
		t.Errorf("%d KiB were on their way to it at once, of %d", flew>>10, held.ReplicationLimit>>10)
	}
	eventually(t, "nothing is on its way", func() error {
		if n := leader.Held().Replication; n != 0 {
			return fmt.Errorf("%d bytes are", n)
		}
		return nil
	})
	t.Logf("caught up after %v; heap of all replicas %d MiB before, %d MiB at most", time.Since(began), before>>20, most>>20)
	if most > before+entries<<20 {
		t.Errorf("the heap grew from %d to %d MiB for %d MiB of entries", before>>20, most>>20, entries)
	}
}

// slowListener accepts connections of which each receives so many bytes in a second.
type slowListener struct {
	net.Listener
	rate int
}

// Accept implements net.Listener.
func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &slowConn{c, l.rate}, err
}

type slowConn struct {
	net.Conn
	rate int
}

// Read implements net.Conn.
func (c *slowConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	time.Sleep(time.Duration(n) * time.Second / time.Duration(c.rate))
	return n, err
}
