package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// fakeKubelet answers logs and exec as an agent's kubelet API does.
type fakeKubelet struct {
	t        *testing.T
	listener net.Listener

	breaks chan struct{} // closed when connections break; nil: they do not

	mu     sync.Mutex
	dialed []string
}

// breakingConn breaks with an error, as a tunnel does whose agent is gone.
type breakingConn struct {
	net.Conn
	breaks <-chan struct{}
}

func (c breakingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	select {
	case <-c.breaks:
		return 0, errors.New("the agent is gone")
	default:
		return n, err
	}
}

func newFakeKubelet(t *testing.T) *fakeKubelet {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeKubelet{t: t, listener: listener}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "log of %s/%s tail %s\n", r.PathValue("pod"), r.PathValue("container"), r.URL.Query().Get("tailLines"))
		if r.URL.Query().Get("follow") == "true" {
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	})
	mux.HandleFunc("GET /stats/summary", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "stats") })
	mux.HandleFunc("POST /exec/{namespace}/{pod}/{container}", k.exec)
	server := &http.Server{Handler: mux}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return k
}

// exec copies stdin to stdout.
func (k *fakeKubelet) exec(w http.ResponseWriter, r *http.Request) {
	if _, err := httpstream.Handshake(r, w, []string{"v4.channel.k8s.io"}); err != nil {
		k.t.Error(err)
		return
	}
	const wanted = 3
	streams := make(chan httpstream.Stream, wanted)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(stream httpstream.Stream, replied <-chan struct{}) error {
		streams <- stream
		return nil
	})
	if conn == nil {
		return
	}
	defer conn.Close()
	byType := map[string]httpstream.Stream{}
	for range wanted {
		select {
		case stream := <-streams:
			byType[stream.Headers().Get(corev1.StreamType)] = stream
		case <-conn.CloseChan(): // the client went away
			return
		case <-time.After(10 * time.Second):
			k.t.Error("streams did not come")
			return
		}
	}
	fmt.Fprint(byType["stdout"], "ran "+strings.Join(r.URL.Query()["command"], " ")+": ")
	if k.breaks != nil {
		<-k.breaks // then the connection breaks
		return
	}
	io.Copy(byType["stdout"], byType["stdin"])
	fmt.Fprint(byType["error"], `{"metadata":{},"status":"Success"}`)
}

func (k *fakeKubelet) dial(ctx context.Context, node string) (net.Conn, error) {
	k.mu.Lock()
	k.dialed = append(k.dialed, node)
	k.mu.Unlock()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", k.listener.Addr().String())
	if err == nil && k.breaks != nil {
		conn = breakingConn{conn, k.breaks}
	}
	return conn, err
}

// pod starts a controller with one node, whose kubelet this is, and a pod on it.
func (k *fakeKubelet) pod(t *testing.T) (*fixture, *kubernetes.Clientset, context.Context) {
	t.Helper()
	f, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, func(c *Config) { c.DialKubelet = k.dial })
	if err != nil {
		t.Fatal(err)
	}
	config := f.network(t, "admin", "system:masters")
	c := client(t, config)
	ctx := within(t, 30*time.Second)
	if _, err := c.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a1"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	account(t, c, "default")
	bound := pod("p")
	bound.Spec.NodeName = "a1"
	eventually(t, 5*time.Second, func() error {
		_, err := c.CoreV1().Pods("default").Create(ctx, bound, metav1.CreateOptions{})
		return err
	})
	return f, c, ctx
}

