package apiserver

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// oneNode is a getter of any Node.
type oneNode struct{}

func (oneNode) Get(_ context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	return &core.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, nil
}

// A node that is asked to upgrade and answers without end, in its head or behind it, is cut
// off, by whatever way the answer is read.
func TestEndlessAnswersOfNodes(t *testing.T) {
	t.Parallel()
	for name, begin := range map[string]string{
		"a status":                "HTTP/1.1 101 ",
		"a header":                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX: ",
		"an error":                "HTTP/1.1 500 No\r\n\r\n",
		"an error with a header":  "HTTP/1.1 403 No\r\nX: ",
		"what is no upgrade":      "HTTP/1.1 200 OK\r\n\r\n",
		"an error that looks one": "HTTP/1.1 500 101\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var sent atomic.Int64
			k := &kubelets{nodes: oneNode{}, dial: func(context.Context, string) (net.Conn, error) {
				near, far := net.Pipe()
				go func() {
					defer far.Close()
					if _, err := http.ReadRequest(bufio.NewReader(far)); err != nil {
						return
					}
					fmt.Fprint(far, begin)
					for chunk := []byte(strings.Repeat("a", 32<<10)); ; {
						n, err := far.Write(chunk)
						if sent.Add(int64(n)); err != nil || sent.Load() > 64<<20 {
							return
						}
					}
				}()
				return near, nil
			}}
			info, err := k.GetConnectionInfo(t.Context(), "n")
			require.NoError(t, err)
			rt, err := spdy.NewRoundTripperWithConfig(spdy.RoundTripperConfig{UpgradeTransport: info.Transport})
			require.NoError(t, err)
			// A command with many arguments: the header that asks comes late.
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://n/exec/ns/p/c?command="+strings.Repeat("x", 20000), nil)
			require.NoError(t, err)
			resp, err := rt.RoundTrip(r)
			if err == nil {
				_, err = rt.NewConnection(resp)
			}
			require.Error(t, err)
			require.LessOrEqual(t, sent.Load(), int64(2*maxAnswerHead))
		})
	}
}

// What is said after an upgrade is passed on, as long as it is, and so is an answer to who
// wanted none.
func TestAnswersOfNodesThatAreStreams(t *testing.T) {
	t.Parallel()
	const long = 4 << 20
	for name, c := range map[string]struct{ request, head string }{
		"upgraded": {"POST /exec HTTP/1.1\r\nHost: n\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n"},
		"a log":    {"GET /containerLogs HTTP/1.1\r\nHost: n\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"},
	} {
		for _, piece := range []int{1, 7, 1 << 20} {
			near, far := net.Pipe()
			conn := newHeaded(near, "n")
			go func() {
				defer far.Close()
				buf := make([]byte, len(c.request))
				_, _ = io.ReadFull(far, buf)
				for at := 0; at < len(c.head); at += piece {
					_, _ = io.WriteString(far, c.head[at:min(at+piece, len(c.head))])
				}
				_, _ = far.Write(make([]byte, long))
			}()
			for at := 0; at < len(c.request); at += piece {
				_, err := io.WriteString(conn, c.request[at:min(at+piece, len(c.request))])
				require.NoError(t, err)
			}
			n, err := io.Copy(io.Discard, conn)
			require.NoError(t, err, name)
			require.EqualValues(t, long+len(c.head), n)
		}
	}
}

// Streams from nodes have places; who has many leaves some to others, and who has all rights
// needs none.
func TestNodeStreamsHaveABound(t *testing.T) {
	t.Parallel()
	n := newNodeStreams(0)
	n.serializer = legacyscheme.Codecs
	inside := make(chan struct{})
	open := make(chan struct{}, 1000)
	h := n.after(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		open <- struct{}{}
		<-inside
	}))
	ask := func(name, subresource string, groups ...string) <-chan int {
		info := &request.RequestInfo{IsResourceRequest: true, Resource: "pods", Subresource: subresource, APIVersion: "v1"}
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		ctx := request.WithUser(request.WithRequestInfo(r.Context(), info), &user.DefaultInfo{Name: name, Groups: groups})
		code := make(chan int, 1)
		go func() {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r.WithContext(ctx))
			code <- w.Code
		}()
		return code
	}
	const places = leastTunnelBytes / tunnelCost
	var all []<-chan int
	take := func(c <-chan int) {
		t.Helper()
		select {
		case <-open:
			all = append(all, c)
		case code := <-c:
			t.Fatalf("answered with %d", code)
		case <-time.After(20 * time.Second):
			t.Fatal("neither open nor refused")
		}
	}
	for i := range places / 2 {
		take(ask(fmt.Sprintf("system:serviceaccount:greedy:%d", i), tunneled[i%len(tunneled)]))
	}
	require.Equal(t, http.StatusTooManyRequests, <-ask("system:serviceaccount:greedy:x", "exec"))
	take(ask("other", "log"))
	take(ask("system:serviceaccount:greedy:x", "status"))
	for range places/2 - 1 {
		take(ask("other", "exec"))
	}
	require.Equal(t, http.StatusTooManyRequests, <-ask("third", "exec"))
	take(ask("admin", "exec", user.SystemPrivilegedGroup))
	require.EqualValues(t, 2, n.refused.Load())
	close(inside)
	for _, c := range all {
		require.Equal(t, http.StatusOK, <-c)
	}
	require.Zero(t, n.room.Stats().Held)
	take(ask("third", "exec"))
}
