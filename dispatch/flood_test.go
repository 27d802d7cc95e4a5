package dispatch

import (
	"context"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/agent/stream"
	pb "timonel/proto/timonel/v1"
)

// heap is how many bytes live.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Clients that read nothing, of containers that write and read nothing, keep a part of a MiB
// each at every place on the way, and are in nobody else's way.
func TestStalledTunnels(t *testing.T) {
	const n = 100
	c := newCluster(t, "c1", "c2")
	var written atomic.Int64
	client, _ := c.realAgentWith(func(config *stream.Config) {
		config.Tunnel = func(_ string, conn net.Conn) {
			go func() {
				defer conn.Close()
				var first [1]byte
				if _, err := io.ReadFull(conn, first[:]); err != nil {
					return
				}
				if first[0] == 'e' {
					_, _ = io.Copy(conn, conn)
					return
				}
				for chunk := make([]byte, 64<<10); ; {
					k, err := conn.Write(chunk)
					if written.Add(int64(k)); err != nil {
						return
					}
				}
			}()
		}
	}, "a1", c.addr("c1"))
	eventually(t, "the agent is on c1", func() bool { name, _, ok := client.Connected(); return ok && name == "c1" })
	before := heap()
	var conns []net.Conn
	for range n {
		conn, err := c.controllers["c1"].DialKubelet(t.Context(), "a1")
		require.NoError(t, err)
		defer conn.Close()
		conns = append(conns, conn)
		go func() {
			for chunk := make([]byte, 64<<10); ; {
				k, err := conn.Write(chunk)
				if written.Add(int64(k)); err != nil {
					return
				}
			}
		}()
	}
	last := int64(-1)
	eventually(t, "all stand still", func() bool {
		time.Sleep(300 * time.Millisecond)
		was := last
		last = written.Load()
		return last == was && last > n*64<<10
	})
	grown := heap() - before
	t.Logf("%d stalled tunnels hold %d MiB", n, grown>>20)
	// A window at the agent and one here, in buffers that may be half full, and what is on
	// its way between.
	require.Less(t, grown, int64(n)*6*pb.TunnelWindow)

	conn, err := c.controllers["c2"].DialKubelet(t.Context(), "a1")
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, "echo")
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	got := make([]byte, 3)
	_, err = io.ReadFull(conn, got)
	require.NoError(t, err)
	require.Equal(t, "cho", string(got))
	for _, conn := range conns {
		conn.Close()
	}
}

// As many tunnels as a node may have leave its other calls their room.
func TestAllTunnelsOfANode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	client, _ := c.realAgentWith(func(config *stream.Config) {
		config.Tunnel = func(_ string, conn net.Conn) { go func() { _, _ = io.Copy(conn, conn) }() }
	}, "a1", c.addr("c1"))
	eventually(t, "the agent is connected", func() bool { _, _, ok := client.Connected(); return ok })
	for range nodeStreams {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		conn, err := c.controllers["c1"].DialKubelet(ctx, "a1")
		cancel()
		if err != nil {
			break // one for each of the agent's own streams, when they share a connection
		}
		defer conn.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := client.Certify(ctx, &pb.JoinRequest{})
	require.Error(t, err, "there is nothing to certify")
	require.NotEqual(t, codes.DeadlineExceeded, status.Code(err), "its turn comes")
}
