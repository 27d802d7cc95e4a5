package proxy

import (
	"context"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// controller is a backend that says its name and may be made not ready.
type controller struct {
	*httptest.Server
	notReady atomic.Bool
}

func newController(t *testing.T, name string) *controller {
	t.Helper()
	c := &controller{}
	c.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/readyz" && c.notReady.Load() {
			http.Error(w, "no leader", http.StatusInternalServerError)
			return
		}
		io.WriteString(w, name)
		if r.URL.Path == "/watch" {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))
	t.Cleanup(c.Close)
	return c
}

// start runs a proxy in front of the controllers and returns its address.
func start(t *testing.T, controllers ...*controller) string {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := free.Addr().String()
	require.NoError(t, free.Close())
	ca := filepath.Join(t.TempDir(), "ca.crt")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: controllers[0].Certificate().Raw}
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(block), 0o600))
	c := Config{Listen: address, CAFile: ca, ServerName: "example.com", Interval: 10 * time.Millisecond, Timeout: 300 * time.Millisecond}
	for _, backend := range controllers {
		c.Backends = append(c.Backends, backend.Listener.Addr().String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, c) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
	return address
}

// ask returns which controller answers a new connection.
func ask(client *http.Client, address string) string {
	response, err := client.Get("https://" + address + "/")
	if err != nil {
		return err.Error()
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	return string(body)
}

func newClient(c *controller) *http.Client {
	transport := c.Client().Transport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	return &http.Client{Transport: transport, Timeout: 5 * time.Second}
}

func TestConnectionsGoToReadyControllers(t *testing.T) {
	t.Parallel()
	c1, c2 := newController(t, "c1"), newController(t, "c2")
	address := start(t, c1, c2)
	client := newClient(c1)

	seen := map[string]bool{}
	require.Eventually(t, func() bool {
		seen[ask(client, address)] = true
		return seen["c1"] && seen["c2"]
	}, 10*time.Second, time.Millisecond, "both take turns")

	c1.notReady.Store(true)
	require.Eventually(t, func() bool {
		for range 10 {
			if ask(client, address) != "c2" {
				return false
			}
		}
		return true
	}, 10*time.Second, time.Millisecond, "only the ready one is asked")

	c2.Close()
	require.Eventually(t, func() bool { return ask(client, address) == "c1" }, 10*time.Second, time.Millisecond,
		"better one that is not ready than none")
}

// A controller that is cut off from the others answers, and a watch on it hears
// nothing. One that nobody can take the place of keeps its connections.
func TestConnectionsLeaveAControllerThatIsNotReady(t *testing.T) {
	t.Parallel()
	c1, c2 := newController(t, "c1"), newController(t, "c2")
	address := start(t, c1, c2)
	transport := c1.Client().Transport.(*http.Transport).Clone()
	ends := map[string]chan error{}
	for i := 0; len(ends) < 2; i++ {
		require.Less(t, i, 1000)
		response, err := (&http.Client{Transport: transport.Clone()}).Get("https://" + address + "/watch")
		if err != nil {
			continue // before the first look
		}
		name := make([]byte, 2)
		_, err = io.ReadFull(response.Body, name)
		require.NoError(t, err)
		if ends[string(name)] != nil {
			response.Body.Close()
			continue
		}
		ended := make(chan error, 1)
		ends[string(name)] = ended
		go func() {
			_, err := io.Copy(io.Discard, response.Body)
			ended <- err
		}()
	}
	require.Eventually(t, func() bool { return ask(newClient(c1), address) != "" }, 10*time.Second, time.Millisecond)
	c1.notReady.Store(true)
	select {
	case err := <-ends["c1"]:
		require.Error(t, err)
	case <-time.After(10 * time.Second):
		t.Fatal("the watch stays")
	}
	select {
	case err := <-ends["c2"]:
		t.Fatalf("the other's ended: %v", err)
	default:
	}
	c2.notReady.Store(true)
	select {
	case err := <-ends["c2"]:
		t.Fatalf("ended, with none to go to: %v", err)
	case <-time.After(300 * time.Millisecond): // 30 looks
	}
	c1.notReady.Store(false)
	require.Error(t, <-ends["c2"])
}

// A controller whose machine lost power answers nothing and resets nothing;
// its clients' connections must not hang until they time out by themselves.
func TestConnectionsToASilentControllerEnd(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, says nothing
	require.NoError(t, err)
	t.Cleanup(func() { silent.Close() })
	c := Config{Listen: "unused", Backends: []string{silent.Addr().String()}, Interval: 10 * time.Millisecond, Timeout: 100 * time.Millisecond}
	require.NoError(t, c.complete())
	b := newBackend(c.Backends[0], c, nil)

	front, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { front.Close() })
	client, err := net.Dial("tcp", front.Addr().String())
	require.NoError(t, err)
	defer client.Close()
	accepted, err := front.Accept()
	require.NoError(t, err)
	server, err := b.dial(t.Context())
	require.NoError(t, err)
	joined := make(chan struct{})
	go func() {
		defer close(joined)
		b.join(t.Context(), accepted.(*net.TCPConn), server)
	}()

	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan error, 1)
	go func() { watched <- b.watch(ctx, func(*backend) bool { return false }) }()
	require.NoError(t, client.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err = client.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "the proxy ends the connection")
	client.Close()
	<-joined
	cancel()
	require.ErrorIs(t, <-watched, context.Canceled)
}

func TestConfigErrorsNameTheFlag(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		config Config
		want   string
	}{
		"no address":  {Config{}, "--listen"},
		"no backends": {Config{Listen: "127.0.0.1:0"}, "--backend"},
		"no CA":       {Config{Listen: "127.0.0.1:0", Backends: []string{"127.0.0.1:1"}, CAFile: "/nowhere"}, "--ca"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.ErrorContains(t, Run(t.Context(), tc.config), tc.want)
		})
	}
}
