package dispatch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	pb "timonel/proto/timonel/v1"
)

// stranger is the TLS of a caller without a certificate.
func stranger() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
}

func TestStrangersMaySayLittle(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	agents := pb.NewAgentsClient(c.dial("c1", stranger()))

	_, err := agents.Join(t.Context(), &pb.JoinRequest{Token: strings.Repeat("x", strangerMessage)})
	require.Equal(t, codes.ResourceExhausted, status.Code(err), err)
	_, err = agents.Join(t.Context(), &pb.JoinRequest{Token: "wrong", NodeName: "a1", Csr: newCSR(t, "a1").CSR})
	require.Equal(t, codes.PermissionDenied, status.Code(err), err)

	// What is not theirs to call is refused before it has a message.
	stream, err := agents.Connect(t.Context())
	require.NoError(t, err)
	_, err = stream.Recv()
	require.Equal(t, codes.PermissionDenied, status.Code(err), err)
	_, err = pb.NewMembershipClient(c.dial("c1", stranger())).Hello(t.Context(), &pb.HelloRequest{ClusterId: strings.Repeat("x", 1<<20)})
	require.Equal(t, codes.PermissionDenied, status.Code(err), err)
}

// TestStrangersTakeLittleMemory floods the port with large messages from many
// connections, as those did who took 560 MB by three of them.
func TestStrangersTakeLittleMemory(t *testing.T) {
	c := newCluster(t, "c1")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	// A frame of 16 MiB of a message of 16 MiB, of which the port lets a window in.
	request := append(h2Preface(), h2Headers(pb.Agents_Join_FullMethodName)...)
	var conns []net.Conn
	for range 2 * strangerConns {
		conn, err := tls.Dial("tcp", c.addr("c1"), stranger())
		if err != nil {
			continue // one that came later had its place
		}
		conns = append(conns, conn)
		require.NoError(t, conn.SetWriteDeadline(time.Now().Add(200*time.Millisecond)))
		_, _ = conn.Write(request)
		_, _ = conn.Write(h2Data(1, strangerWindow-1024))
	}
	require.GreaterOrEqual(t, len(conns), strangerPerHost)
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapInuse) - int64(before.HeapInuse)
	t.Logf("%d connections of strangers: heap +%d KiB", len(conns), grown>>10)
	require.Less(t, grown, int64(64<<20))
	eventually(t, "no more of them than one address may have", func() bool {
		ofStrangers, _ := c.controllers["c1"].server.Connections()
		return ofStrangers <= strangerPerHost
	})
	for _, conn := range conns {
		conn.Close()
	}
}

// TestANodeHasFewCalls begins calls and says nothing in them: each could hold a message of
// 8 MiB that is nearly whole, 4,096 of them on a node's connections.
func TestANodeHasFewCalls(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	one, other := c.dial("c1", c.nodeTLS("a1")), c.dial("c1", c.nodeTLS("a1"))
	for _, method := range []string{pb.Agents_Join_FullMethodName, healthv1.Health_Check_FullMethodName} {
		begin := func(ctx context.Context, conn *grpc.ClientConn) grpc.ClientStream {
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, method)
			require.NoError(t, err)
			return stream
		}
		open, end := context.WithCancel(t.Context())
		for range nodeConnects {
			begin(open, one)
		}
		server := c.controllers["c1"].server
		counted := func() int {
			server.mu.Lock()
			defer server.mu.Unlock()
			return server.streams[nodeCall{"a1", method}]
		}
		require.Eventually(t, func() bool { return counted() == nodeConnects }, patience, time.Millisecond, method)
		err := begin(open, other).RecvMsg(&pb.JoinResponse{})
		require.Equal(t, codes.ResourceExhausted, status.Code(err), "%s: %v", method, err)
		end()
		require.Eventually(t, func() bool { return counted() == 0 }, patience, time.Millisecond, method)
	}
}

func TestSilentHandshake(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	conn, err := net.Dial("tcp", c.addr("c1"))
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	_, err = conn.Read(make([]byte, 1))
	var timeout net.Error
	require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "a caller that says nothing keeps its connection")
}

func TestANodeHasFewConnections(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	config := c.nodeTLS("a1")
	config.NextProtos = []string{"h2"}
	var conns []*tls.Conn
	server := c.controllers["c1"].server
	for i := range nodeConns + 3 {
		conn, err := tls.Dial("tcp", c.addr("c1"), config)
		require.NoError(t, err)
		defer conn.Close()
		conns = append(conns, conn)
		// A client's handshake ends first: the server takes them in this order only so.
		require.Eventually(t, func() bool { _, n := server.Connections(); return n >= min(i+1, nodeConns) }, patience, time.Millisecond)
	}
	for i, conn := range conns[:3] {
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
		_, err := io.Copy(io.Discard, conn)
		var timeout net.Error
		require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "connection %d is open still", i)
	}
	_, ofNodes := server.Connections()
	require.Equal(t, nodeConns, ofNodes)
}

// TestReportsOfOthersPods: what a node says of pods that are not its own is not kept.
func TestReportsOfOthersPods(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	other := &corev1.Pod{}
	other.Name, other.Namespace, other.UID, other.Spec.NodeName = "other", "default", "u-other", "a2"
	c.put(other)
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	c.settle(a)
	body, err := (&corev1.PodStatus{Message: strings.Repeat("m", 100<<10)}).Marshal()
	require.NoError(t, err)
	for i := range 300 {
		uid := fmt.Sprintf("u-%d", i)
		name := fmt.Sprintf("p%d", i)
		if i%3 == 0 {
			uid, name = "u-other", "other"
		}
		a.say(&pb.AgentMessage{Message: &pb.AgentMessage_PodStatus{PodStatus: &pb.PodStatus{Namespace: "default", Name: name, Uid: uid, Status: body}}})
		a.say(&pb.AgentMessage{Message: &pb.AgentMessage_PodTerminated{PodTerminated: &pb.PodTerminated{Namespace: "default", Name: name, Uid: uid}}})
	}
	c.settle(a)
	session := c.controllers["c1"].hub.session("a1")
	require.NotNil(t, session)
	session.reports.mu.Lock()
	kept := len(session.reports.pods)
	session.reports.mu.Unlock()
	require.Zero(t, kept, "statuses of pods that are not its own are kept")
	require.Zero(t, c.controllers["c1"].ReportBytes())
	require.Zero(t, c.api.calls("pods/other"))
}

// h2Preface begins an HTTP/2 connection with empty settings.
func h2Preface() []byte {
	return append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0, 0, 0, 4, 0, 0, 0, 0, 0)
}

// h2Headers begins a gRPC call on stream 1: literal headers without indexing.
func h2Headers(method string) []byte {
	var block []byte
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", method}, {":authority", "c1"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		block = append(block, 0, byte(len(h[0])))
		block = append(block, h[0]...)
		block = append(block, byte(len(h[1])))
		block = append(block, h[1]...)
	}
	return append([]byte{0, 0, byte(len(block)), 1, 4, 0, 0, 0, 1}, block...)
}

// h2Data is the beginning of one gRPC message, in frames of 16 KiB.
func h2Data(stream byte, size int) (out []byte) {
	body := append([]byte{0, 0, 0xff, 0xff, 0xff}, make([]byte, size)...)
	for len(body) > 0 {
		n := min(len(body), 16<<10)
		out = append(out, byte(n>>16), byte(n>>8), byte(n), 0, 0, 0, 0, 0, stream)
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}