// A command whose node is gone has not succeeded, whatever of its output came.
func TestACommandWhoseConnectionBreaksFails(t *testing.T) {
	kubelet := newFakeKubelet(t)
	kubelet.breaks = make(chan struct{})
	f, c, ctx := kubelet.pod(t)
	defer f.stop()
	url := c.CoreV1().RESTClient().Get().Resource("pods").Namespace("default").Name("p").SubResource("exec").
		Param("container", "c").Param("command", "cat").Param("stdin", "true").Param("stdout", "true").URL()
	run, err := remotecommand.NewWebSocketExecutor(f.network(t, "admin", "system:masters"), http.MethodGet, url.String())
	if err != nil {
		t.Fatal(err)
	}
	in, out := io.Pipe()
	defer in.Close()
	began, far := io.Pipe()
	go func() {
		io.ReadFull(began, make([]byte, len("ran cat: ")))
		close(kubelet.breaks)
		io.Copy(io.Discard, began)
	}()
	defer out.Close()
	err = run.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: far})
	if err == nil || !strings.Contains(err.Error(), "the connection to node a1 broke") {
		t.Errorf("the command ended with %v", err)
	}
}

func TestReachesKubeletsThroughDialKubelet(t *testing.T) {
	kubelet := newFakeKubelet(t)
	f, c, ctx := kubelet.pod(t)
	config := f.network(t, "admin", "system:masters")

	t.Run("logs", func(t *testing.T) {
		lines := int64(7)
		raw, err := c.CoreV1().Pods("default").GetLogs("p", &corev1.PodLogOptions{TailLines: &lines}).DoRaw(ctx)
		if err != nil || string(raw) != "log of p/c tail 7\n" {
			t.Errorf("%q, %v", raw, err)
		}
	})
	// The answer is short, so that its last bytes and its end come at once.
	t.Run("logs by WebSocket", func(t *testing.T) {
		tlsConfig, err := rest.TLSConfigFor(config)
		if err != nil {
			t.Fatal(err)
		}
		url := c.CoreV1().Pods("default").GetLogs("p", &corev1.PodLogOptions{}).URL()
		url.Scheme = "wss"
		ws, err := websocket.NewConfig(url.String(), "http://localhost")
		if err != nil {
			t.Fatal(err)
		}
		ws.TlsConfig, ws.Protocol = tlsConfig, []string{"binary.k8s.io"}
		if config.BearerToken != "" {
			ws.Header.Set("Authorization", "Bearer "+config.BearerToken)
		}
		conn, err := ws.DialContext(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		raw, err := io.ReadAll(conn)
		if err != nil || string(raw) != "log of p/c tail \n" {
			t.Errorf("%q, %v", raw, err)
		}
	})
	t.Run("node proxy", func(t *testing.T) {
		raw, err := c.CoreV1().RESTClient().Get().AbsPath("/api/v1/nodes/a1/proxy/stats/summary").DoRaw(ctx)
		if err != nil || string(raw) != "stats" {
			t.Errorf("%q, %v", raw, err)
		}
	})
	request := func(method string) *rest.Request {
		return c.CoreV1().RESTClient().Verb(method).Resource("pods").Namespace("default").Name("p").SubResource("exec").
			Param("container", "c").Param("command", "cat").Param("stdin", "true").Param("stdout", "true")
	}
	for name, executor := range map[string]func() (remotecommand.Executor, error){
		"exec by SPDY": func() (remotecommand.Executor, error) {
			return remotecommand.NewSPDYExecutor(config, http.MethodPost, request(http.MethodPost).URL())
		},
		"exec by WebSocket": func() (remotecommand.Executor, error) {
			return remotecommand.NewWebSocketExecutor(config, http.MethodGet, request(http.MethodGet).URL().String())
		},
	} {
		t.Run(name, func(t *testing.T) {
			run, err := executor()
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err = run.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: strings.NewReader("hello"), Stdout: &out})
			if err != nil || out.String() != "ran cat: hello" {
				t.Errorf("%q, %v", out.String(), err)
			}
		})
	}
	t.Run("drains with watches open", func(t *testing.T) {
		w, err := c.CoreV1().Pods("default").Watch(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := f.stop(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > DefaultDrainTimeout+2*time.Second {
			t.Errorf("took %s", took)
		}
		for range w.ResultChan() { // ends
		}
	})
	kubelet.mu.Lock()
	defer kubelet.mu.Unlock()
	for _, node := range kubelet.dialed {
		if node != "a1" {
			t.Errorf("dialed %q, want a1", node)
		}
	}
}
