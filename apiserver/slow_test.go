package apiserver

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// slowClient watches and reads only when it is told to.
type slowClient struct {
	name string
	read func() (n int64, err error) // all that there is to read, to the end
}

// smallBuffers dials with little room in the kernel for what is not read.
func smallBuffers(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err == nil {
		err = conn.(*net.TCPConn).SetReadBuffer(32 << 10)
	}
	return conn, err
}

// watchSlowly opens a watch of a ConfigMap from a revision and reads nothing of it.
func watchSlowly(t *testing.T, config *rest.Config, kind, name, after string) slowClient {
	t.Helper()
	path := "/api/v1/namespaces/default/configmaps?watch=true&fieldSelector=metadata.name%3D" + name + "&resourceVersion=" + after
	if kind == "websocket" {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(config.CAData)
		pair, err := tls.X509KeyPair(config.CertData, config.KeyData)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := smallBuffers(within(t, time.Minute), "tcp", config.Host[len("https://"):])
		if err != nil {
			t.Fatal(err)
		}
		conn := tls.Client(raw, &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: "127.0.0.1", NextProtos: []string{"http/1.1"}})
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: %s\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", path, config.Host[len("https://"):], config.Host)
		status := make([]byte, len("HTTP/1.1 101"))
		if _, err := io.ReadFull(conn, status); err != nil || string(status) != "HTTP/1.1 101" {
			t.Fatalf("%s: %q, %v", kind, status, err)
		}
		return slowClient{kind, func() (int64, error) { return io.Copy(io.Discard, conn) }}
	}
	config = rest.CopyConfig(config)
	config.Dial = smallBuffers // a connection of its own
	if kind == "HTTP/1" {
		config.NextProtos = []string{"http/1.1"}
	}
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.Get(config.Host + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close(); transport.CloseIdleConnections() })
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", kind, resp.Status)
	}
	return slowClient{kind, func() (int64, error) { return io.Copy(io.Discard, resp.Body) }}
}

// TestClientsThatDoNotReadAreCutOff has clients of all kinds watch a large object that is
// written all the time, and read nothing: what waits for them has a bound, who reads is
// left alone however slowly it does, and who was cut off goes on after its last event.
func TestClientsThatDoNotReadAreCutOff(t *testing.T) {
	f, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, func(c *Config) { c.WatchBytes = leastWatchBytes })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	admin := client(t, f.admin()).CoreV1().ConfigMaps("default")
	o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "large"}, Data: map[string]string{"n": "0"}}
	if o, err = admin.Create(within(t, time.Minute), o, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	config := f.network(t, "watcher", "system:masters")
	after := o.ResourceVersion
	reader, ended := slowReader(t, config, after)
	var slow []slowClient
	random := rand.New(rand.NewPCG(1, 2))
	blob := make([]byte, 900<<10)
	written := 0
	write := func() {
		for i := range blob {
			blob[i] = byte(random.Uint32())
		}
		written++
		o.Data["n"], o.BinaryData = strconv.Itoa(written), map[string][]byte{"blob": blob}
		if o, err = admin.Update(within(t, time.Minute), o, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for range 8 { // at different places each
		for _, kind := range []string{"HTTP/1", "HTTP/2", "websocket"} {
			slow = append(slow, watchSlowly(t, config, kind, "large", o.ResourceVersion))
		}
		write()
		write()
	}
	for range 20 {
		write()
	}
	_, bytes := f.server.life.slow.stalled(time.Now().Add(slowAfter))
	t.Logf("%d MiB wait for %d clients", bytes>>20, len(slow))
	if bytes < 2*leastWatchBytes {
		t.Fatalf("only %d bytes wait", bytes)
	}
	eventually(t, time.Minute, func() error {
		if _, cut := f.server.SlowWatches(); cut < uint64(len(slow))/2 {
			return fmt.Errorf("%d clients were cut off", cut)
		}
		if bytes, _ := f.server.SlowWatches(); bytes > leastWatchBytes {
			return fmt.Errorf("%d bytes wait for clients that do not read", bytes)
		}
		return nil
	})
	bytes, cut := f.server.SlowWatches()
	t.Logf("%d of %d clients were cut off, %d KiB wait", cut, len(slow), bytes>>10)
	// Who was cut off comes to an end when it reads at last.
	ends := make(chan string, len(slow))
	for _, s := range slow {
		go func() {
			s.read()
			ends <- s.name
		}()
	}
	for range cut {
		select {
		case <-ends:
		case <-time.After(time.Minute):
			t.Fatal("one that was cut off does not come to an end")
		}
	}
	for n := 1; n <= written; n++ {
		select {
		case got := <-reader:
			if got != strconv.Itoa(n) {
				t.Fatalf("who reads saw %s, want %d", got, n)
			}
		case err := <-ended:
			t.Fatalf("the watch of one who reads ended: %v", err)
		case <-time.After(time.Minute):
			t.Fatalf("who reads did not see %d", n)
		}
	}
}

// slowReader watches from a revision, and takes each event slowly. It tells of each.
func slowReader(t *testing.T, config *rest.Config, after string) (saw <-chan string, ended <-chan error) {
	t.Helper()
	config = rest.CopyConfig(config)
	config.Dial = smallBuffers
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	body, err := c.CoreV1().RESTClient().Get().AbsPath("/api/v1/namespaces/default/configmaps").Param("watch", "true").
		Param("resourceVersion", after).Param("fieldSelector", "metadata.name=large").SetHeader("Accept", "application/json").Stream(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { body.Close() })
	events, end := make(chan string, 1000), make(chan error, 1)
	go func() {
		lines := bufio.NewReaderSize(slowly{body}, 64<<10)
		for {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				end <- err
				return
			}
			var e struct {
				Type   string
				Object corev1.ConfigMap
			}
			if err := json.Unmarshal(line, &e); err != nil || e.Type == "ERROR" {
				end <- errors.Join(err, fmt.Errorf("%.200s", line))
				return
			}
			events <- e.Object.Data["n"]
		}
	}()
	return events, end
}

// slowly reads some MiB a second.
type slowly struct{ io.Reader }

func (r slowly) Read(b []byte) (int, error) {
	time.Sleep(2 * time.Millisecond)
	return r.Reader.Read(b[:min(len(b), 16<<10)])
}
