package apiserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"timonel/pki"
	"timonel/state"
	"timonel/state/storage/storagetest"
)

func TestStrangersShare(t *testing.T) {
	s := newStrangers()
	source := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	fill := func(i int) (n int) {
		for s.enter(source(i)) {
			n++
		}
		return n
	}
	if n := fill(1); n != mostOfSource {
		t.Fatalf("one address has %d places, want %d", n, mostOfSource)
	}
	for i := 2; i <= 8; i++ { // twice as many as there is room for
		fill(i)
	}
	// Whoever has less than the others gets in, and there is a bound even so.
	for i := 9; i < 100; i++ {
		fill(i)
	}
	if !s.enter(source(5000)) {
		t.Fatal("who has nothing yet was refused")
	}
	if s.held > 6*mostStrangers {
		t.Fatalf("%d are served", s.held)
	}
	for source, n := range s.sources {
		for range n {
			s.leave(source)
		}
	}
	if len(s.sources) != 0 || s.held != 0 {
		t.Fatalf("%d and %v are left", s.held, s.sources)
	}
}

// flood begins requests without credentials on connections of HTTP/2 of its own, as fast as it can,
// until ctx ends: with no room for the answers, or taking each back at once.
func flood(ctx context.Context, f *fixture, path string, reset bool) (sent int) {
	var headers bytes.Buffer
	for ctx.Err() == nil {
		raw, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", f.server.Addr().String())
		if err != nil {
			continue
		}
		stop := context.AfterFunc(ctx, func() { raw.Close() })
		conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		fmt.Fprint(conn, http2.ClientPreface)
		fr := http2.NewFramer(conn, conn)
		err = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		go func() { // ends with the connection
			for {
				if _, err := fr.ReadFrame(); err != nil {
					raw.Close()
					return
				}
			}
		}()
		enc := hpack.NewEncoder(&headers)
		for id := uint32(1); err == nil && id < 2000; id += 2 {
			headers.Reset()
			for _, h := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "x"}, {":path", path}} {
				_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
			}
			err = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers.Bytes(), EndStream: true, EndHeaders: true})
			if err == nil && reset {
				err = fr.WriteRSTStream(id, http2.ErrCodeCancel)
			}
			sent++
		}
		if !reset && err == nil { // stays for its answers
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
		raw.Close()
		stop()
	}
	return sent
}

// TestStrangersCannotFill floods a server with requests that nobody authenticated and nobody
// reads the answers of: it serves a bounded number of them, and others go on.
func TestStrangersCannotFill(t *testing.T) {
	f, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, func(*Config) {})
	if err != nil {
		t.Fatal(err)
	}
	defer f.stop()
	honest := f.network(t, "admin", pki.AdminGroup)
	honest.Dial = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext
	c := client(t, honest)
	for _, reset := range []bool{false, true} {
		t.Run(fmt.Sprintf("reset=%v", reset), func(t *testing.T) {
			before := runtime.NumGoroutine()
			ctx, cancel := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			var mu sync.Mutex
			sent := 0
			for range 16 {
				wg.Go(func() {
					n := flood(ctx, f, "/api/v1/namespaces/default/pods", reset)
					mu.Lock()
					sent += n
					mu.Unlock()
				})
			}
			most, places, served := 0, 0, 0
			for until := time.Now().Add(6 * time.Second); time.Now().Before(until); {
				if _, err := c.CoreV1().Namespaces().Get(within(t, 30*time.Second), "default", metav1.GetOptions{}); err != nil {
					t.Fatal(err)
				}
				served++
				held, _ := f.server.Strangers()
				most, places = max(most, runtime.NumGoroutine()-before), max(places, held)
			}
			cancel()
			wg.Wait()
			held, refused := f.server.Strangers()
			t.Logf("%d requests, %d refused, at most %d served; at most %d goroutines more; %d honest reads", sent, refused, places, most, served)
			if refused == 0 {
				t.Fatal("nothing was refused: the flood was none")
			}
			if places > mostOfSource+1 { // the flood's, and a client's before it is known
				t.Fatalf("%d requests of nobody known were served", places)
			}
			eventually(t, time.Minute, func() error {
				if held, _ = f.server.Strangers(); held != 0 {
					return fmt.Errorf("%d places were not given back", held)
				}
				return nil
			})
		})
	}
}

// TestStrangersHeads is about what of a header is read before it is known whose it is.
func TestStrangersHeads(t *testing.T) {
	f := shareServer(t)
	dial := func(t *testing.T, proto string) *tls.Conn {
		t.Helper()
		conn, err := tls.Dial("tcp", f.server.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{proto}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	t.Run("one that does not end", func(t *testing.T) {
		t.Parallel()
		conn := dial(t, "http/1.1")
		fmt.Fprintf(conn, "GET /version HTTP/1.1\r\nHost: x\r\n")
		for i, sent := 0, 0; sent < 900<<10; i++ { // upstream's limit is 1 MiB
			n, err := fmt.Fprintf(conn, "x-%d:\r\n", i)
			if sent += n; err != nil {
				return // the server has gone
			}
		}
		// It waits for the rest no longer, and not for the half minute that a header may take.
		answer := make([]byte, len("HTTP/1.1 400"))
		if _, err := io.ReadFull(conn, answer); err == nil && string(answer) != "HTTP/1.1 400" || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%q, %v", answer, err)
		}
	})
	t.Run("one of little that says much", func(t *testing.T) {
		t.Parallel()
		conn := dial(t, "h2")
		fmt.Fprint(conn, http2.ClientPreface)
		fr := http2.NewFramer(conn, conn)
		fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		if err := fr.WriteSettings(); err != nil {
			t.Fatal(err)
		}
		var block bytes.Buffer
		enc := hpack.NewEncoder(&block)
		for _, h := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "x"}, {":path", "/version"}} {
			_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
		}
		for range 200 {
			_ = enc.WriteField(hpack.HeaderField{Name: "x", Value: string(bytes.Repeat([]byte("y"), 1000))})
		}
		if block.Len() > 4<<10 {
			t.Fatalf("the header takes %d bytes", block.Len())
		}
		if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
		for {
			frame, err := fr.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if h, ok := frame.(*http2.MetaHeadersFrame); ok {
				if status := h.PseudoValue("status"); status != "431" {
					t.Fatalf("the answer is %s", status)
				}
				return
			}
		}
	})
	t.Run("many small ones", func(t *testing.T) {
		t.Parallel()
		conn := dial(t, "http/1.1")
		answers := bufio.NewReader(conn)
		for i := range 100 { // some 100 KiB in all
			fmt.Fprintf(conn, "GET /version HTTP/1.1\r\nHost: x\r\nX-A: %s\r\n\r\n", bytes.Repeat([]byte("y"), 1000))
			resp, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatalf("request %d: %v", i, err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
				t.Fatalf("request %d: %s, %v", i, resp.Status, err)
			}
		}
	})
}
