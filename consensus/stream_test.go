package consensus

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// logBuffer collects a log for looking into it while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func testStream(t *testing.T, cfg Config) *stream {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := newStream(cfg.withDefaults(), ln, ln.Addr().String())
	s.start()
	t.Cleanup(func() { s.Close() })
	return s
}

func TestOnlyControllersOfThisClusterGetIn(t *testing.T) {
	t.Parallel()
	ours, theirs := newTestCA(t), newTestCA(t)
	controller := func(ca *testCA, id string) *tls.Config {
		return ca.config(t, "timonel:controller:"+id, "timonel:controllers")
	}
	tests := []struct {
		name   string
		peer   Config
		dial   string // id to look for at c1's address
		dialer string // expected in the dialler's error; empty: it gets in
		log    string // expected in c1's log
	}{
		{name: "a replica of the cluster", peer: Config{ID: "c2", ClusterID: "one", TLS: controller(ours, "c2")}, dial: "c1"},
		{name: "another CA", peer: Config{ID: "c2", ClusterID: "one", TLS: controller(theirs, "c2")}, dial: "c1",
			dialer: "another cluster's CA", log: "another cluster's CA"},
		{name: "another cluster of the same CA", peer: Config{ID: "c2", ClusterID: "two", TLS: controller(ours, "c2")}, dial: "c1",
			dialer: `is of cluster "two"`, log: `is of cluster \"two\"`},
		{name: "an agent's certificate", peer: Config{ID: "c2", ClusterID: "one", TLS: ours.config(t, "system:node:a1", "system:nodes")}, dial: "c1",
			dialer: "not a controller's", log: "not a controller's"},
		{name: "a name that is not the certificate's", peer: Config{ID: "c3", ClusterID: "one", TLS: controller(ours, "c2")}, dial: "c1",
			dialer: "calls itself", log: "calls itself"},
		{name: "a second replica of the same name", peer: Config{ID: "c1", ClusterID: "one", TLS: controller(ours, "c1")}, dial: "",
			dialer: "also calls itself", log: "also calls itself"},
		{name: "an address that another replica has now", peer: Config{ID: "c2", ClusterID: "one", TLS: controller(ours, "c2")}, dial: "c3",
			dialer: `looks for "c3" here, this is "c1"`, log: "looks for"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out logBuffer
			server := testStream(t, Config{ID: "c1", ClusterID: "one", TLS: controller(ours, "c1"), Logger: slog.New(slog.NewTextHandler(&out, nil))})
			tt.peer.Logger = slog.New(slog.DiscardHandler)
			client := testStream(t, tt.peer)
			addr := server.advertise
			if tt.dial != "" {
				addr = encodeAddr(raft.ServerID(tt.dial), addr)
			}
			conn, err := client.Dial(addr, 5*time.Second)
			if tt.dialer == "" {
				must(t, err)
				defer conn.Close()
				in, err := server.Accept()
				must(t, err)
				in.Close()
				return
			}
			if err == nil {
				conn.Close()
				t.Fatal("it got in")
			}
			if !strings.Contains(err.Error(), tt.dialer) {
				t.Errorf("dialler's error %q lacks %q", err, tt.dialer)
			}
			eventually(t, "a line in the log", func() error {
				if !strings.Contains(out.String(), tt.log) {
					return errLog(out.String())
				}
				return nil
			})
		})
	}
}

type errLog string

func (e errLog) Error() string { return "log: " + string(e) }

func TestStrangersDoNotDisturb(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1).startAll(1)
	leader := c.leader()
	eventually(t, "the replica to be in touch", func() error { // a leader of a moment ago has yet to prove it
		_, err := leader.InTouch()
		return err
	})
	before := leader.Status()
	for _, first := range []string{"", "GET / HTTP/1.0\r\n\r\n", strings.Repeat("\x00", 4096)} {
		conn, err := net.Dial("tcp", c.leader().raft)
		must(t, err)
		_, err = conn.Write([]byte(first))
		must(t, err)
		if first == "" {
			must(t, conn.(*net.TCPConn).CloseWrite())
		}
		// It is hung up on, soon, and told nothing but that its TLS is none.
		must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
		answer, err := io.ReadAll(conn)
		if errors.Is(err, os.ErrDeadlineExceeded) || len(answer) > 64 || bytes.Contains(answer, []byte("c1")) {
			t.Errorf("to %.10q it answers %q, %v", first, answer, err)
		}
		conn.Close()
	}
	must(t, leader.ReadBarrier(context.Background()))
	if now := leader.Status(); now.Role != "leader" || now.Term != before.Term || len(now.Problems) != len(before.Problems) {
		t.Errorf("before it was in term %d with problems %q; after it is %s in term %d with %q", before.Term, before.Problems, now.Role, now.Term, now.Problems)
	}
	leader.stream.mu.Lock()
	defer leader.stream.mu.Unlock()
	if n := len(leader.stream.in); n != 0 {
		t.Errorf("%d connections of strangers are taken for peers'", n)
	}
}
