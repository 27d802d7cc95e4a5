package dispatch

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/desired"
	"timonel/agent/stream"
	"timonel/gossip"
	pb "timonel/proto/timonel/v1"
)

// relay passes bytes to a controller until it is cut, and then holds them back
// while all connections stay open, as a network does that lost a machine.
type relay struct {
	net.Listener
	cut chan struct{}
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r := &relay{Listener: listener, cut: make(chan struct{})}
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); listener.Close(); work.Wait() })
	work.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			context.AfterFunc(ctx, func() { near.Close(); far.Close() })
			work.Go(func() { r.pass(ctx, near, far) })
			work.Go(func() { r.pass(ctx, far, near) })
		}
	})
	return r
}

func (r *relay) pass(ctx context.Context, to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		select {
		case <-r.cut:
			<-ctx.Done()
			return
		default:
		}
		if err != nil {
			to.Close()
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			from.Close()
			return
		}
	}
}

// realAgent runs the agents' own end of the stream.
func (c *cluster) realAgent(name string, controllers ...string) (*stream.Client, *desired.Store) {
	c.t.Helper()
	return c.realAgentWith(func(*stream.Config) {}, name, controllers...)
}

func (c *cluster) realAgentWith(prepare func(*stream.Config), name string, controllers ...string) (*stream.Client, *desired.Store) {
	c.t.Helper()
	store, err := desired.Open(c.t.TempDir(), slog.New(slog.DiscardHandler))
	require.NoError(c.t, err)
	config := stream.Config{
		NodeName: name, Version: "test", TLS: c.nodeTLS(name), Controllers: controllers, Desired: store,
		Logger:     slog.New(slog.DiscardHandler),
		Cluster:    func(news *pb.Cluster) { c.tell(name, news.GetControllers()) },
		GossipKeys: func(keys [][]byte) error { return c.keep(name, keys) }, GossipKeyIDs: func() []string { return c.kept(name) },
		Tunnel: func(target string, conn net.Conn) {
			go func() { // as an HTTP server would
				_ = http.Serve(&oneConn{conn: conn}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(w, r.Body)
					_, _ = io.WriteString(w, " by "+name+"'s "+target)
				}))
			}()
		},
	}
	prepare(&config)
	client := stream.New(config)
	client.SetNode(nodeObject(name))
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = client.Run(ctx) })
	c.t.Cleanup(func() { cancel(); done.Wait(); _ = store.Close() })
	return client, store
}

// oneConn is a listener with one connection.
type oneConn struct {
	mu   sync.Mutex
	conn net.Conn
}

func (o *oneConn) Accept() (net.Conn, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.conn == nil {
		return nil, net.ErrClosed
	}
	conn := o.conn
	o.conn = nil
	return conn, nil
}
func (o *oneConn) Close() error   { return nil }
func (o *oneConn) Addr() net.Addr { return streamAddr("test") }

