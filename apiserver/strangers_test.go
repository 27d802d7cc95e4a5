package apiserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
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
