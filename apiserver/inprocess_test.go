package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"k8s.io/apiserver/pkg/authentication/user"
)

type testKey struct{}

// call makes a request to handler in memory.
func call(ctx context.Context, t *testing.T, handler http.HandlerFunc) (*http.Response, error) {
	t.Helper()
	transport := newInProcess()
	transport.open(handler)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://host/path?q=1", strings.NewReader("in"))
	if err != nil {
		t.Fatal(err)
	}
	return transportAs{transport, authenticated(&user.DefaultInfo{Name: "u", Groups: []string{"g"}})}.RoundTrip(request)
}

func TestInProcessTransport(t *testing.T) {
	t.Run("unary", func(t *testing.T) {
		ctx := context.WithValue(t.Context(), testKey{}, "kept")
		response, err := call(ctx, t, func(w http.ResponseWriter, r *http.Request) {
			answer, ok, err := inProcessAuthenticator{}.AuthenticateRequest(r)
			if err != nil || !ok {
				t.Errorf("not authenticated: %v", err)
				return
			}
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("X-Test", "1")
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, answer.User.GetName(), answer.User.GetGroups(), r.Context().Value(testKey{}), string(body), r.RequestURI)
		})
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		const want = "u[g system:authenticated]keptin/path?q=1"
		if err != nil || string(body) != want || response.StatusCode != http.StatusCreated || response.Header.Get("X-Test") != "1" {
			t.Errorf("%d %v %q %v, want %q", response.StatusCode, response.Header, body, err, want)
		}
		if response.ContentLength != int64(len(want)) {
			t.Errorf("content length %d, want %d", response.ContentLength, len(want))
		}
	})
	t.Run("stream", func(t *testing.T) {
		ended := make(chan struct{})
		response, err := call(t.Context(), t, func(w http.ResponseWriter, r *http.Request) {
			defer close(ended)
			fmt.Fprint(w, "first")
			w.(http.Flusher).Flush()
			<-r.Context().Done() // the caller closes the body
		})
		if err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 5)
		if _, err := io.ReadFull(response.Body, buffer); err != nil || string(buffer) != "first" {
			t.Errorf("%q, %v", buffer, err)
		}
		response.Body.Close()
		<-ended
	})
	t.Run("a slow reader holds the writer up", func(t *testing.T) {
		const size = 5 * streamBuffer
		response, err := call(t.Context(), t, func(w http.ResponseWriter, r *http.Request) {
			for range size / 1024 {
				if _, err := w.Write(make([]byte, 1024)); err != nil {
					t.Error(err)
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, response.Body); n != size || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
	t.Run("a reader that left fails the writer", func(t *testing.T) {
		failed := make(chan error)
		response, err := call(t.Context(), t, func(w http.ResponseWriter, r *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 1024)); err != nil {
					failed <- err
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if err := <-failed; err == nil {
			t.Error("no error")
		}
	})
	t.Run("panic", func(t *testing.T) {
		if _, err := call(t.Context(), t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }); err == nil {
			t.Error("no error")
		}
	})
	t.Run("the caller's deadline", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 1)
			defer cancel()
			_, err := call(ctx, t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want the deadline", err)
			}
		})
	})
	t.Run("before the server is open", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		request, _ := http.NewRequestWithContext(ctx, http.MethodGet, "https://host/", nil)
		if _, err := (transportAs{newInProcess(), &user.DefaultInfo{}}).RoundTrip(request); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want Canceled", err)
		}
	})
}