// TestBothEnds runs the agents' own code against ours.
func TestBothEnds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	c.put(configMap("env", "1"))
	c.put(secret("key", "1"))
	c.put(podOn("a1", "web", "u1", withRefs))
	client, store := c.realAgent("a1", c.addr("c1"))
	eventually(t, "the pod is desired", func() bool { _, ok := store.Pod("u1"); return ok })
	cm, ok := store.ConfigMap("default", "env")
	require.True(t, ok)
	require.Equal(t, "1", cm.Data["k"])
	eventually(t, "the node is registered", func() bool { return ready(c.node("a1")) == corev1.ConditionTrue })

	pod, _ := store.Pod("u1")
	client.SetPodStatus(pod, &corev1.PodStatus{Phase: corev1.PodRunning})
	eventually(t, "its status is written", func() bool { return c.pod("web").Status.Phase == corev1.PodRunning })

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	token, err := client.Token(ctx, "default", "sa", &authenticationv1.TokenRequest{})
	require.NoError(t, err)
	require.Equal(t, "token of default/sa", token.Status.Token)

	for _, from := range []string{"c1", "c2"} {
		web := http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return c.controllers[from].DialKubelet(ctx, "a1")
			},
		}}
		long := strings.Repeat("x", 1<<20)
		answer, err := web.Post("http://a1/", "text/plain", strings.NewReader(long))
		require.NoError(t, err)
		body, err := io.ReadAll(answer.Body)
		require.NoError(t, err)
		require.Equal(t, long+" by a1's kubelet", string(body))
		answer.Body.Close()
	}

	// c1 dies; what happens meanwhile is not missed.
	eventually(t, "the agent knows c2", func() bool { return len(c.knownTo("a1")) == 2 })
	c.controllers["c1"].stop()
	c.put(configMap("env", "2"))
	c.put(podOn("a1", "second", "u2"))
	eventually(t, "it moved to c2", func() bool { name, _, ok := client.Connected(); return ok && name == "c2" })
	eventually(t, "it has what changed", func() bool {
		cm, _ := store.ConfigMap("default", "env")
		_, ok := store.Pod("u2")
		return ok && cm.Data["k"] == "2"
	})

	client.PodTerminated(&corev1.Pod{ObjectMeta: podOn("a1", "second", "u2").ObjectMeta})
	eventually(t, "the terminated pod is gone at both ends", func() bool {
		_, ok := store.Pod(types.UID("u2"))
		_, stored := c.store.View().Get("/registry/pods/default/second")
		return !ok && !stored
	})
}

// A machine that is cut off is missed in about two seconds, and the agent notices
// it too and goes elsewhere.
func TestCutOff(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.gossip.set(gossip.Member{Name: "a1", Role: gossip.RoleAgent, State: gossip.Alive})
	r := newRelay(t, c.addr("c1"))
	client, _ := c.realAgent("a1", r.Addr().String())
	tracker := c.track("c1")
	tracker.await(t, "a1", func(n NodeHealth) bool { return n.Stream })
	eventually(t, "the agent knows that it is connected", func() bool { _, _, ok := client.Connected(); return ok })
	c.gossip.setSilent("a1", true)
	close(r.cut)
	start := time.Now()
	tracker.await(t, "a1", func(n NodeHealth) bool { return !n.Stream && n.ProbesFailed == 1 })
	require.Less(t, time.Since(start), pb.PingInterval+pb.PingTimeout+2500*time.Millisecond)
	t.Logf("missed after %s", time.Since(start).Round(time.Millisecond))
}

// What goes on through a connection to a node goes on when the agent leaves the controller
// that has it, which is out of touch with the others and still there.
func TestTunnelsOutliveTheirSession(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	client, _ := c.realAgent("a1", c.addr("c1"))
	eventually(t, "the agent is on c1 and knows c2", func() bool {
		name, _, ok := client.Connected()
		return ok && name == "c1" && len(c.knownTo("a1")) == 2
	})
	type reply struct {
		text string
		err  error
	}
	var asked []*io.PipeWriter
	replies := make(chan reply, 2)
	for _, from := range []string{"c1", "c2"} {
		conn, err := c.controllers[from].DialKubelet(t.Context(), "a1")
		require.NoError(t, err)
		body, ask := io.Pipe()
		asked = append(asked, ask)
		web := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}}
		go func() {
			answer, err := web.Post("http://a1/", "text/plain", body)
			if err != nil {
				replies <- reply{"", err}
				return
			}
			defer answer.Body.Close()
			text, err := io.ReadAll(answer.Body)
			replies <- reply{string(text), err}
		}()
		_, err = io.WriteString(ask, "before ")
		require.NoError(t, err)
	}
	c.controllers["c1"].cutOff()
	eventually(t, "it moved to c2", func() bool { name, _, ok := client.Connected(); return ok && name == "c2" })
	for _, ask := range asked {
		_, err := io.WriteString(ask, "after")
		require.NoError(t, err)
		require.NoError(t, ask.Close())
	}
	for range asked {
		require.Equal(t, reply{"before after by a1's kubelet", nil}, <-replies)
	}
}
